//! Tables of images, as the hub keeps its data sets: parquet files with a column of encoded images and
//! one of classes. Reading them is the cargo feature `datasets`.

use super::DatasetError;

#[cfg(feature = "datasets")]
pub(super) use with::{known, read};
#[cfg(not(feature = "datasets"))]
pub(super) use without::{known, read};

/// Whether this build reads tables.
pub(super) const READ: bool = cfg!(feature = "datasets");

/// That it does not; `or` is another way, in words that go on.
pub(super) fn missing(name: &str, or: &'static str) -> DatasetError {
    let name = name.to_string();
    DatasetError::NoFeature { name, or }
}

#[cfg(not(feature = "datasets"))]
mod without {
    use std::path::PathBuf;

    use super::super::dataset::{DatasetError, Notices};
    use super::super::named::{Collection, Known};
    use super::missing;
    use crate::hub::Hub;

    pub fn read(
        name: &str,
        _files: &[(String, PathBuf)],
        _notices: &mut Notices,
    ) -> Result<Collection, DatasetError> {
        Err(missing(name, ""))
    }

    pub fn known(known: Known, _hub: &Hub) -> Result<Collection, DatasetError> {
        let or = match known {
            Known::Mnist => ", or give the folder of its idx files as mnist:DIR",
            Known::FashionMnist => ", or give the folder of its idx files as fashion-mnist:DIR",
            Known::Cifar10 => ", or give the folder of its binary files as cifar10:DIR",
        };
        Err(missing(known.name(), or))
    }
}

#[cfg(feature = "datasets")]
mod with {
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::thread;

    use candle_core::Tensor;
    use candle_datasets::vision;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::{Field, Row};
    use parquet::schema::types::Type;
    use serde_json::Value;

    use super::super::dataset::{DatasetError, Notices, Picture, Sample};
    use super::super::held::{ColourImages, EncodedImages, Images};
    use super::super::idx::IdxImages;
    use super::super::named::{Collection, Known, split_of};
    use super::super::pipeline::THREAD_NAME;
    use crate::hub::{Hub, Repository, RepositoryKind};

    /// A well-known data set from the hub, by candle-datasets' readers. They fetch nothing: the files
    /// are put where they look first, by transfers that are resumed and checked.
    pub fn known(known: Known, hub: &Hub) -> Result<Collection, DatasetError> {
        let (id, configuration) = match known {
            Known::Mnist => ("ylecun/mnist", "mnist"),
            Known::FashionMnist => ("zalando-datasets/fashion_mnist", "fashion_mnist"),
            Known::Cifar10 => ("cifar10", "plain_text"),
        };
        let repository = Repository {
            kind: RepositoryKind::Dataset,
            id: id.into(),
            revision: "refs/convert/parquet".into(),
        };
        for part in ["test", "train"] {
            hub.fetch(&repository, &format!("{configuration}/{part}/0000.parquet"))?;
        }
        let broken = |reason: String| DatasetError::Table {
            name: repository.to_string(),
            reason,
        };
        let load = move || match known {
            Known::Mnist => vision::mnist::load(),
            Known::FashionMnist => vision::fashion_mnist::load(),
            Known::Cifar10 => vision::cifar::load(),
        };
        let loaded = guarded(load).ok_or_else(|| {
            broken("a picture in it is broken (remove it from the cache, and try again)".into())
        })?;
        let device = |e: candle_core::Error| {
            let text = e.to_string();
            broken(text.lines().next().unwrap_or_default().into())
        };
        let vision::Dataset {
            train_images,
            train_labels,
            test_images,
            test_labels,
            ..
        } = loaded.map_err(device)?;
        let part = |images: Tensor, labels: Tensor| -> Result<Vec<Sample>, DatasetError> {
            let labels = labels.to_vec1::<u8>().map_err(device)?;
            let images = match known {
                Known::Mnist | Known::FashionMnist => {
                    let pixels = bytes(&images).map_err(device)?;
                    Images::Grey(IdxImages::of_pixels([28, 28], pixels, labels.clone()))
                }
                // candle's are [N, 3, width, height].
                Known::Cifar10 => Images::Colour(ColourImages {
                    width: 32,
                    height: 32,
                    planes: images
                        .transpose(2, 3)
                        .and_then(|images| bytes(&images))
                        .map_err(device)?,
                }),
            };
            known.samples(images, &labels, id)
        };
        Ok(Collection {
            classes: known.classes(),
            validation: part(test_images, test_labels)?,
            train: part(train_images, train_labels)?,
            tiny: true,
            ..Collection::default()
        })
    }

    /// Values from 0 to 1 as they were in 8 bits, a part after the other: there are many.
    fn bytes(images: &Tensor) -> candle_core::Result<Vec<u8>> {
        const PART: usize = 1000;
        let count = images.dim(0)?;
        let mut bytes = Vec::with_capacity(images.elem_count());
        for start in (0..count).step_by(PART) {
            let part = images.narrow(0, start, PART.min(count - start))?;
            let values = part.flatten_all()?.to_vec1::<f32>()?;
            bytes.extend(values.iter().map(|value| (value * 255.0).round() as u8));
        }
        Ok(bytes)
    }

