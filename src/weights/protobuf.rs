//! Writing protocol buffers: as much of the encoding as ONNX and TensorBoard need.
//!
//! A dozen message types with a handful of fields each do not pay for a generated crate and a
//! compiler of schemas in the build.

use std::io::{self, Write};

/// A message, whose large parts (`T`) are only produced while it is written.
pub struct Message<T> {
    pieces: Vec<Piece<T>>,
    length: u64,
}

enum Piece<T> {
    Bytes(Vec<u8>),
    Later(T),
}

impl<T> Default for Message<T> {
    fn default() -> Self {
        Self {
            pieces: Vec::new(),
            length: 0,
        }
    }
}

impl<T> Message<T> {
    pub fn int(self, field: u32, value: i64) -> Self {
        let mut bytes = key(field, 0);
        varint(value as u64, &mut bytes);
        self.raw(bytes)
    }

    pub fn ints(self, field: u32, values: &[i64]) -> Self {
        values.iter().fold(self, |m, &value| m.int(field, value))
    }

    pub fn float(self, field: u32, value: f32) -> Self {
        let mut bytes = key(field, 5);
        bytes.extend(value.to_le_bytes());
        self.raw(bytes)
    }

    pub fn double(self, field: u32, value: f64) -> Self {
        let mut bytes = key(field, 1);
        bytes.extend(value.to_le_bytes());
        self.raw(bytes)
    }

    /// A packed list.
    pub fn doubles(self, field: u32, values: &[f64]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes(field, &bytes)
    }

    pub fn text(self, field: u32, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    pub fn bytes(self, field: u32, content: &[u8]) -> Self {
        let mut bytes = key(field, 2);
        varint(content.len() as u64, &mut bytes);
        bytes.extend(content);
        self.raw(bytes)
    }

    /// Bytes of that length, produced when the message is written.
    pub fn later(self, field: u32, length: u64, content: T) -> Self {
        let mut bytes = key(field, 2);
        varint(length, &mut bytes);
        let mut message = self.raw(bytes);
        message.pieces.push(Piece::Later(content));
        message.length += length;
        message
    }

    pub fn message(self, field: u32, inner: Self) -> Self {
        let mut bytes = key(field, 2);
        varint(inner.length, &mut bytes);
        let mut message = self.raw(bytes);
        for piece in inner.pieces {
            match (piece, message.pieces.last_mut()) {
                (Piece::Bytes(bytes), Some(Piece::Bytes(before))) => before.extend(bytes),
                (piece, _) => message.pieces.push(piece),
            }
        }
        message.length += inner.length;
        message
    }

    /// How many bytes the message takes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Writes the message; `produce` writes what comes later.
    ///
    /// # Errors
    /// Those of `out` and `produce`.
    pub fn write<W: Write>(
        self,
        out: &mut W,
        mut produce: impl FnMut(T, &mut W) -> io::Result<()>,
    ) -> io::Result<()> {
        for piece in self.pieces {
            match piece {
                Piece::Bytes(bytes) => out.write_all(&bytes)?,
                Piece::Later(content) => produce(content, out)?,
            }
        }
        Ok(())
    }

    fn raw(mut self, bytes: Vec<u8>) -> Self {
        self.length += bytes.len() as u64;
        match self.pieces.last_mut() {
            Some(Piece::Bytes(before)) => before.extend(bytes),
            _ => self.pieces.push(Piece::Bytes(bytes)),
        }
        self
    }
}

/// Number of a field and how its value is stored.
fn key(field: u32, kind: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint(u64::from(field << 3 | kind), &mut bytes);
    bytes
}

/// Seven bits a byte, the lowest first.
fn varint(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_encoded_as_the_specification_shows() {
        let inner = Message::default().int(1, 150);
        let message = Message::default()
            .text(2, "testing")
            .message(3, inner)
            .int(4, -1)
            .float(5, 1.0)
            .later(6, 2, "ab");
        assert_eq!(message.length(), 34);
        let mut out = Vec::new();
        let produce = |content: &str, out: &mut Vec<u8>| out.write_all(content.as_bytes());
        message.write(&mut out, produce).unwrap();
        assert_eq!(&out[..9], b"\x12\x07testing");
        assert_eq!(&out[9..14], b"\x1a\x03\x08\x96\x01");
        assert_eq!(
            &out[14..25],
            b"\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"
        );
        assert_eq!(&out[25..], b"\x2d\x00\x00\x80\x3f\x32\x02ab");
    }
}
