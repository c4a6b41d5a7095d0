//! Labelled images to judge a network by.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::dataset::{Labelled, VALIDATION, class_folders, from_csv, split};
use super::named::{Collection, Named, named};
use super::{DatasetError, Notices, Picture, Sample};
use crate::hub::Hub;

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Train,
    Validation,
    Test,
    All,
}

/// Images and what they show.
pub struct LabelledImages {
    /// Names that the data give the classes, in sorted order.
    pub classes: Vec<String>,
    /// With labels that are indices into `classes`.
    pub samples: Vec<Sample>,
    pub notices: Notices,
}

/// What a folder or a list says of its parts; nothing where all images are in one heap.
struct Parts {
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    /// Whether the data themselves say which part an image belongs to.
    divided: bool,
}

impl LabelledImages {
    /// Finds the images of `data`, which takes the forms of [`super::Dataset::open`]; a single class will
    /// do. Without `part`, those to validate on where the data themselves say which these are,
    /// else those to test on, else all. The validation part of data that do not say it is the one
    /// that training with `val_split` and `seed` would draw.
    ///
    /// # Errors
    /// As [`super::Dataset::open`], or where the part has no images.
    pub fn open(
        data: &str,
        part: Option<Part>,
        val_split: f64,
        seed: u64,
        hub: &Hub,
    ) -> Result<Self, DatasetError> {
        let mut notices = Notices::default();
        let path = match named(data, hub, &mut notices)? {
            Some(Named::Collection(collection)) => {
                let mut images = Self::of_collection(collection, part, val_split, seed);
                images.notices = notices;
                return images.checked(data, part.unwrap_or(Part::All));
            }
            Some(Named::Folder(folder)) => folder,
            None => PathBuf::from(data),
        };
        let path = path.as_path();
        let parts = if path.is_dir() {
            folders(path, &mut notices)?
        } else if path.is_file() {
            let rows = from_csv(path)?;
            Parts {
                train: rows.train,
                validation: rows.validation,
                test: rows.test,
                divided: rows.has_splits,
            }
        } else {
            return Err(DatasetError::Missing(data.to_string()));
        };
        let part = part.unwrap_or(match &parts {
            p if !p.divided => Part::All,
            p if !p.validation.is_empty() => Part::Validation,
            p if !p.test.is_empty() => Part::Test,
            _ => Part::All,
        });
        // What training would draw, it draws from the classes that it would know.
        let drawn = parts.validation.is_empty() && matches!(part, Part::Train | Part::Validation);
        let labelled = match part {
            Part::Train | Part::Validation if drawn => parts.train,
            Part::Train => parts.train,
            Part::Validation => parts.validation,
            Part::Test => parts.test,
            Part::All => [parts.train, parts.validation, parts.test].concat(),
        };
        let mut images = Self::new(labelled, notices);
        if drawn {
            let (train, validation) = split(images.samples, images.classes.len(), val_split, seed);
            images.samples = match part {
                Part::Train => train,
                _ => validation,
            };
        }
        images.checked(data, part)
    }

    fn of_collection(
        collection: Collection,
        part: Option<Part>,
        val_split: f64,
        seed: u64,
    ) -> Self {
        let Collection {
            classes,
            mut train,
            mut validation,
            test,
            ..
        } = collection;
        let part = part.unwrap_or(match (validation.is_empty(), test.is_empty()) {
            (false, _) => Part::Validation,
            (true, false) => Part::Test,
            (true, true) => Part::All,
        });
        if validation.is_empty() && matches!(part, Part::Train | Part::Validation) {
            (train, validation) = split(train, classes.len(), val_split, seed);
        }
        let samples = match part {
            Part::Train => train,
            Part::Validation => validation,
            // What is there to test on is what there is to validate on.
            Part::Test if test.is_empty() => validation,
            Part::Test => test,
            Part::All => train.into_iter().chain(validation).chain(test).collect(),
        };
        Self {
            classes,
            samples,
            notices: Notices::default(),
        }
    }

    fn new(labelled: Labelled, notices: Notices) -> Self {
        let classes: BTreeSet<&String> = labelled.iter().map(|(class, _)| class).collect();
        let classes: Vec<String> = classes.into_iter().cloned().collect();
        let index: BTreeMap<&String, usize> =
            classes.iter().enumerate().map(|(i, c)| (c, i)).collect();
        let samples = labelled.iter().map(|(class, path)| Sample {
            picture: Picture::File(path.clone()),
            label: index[class],
        });
        let samples = samples.collect();
        Self {
            classes,
            samples,
            notices,
        }
    }

