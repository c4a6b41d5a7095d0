//! Results in a file for each process, and an index that tells their order.
//!
//! A folder holds `results-0000.jsonl` and so on, each written by one process alone, and `index.jsonl`,
//! a line for each run of results, in the order of the images. Read in that order, the runs are what one
//! process would have written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ReportError, write_file};

/// The order of the results in all files.
pub const INDEX_FILE: &str = "index.jsonl";

/// Results that follow each other: a line of the index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexEntry {
    /// The file they are in.
    pub file: String,
    /// Where they begin there.
    pub offset: u64,
    pub bytes: u64,
    /// How many they are.
    pub results: u64,
}

/// One process's file.
pub struct Shard {
    name: String,
    file: File,
    /// What is in the index, or on its way there.
    listed: u64,
}

impl Shard {
    /// Makes a process's file, or goes on with it.
    ///
    /// # Errors
    /// Where it cannot be opened; likewise below.
    pub fn open(folder: &Path, rank: usize) -> Result<Self, ReportError> {
        let name = format!("{PREFIX}{rank:04}{SUFFIX}");
        let path = folder.join(&name);
        let open = || {
            let file = File::options().create(true).append(true).open(&path)?;
            Ok((file.metadata()?.len(), file))
        };
        let (listed, file) = open().map_err(|error| ReportError::io(&path, error))?;
        Ok(Self { name, file, listed })
    }

    /// Where results are written.
    pub fn writer(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// What was written since this was last asked: so many results.
    pub fn entry(&mut self, results: u64) -> io::Result<IndexEntry> {
        let length = self.file.metadata()?.len();
        let offset = std::mem::replace(&mut self.listed, length);
        Ok(IndexEntry {
            file: self.name.clone(),
            offset,
            bytes: length - offset,
            results,
        })
    }
}

/// The index, written by one process alone.
pub struct Index {
    path: PathBuf,
    file: File,
}

impl Index {
    /// Begins an index in a folder that is made where it is missing. With `goes_on`, files of earlier
    /// runs stay: a last line that was cut off is taken away, and results that their index does not
    /// list come behind those that it does.
    ///
    /// # Errors
    /// Where there are results and it does not go on, a file cannot be read or written, or a line of
    /// the index makes no sense.
    pub fn begin(folder: &Path, goes_on: bool) -> Result<Self, ReportError> {
        let path = folder.join(INDEX_FILE);
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |error| ReportError::io(&path, error)
        };
        fs::create_dir_all(folder).map_err(at(folder))?;
        let shards = shards(folder).map_err(at(folder))?;
        if !goes_on && (path.exists() || !shards.is_empty()) {
            let why = "holds results (--resume-from with the same folder goes on)";
            return Err(at(folder)(io::Error::other(why)));
        }
        let mut lengths = BTreeMap::new();
        for shard in &shards {
            lengths.insert(name_of(shard), whole_lines(shard).map_err(at(shard))?);
        }
        let mut entries = entries(&path).map_err(at(&path))?;
        entries.retain(|e| {
            let end = e.offset.checked_add(e.bytes);
            end.is_some_and(|end| lengths.get(&e.file).is_some_and(|&length| end <= length))
        });
        for shard in &shards {
            let gaps = unlisted(shard, lengths[&name_of(shard)], &entries).map_err(at(shard))?;
            entries.extend(gaps);
        }
        let mut lines = Vec::new();
        for entry in &entries {
            write_line(&mut lines, entry).map_err(at(&path))?;
        }
        write_file(&path, &lines)?;
        let file = File::options().append(true).open(&path);
        Ok(Self {
            file: file.map_err(at(&path))?,
            path,
        })
    }

    /// The next results.
    pub fn add(&mut self, entry: &IndexEntry) -> Result<(), ReportError> {
        if entry.results == 0 {
            return Ok(());
        }
        let mut line = Vec::new();
        write_line(&mut line, entry)
            .and_then(|()| self.file.write_all(&line))
            .map_err(|error| ReportError::io(&self.path, error))
    }
}

const PREFIX: &str = "results-";
const SUFFIX: &str = ".jsonl";

/// The files of all processes in a folder, in their order.
pub(super) fn shards(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = name_of(&path);
        let number = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.strip_suffix(SUFFIX));
        if number.is_some_and(|n| n.len() >= 4 && n.bytes().all(|b| b.is_ascii_digit())) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Takes a line away that has no end. The file's length then.
fn whole_lines(path: &Path) -> io::Result<u64> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let mut end = length;
    let mut chunk = [0; 4096];
    while end > 0 {
        let start = end.saturating_sub(chunk.len() as u64);
        let chunk = &mut chunk[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(chunk)?;
        if let Some(last) = chunk.iter().rposition(|&b| b == b'\n') {
            end = start + last as u64 + 1;
            break;
        }
        end = start;
    }
    if end < length {
        file.set_len(end)?;
    }
    Ok(end)
}

fn write_line(to: &mut Vec<u8>, entry: &IndexEntry) -> io::Result<()> {
    serde_json::to_writer(&mut *to, entry)?;
    to.push(b'\n');
    Ok(())
}

