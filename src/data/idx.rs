//! MNIST's idx files: a header with the type and the dimensions, then bytes.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::Rgb;

/// Why an idx file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdxError {
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("{path}: not an idx file of bytes in {wanted} dimensions: {reason}")]
    Format {
        path: String,
        wanted: usize,
        reason: String,
    },
    #[error("{path}: no {name} here, also not with .gz at the end")]
    Missing { path: String, name: &'static str },
    #[error("{path}: {images} images and {labels} labels")]
    Counts {
        path: String,
        images: usize,
        labels: usize,
    },
}

/// Grey pictures and their labels.
pub struct IdxImages {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    pub labels: Vec<u8>,
}

/// A file of more values is not one of MNIST's kind.
const MOST_VALUES: usize = 1 << 31;

impl IdxImages {
    /// Reads `PREFIX-images-idx3-ubyte` and `PREFIX-labels-idx1-ubyte`, plain or with `.gz`, of a
    /// folder or of its `raw` or `MNIST/raw`, where torchvision puts them.
    ///
    /// # Errors
    /// Where a file is missing, broken, or they disagree.
    pub fn open(folder: &Path, [images, labels]: [&'static str; 2]) -> Result<Self, IdxError> {
        let (shape, pixels) = read(&find(folder, images)?, 3)?;
        let (_, labels) = read(&find(folder, labels)?, 1)?;
        if shape[0] != labels.len() {
            return Err(IdxError::Counts {
                path: folder.display().to_string(),
                images: shape[0],
                labels: labels.len(),
            });
        }
        Ok(Self {
            height: shape[1],
            width: shape[2],
            pixels,
            labels,
        })
    }

    /// Pictures `[count, height, width]` and their labels.
    #[cfg(feature = "datasets")]
    pub(super) fn of_pixels([height, width]: [usize; 2], pixels: Vec<u8>, labels: Vec<u8>) -> Self {
        Self {
            width,
            height,
            pixels,
            labels,
        }
    }

    pub fn len(&self) -> usize {
        self.labels.len()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// A picture, with three equal channels.
    pub fn picture(&self, index: usize) -> Rgb {
        let area = self.width * self.height;
        let grey = &self.pixels[index * area..(index + 1) * area];
        Rgb {
            width: self.width,
            height: self.height,
            pixels: grey.iter().flat_map(|&v| [v; 3]).collect(),
        }
    }
}

fn find(folder: &Path, name: &'static str) -> Result<PathBuf, IdxError> {
    // Some copies have a dot before `idx`.
    let dotted = name.replace("-idx", ".idx");
    let folders = ["", "raw", "MNIST/raw", "FashionMNIST/raw"].map(|sub| folder.join(sub));
    let names = [name, &dotted].map(|n| [n.to_string(), format!("{n}.gz")]);
    let candidates = folders
        .iter()
        .flat_map(|folder| names.iter().flatten().map(move |name| folder.join(name)));
    let mut candidates = candidates;
    candidates
        .find(|path| path.is_file())
        .ok_or_else(|| IdxError::Missing {
            path: folder.display().to_string(),
            name,
        })
}

/// The dimensions, and the values.
fn read(path: &Path, dimensions: usize) -> Result<(Vec<usize>, Vec<u8>), IdxError> {
    let shown = || path.display().to_string();
    let format = |reason: String| IdxError::Format {
        path: shown(),
        wanted: dimensions,
        reason,
    };
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::UnexpectedEof => format("it is cut short".into()),
        _ => IdxError::Io {
            path: shown(),
            source,
        },
    };
    let file = BufReader::new(File::open(path).map_err(io)?);
    let mut reader: Box<dyn Read> = if path.extension().is_some_and(|e| e == "gz") {
        Box::new(GzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let mut word = [0; 4];
    reader.read_exact(&mut word).map_err(io)?;
    // Two zeros, the type (8: bytes), the number of dimensions.
    if word != [0, 0, 8, dimensions as u8] {
        return Err(format(format!("it begins with {word:02x?}")));
    }
    let mut shape = Vec::with_capacity(dimensions);
    for _ in 0..dimensions {
        reader.read_exact(&mut word).map_err(io)?;
        shape.push(u32::from_be_bytes(word) as usize);
    }
    let total = shape
        .iter()
        .try_fold(1usize, |total, &n| total.checked_mul(n));
    let total = match total {
        Some(total) if total > 0 && total <= MOST_VALUES => total,
        _ => return Err(format(format!("its dimensions are {shape:?}"))),
    };
    // Grows with what is there, not with what the header says.
    let mut values = Vec::new();
    reader
        .take(total as u64 + 1)
        .read_to_end(&mut values)
        .map_err(io)?;
    if values.len() != total {
        let kind = if values.len() < total {
            "fewer"
        } else {
            "more"
        };
        return Err(format(format!(
            "its dimensions are {shape:?}, and there are {kind} values"
        )));
    }
    Ok((shape, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 2] = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"];

    fn write(folder: &Path, images: &[u8], labels: &[u8]) {
        std::fs::write(folder.join(NAMES[0]), images).unwrap();
        std::fs::write(folder.join(NAMES[1]), labels).unwrap();
    }

    const LABELS: [u8; 10] = [0, 0, 8, 1, 0, 0, 0, 2, 7, 3];

    fn images(count: u32, height: u32, width: u32, values: usize) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, 3];
        bytes.extend([count, height, width].iter().flat_map(|n| n.to_be_bytes()));
        bytes.extend((0..values).map(|v| v as u8));
        bytes
    }

    #[test]
    fn pictures_are_read_plain_and_compressed() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = images(2, 2, 3, 12);
        write(folder.path(), &bytes, &LABELS);
        let plain = IdxImages::open(folder.path(), NAMES).unwrap();
        assert_eq!((plain.len(), plain.labels.as_slice()), (2, &[7, 3][..]));
        let second = plain.picture(1);
        assert_eq!((second.width, second.height), (3, 2));
        assert_eq!(second.pixels[..6], [6, 6, 6, 7, 7, 7]);
        let raw = folder.path().join("raw");
        std::fs::create_dir(&raw).unwrap();
        for name in NAMES {
            let from = folder.path().join(name);
            let to = File::create(raw.join(format!("{name}.gz"))).unwrap();
            let mut encoder = flate2::write::GzEncoder::new(to, flate2::Compression::fast());
            io::copy(&mut File::open(&from).unwrap(), &mut encoder).unwrap();
            encoder.finish().unwrap();
            std::fs::remove_file(from).unwrap();
        }
        let packed = IdxImages::open(folder.path(), NAMES).unwrap();
        assert_eq!(packed.pixels, plain.pixels);
    }

    #[test]
    fn hostile_headers_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            (images(2, 2, 3, 11), "fewer"),
            (images(2, 2, 3, 13), "more"),
            (images(u32::MAX, u32::MAX, u32::MAX, 5), "dimensions"),
            (images(0, 28, 28, 0), "dimensions"),
            (images(2, 2, 3, 12)[..9].to_vec(), "cut short"),
            (b"PK\x03\x04rest".to_vec(), "begins with"),
            (Vec::new(), "cut short"),
            (images(1, 2, 3, 6), "1 images and 2 labels"),
        ];
        for (bytes, expected) in cases {
            write(folder.path(), &bytes, &LABELS);
            let error = IdxImages::open(folder.path(), NAMES).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let error = IdxImages::open(Path::new("nowhere"), NAMES).err().unwrap();
        assert!(error.to_string().contains("no train-images"), "{error}");
    }
}
