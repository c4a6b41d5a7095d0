//! Checksums.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What is known of a file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The beginning of its SHA-256, or all of it, in lower-case hexadecimal digits.
    Sha256(String),
    /// git's name for it: the SHA-1 of its length and its bytes.
    Git(String),
    Unknown,
}

impl Checksum {
    /// The hub's etags: the SHA-256 of large files, git's names of the others.
    pub fn of_etag(etag: &str) -> Self {
        let hexadecimal = etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match etag.len() {
            64 if hexadecimal => Checksum::Sha256(etag.into()),
            40 if hexadecimal => Checksum::Git(etag.into()),
            _ => Checksum::Unknown,
        }
    }

    /// torchvision's file names: `resnet18-f37072fd.pth`.
    pub fn of_file_name(name: &str) -> Self {
        let stem = name.split_once('.').map_or(name, |_| {
            name.rsplit_once('.').map_or(name, |(stem, _)| stem)
        });
        match stem.rsplit_once('-') {
            Some((_, hash))
                if hash.len() >= 8
                    && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) =>
            {
                Checksum::Sha256(hash.into())
            }
            _ => Checksum::Unknown,
        }
    }

    /// Compares with a file; None where they agree, else both sides.
    pub fn differs(&self, path: &Path) -> io::Result<Option<String>> {
        let (name, expected, actual) = match self {
            Checksum::Unknown => return Ok(None),
            Checksum::Sha256(expected) => ("SHA-256", expected, digest(path, Sha256::new())?),
            Checksum::Git(expected) => {
                let mut hasher = Sha1::new();
                let length = path.metadata()?.len();
                hasher.update(format!("blob {length}\0"));
                ("git's SHA-1", expected, digest(path, hasher)?)
            }
        };
        Ok((!actual.starts_with(expected))
            .then(|| format!("its {name} is {actual}, not {expected}")))
    }
}

fn digest(path: &Path, mut hasher: impl Digest) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let bytes = hasher.finalize();
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_come_from_etags_and_file_names() {
        let sha256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889";
        assert_eq!(Checksum::of_etag(sha256), Checksum::Sha256(sha256.into()));
        let git = "9daeafb9864cf43055ae93beb0afd6c7d144bfa4";
        assert_eq!(Checksum::of_etag(git), Checksum::Git(git.into()));
        assert_eq!(Checksum::of_etag("some-etag"), Checksum::Unknown);
        for (name, hash) in [
            ("resnet18-f37072fd.pth", "f37072fd"),
            ("shufflenetv2_x0.5-f707e7126e.pth", "f707e7126e"),
        ] {
            assert_eq!(Checksum::of_file_name(name), Checksum::Sha256(hash.into()));
        }
        for name in [
            "weights.pth",
            "resnet-18.pth",
            "a-b0353104-b.pth",
            "abcdef01.pth",
        ] {
            assert_eq!(Checksum::of_file_name(name), Checksum::Unknown, "{name}");
        }
    }

    #[test]
    fn a_file_is_compared_with_its_checksum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "test\n").unwrap();
        // What `git hash-object` and `sha256sum` say.
        let git = "9daeafb9864cf43055ae93beb0afd6c7d144bfa4";
        assert_eq!(Checksum::Git(git.into()).differs(&path).unwrap(), None);
        assert_eq!(
            Checksum::Sha256("f2ca1bb6c7e907d0".into())
                .differs(&path)
                .unwrap(),
            None
        );
        let other = Checksum::Sha256("f2ca1bb6c7e907d1".into());
        assert!(
            other
                .differs(&path)
                .unwrap()
                .unwrap()
                .contains("f2ca1bb6c7e907d0")
        );
    }
}
