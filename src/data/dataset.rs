//! Labelled images: class folders, lists, and data sets with a name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::cifar::CifarError;
use super::held::Images;
use super::idx::IdxError;
use super::input::is_image;
use super::named::{Collection, Named, named};
use super::twins::twins;
use super::{Decoder, ImageError, Input, InputError, Inputs, Rgb, Skipped};
use crate::data::random::{Purpose, generator};
use crate::hub::{Hub, HubError};

/// Where a sample's picture comes from.
#[derive(Clone)]
pub enum Picture {
    File(PathBuf),
    /// One of many in one file.
    Held {
        images: Arc<Images>,
        index: usize,
    },
}

impl Picture {
    /// As messages name it.
    pub fn name(&self) -> String {
        match self {
            Picture::File(path) => path.display().to_string(),
            Picture::Held { images, index } => images.name(*index),
        }
    }

    /// The picture itself.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn decode(&self, decoder: &Decoder) -> Result<Rgb, ImageError> {
        match self.read()? {
            Source::Bytes(bytes) => decoder.decode(&bytes),
            Source::Decoded(image) => Ok(image),
        }
    }

    /// What there is of it before it is decoded.
    pub(super) fn read(&self) -> Result<Source, ImageError> {
        match self {
            Picture::File(path) => {
                let bytes = Input::File(path.clone()).read(super::MAX_FILE_BYTES)?;
                Ok(Source::Bytes(bytes))
            }
            Picture::Held { images, index } => match &**images {
                Images::Encoded(images) => Ok(Source::Bytes(images.bytes(*index)?)),
                Images::Grey(images) => Ok(Source::Decoded(images.picture(*index))),
                Images::Colour(images) => Ok(Source::Decoded(images.picture(*index))),
            },
        }
    }
}

/// A picture before it is decoded.
pub(super) enum Source {
    Bytes(Vec<u8>),
    /// It never was encoded.
    Decoded(Rgb),
}

/// A picture and its class.
#[derive(Clone)]
pub struct Sample {
    pub picture: Picture,
    /// Index of the class.
    pub label: usize,
}

/// Labelled images, divided into those to learn from and those to judge by.
pub struct Dataset {
    /// In sorted order.
    pub classes: Vec<String>,
    pub train: Vec<Sample>,
    pub validation: Vec<Sample>,
    /// Tiny pictures, of which nothing should be cut off.
    pub tiny: bool,
    pub notices: Notices,
}

/// What a person should know of the data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notices {
    /// Places that could not be read; what else there is was taken.
    pub skipped: Vec<Skipped>,
    /// Whatever else is odd, a line each.
    pub notes: Vec<String>,
}

/// Why a data set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("{path}: {source}")]
    Io {
        path: String,
        source: std::io::Error,
    },
    #[error("{path}: {reason}{}", empty_advice(.reason))]
    EmptyClass { path: String, reason: String },
    #[error("{path}: its name is no valid UTF-8, and a class needs a name (rename the folder)")]
    ClassName { path: String },
    #[error(transparent)]
    Idx(#[from] IdxError),
    #[error(transparent)]
    Cifar(#[from] CifarError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error("{name}: {reason}")]
    Table { name: String, reason: String },
    #[error(
        "{name}: this build reads no parquet files (build sconce with --features datasets{or})"
    )]
    NoFeature { name: String, or: &'static str },
    #[error(
        "{0}: no such folder or file (give a folder of class folders, one with train/ and val/, a CSV with the columns path,label[,split], mnist, fashion-mnist, cifar10, or hub:OWNER/NAME)"
    )]
    Missing(String),
    #[error("{0}: no folders in it (put each class's images into a folder named after it)")]
    NoClasses(String),
    #[error("{path}: one class only, {class}; there must be two to tell apart")]
    OneClass { path: String, class: String },
    #[error("{path}: class {class} is not among those to train on")]
    UnknownClass { path: String, class: String },
    #[error(
        "{path}: no images left to {what} (change --val-split, or add images to the smallest classes)"
    )]
    Empty { path: String, what: &'static str },
    #[error("{path}: no images for --split {part}")]
    NoPart { path: String, part: &'static str },
    #[error("{path}, line {line}: {reason}")]
    Csv {
        path: String,
        line: u64,
        reason: String,
    },
}

fn empty_advice(reason: &str) -> &'static str {
    match reason {
        super::input::NO_IMAGES => " (put images into it, or remove it)",
        _ => "",
    }
}

