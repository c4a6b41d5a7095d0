//! What an earlier run has told already.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;

use super::ReportError;
use super::shards::shards;

/// The paths in a file of JSON lines. Held as hashes of 64 bits, so that a million take 16 MB.
pub struct Earlier {
    paths: HashSet<u64>,
    hasher: RandomState,
    /// A file's last line has no end: a run was cut off while it wrote it.
    cut: bool,
}

#[derive(Deserialize)]
struct Line {
    path: String,
}

impl Earlier {
    /// Reads the results in a file, or in the files of a folder of shards, those of images that failed
    /// too. A last line that is cut off does not count.
    ///
    /// # Errors
    /// Where a file cannot be read, or another line is no result: then its number is told.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let mut earlier = Self {
            paths: HashSet::new(),
            hasher: RandomState::new(),
            cut: false,
        };
        let files = match path.is_dir() {
            true => shards(path).map_err(|error| ReportError::io(path, error))?,
            false => vec![path.to_path_buf()],
        };
        for file in files {
            let read = earlier.add(&file);
            read.map_err(|error| ReportError::io(&file, error))?;
        }
        Ok(earlier)
    }

    fn add(&mut self, path: &Path) -> io::Result<()> {
        let mut reader = BufReader::new(File::open(path)?);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if reader.read_until(b'\n', &mut line)? == 0 {
                break;
            }
            if line.last() != Some(&b'\n') {
                self.cut = true;
                break;
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            // A line that was cut off, and then gone on from in a new one.
            match serde_json::from_slice::<Line>(&line) {
                Ok(Line { path }) => {
                    let hash = self.hasher.hash_one(&path);
                    self.paths.insert(hash);
                }
                Err(error) if error.is_eof() => {}
                Err(error) => {
                    let reason = format!("line {number} is no result: {error}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
                }
            }
        }
        Ok(())
    }

    /// Whether there is a result of that path.
    pub fn has(&self, path: &str) -> bool {
        self.paths.contains(&self.hasher.hash_one(path))
    }

    /// Whether what is appended to the file has to begin with a new line.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Number of paths.
    pub fn len(&self) -> usize {
        self.paths.len()
    }

    pub fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }
}
