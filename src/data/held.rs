//! Images of which many lie in one file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::{Mutex, PoisonError};

use super::idx::IdxImages;
use super::{ImageError, Rgb};

/// Images that are counted, not named.
pub enum Images {
    /// MNIST's: 8-bit grey, all of one size.
    Grey(IdxImages),
    /// CIFAR's: 8-bit colours, all of one size.
    Colour(ColourImages),
    /// As their files were encoded.
    Encoded(EncodedImages),
}

impl Images {
    /// As messages name an image.
    pub fn name(&self, index: usize) -> String {
        match self {
            Images::Grey(_) | Images::Colour(_) => format!("picture {index}"),
            Images::Encoded(images) => format!("{}, picture {index}", images.name),
        }
    }
}

/// 8-bit pictures of one size in three colours.
pub struct ColourImages {
    pub width: usize,
    pub height: usize,
    /// `[count, 3, height, width]`
    pub planes: Vec<u8>,
}

impl ColourImages {
    pub fn len(&self) -> usize {
        self.planes.len() / (self.width * self.height * 3).max(1)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn picture(&self, index: usize) -> Rgb {
        let area = self.width * self.height;
        let planes = &self.planes[index * area * 3..(index + 1) * area * 3];
        let pixel = |at: usize| [planes[at], planes[area + at], planes[2 * area + at]];
        Rgb {
            width: self.width,
            height: self.height,
            pixels: (0..area).flat_map(pixel).collect(),
        }
    }
}

/// Encoded images one after the other in a temporary file, so that a large data set takes no memory.
pub struct EncodedImages {
    /// Where they come from.
    name: String,
    file: Mutex<File>,
    /// Offset and length of each.
    spans: Vec<(u64, u64)>,
}

impl EncodedImages {
    /// None yet.
    ///
    /// # Errors
    /// Where there can be no temporary file.
    pub fn new(name: String) -> io::Result<Self> {
        Ok(Self {
            name,
            file: Mutex::new(tempfile::tempfile()?),
            spans: Vec::new(),
        })
    }

    pub fn len(&self) -> usize {
        self.spans.len()
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Adds one image's bytes.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = self.file.get_mut().unwrap_or_else(PoisonError::into_inner);
        file.write_all(bytes)?;
        let offset = self
            .spans
            .last()
            .map_or(0, |(offset, length)| offset + length);
        self.spans.push((offset, bytes.len() as u64));
        Ok(())
    }

    /// An image's bytes.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub fn bytes(&self, index: usize) -> Result<Vec<u8>, ImageError> {
        let (offset, length) = self.spans[index];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
