//! The images that a command was pointed at: files, folders, globs, lists, standard input.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Stdin};
use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

/// Endings by which images in folders are known.
const EXTENSIONS: [&str; 19] = [
    "bmp", "dib", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "qoi",
    "tif", "tiff", "webp", // not read, but named:
    "avif", "heic", "heif",
];

/// What is said of a folder without images.
pub(super) const NO_IMAGES: &str = "no images in this folder";

/// One image to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    File(PathBuf),
    /// The bytes of one image on standard input.
    Stdin,
}

impl Input {
    /// As results name it.
    pub fn name(&self) -> String {
        match self {
            Input::File(path) => path.to_string_lossy().into_owned(),
            Input::Stdin => "-".into(),
        }
    }

    /// The bytes, at most `limit` of them.
    ///
    /// # Errors
    /// Where they cannot be read, or there are more.
    pub fn read(&self, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            Input::File(path) => {
                let file = File::open(path)?;
                let length = file.metadata()?.len();
                bytes.reserve_exact(length.min(limit).try_into().unwrap_or(0));
                file.take(limit + 1).read_to_end(&mut bytes)?
            }
            Input::Stdin => io::stdin().lock().take(limit + 1).read_to_end(&mut bytes)?,
        };
        if bytes.len() as u64 > limit {
            let reason = format!("larger than {} MiB", limit >> 20);
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
        }
        Ok(bytes)
    }
}

/// A place where no image could be found.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {reason}")]
pub struct InputError {
    pub name: String,
    pub reason: String,
}

impl InputError {
    fn new(name: impl Into<String>, reason: impl ToString) -> Self {
        Self {
            name: name.into(),
            reason: reason.to_string(),
        }
    }
}

/// An image, or a place where none could be found.
pub type Found = Result<Input, InputError>;

/// A list of paths, one after the other as they are written.
pub struct PathList {
    reader: Box<dyn BufRead + Send>,
    name: String,
    separator: u8,
}

impl PathList {
    /// Opens a list, `-` for standard input; paths end in a newline, or in NUL.
    ///
    /// # Errors
    /// Where the file cannot be opened.
    pub fn open(path: &Path, nul: bool) -> Result<Self, InputError> {
        let separator = if nul { 0 } else { b'\n' };
        let name = path.display().to_string();
        if path == Path::new("-") {
            return Ok(Self {
                reader: Box::new(BufReader::new(StdinReader(io::stdin()))),
                name,
                separator,
            });
        }
        let file = File::open(path).map_err(|e| InputError::new(&name, e))?;
        Ok(Self {
            reader: Box::new(BufReader::new(file)),
            name,
            separator,
        })
    }
}

/// Standard input that may move to another thread.
struct StdinReader(Stdin);

impl Read for StdinReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().read(buffer)
    }
}

impl Iterator for PathList {
    type Item = Result<PathBuf, InputError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut line = Vec::new();
            match self.reader.read_until(self.separator, &mut line) {
                Ok(0) => return None,
                Err(error) => return Some(Err(InputError::new(&self.name, error))),
                Ok(_) => {}
            }
            if line.last() == Some(&self.separator) {
                line.pop();
            }
            if self.separator == b'\n' && line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.is_empty() {
                return Some(Ok(path_from_bytes(line)));
            }
        }
    }
}

#[cfg(unix)]
fn path_from_bytes(bytes: Vec<u8>) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(not(unix))]
fn path_from_bytes(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from(String::from_utf8_lossy(&bytes).into_owned()))
}

/// All images of a command line, found as they are asked for.
pub struct Inputs {
    pending: Box<dyn Iterator<Item = Found> + Send>,
}

impl Inputs {
    /// Arguments first, in their order (files, folders, globs, `-`), then the list's paths.
    pub fn new(arguments: Vec<PathBuf>, list: Option<PathList>) -> Self {
        let arguments = arguments.into_iter().flat_map(expand);
        let listed = list.into_iter().flatten().flat_map(|path| match path {
            Ok(path) => from_path(path),
            Err(error) => one(Err(error)),
        });
        Self {
            pending: Box::new(arguments.chain(listed)),
        }
    }
}

impl Iterator for Inputs {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        self.pending.next()
    }
}

type Several = Box<dyn Iterator<Item = Found> + Send>;

fn one(found: Found) -> Several {
    Box::new(std::iter::once(found))
}

/// The images of one argument.
fn expand(argument: PathBuf) -> Several {
    if argument == Path::new("-") {
        return one(Ok(Input::Stdin));
    }
    let pattern = argument
        .to_str()
        .filter(|text| text.contains(['*', '?', '[']));
    match pattern {
        Some(pattern) if !argument.exists() => matches(pattern),
        _ => from_path(argument),
    }
}