/// What an index lists, but a last line that is cut off.
fn entries(path: &Path) -> io::Result<Vec<IndexEntry>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut reader = BufReader::new(file);
    let mut entries = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        reader.read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            break;
        }
        entries.push(serde_json::from_slice(&line).map_err(|error| {
            let reason = format!("line {number} is no entry of an index: {error}");
            io::Error::new(io::ErrorKind::InvalidData, reason)
        })?);
    }
    Ok(entries)
}

/// What of a file of so many bytes no entry lists.
fn unlisted(path: &Path, length: u64, entries: &[IndexEntry]) -> io::Result<Vec<IndexEntry>> {
    let name = name_of(path);
    let mut listed: Vec<_> = entries.iter().filter(|e| e.file == name).collect();
    listed.sort_by_key(|e| e.offset);
    let mut gaps = Vec::new();
    let mut at = 0;
    let ends = listed.iter().map(|e| (e.offset, e.offset + e.bytes));
    for (offset, end) in ends.chain([(length, length)]) {
        if offset > at {
            gaps.push((at, offset - at));
        }
        at = at.max(end);
    }
    let mut file = File::open(path)?;
    let count = |(offset, bytes): (u64, u64)| {
        file.seek(SeekFrom::Start(offset))?;
        let lines = BufReader::new((&file).take(bytes)).split(b'\n');
        Ok(IndexEntry {
            file: name.clone(),
            offset,
            bytes,
            results: lines.count() as u64,
        })
    };
    gaps.into_iter().map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    /// Writes lines as a block of results.
    fn block(shard: &mut Shard, lines: &[&str]) -> IndexEntry {
        let mut writer = shard.writer().unwrap();
        for line in lines {
            writeln!(writer, "{line}").unwrap();
        }
        shard.entry(lines.len() as u64).unwrap()
    }

    /// Everything in the order of the index.
    fn joined(folder: &Path) -> String {
        let mut all = String::new();
        for entry in entries(&folder.join(INDEX_FILE)).unwrap() {
            let text = fs::read_to_string(folder.join(&entry.file)).unwrap();
            let run = &text[entry.offset as usize..][..entry.bytes as usize];
            assert_eq!(run.lines().count() as u64, entry.results);
            all += run;
        }
        all
    }

    #[test]
    fn the_index_tells_the_order() {
        let folder = folder();
        let path = &folder.path().join("made");
        let mut index = Index::begin(path, false).unwrap();
        let mut shards = [0, 1].map(|rank| Shard::open(path, rank).unwrap());
        let last = block(&mut shards[1], &["c", "d"]);
        index.add(&block(&mut shards[0], &["a", "b"])).unwrap();
        index.add(&last).unwrap();
        index.add(&block(&mut shards[1], &[])).unwrap();
        index.add(&block(&mut shards[1], &["e"])).unwrap();
        assert_eq!(joined(path), "a\nb\nc\nd\ne\n");
    }

    #[test]
    fn what_a_run_left_is_kept_and_listed() {
        let folder = folder();
        let path = folder.path();
        let mut index = Index::begin(path, false).unwrap();
        let mut shards = [0, 1].map(|rank| Shard::open(path, rank).unwrap());
        let unlisted = block(&mut shards[1], &["first", "second"]);
        index.add(&block(&mut shards[1], &["third"])).unwrap();
        index.add(&block(&mut shards[0], &["fourth"])).unwrap();
        block(&mut shards[0], &["fifth"]);
        write!(shards[0].writer().unwrap(), "{{\"cut").unwrap();
        // Listed, but lost with the machine; and a line that was not finished.
        let lost = IndexEntry {
            offset: 1000,
            ..unlisted
        };
        index.add(&lost).unwrap();
        index.file.write_all(b"{\"fi").unwrap();

        let error = Index::begin(path, false).err().unwrap().to_string();
        assert!(error.contains("--resume-from"), "{error}");
        let mut index = Index::begin(path, true).unwrap();
        let mut shard = Shard::open(path, 0).unwrap();
        index.add(&block(&mut shard, &["sixth"])).unwrap();
        assert_eq!(joined(path), "third\nfourth\nfifth\nfirst\nsecond\nsixth\n");
    }

    #[test]
    fn an_index_that_makes_no_sense_is_refused() {
        let folder = folder();
        for text in ["no json\n", "{}\n", "{\"file\":3}\n"] {
            fs::write(folder.path().join(INDEX_FILE), text).unwrap();
            let error = Index::begin(folder.path(), true).err().unwrap();
            let error = error.to_string();
            assert!(
                error.contains("line 1") && error.contains(INDEX_FILE),
                "{error}"
            );
        }
    }

    #[test]
    fn only_whole_lines_stay() {
        let folder = folder();
        let path = folder.path().join("results-0000.jsonl");
        let long = "x".repeat(10_000);
        for (text, left) in [
            (String::new(), 0),
            ("a\n".into(), 2),
            ("a\nb".into(), 2),
            (long.clone(), 0),
            (format!("a\n{long}"), 2),
            (format!("{long}\n{long}"), 10_001),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(whole_lines(&path).unwrap(), left);
            assert_eq!(fs::metadata(&path).unwrap().len(), left);
        }
    }
}