pub(super) const VALIDATION: [&str; 3] = ["val", "valid", "validation"];

impl Dataset {
    /// Finds the images of `data`: a folder of class folders; one with `train` and `val` (or
    /// `valid`, `validation`); a CSV with the columns path, label and perhaps split; `mnist`,
    /// `fashion-mnist` or `cifar10`, each also `:DIR` for files on disk; or `hub:OWNER/NAME`. Where
    /// nothing says what to validate on, the share `val_split` of every class is drawn with `seed`.
    ///
    /// # Errors
    /// Where there is nothing of the kind, or a class has no images.
    pub fn open(data: &str, val_split: f64, seed: u64, hub: &Hub) -> Result<Self, DatasetError> {
        let mut notices = Notices::default();
        let path = match named(data, hub, &mut notices)? {
            Some(Named::Collection(collection)) => {
                return Self::of_collection(collection, data, val_split, seed, notices);
            }
            Some(Named::Folder(folder)) => folder,
            None => PathBuf::from(data),
        };
        let path = path.as_path();
        let (labelled, validation) = if path.is_dir() {
            let sub = |name: &str| Some(path.join(name)).filter(|p| p.is_dir());
            match sub("train") {
                Some(train) => {
                    let validation = VALIDATION.iter().find_map(|name| sub(name));
                    let validation = validation.map(|v| class_folders(&v, &mut notices));
                    let validation = validation.transpose()?;
                    (class_folders(&train, &mut notices)?, validation)
                }
                None => (class_folders(path, &mut notices)?, None),
            }
        } else if path.is_file() {
            let Rows {
                train, validation, ..
            } = from_csv(path)?;
            (train, Some(validation).filter(|v| !v.is_empty()))
        } else {
            return Err(DatasetError::Missing(data.to_string()));
        };
        let classes: BTreeSet<&String> = labelled.iter().map(|(class, _)| class).collect();
        let classes: Vec<String> = classes.into_iter().cloned().collect();
        if let [class] = classes.as_slice() {
            return Err(DatasetError::OneClass {
                path: data.to_string(),
                class: class.clone(),
            });
        }
        let index: BTreeMap<&String, usize> =
            classes.iter().enumerate().map(|(i, c)| (c, i)).collect();
        let samples = |labelled: Labelled| -> Result<Vec<Sample>, DatasetError> {
            let sample = |(class, path): (String, PathBuf)| match index.get(&class) {
                Some(&label) => Ok(Sample {
                    picture: Picture::File(path),
                    label,
                }),
                None => Err(DatasetError::UnknownClass {
                    path: data.to_string(),
                    class,
                }),
            };
            labelled.into_iter().map(sample).collect()
        };
        let train = samples(labelled)?;
        let validation = validation.map(samples).transpose()?;
        Self::divided(data, classes, train, validation, val_split, seed, notices)
    }

    fn of_collection(
        collection: Collection,
        data: &str,
        val_split: f64,
        seed: u64,
        notices: Notices,
    ) -> Result<Self, DatasetError> {
        let Collection {
            classes,
            train,
            validation,
            tiny,
            ..
        } = collection;
        let validation = Some(validation).filter(|v| !v.is_empty());
        let data = Self::divided(data, classes, train, validation, val_split, seed, notices)?;
        Ok(Self { tiny, ..data })
    }