/// The files that a glob matches, sorted; folders among them are walked.
fn matches(pattern: &str) -> Several {
    let name = pattern.to_string();
    let paths = match glob::glob(pattern) {
        Ok(paths) => paths,
        Err(error) => return one(Err(InputError::new(name, error))),
    };
    let mut paths = paths.peekable();
    if paths.peek().is_none() {
        return one(Err(InputError::new(name, "no file matches")));
    }
    Box::new(paths.flat_map(|path| match path {
        Ok(path) => from_path(path),
        Err(error) => one(Err(InputError::new(
            error.path().display().to_string(),
            error.error(),
        ))),
    }))
}

fn from_path(path: PathBuf) -> Several {
    if path.is_dir() {
        walk(path)
    } else {
        one(Ok(Input::File(path)))
    }
}

fn whole(entry: &DirEntry) -> &[u8] {
    entry.path().as_os_str().as_encoded_bytes()
}

/// Images below a folder, sorted, hidden files and folders left out, links followed.
fn walk(folder: PathBuf) -> Several {
    let name = folder.display().to_string();
    // All entries of a folder share what comes before their names: to compare paths whole is as good
    // as to compare names, and takes half the time where there are a million.
    let mut entries = WalkDir::new(&folder)
        .follow_links(true)
        .sort_by(|a, b| whole(a).cmp(whole(b)))
        .into_iter()
        .filter_entry(|entry| {
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            entry.depth() == 0 || !hidden
        })
        .filter_map(|entry| match entry {
            Ok(entry) => {
                let kind = entry.file_type();
                if kind.is_dir() || !is_image(entry.path()) {
                    return None;
                }
                if !kind.is_file() {
                    // To open a pipe would wait for somebody to write to it.
                    let name = entry.path().display().to_string();
                    return Some(Err(InputError::new(
                        name,
                        "a pipe, socket or device, not a file",
                    )));
                }
                Some(Ok(Input::File(entry.into_path())))
            }
            Err(error) => {
                let name = error.path().map(|p| p.display().to_string());
                let reason = match (error.loop_ancestor(), error.io_error()) {
                    (Some(ancestor), _) => format!("a link back to {}", ancestor.display()),
                    (None, Some(io)) => io.to_string(),
                    (None, None) => error.to_string(),
                };
                Some(Err(InputError::new(name.unwrap_or_default(), reason)))
            }
        })
        .peekable();
    if entries.peek().is_none() {
        return one(Err(InputError::new(name, NO_IMAGES)));
    }
    Box::new(entries)
}

/// Whether a file's ending is that of an image.
pub(super) fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str());
    extension.is_some_and(|e| EXTENSIONS.contains(&e.to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(inputs: Inputs, root: &Path) -> Vec<String> {
        inputs
            .map(|found| match found {
                Ok(Input::File(path)) => path.strip_prefix(root).unwrap().display().to_string(),
                Ok(Input::Stdin) => "-".into(),
                Err(error) => format!("error: {}", error.reason),
            })
            .collect()
    }

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
        root
    }

    #[test]
    fn folders_are_walked_in_order_without_hidden_and_other_files() {
        let root = folder(&[
            "b/2.JPG",
            "b/1.png",
            "a.webp",
            ".h.png",
            ".git/x.png",
            "n.txt",
        ]);
        let found = names(Inputs::new(vec![root.path().into()], None), root.path());
        assert_eq!(found, ["a.webp", "b/1.png", "b/2.JPG"]);
    }

    #[test]
    fn globs_are_sorted_and_one_without_a_match_is_an_error() {
        let root = folder(&["2.png", "1.png", "3.jpg"]);
        let glob = |pattern: &str| {
            let inputs = Inputs::new(vec![root.path().join(pattern)], None);
            names(inputs, root.path())
        };
        assert_eq!(glob("*.png"), ["1.png", "2.png"]);
        assert_eq!(glob("*.gif"), ["error: no file matches"]);
    }

    #[test]
    fn a_file_whose_name_looks_like_a_glob_is_that_file() {
        let root = folder(&["a[1].png", "a1.png"]);
        let inputs = Inputs::new(vec![root.path().join("a[1].png")], None);
        assert_eq!(names(inputs, root.path()), ["a[1].png"]);
    }

    #[test]
    fn lists_hold_a_path_a_line_or_end_paths_with_nul() {
        let root = folder(&["1.png", "line\nbreak.png"]);
        let list = |text: String, nul| {
            let path = root.path().join("list");
            fs::write(&path, text).unwrap();
            let list = PathList::open(&path, nul).unwrap();
            names(Inputs::new(Vec::new(), Some(list)), root.path())
        };
        let at = |name: &str| root.path().join(name).display().to_string();
        let lines = format!("{}\r\n\n{}", at("1.png"), at("missing.png"));
        assert_eq!(list(lines, false), ["1.png", "missing.png"]);
        let nul = format!("{}\0{}\0", at("line\nbreak.png"), at("1.png"));
        assert_eq!(list(nul, true), ["line\nbreak.png", "1.png"]);
    }

    #[test]
    fn an_empty_folder_is_an_error() {
        let root = folder(&["note.txt"]);
        let found = names(Inputs::new(vec![root.path().into()], None), root.path());
        assert_eq!(found, ["error: no images in this folder"]);
    }
}
