//! Data sets that are neither a folder of images nor a list: those with a name, and those of the hub.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dataset::{DatasetError, Notices, Picture, Sample, VALIDATION};
use super::held::Images;
use super::idx::IdxImages;
use super::input::is_image;
use super::{cifar, tables};
use crate::hub::{Hub, HubError, Repository};

/// Images that someone else has divided.
#[derive(Default)]
pub(super) struct Collection {
    pub classes: Vec<String>,
    pub train: Vec<Sample>,
    /// Empty where nobody said what to validate on.
    pub validation: Vec<Sample>,
    pub test: Vec<Sample>,
    /// Tiny pictures, of which nothing should be cut off.
    pub tiny: bool,
}

/// What a name stands for.
pub(super) enum Named {
    Collection(Collection),
    /// A folder as a person would have it.
    Folder(PathBuf),
}

/// The well-known data sets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Mnist,
    FashionMnist,
    Cifar10,
}

/// What parquet files of the hub are converted to, where they were something else.
const CONVERTED: &str = "refs/convert/parquet";

const FASHION: [&str; 10] = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
];

impl Known {
    pub const ALL: [Self; 3] = [Known::Mnist, Known::FashionMnist, Known::Cifar10];

    pub fn name(self) -> &'static str {
        match self {
            Known::Mnist => "mnist",
            Known::FashionMnist => "fashion-mnist",
            Known::Cifar10 => "cifar10",
        }
    }

    pub fn classes(self) -> Vec<String> {
        match self {
            Known::Mnist => (0..10).map(|digit: usize| digit.to_string()).collect(),
            Known::FashionMnist => FASHION.map(String::from).into(),
            Known::Cifar10 => cifar::CLASSES.map(String::from).into(),
        }
    }

    /// Pictures of it: all are to learn from or to be judged by.
    pub fn samples(
        self,
        images: Images,
        labels: &[u8],
        path: &str,
    ) -> Result<Vec<Sample>, DatasetError> {
        let images = Arc::new(images);
        let classes = self.classes().len();
        let sample = |(index, &label): (usize, &u8)| {
            let (images, label) = (images.clone(), usize::from(label));
            if label >= classes {
                let (path, class) = (path.to_string(), label.to_string());
                return Err(DatasetError::UnknownClass { path, class });
            }
            let picture = Picture::Held { images, index };
            Ok(Sample { picture, label })
        };
        labels.iter().enumerate().map(sample).collect()
    }

    /// Of files in a folder.
    fn on_disk(self, folder: &Path, notices: &mut Notices) -> Result<Collection, DatasetError> {
        let shown = folder.display().to_string();
        let raw = match self {
            Known::Mnist | Known::FashionMnist => {
                let part = |names| -> Result<Vec<Sample>, DatasetError> {
                    let images = IdxImages::open(folder, names)?;
                    let labels = images.labels.clone();
                    self.samples(Images::Grey(images), &labels, &shown)
                };
                part(["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]).and_then(|train| {
                    let test = part(["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])?;
                    Ok((train, test))
                })
            }
            Known::Cifar10 => cifar::find(folder)
                .map_err(DatasetError::from)
                .and_then(|folder| {
                    let part = |names: &[&'static str]| -> Result<Vec<Sample>, DatasetError> {
                        let (images, labels) = cifar::read(&folder, names)?;
                        self.samples(Images::Colour(images), &labels, &shown)
                    };
                    Ok((part(&cifar::TRAIN)?, part(&cifar::TEST)?))
                }),
        };
        let (train, validation) = match raw {
            Ok(parts) => parts,
            Err(error) => {
                // The hub's files of the same data, where there are any.
                let files = parquet_files(folder);
                if files.is_empty() {
                    return Err(error);
                }
                let mut collection = tables::read(&shown, &files, notices)?;
                let test = std::mem::take(&mut collection.test);
                if collection.validation.is_empty() {
                    collection.validation = test;
                }
                let tiny = true;
                return Ok(Collection { tiny, ..collection });
            }
        };
        Ok(Collection {
            classes: self.classes(),
            train,
            validation,
            tiny: true,
            ..Collection::default()
        })
    }
}

/// What `data` names; None where it is no name.
pub(super) fn named(
    data: &str,
    hub: &Hub,
    notices: &mut Notices,
) -> Result<Option<Named>, DatasetError> {
    if let Some(repository) = data.strip_prefix("hub:") {
        return of_hub(&Repository::dataset(repository)?, hub, notices).map(Some);
    }
    let (name, folder) = match data.split_once(':') {
        Some((name, folder)) => (name, Some(Path::new(folder))),
        None => (data, None),
    };
    let Some(known) = Known::ALL.into_iter().find(|known| known.name() == name) else {
        return Ok(None);
    };
    let collection = match folder {
        Some(folder) => known.on_disk(folder, notices)?,
        None if Path::new(data).exists() => return Ok(None),
        None => tables::known(known, hub)?,
    };
    Ok(Some(Named::Collection(collection)))
}

/// Parquet files below a folder, with their names from there.
fn parquet_files(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = walkdir::WalkDir::new(folder)
        .follow_links(true)
        .sort_by_file_name();
    let files = entries.into_iter().filter_map(Result::ok);
    files
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "parquet"))
        .map(|entry| {
            let name = entry.path().strip_prefix(folder).unwrap_or(entry.path());
            (name.to_string_lossy().replace('\\', "/"), entry.into_path())
        })
        .collect()
}