    fn divided(
        data: &str,
        classes: Vec<String>,
        train: Vec<Sample>,
        validation: Option<Vec<Sample>>,
        val_split: f64,
        seed: u64,
        notices: Notices,
    ) -> Result<Self, DatasetError> {
        let (train, validation) = match validation {
            Some(validation) => (train, validation),
            None => split(train, classes.len(), val_split, seed),
        };
        for (samples, what) in [(&train, "train on"), (&validation, "validate on")] {
            if samples.is_empty() {
                let path = data.to_string();
                return Err(DatasetError::Empty { path, what });
            }
        }
        let mut dataset = Self {
            classes,
            train,
            validation,
            tiny: false,
            notices,
        };
        let notes = dataset.oddities();
        dataset.notices.notes.extend(notes);
        Ok(dataset)
    }

    /// What is odd about the classes and the division, a line each.
    fn oddities(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let mut by_lower: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for class in &self.classes {
            by_lower
                .entry(class.to_lowercase())
                .or_default()
                .push(class);
        }
        for alike in by_lower.values().filter(|alike| alike.len() > 1) {
            let alike = alike.join(" and ");
            notes.push(format!(
                "{alike} differ only in case, and are taken for two classes"
            ));
        }
        let mut judged = vec![false; self.classes.len()];
        for sample in &self.validation {
            judged[sample.label] = true;
        }
        let names = self.classes.iter().zip(judged);
        let unjudged = names
            .filter(|(_, judged)| !judged)
            .map(|(name, _)| name.as_str());
        let unjudged: Vec<&str> = unjudged.collect();
        if !unjudged.is_empty() {
            notes.push(format!(
                "no images to validate on of {} (the figures say nothing of them)",
                some(&unjudged)
            ));
        }
        let twins = twins(&self.train, &self.validation);
        if !twins.is_empty() {
            let named = |&(train, validation): &(usize, usize)| {
                let [train, validation] = [&self.train[train], &self.validation[validation]]
                    .map(|sample| sample.picture.name().escape_debug().to_string());
                format!("{validation} is {train}")
            };
            let shown: Vec<String> = twins.iter().map(named).collect();
            let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
            let (count, of) = (twins.len(), self.validation.len());
            notes.push(format!(
                "{count} of the {of} images to validate on are among those to train on, so the figures will flatter: {} (remove one of each)",
                some(&shown)
            ));
        }
        notes
    }

    /// How many images to train on each class has.
    pub fn class_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.classes.len()];
        for sample in &self.train {
            counts[sample.label] += 1;
        }
        counts
    }
}

/// Class names and paths, in order.
pub(super) type Labelled = Vec<(String, PathBuf)>;

/// The first few of many names.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The images of every folder in `root`, all below it included.
pub(super) fn class_folders(root: &Path, notices: &mut Notices) -> Result<Labelled, DatasetError> {
    let shown = || root.display().to_string();
    let io = |source| DatasetError::Io {
        path: shown(),
        source,
    };
    let mut folders = BTreeMap::new();
    let mut loose = 0;
    for entry in std::fs::read_dir(root).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let Some(name) = path.file_name() else {
            continue;
        };
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if !path.is_dir() {
            loose += usize::from(is_image(&path));
            continue;
        }
        let Some(name) = name.to_str() else {
            return Err(DatasetError::ClassName {
                path: path.display().to_string(),
            });
        };
        folders.insert(name.to_string(), path);
    }
    if folders.is_empty() {
        return Err(DatasetError::NoClasses(shown()));
    }
    if loose > 0 {
        notices.notes.push(format!(
            "{}: {loose} images lie beside the class folders, and are left out",
            shown()
        ));
    }
    let mut labelled = Vec::new();
    for (class, folder) in folders {
        let (before, mut failed) = (labelled.len(), Vec::new());
        for found in Inputs::new(vec![folder.clone()], None) {
            match found {
                Ok(Input::File(path)) => labelled.push((class.clone(), path)),
                Ok(Input::Stdin) => {}
                Err(InputError { name, reason }) => failed.push(Skipped { name, reason }),
            }
        }
        if labelled.len() == before {
            // A class that is missed without a word would be a model that does not know it.
            let Skipped { name: path, reason } = failed.swap_remove(0);
            return Err(DatasetError::EmptyClass { path, reason });
        }
        notices.skipped.append(&mut failed);
    }
    Ok(labelled)
}

