//! Labelled images: class folders, lists, MNIST's files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::idx::{IdxError, IdxImages};
use super::{Decoder, ImageError, Input, Inputs, Rgb};
use crate::data::random::{Purpose, generator};

/// Where a sample's picture comes from.
#[derive(Clone)]
pub enum Picture {
    File(PathBuf),
    /// Of a file of many grey pictures.
    Grey {
        images: Arc<IdxImages>,
        index: usize,
    },
}

impl Picture {
    /// As messages name it.
    pub fn name(&self) -> String {
        match self {
            Picture::File(path) => path.display().to_string(),
            Picture::Grey { index, .. } => format!("picture {index}"),
        }
    }

    /// Pixels, by the header, and bytes of the file: what decoding it will take.
    pub(super) fn read(&self, decoder: &Decoder) -> Result<Source<'_>, ImageError> {
        match self {
            Picture::File(path) => {
                let bytes = Input::File(path.clone()).read(super::MAX_FILE_BYTES)?;
                let (width, height) = decoder.dimensions(&bytes)?;
                Ok(Source::Bytes {
                    pixels: u64::from(width) * u64::from(height),
                    bytes,
                })
            }
            Picture::Grey { images, index } => Ok(Source::Grey(images, *index)),
        }
    }
}

/// A picture before it is decoded.
pub(super) enum Source<'a> {
    Bytes { pixels: u64, bytes: Vec<u8> },
    Grey(&'a IdxImages, usize),
}

impl Source<'_> {
    /// Memory that decoding takes.
    pub fn needed(&self) -> u64 {
        match self {
            // The decoder's picture and its conversion to RGB, and the file.
            Source::Bytes { pixels, bytes } => pixels * 7 + bytes.len() as u64,
            Source::Grey(..) => 0,
        }
    }

    pub fn decode(self, decoder: &Decoder) -> Result<Rgb, ImageError> {
        match self {
            Source::Bytes { bytes, .. } => decoder.decode(&bytes),
            Source::Grey(images, index) => Ok(images.picture(index)),
        }
    }
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
    /// Small grey pictures, of which nothing should be cut off.
    pub grey: bool,
}

/// Why a data set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error("{path}: {source}")]
    Io {
        path: String,
        source: std::io::Error,
    },
    #[error("{0}: {1}")]
    Image(String, String),
    #[error(transparent)]
    Idx(#[from] IdxError),
    #[error(
        "{0}: no such folder or file (give a folder of class folders, one with train/ and val/, a CSV with the columns path,label[,split], or mnist:DIR)"
    )]
    Missing(String),
    #[error(
        "{name}: give the folder that holds its files as {name}:DIR (train-images-idx3-ubyte and so on)"
    )]
    NoFolder { name: &'static str },
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

pub(super) const VALIDATION: [&str; 3] = ["val", "valid", "validation"];
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

impl Dataset {
    /// Finds the images of `data`: a folder of class folders; one with `train` and `val` (or
    /// `valid`, `validation`); a CSV with the columns path, label and perhaps split; `mnist:DIR`
    /// or `fashion-mnist:DIR`. Where nothing says what to validate on, the share `val_split` of
    /// every class is drawn with `seed`.
    ///
    /// # Errors
    /// Where there is nothing of the kind, or a class has no images.
    pub fn open(data: &str, val_split: f64, seed: u64) -> Result<Self, DatasetError> {
        let digits: fn(usize) -> String = |digit| digit.to_string();
        let clothes: fn(usize) -> String = |class| FASHION[class].to_string();
        let path = Path::new(data);
        for (name, class) in [("mnist", digits), ("fashion-mnist", clothes)] {
            if let Some(folder) = data.strip_prefix(name).and_then(|d| d.strip_prefix(':')) {
                return Self::idx(Path::new(folder), class);
            }
            if data == name && !path.exists() {
                return Err(DatasetError::NoFolder { name });
            }
        }
        let (labelled, validation) = if path.is_dir() {
            let sub = |name: &str| Some(path.join(name)).filter(|p| p.is_dir());
            match sub("train") {
                Some(train) => {
                    let validation = VALIDATION.iter().find_map(|name| sub(name));
                    let validation = validation.map(|v| class_folders(&v)).transpose()?;
                    (class_folders(&train)?, validation)
                }
                None => (class_folders(path)?, None),
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
        let (train, validation) = match validation {
            Some(validation) => (samples(labelled)?, samples(validation)?),
            None => split(samples(labelled)?, classes.len(), val_split, seed),
        };
        for (samples, what) in [(&train, "train on"), (&validation, "validate on")] {
            if samples.is_empty() {
                let path = data.to_string();
                return Err(DatasetError::Empty { path, what });
            }
        }
        Ok(Self {
            classes,
            train,
            validation,
            grey: false,
        })
    }

    fn idx(folder: &Path, class: fn(usize) -> String) -> Result<Self, DatasetError> {
        const CLASSES: usize = 10;
        let samples = |names| -> Result<Vec<Sample>, DatasetError> {
            let images = Arc::new(IdxImages::open(folder, names)?);
            let sample = |index: usize| {
                let label = usize::from(images.labels[index]);
                if label >= CLASSES {
                    return Err(DatasetError::UnknownClass {
                        path: folder.display().to_string(),
                        class: label.to_string(),
                    });
                }
                let images = images.clone();
                let picture = Picture::Grey { images, index };
                Ok(Sample { picture, label })
            };
            (0..images.len()).map(sample).collect()
        };
        Ok(Self {
            classes: (0..CLASSES).map(class).collect(),
            train: samples(["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])?,
            validation: samples(["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])?,
            grey: true,
        })
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

/// The images of every folder in `root`, all below it included.
pub(super) fn class_folders(root: &Path) -> Result<Labelled, DatasetError> {
    let shown = || root.display().to_string();
    let io = |source| DatasetError::Io {
        path: shown(),
        source,
    };
    let mut folders = BTreeMap::new();
    for entry in std::fs::read_dir(root).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
        if let Some(name) = name
            && !name.starts_with('.')
            && path.is_dir()
        {
            folders.insert(name, path);
        }
    }
    if folders.is_empty() {
        return Err(DatasetError::NoClasses(shown()));
    }
    let mut labelled = Vec::new();
    for (class, folder) in folders {
        for found in Inputs::new(vec![folder], None) {
            match found {
                Ok(Input::File(path)) => labelled.push((class.clone(), path)),
                Ok(Input::Stdin) => {}
                Err(error) => return Err(DatasetError::Image(error.name, error.reason)),
            }
        }
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

/// Every order is equally likely (Fisher and Yates).
pub(super) fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
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
        Dataset::open(root.path().to_str().unwrap(), part, seed)
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
            Dataset::open(list.to_str().unwrap(), 0.5, 0)
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
        let error = |data: &str| Dataset::open(data, 0.2, 0).err().unwrap().to_string();
        assert!(error("nowhere").contains("class folders"));
        assert!(error("mnist").contains("mnist:DIR"));
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