/// A data set of the hub: tables, in the form that its people uploaded or in the one that the hub
/// converts everything to; or image files in class folders.
fn of_hub(
    repository: &Repository,
    hub: &Hub,
    notices: &mut Notices,
) -> Result<Named, DatasetError> {
    let is_table = |file: &String| file.ends_with(".parquet");
    let (files, offline) = match hub.files(repository) {
        Ok(files) => (files, None),
        // What it was converted to may be here alone.
        Err(error @ HubError::Offline { .. }) => (Vec::new(), Some(error)),
        Err(error) => return Err(error.into()),
    };
    let mut tables = (repository.clone(), files.clone());
    tables.1.retain(is_table);
    if tables.1.is_empty() && tables::READ {
        let revision = CONVERTED.to_string();
        let converted = Repository {
            revision,
            ..repository.clone()
        };
        let all = match hub.files(&converted) {
            Ok(all) => all,
            // Not every data set is converted, and not all that is converted is here.
            Err(
                HubError::NoFile { .. } | HubError::NoRepository { .. } | HubError::Offline { .. },
            ) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        tables = (converted, all.into_iter().filter(is_table).collect());
    }
    tables.1.sort();
    let images: Vec<&String> = files.iter().filter(|f| is_image(Path::new(f))).collect();
    if !tables.1.is_empty() && (tables::READ || images.is_empty()) {
        let name = repository.to_string();
        if !tables::READ {
            return Err(tables::missing(&name, ""));
        }
        let (from, files) = tables;
        let files = one_configuration(&name, files, notices);
        let fetch = |file: String| Ok((file.clone(), hub.fetch(&from, &file)?));
        let files: Result<Vec<_>, HubError> = files.into_iter().map(fetch).collect();
        let collection = tables::read(&name, &files?, notices)?;
        return Ok(Named::Collection(collection));
    }
    if let Some(error) = offline {
        return Err(error.into());
    }
    if images.is_empty() {
        return Err(DatasetError::Table {
            name: repository.to_string(),
            reason: "neither parquet files nor images in it".into(),
        });
    }
    let mut root = PathBuf::new();
    for file in &images {
        // The folder of the whole, above what is the file's name there.
        let path = hub.fetch(repository, file)?;
        let depth = file.split('/').count();
        root = path.ancestors().nth(depth).unwrap_or(&path).to_path_buf();
    }
    Ok(Named::Folder(images_root(root, &images)))
}

/// Below what all images share, the folders begin that say something.
fn images_root(mut root: PathBuf, images: &[&String]) -> PathBuf {
    let mut paths: Vec<Vec<&str>> = images.iter().map(|f| f.split('/').collect()).collect();
    loop {
        let first = paths[0][0];
        let shared = paths.iter().all(|path| path.len() > 2 && path[0] == first);
        if !shared || split_of(first).is_some() {
            return root;
        }
        root.push(first);
        for path in &mut paths {
            path.remove(0);
        }
    }
}

/// The part of the data that a file's or folder's name says: `train`, VALIDATION's first, or `test`.
pub(super) fn split_of(name: &str) -> Option<&'static str> {
    let stem = name.split(['-', '_', '.']).next().unwrap_or_default();
    match stem.to_ascii_lowercase().as_str() {
        "train" | "training" => Some("train"),
        "dev" => Some(VALIDATION[0]),
        "test" | "testing" | "eval" => Some("test"),
        other => VALIDATION.contains(&other).then_some(VALIDATION[0]),
    }
}