/// A list's rows, by their split; all are to train on where it names none.
#[derive(Default)]
pub(super) struct Rows {
    pub train: Labelled,
    pub validation: Labelled,
    pub test: Labelled,
    pub has_splits: bool,
}

/// Reads a list; paths in it are relative to its folder.
pub(super) fn from_csv(path: &Path) -> Result<Rows, DatasetError> {
    let shown = path.display().to_string();
    let error = |line: u64, reason: String| DatasetError::Csv {
        path: shown.clone(),
        line,
        reason,
    };
    let broken = |e: csv::Error| {
        let line = e.position().map_or(0, csv::Position::line);
        error(line, e.to_string())
    };
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::All)
        .from_path(path)
        .map_err(broken)?;
    let header = reader.headers().map_err(broken)?.clone();
    let column = |name: &str| {
        let is = |title: &str| {
            title
                .trim_start_matches('\u{feff}')
                .eq_ignore_ascii_case(name)
        };
        header.iter().position(is)
    };
    let (Some(paths), Some(labels)) = (column("path"), column("label")) else {
        let reason = "expected the columns path,label or path,label,split".to_string();
        return Err(error(1, reason));
    };
    let splits = column("split");
    let root = path.parent().unwrap_or(Path::new(""));
    let mut rows = Rows {
        has_splits: splits.is_some(),
        ..Rows::default()
    };
    for record in reader.records() {
        let record = record.map_err(broken)?;
        let line = record.position().map_or(0, csv::Position::line);
        let (path, label) = (&record[paths], &record[labels]);
        if path.is_empty() || label.is_empty() {
            return Err(error(line, "a path and a label are needed".into()));
        }
        let row = (label.to_string(), root.join(path));
        match splits.map_or("train", |s| &record[s]) {
            "train" => rows.train.push(row),
            "test" => rows.test.push(row),
            split if VALIDATION.contains(&split) => rows.validation.push(row),
            other => {
                let reason = format!("split {other:?} is none of train, val, test");
                return Err(error(line, reason));
            }
        }
    }
    Ok(rows)
}

/// Draws the share `part` of every class to validate on, at least one of a class of two or more
/// and never all of it.
pub(super) fn split(
    samples: Vec<Sample>,
    classes: usize,
    part: f64,
    seed: u64,
) -> (Vec<Sample>, Vec<Sample>) {
    let mut by_class = vec![Vec::new(); classes];
    for (index, sample) in samples.iter().enumerate() {
        by_class[sample.label].push(index);
    }
    let mut drawn = vec![false; samples.len()];
    let mut rng = generator(seed, Purpose::Split, 0, 0);
    for members in &mut by_class {
        shuffle(members, &mut rng);
        let most = members.len().saturating_sub(1);
        let count = (members.len() as f64 * part).round() as usize;
        for &index in &members[..count.clamp(most.min(1), most)] {
            drawn[index] = true;
        }
    }
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (sample, drawn) in samples.into_iter().zip(drawn) {
        if drawn { &mut validation } else { &mut train }.push(sample);
    }
    (train, validation)
}

