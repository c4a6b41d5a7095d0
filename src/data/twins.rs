//! The same image among those to learn from and those to judge by.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{Picture, Sample};

/// Bytes of a file's middle that are compared before all of it is.
const MIDDLE: u64 = 4096;

/// Images to validate on whose file is byte for byte one of those to train on: positions in both.
/// Cheap where it can be: only files of equal length are opened, and only those with an equal middle
/// read to the end. What cannot be read is left out.
pub(super) fn twins(train: &[Sample], validation: &[Sample]) -> Vec<(usize, usize)> {
    let path = |sample: &Sample| match &sample.picture {
        Picture::File(path) => Some(path.clone()),
        Picture::Held { .. } => None,
    };
    let [train, validation] = [train, validation].map(|samples| {
        let files = samples.iter().enumerate();
        files
            .filter_map(|(index, sample)| Some((index, path(sample)?)))
            .filter_map(|(index, path)| {
                let length = path.metadata().ok()?.len();
                (length > 0).then_some((index, path, length))
            })
            .collect::<Vec<_>>()
    });
    let mut same: Vec<(usize, usize)> = Vec::new();
    let by_length = common(&train, &validation, |(_, _, length)| Some(*length));
    for (train, validation) in by_length {
        let by_middle = common(&train, &validation, |(_, path, length)| {
            middle(path, *length)
        });
        for (train, validation) in by_middle {
            for (train, validation) in common(&train, &validation, |(_, path, _)| whole(path)) {
                same.extend(validation.iter().map(|(index, ..)| (train[0].0, *index)));
            }
        }
    }
    same.sort_unstable_by_key(|&(_, validation)| validation);
    same
}

/// Groups of both sides that have a key in common.
fn common<T: Clone, K: Eq + std::hash::Hash>(
    left: &[T],
    right: &[T],
    key: impl Fn(&T) -> Option<K>,
) -> Vec<(Vec<T>, Vec<T>)> {
    let mut groups: HashMap<K, (Vec<T>, Vec<T>)> = HashMap::new();
    for item in right {
        if let Some(key) = key(item) {
            groups.entry(key).or_default().1.push(item.clone());
        }
    }
    for item in left {
        if let Some(group) = key(item).and_then(|key| groups.get_mut(&key)) {
            group.0.push(item.clone());
        }
    }
    let groups = groups.into_values();
    groups.filter(|(left, _)| !left.is_empty()).collect()
}

fn middle(path: &Path, length: u64) -> Option<Vec<u8>> {
    let mut file = File::open(path).ok()?;
    let start = (length / 2).saturating_sub(MIDDLE / 2);
    file.seek(SeekFrom::Start(start)).ok()?;
    digest(file.take(MIDDLE))
}

fn whole(path: &Path) -> Option<Vec<u8>> {
    digest(File::open(path).ok()?)
}

fn digest(mut bytes: impl Read) -> Option<Vec<u8>> {
    let mut hasher = Sha256::new();
    let mut buffer = [0; 1 << 16];
    loop {
        match bytes.read(&mut buffer).ok()? {
            0 => return Some(hasher.finalize().to_vec()),
            count => hasher.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn equal_files_are_found_and_similar_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| -> PathBuf {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let long = vec![7; 20_000];
        let mut end = long.clone();
        end[19_999] = 8;
        let sample = |path: PathBuf| Sample {
            picture: Picture::File(path),
            label: 0,
        };
        let train = [
            write("a", b"one"),
            write("b", b"two"),
            write("c", &long),
            write("e", b""),
            folder.path().join("missing"),
        ];
        let validation = [
            write("f", b"six"),
            write("g", &end),
            write("h", &long),
            write("i", b""),
            write("j", b"two"),
        ];
        let found = twins(&train.map(sample), &validation.map(sample));
        assert_eq!(found, [(2, 2), (1, 4)]);
    }
}