/// Some data sets come in several configurations, a folder each: `default`, or the first.
fn one_configuration(name: &str, files: Vec<String>, notices: &mut Notices) -> Vec<String> {
    let configuration = |file: &str| {
        let (folder, _) = file.split_once('/')?;
        let plain = folder == "data" || split_of(folder).is_some();
        (!plain).then(|| folder.to_string())
    };
    let mut all: Vec<Option<String>> = files.iter().map(|f| configuration(f)).collect();
    all.sort();
    all.dedup();
    let default = Some("default".to_string());
    let chosen = if all.contains(&default) {
        default
    } else {
        all.first().cloned().flatten()
    };
    if all.len() > 1 {
        let names: Vec<&str> = all.iter().flatten().map(String::as_str).collect();
        let chosen = chosen.as_deref().unwrap_or("what is in no folder");
        notices.notes.push(format!(
            "{name} has the configurations {}: {chosen} is taken",
            names.join(", ")
        ));
    }
    let mut files = files;
    files.retain(|file| configuration(file) == chosen);
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_say_their_part() {
        for (name, expected) in [
            ("train-00000-of-00004.parquet", Some("train")),
            ("validation", Some("val")),
            ("valid_1.parquet", Some("val")),
            ("Test.parquet", Some("test")),
            ("0000.parquet", None),
            ("trainer", None),
        ] {
            assert_eq!(split_of(name), expected, "{name}");
        }
    }

    #[test]
    fn one_of_several_configurations_is_taken() {
        let chosen = |files: &[&str]| {
            let mut notices = Notices::default();
            let files = files.iter().map(|f| f.to_string()).collect();
            (
                one_configuration("x", files, &mut notices),
                notices.notes.len(),
            )
        };
        let split = ["data/train-0.parquet", "data/test-0.parquet"];
        assert_eq!(chosen(&split), (split.map(String::from).into(), 0));
        let files = ["b/train/0.parquet", "a/train/0.parquet"];
        assert_eq!(chosen(&files), (vec!["a/train/0.parquet".into()], 1));
        let files = ["a/train/0.parquet", "default/train/0.parquet"];
        assert_eq!(chosen(&files), (vec!["default/train/0.parquet".into()], 1));
    }

    #[test]
    fn folders_begin_below_what_all_share() {
        let root = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|f| f.to_string()).collect();
            images_root(PathBuf::from("r"), &files.iter().collect::<Vec<_>>())
        };
        assert_eq!(
            root(&["data/train/a/1.png", "data/test/b/2.png"]),
            Path::new("r/data")
        );
        assert_eq!(root(&["train/a/1.png", "train/b/2.png"]), Path::new("r"));
        assert_eq!(root(&["a/1.png", "b/2.png"]), Path::new("r"));
        assert_eq!(root(&["x/y/a/1.png", "x/y/b/2.png"]), Path::new("r/x/y"));
    }
}