/// What tells labelled images from others: their classes, their names (those below `root` without it)
/// and their labels, part by part (FNV-1a).
pub fn fingerprint(root: &str, classes: &[String], parts: &[&[Sample]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes.iter().chain(&[0]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    classes.iter().for_each(|c| eat(c.as_bytes()));
    for samples in parts {
        eat(&samples.len().to_le_bytes());
        for sample in *samples {
            let name = sample.picture.name();
            eat(name.strip_prefix(root).unwrap_or(&name).as_bytes());
            eat(&sample.label.to_le_bytes());
        }
    }
    hash
}

/// Every order is equally likely (Fisher and Yates).
pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, rng.random_range(0..=last));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"x").unwrap();
        }
        root
    }

    fn open(root: &tempfile::TempDir, part: f64, seed: u64) -> Result<Dataset, DatasetError> {
        Dataset::open(
            root.path().to_str().unwrap(),
            part,
            seed,
            &Hub::new().offline(),
        )
    }

    fn names(samples: &[Sample]) -> Vec<(String, usize)> {
        let name = |s: &Sample| {
            let name = s.picture.name();
            let file = Path::new(&name).file_name().unwrap();
            (file.to_string_lossy().into_owned(), s.label)
        };
        samples.iter().map(name).collect()
    }

    #[test]
    fn folders_are_classes_and_the_split_follows_the_seed() {
        let mut files: Vec<String> = (0..10).map(|i| format!("rose/{i}.png")).collect();
        files.extend((0..5).map(|i| format!("daisy/deep/er/{i}.jpg")));
        files.extend(["tulip/a.png", "tulip/b.png", "lily/only.png"].map(String::from));
        files.extend([".git/x.png", "loose.png"].map(String::from));
        let root = folder(&files.iter().map(String::as_str).collect::<Vec<_>>());
        let data = open(&root, 0.2, 1).unwrap();
        assert_eq!(data.classes, ["daisy", "lily", "rose", "tulip"]);
        assert_eq!(data.class_counts(), [4, 1, 8, 1]);
        assert_eq!(data.validation.len(), 4);
        let again = open(&root, 0.2, 1).unwrap();
        assert_eq!(names(&data.validation), names(&again.validation));
        let other = open(&root, 0.2, 2).unwrap();
        assert_ne!(names(&data.validation), names(&other.validation));
    }

    #[test]
    fn train_and_validation_folders_are_taken_as_they_are() {
        let root = folder(&[
            "train/a/1.png",
            "train/b/2.png",
            "valid/b/3.png",
            "test/c/4.png",
        ]);
        let data = open(&root, 0.2, 0).unwrap();
        assert_eq!(
            names(&data.train),
            [("1.png".into(), 0), ("2.png".into(), 1)]
        );
        assert_eq!(names(&data.validation), [("3.png".into(), 1)]);
        fs::create_dir_all(root.path().join("valid/z")).unwrap();
        fs::write(root.path().join("valid/z/5.png"), b"x").unwrap();
        let error = open(&root, 0.2, 0).err().unwrap().to_string();
        assert!(error.contains("class z"), "{error}");
    }

    #[test]
    fn lists_name_paths_labels_and_splits() {
        let root = folder(&["x.png"]);
        let list = root.path().join("list.csv");
        let read = |text: &str| {
            fs::write(&list, text).unwrap();
            Dataset::open(list.to_str().unwrap(), 0.5, 0, &Hub::new().offline())
        };
        let data = read(
            "split,label,path\ntrain,b,1.png\nval,a,2.png\ntrain,a,\"3, 4.png\"\ntest,q,5.png\n",
        );
        let data = data.unwrap();
        assert_eq!(data.classes, ["a", "b"]);
        assert_eq!(
            names(&data.train),
            [("1.png".into(), 1), ("3, 4.png".into(), 0)]
        );
        assert_eq!(names(&data.validation), [("2.png".into(), 0)]);
        let data = read("path,label\n1.png,a\n2.png,b\n3.png,a\n4.png,b\n").unwrap();
        assert_eq!((data.train.len(), data.validation.len()), (2, 2));
        for (text, expected) in [
            ("file,class\n1.png,a\n", "expected the columns"),
            ("path,label,split\n1.png,a,foo\n", "line 2: split \"foo\""),
            ("path,label\n,a\n", "line 2: a path"),
            ("path,label\n1.png\n", "line 2"),
            ("path,label\n1.png,a\n2.png,a\n", "one class only"),
        ] {
            let error = read(text).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_is_no_data_set_says_what_would_be() {
        let hub = Hub::new().offline();
        let error = |data: &str| Dataset::open(data, 0.2, 0, &hub).err().unwrap().to_string();
        assert!(error("nowhere").contains("class folders"));
        let root = folder(&["a.png"]);
        assert!(
            open(&root, 0.2, 0)
                .err()
                .unwrap()
                .to_string()
                .contains("no folders")
        );
        let root = folder(&["a/1.png", "b/note.txt"]);
        let error = open(&root, 0.2, 0).err().unwrap().to_string();
        assert!(error.contains("b: no images"), "{error}");
    }
}