    fn checked(self, data: &str, part: Part) -> Result<Self, DatasetError> {
        if self.samples.is_empty() {
            return Err(DatasetError::NoPart {
                path: data.to_string(),
                part: match part {
                    Part::Train => "train",
                    Part::Validation => "val",
                    Part::Test => "test",
                    Part::All => "all",
                },
            });
        }
        Ok(self)
    }
}

fn folders(root: &Path, notices: &mut Notices) -> Result<Parts, DatasetError> {
    // A folder of class folders; of one that holds images, `test` may be a class.
    let mut below = |name: &str| {
        let folder = root.join(name);
        let holds_folders = || {
            let mut entries = std::fs::read_dir(&folder).ok()?.filter_map(Result::ok);
            entries.find(|entry| entry.path().is_dir())
        };
        let found = folder.is_dir() && (name == "train" || holds_folders().is_some());
        found.then(|| class_folders(&folder, notices)).transpose()
    };
    let train = below("train")?;
    let validation = match VALIDATION.iter().find(|name| root.join(name).is_dir()) {
        Some(name) => below(name)?,
        None => None,
    };
    let test = below("test")?;
    if train.is_none() && validation.is_none() && test.is_none() {
        return Ok(Parts {
            train: class_folders(root, notices)?,
            validation: Vec::new(),
            test: Vec::new(),
            divided: false,
        });
    }
    Ok(Parts {
        train: train.unwrap_or_default(),
        validation: validation.unwrap_or_default(),
        test: test.unwrap_or_default(),
        divided: true,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::Dataset;

    fn hub() -> Hub {
        Hub::new().offline()
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

    fn names(data: &Path, part: Option<Part>) -> Vec<String> {
        let images = LabelledImages::open(data.to_str().unwrap(), part, 0.5, 3, &hub()).unwrap();
        let name = |s: &Sample| {
            let path = s.picture.name();
            let file = Path::new(&path).file_stem().unwrap();
            format!("{} {}", images.classes[s.label], file.to_str().unwrap())
        };
        images.samples.iter().map(name).collect()
    }

    #[test]
    fn a_heap_is_judged_whole_and_divided_data_by_their_validation_part() {
        let heap = folder(&["b/1.png", "b/2.png", "a/3.png", "a/4.png"]);
        assert_eq!(names(heap.path(), None), ["a 3", "a 4", "b 1", "b 2"]);
        let drawn = names(heap.path(), Some(Part::Validation));
        let data = Dataset::open(heap.path().to_str().unwrap(), 0.5, 3, &hub()).unwrap();
        let expected = data.validation.iter().map(|s| s.picture.name());
        let expected: Vec<String> = expected.collect();
        assert_eq!(drawn.len(), 2);
        for (drawn, expected) in drawn.iter().zip(expected) {
            let (_, stem) = drawn.split_once(' ').unwrap();
            assert!(expected.ends_with(&format!("{stem}.png")));
        }
        let parts = folder(&[
            "train/a/1.png",
            "train/b/2.png",
            "val/b/3.png",
            "test/c/4.png",
        ]);
        assert_eq!(names(parts.path(), None), ["b 3"]);
        assert_eq!(names(parts.path(), Some(Part::Train)), ["a 1", "b 2"]);
        assert_eq!(names(parts.path(), Some(Part::Test)), ["c 4"]);
        assert_eq!(
            names(parts.path(), Some(Part::All)),
            ["a 1", "b 2", "b 3", "c 4"]
        );
        // One class is enough, and a class may be called test.
        let one = folder(&["test/4.png"]);
        assert_eq!(names(one.path(), None), ["test 4"]);
    }

    #[test]
    fn a_list_is_judged_by_its_rows_of_a_split() {
        let root = folder(&[]);
        let list = root.path().join("list.csv");
        fs::write(
            &list,
            "path,label,split\n1.png,a,train\n2.png,b,test\n3.png,a,val\n",
        )
        .unwrap();
        assert_eq!(names(&list, None), ["a 3"]);
        assert_eq!(names(&list, Some(Part::Test)), ["b 2"]);
        fs::write(&list, "path,label\n1.png,a\n2.png,b\n").unwrap();
        assert_eq!(names(&list, None), ["a 1", "b 2"]);
        let data = list.to_str().unwrap();
        let error = LabelledImages::open(data, Some(Part::Test), 0.5, 0, &hub());
        let error = error.err().unwrap().to_string();
        assert!(error.contains("no images for --split test"), "{error}");
    }
}
