//! CIFAR-10's binary files: for each picture a byte with its class and 32 x 32 pixels, red, then
//! green, then blue.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::held::ColourImages;

const SIDE: usize = 32;
const RECORD: usize = 1 + 3 * SIDE * SIDE;
/// A file of more pictures is not one of CIFAR's.
const MOST_PICTURES: usize = 1 << 20;

pub(super) const TRAIN: [&str; 5] = [
    "data_batch_1.bin",
    "data_batch_2.bin",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "data_batch_5.bin",
];
pub(super) const TEST: [&str; 1] = ["test_batch.bin"];

/// In the order of their numbers.
pub(super) const CLASSES: [&str; 10] = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
];

/// Why CIFAR's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CifarError {
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
    #[error("{path}: {bytes} bytes are not a whole number of pictures of {RECORD} bytes")]
    Length { path: String, bytes: usize },
    #[error("{path}: picture {picture} is of class {class}, and there are ten, 0 to 9")]
    Class {
        path: String,
        picture: usize,
        class: u8,
    },
    #[error(
        "{path}: no {name} here (the binary version's files are expected, data_batch_1.bin to data_batch_5.bin and test_batch.bin, or parquet files of the hub)"
    )]
    Missing { path: String, name: &'static str },
}

/// Where the binary files lie: the folder, or the one in it that the archive makes.
pub(super) fn find(folder: &Path) -> Result<PathBuf, CifarError> {
    ["", "cifar-10-batches-bin"]
        .map(|below| folder.join(below))
        .into_iter()
        .find(|folder| folder.join(TEST[0]).is_file())
        .ok_or_else(|| CifarError::Missing {
            path: folder.display().to_string(),
            name: TEST[0],
        })
}

/// The pictures of some files, and their classes.
pub(super) fn read(
    folder: &Path,
    names: &[&'static str],
) -> Result<(ColourImages, Vec<u8>), CifarError> {
    let mut images = ColourImages {
        width: SIDE,
        height: SIDE,
        planes: Vec::new(),
    };
    let mut labels = Vec::new();
    for &name in names {
        let path = folder.join(name);
        let shown = || path.display().to_string();
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => CifarError::Missing {
                path: folder.display().to_string(),
                name,
            },
            _ => CifarError::Io {
                path: shown(),
                source,
            },
        };
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| {
                let most = (MOST_PICTURES * RECORD) as u64 + 1;
                file.take(most).read_to_end(&mut bytes)
            })
            .map_err(io)?;
        let (records, rest) = bytes.as_chunks::<RECORD>();
        if records.is_empty() || !rest.is_empty() {
            let (path, bytes) = (shown(), bytes.len());
            return Err(CifarError::Length { path, bytes });
        }
        for (picture, record) in records.iter().enumerate() {
            let class = record[0];
            if usize::from(class) >= CLASSES.len() {
                let path = shown();
                return Err(CifarError::Class {
                    path,
                    picture,
                    class,
                });
            }
            labels.push(class);
            images.planes.extend_from_slice(&record[1..]);
        }
    }
    Ok((images, labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(class: u8) -> Vec<u8> {
        let plane = |colour: u8| (0..SIDE * SIDE).map(move |at| colour * 80 + (at % SIDE) as u8);
        std::iter::once(class)
            .chain((0..3).flat_map(plane))
            .collect()
    }

    #[test]
    fn pictures_are_read_the_right_way_round() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(TEST[0]), [record(3), record(9)].concat()).unwrap();
        let (images, labels) = read(folder.path(), &TEST).unwrap();
        assert_eq!((images.len(), labels), (2, vec![3, 9]));
        let picture = images.picture(1);
        // The column is in the value.
        let at = |y: usize, x: usize| &picture.pixels[(y * SIDE + x) * 3..][..3];
        assert_eq!(at(0, 5), [5, 85, 165]);
        assert_eq!(at(5, 0), [0, 80, 160]);
    }

    #[test]
    fn broken_files_are_errors_that_name_them() {
        let folder = tempfile::tempdir().unwrap();
        let cases = [
            (record(3)[..100].to_vec(), "100 bytes are not"),
            (Vec::new(), "0 bytes are not"),
            ([record(1), record(10)].concat(), "picture 1 is of class 10"),
        ];
        for (bytes, expected) in cases {
            std::fs::write(folder.path().join(TEST[0]), bytes).unwrap();
            let error = read(folder.path(), &TEST).err().unwrap().to_string();
            assert!(
                error.contains("test_batch.bin: ") && error.contains(expected),
                "{error}"
            );
        }
        let error = find(Path::new("nowhere")).err().unwrap().to_string();
        assert!(error.contains("no test_batch.bin here"), "{error}");
        let error = read(folder.path(), &TRAIN).err().unwrap().to_string();
        assert!(error.contains("no data_batch_1.bin here"), "{error}");
    }
}
