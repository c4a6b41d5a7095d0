//! Images put into folders that are named after what they show.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// How an image gets into its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sorting {
    /// A link: symbolic on Unix, else a hard one.
    Link,
    Copy,
    Move,
}

/// Puts the image at `path` into `folder/label`, under its own name, or `name-2.jpg` and so on where
/// another file has that. An image that is there already stays as it is. Gives its place there.
///
/// Nothing is overwritten, and a move removes the image only when its copy is whole.
///
/// # Errors
/// Where the system refuses.
pub fn sort_into(folder: &Path, label: &str, path: &Path, sorting: Sorting) -> io::Result<PathBuf> {
    let folder = folder.join(folder_name(label));
    fs::create_dir_all(&folder)?;
    let source = fs::canonicalize(path)?;
    let name = path.file_name().unwrap_or(source.as_os_str());
    let name = Path::new(name);
    let (stem, extension) = (name.file_stem().unwrap_or_default(), name.extension());
    for number in 1_u64.. {
        let mut numbered = stem.to_os_string();
        if number > 1 {
            numbered.push(format!("-{number}"));
        }
        if let Some(extension) = extension {
            numbered.push(".");
            numbered.push(extension);
        }
        let place = folder.join(numbered);
        match put(&source, path, &place, sorting) {
            Ok(()) => return Ok(place),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if is_there(&source, &place, sorting)? {
                    return Ok(place);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// A label as a folder's name.
fn folder_name(label: &str) -> String {
    let plain = |c: char| match c {
        '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|' => '_',
        c if c.is_control() => '_',
        c => c,
    };
    let name: String = label.trim().chars().map(plain).collect();
    match name.trim_start_matches('.') {
        "" => "_".into(),
        visible => visible.into(),
    }
}

/// Fails with `AlreadyExists` where the place is taken.
fn put(source: &Path, path: &Path, place: &Path, sorting: Sorting) -> io::Result<()> {
    match sorting {
        Sorting::Link => link(source, place),
        Sorting::Copy => copy(source, place),
        Sorting::Move => {
            // A hard link never replaces what is there, as a rename would.
            match fs::hard_link(path, place) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(error),
                // Another file system, or one without links.
                Err(_) => copy(path, place)?,
            }
            fs::remove_file(path)
        }
    }
}

#[cfg(unix)]
fn link(source: &Path, place: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(source, place)
}

#[cfg(not(unix))]
fn link(source: &Path, place: &Path) -> io::Result<()> {
    fs::hard_link(source, place)
}

/// A copy that is whole or not there.
fn copy(source: &Path, place: &Path) -> io::Result<()> {
    let mut to = File::create_new(place)?;
    let copied = File::open(source)
        .and_then(|mut from| io::copy(&mut from, &mut to))
        .and_then(|_| to.sync_all());
    if copied.is_err() {
        let _ = fs::remove_file(place);
    }
    copied
}

/// Whether what is at the place is that image, put there before.
fn is_there(source: &Path, place: &Path, sorting: Sorting) -> io::Result<bool> {
    if fs::canonicalize(place).is_ok_and(|there| there == source) {
        return Ok(sorting != Sorting::Move || fs::symlink_metadata(place)?.is_file());
    }
    if sorting != Sorting::Copy || fs::metadata(place)?.len() != fs::metadata(source)?.len() {
        return Ok(false);
    }
    Ok(fs::read(place)? == fs::read(source)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_become_names_that_every_system_takes() {
        let names = ["cat", "bow tie, bow-tie/bowtie", " ..", "", "a\nb"].map(folder_name);
        assert_eq!(names, ["cat", "bow tie, bow-tie_bowtie", "_", "_", "a_b"]);
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_is_put_twice() {
        for sorting in [Sorting::Link, Sorting::Copy] {
            let root = tempfile::tempdir().unwrap();
            let (a, b) = (root.path().join("a"), root.path().join("b"));
            for (folder, content) in [(&a, "first"), (&b, "second")] {
                fs::create_dir(folder).unwrap();
                fs::write(folder.join("x.jpg"), content).unwrap();
            }
            let out = root.path().join("out");
            let put = |path: &Path| sort_into(&out, "cat", path, sorting).unwrap();
            assert_eq!(put(&a.join("x.jpg")), out.join("cat/x.jpg"));
            assert_eq!(put(&b.join("x.jpg")), out.join("cat/x-2.jpg"));
            assert_eq!(put(&a.join("x.jpg")), out.join("cat/x.jpg"));
            assert_eq!(put(&b.join("x.jpg")), out.join("cat/x-2.jpg"));
            let read = |name: &str| fs::read_to_string(out.join("cat").join(name)).unwrap();
            assert_eq!([read("x.jpg"), read("x-2.jpg")], ["first", "second"]);
            assert_eq!(fs::read_dir(out.join("cat")).unwrap().count(), 2);
        }
    }

    #[test]
    fn a_moved_image_is_in_one_place() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x.jpg");
        fs::write(&path, "image").unwrap();
        let place = sort_into(root.path(), "cat", &path, Sorting::Move).unwrap();
        assert!(!path.exists());
        assert_eq!(fs::read_to_string(&place).unwrap(), "image");
        // What is there under that name stays.
        fs::write(&path, "image").unwrap();
        let second = sort_into(root.path(), "cat", &path, Sorting::Move).unwrap();
        assert_eq!(second, root.path().join("cat/x-2.jpg"));
        assert!(!path.exists());
    }
}