    /// Runs what panics on broken files; None where it did. Nothing is printed: the thread's name
    /// is one of a decoder's.
    fn guarded<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let thread = thread::Builder::new().name(format!("{THREAD_NAME}-table"));
        thread.spawn(work).ok()?.join().ok()
    }

    /// What a row says of its class.
    enum Label {
        Number(i64),
        Name(String),
    }

    /// Which columns count.
    struct Columns {
        image: String,
        label: String,
        /// The classes' names, where the numbers stand for some.
        names: Option<Vec<String>>,
    }

    /// One part of the data.
    struct Part {
        split: &'static str,
        images: EncodedImages,
        labels: Vec<Label>,
    }

    /// Reads parquet files, given with the names that say which part of the data each belongs to;
    /// what says nothing is to train on.
    pub fn read(
        name: &str,
        files: &[(String, PathBuf)],
        notices: &mut Notices,
    ) -> Result<Collection, DatasetError> {
        let mut parts: Vec<Part> = Vec::new();
        let mut names = None;
        let (mut unlabelled, mut absent) = (0, 0);
        for (file, path) in files {
            let split = file.split('/').rev().find_map(split_of).unwrap_or("train");
            let what = format!("{name}/{file}");
            let at = match parts.iter().position(|part| part.split == split) {
                Some(at) => at,
                None => {
                    let images = EncodedImages::new(format!("{name}, {split}"));
                    let images = images.map_err(|source| DatasetError::Io {
                        path: "a temporary file".into(),
                        source,
                    })?;
                    parts.push(Part {
                        split,
                        images,
                        labels: Vec::new(),
                    });
                    parts.len() - 1
                }
            };
            let mut part = parts.swap_remove(at);
            let broken = |reason: String| DatasetError::Table {
                name: what.clone(),
                reason,
            };
            let path = path.clone();
            let read = guarded(move || -> Result<_, String> {
                let (columns, counts) = read_file(&path, &mut part)?;
                Ok((columns, counts, part))
            });
            let read = read.ok_or_else(|| broken("a broken parquet file".into()))?;
            let (columns, counts, part) = read.map_err(broken)?;
            names = names.or(columns.names);
            unlabelled += counts[0];
            absent += counts[1];
            parts.push(part);
        }
        for (count, what) in [
            (unlabelled, "have no class"),
            (absent, "have no image in them"),
        ] {
            if count > 0 {
                let note = format!("{name}: {count} rows {what}, and are left out");
                notices.notes.push(note);
            }
        }
        collect(name, parts, names)
    }

    /// Gives the labels numbers from 0 and the parts their places.
    fn collect(
        name: &str,
        parts: Vec<Part>,
        names: Option<Vec<String>>,
    ) -> Result<Collection, DatasetError> {
        let labels = || parts.iter().flat_map(|part| &part.labels);
        let numbers = labels().filter_map(|label| match label {
            Label::Number(number) => Some(*number),
            Label::Name(_) => None,
        });
        let numbers: BTreeSet<i64> = numbers.collect();
        let words = labels().filter_map(|label| match label {
            Label::Number(_) => None,
            Label::Name(name) => Some(name.clone()),
        });
        let words: BTreeSet<String> = words.collect();
        let (classes, numbers): (Vec<String>, Vec<i64>) = match names {
            Some(names) => {
                let numbers = (0..names.len() as i64).collect();
                (names, numbers)
            }
            None if words.is_empty() => (
                numbers.iter().map(i64::to_string).collect(),
                numbers.into_iter().collect(),
            ),
            None => (words.into_iter().collect(), Vec::new()),
        };
        if let [class] = classes.as_slice() {
            let (path, class) = (name.to_string(), class.clone());
            return Err(DatasetError::OneClass { path, class });
        }
        let mut collection = Collection {
            classes,
            ..Collection::default()
        };
        for Part {
            split,
            images,
            labels,
        } in parts
        {
            let images = Arc::new(Images::Encoded(images));
            let mut samples = Vec::with_capacity(labels.len());
            for (index, label) in labels.into_iter().enumerate() {
                let (found, shown) = match label {
                    Label::Number(number) => {
                        (numbers.binary_search(&number).ok(), number.to_string())
                    }
                    Label::Name(name) => (collection.classes.binary_search(&name).ok(), name),
                };
                let label = found.ok_or_else(|| DatasetError::UnknownClass {
                    path: name.to_string(),
                    class: shown,
                })?;
                let images = images.clone();
                let picture = Picture::Held { images, index };
                samples.push(Sample { picture, label });
            }
            match split {
                "train" => collection.train = samples,
                "test" => collection.test = samples,
                _ => collection.validation = samples,
            }
        }
        Ok(collection)
    }

    /// Adds a file's rows to a part. Gives how many rows had no class, and how many no image.
    fn read_file(path: &Path, part: &mut Part) -> Result<(Columns, [usize; 2]), String> {
        let text = |e: parquet::errors::ParquetError| e.to_string();
        let file = File::open(path).map_err(|e| e.to_string())?;
        let reader = SerializedFileReader::new(file).map_err(text)?;
        let columns = columns(&reader)?;
        let schema = reader.metadata().file_metadata().schema();
        let wanted = schema.get_fields().iter().filter(|field| {
            let name = field.name();
            name == columns.image || name == columns.label
        });
        let projection = Type::group_type_builder(schema.name())
            .with_fields(wanted.cloned().collect())
            .build()
            .map_err(text)?;
        let mut counts = [0; 2];
        for row in reader.get_row_iter(Some(projection)).map_err(text)? {
            let row: Row = row.map_err(text)?;
            let (mut label, mut image) = (None, None);
            for (name, field) in row.get_column_iter() {
                if *name == columns.label {
                    label = label_of(field);
                } else if *name == columns.image {
                    image = image_of(field);
                }
            }
            match (label, image) {
                (None, _) => counts[0] += 1,
                (_, None) => counts[1] += 1,
                (Some(label), Some(image)) => {
                    part.images.push(image).map_err(|e| e.to_string())?;
                    part.labels.push(label);
                }
            }
        }
        Ok((columns, counts))
    }

    fn label_of(field: &Field) -> Option<Label> {
        let number = match field {
            Field::Str(name) => return Some(Label::Name(name.clone())),
            Field::Long(number) => *number,
            Field::Int(number) => i64::from(*number),
            Field::Short(number) => i64::from(*number),
            Field::Byte(number) => i64::from(*number),
            Field::ULong(number) => i64::try_from(*number).ok()?,
            Field::UInt(number) => i64::from(*number),
            Field::UShort(number) => i64::from(*number),
            Field::UByte(number) => i64::from(*number),
            Field::Bool(yes) => i64::from(*yes),
            _ => return None,
        };
        // -1 is the hub's word for no class.
        (number >= 0).then_some(Label::Number(number))
    }

    fn image_of(field: &Field) -> Option<&[u8]> {
        match field {
            Field::Bytes(bytes) => Some(bytes.data()),
            Field::Group(row) => row.get_column_iter().find_map(|(name, field)| match field {
                Field::Bytes(bytes) if name == "bytes" => Some(bytes.data()),
                _ => None,
            }),
            _ => None,
        }
    }

    /// The columns of images and of classes: as the hub's description in the file says, else by their
    /// names.
    fn columns(reader: &SerializedFileReader<File>) -> Result<Columns, String> {
        let metadata = reader.metadata().file_metadata();
        let fields: Vec<&str> = metadata
            .schema()
            .get_fields()
            .iter()
            .map(|f| f.name())
            .collect();
        let described = metadata.key_value_metadata().into_iter().flatten();
        let described = described
            .filter(|entry| entry.key == "huggingface")
            .find_map(|entry| serde_json::from_str::<Value>(entry.value.as_deref()?).ok());
        let features = described.as_ref().map(|d| &d["info"]["features"]);
        let of_type = |kind: &str| {
            let is = |name: &&&str| features.is_some_and(|f| f[**name]["_type"] == kind);
            fields.iter().filter(is).copied().collect::<Vec<_>>()
        };
        let first_of = |preferred: &[&str], among: &[&str]| {
            let named = |name: &&&str| among.contains(*name);
            let found = preferred.iter().find(named).copied();
            found.map(String::from)
        };
        let expected = || {
            let found = fields.join(", ");
            format!(
                "no column of images and one of classes among {found} (expected image and label)"
            )
        };
        const IMAGES: [&str; 5] = ["image", "img", "images", "picture", "photo"];
        const LABELS: [&str; 6] = [
            "label",
            "labels",
            "class",
            "fine_label",
            "target",
            "category",
        ];
        let images = of_type("Image");
        let image = first_of(&IMAGES, &images)
            .or_else(|| images.first().map(|name| name.to_string()))
            .or_else(|| first_of(&IMAGES, &fields))
            .ok_or_else(expected)?;
        let labels = of_type("ClassLabel");
        let label = first_of(&LABELS, &labels)
            .or_else(|| labels.first().map(|name| name.to_string()))
            .or_else(|| first_of(&LABELS, &fields))
            .ok_or_else(expected)?;
        let names = features.and_then(|f| f[&label]["names"].as_array());
        let names = names.map(|names| {
            let text = |name: &Value| name.as_str().map(String::from).unwrap_or(name.to_string());
            names.iter().map(text).collect()
        });
        Ok(Columns {
            image,
            label,
            names,
        })
    }
}
