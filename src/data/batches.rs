use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cache::{Cache, Kept};
use super::dataset::{Source, shuffle};
use super::pipeline::{Budget, Next, Pipeline};
use super::preprocess::reduction;
use super::random::{Purpose, generator};
use super::{
    Augment, Augmentation, Decoder, ImageError, Mix, Rgb, Sample, crop_pixels, crop_view, normalize,
};
use crate::models::Preprocessing;
use crate::ranks::share;

/// How samples become batches.
#[derive(Clone)]
pub struct BatchPlan {
    pub samples: Arc<[Sample]>,
    /// What is kept of them from one pass to the next.
    pub cache: Cache,
    pub decoder: Decoder,
    pub preprocessing: Preprocessing,
    pub augmentation: Augmentation,
    pub batch_size: usize,
    pub seed: u64,
    pub threads: usize,
    /// The processes that have a part of every batch each, and of all samples where these are read in
    /// their order: how many, and which of them this is.
    pub parts: usize,
    pub part: usize,
}

/// Images of one batch.
pub struct Batch {
    /// `[count, crop, crop, 3]`, normalised.
    pub pixels: Vec<f32>,
    /// Positions of the samples among all.
    pub samples: Vec<usize>,
    /// Their classes.
    pub labels: Vec<usize>,
    /// Where each image is mixed with the one before it (the first with the last): how much of it,
    /// and of its class, is its own.
    pub own_share: Option<f64>,
    /// Samples that should be here and could not be read.
    pub skipped: Vec<Skipped>,
}

/// A sample that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    pub name: String,
    pub reason: String,
}

/// One pass over the samples, read ahead in several threads.
pub struct Batches {
    pipeline: Pipeline<(usize, Result<Vec<f32>, ImageError>)>,
    samples: Arc<[Sample]>,
    sizes: Sizes,
    mixing: Option<Mixing>,
}

/// How many samples a batch has.
enum Sizes {
    /// Of each batch still to come.
    Known(std::vec::IntoIter<usize>),
    /// At most so many, of those that are there.
    AtMost(usize),
}

/// How long a batch waits for samples that are still to be named.
const PATIENCE: Duration = Duration::from_millis(20);

/// What mixes the batches of one epoch.
struct Mixing {
    augmentation: Augmentation,
    /// Height and width of the images.
    size: usize,
    seed: u64,
    epoch: u64,
    /// The next batch's place in the epoch.
    batch: u64,
}

impl Mixing {
    /// Mixes the next batch.
    fn mix(&mut self, batch: &mut Batch) {
        let Augmentation { mixup, cutmix, .. } = self.augmentation;
        let mut rng = generator(self.seed, Purpose::Mix, self.epoch, self.batch);
        self.batch += 1;
        if let Some(mix) = Mix::draw(mixup, cutmix, [self.size; 2], &mut rng) {
            mix.apply(&mut batch.pixels, self.size * self.size * 3, self.size);
            batch.own_share = Some(mix.own());
        }
    }
}

impl BatchPlan {
    /// How many batches training makes of the samples. A last batch of one image is left out,
    /// since batch norm may learn nothing from it; the next shuffle gives the image its turn.
    pub fn training_batches(&self) -> usize {
        self.training_length().div_ceil(self.batch_size)
    }

    fn training_length(&self) -> usize {
        let count = self.samples.len();
        if count > self.batch_size && count % self.batch_size == 1 {
            count - 1
        } else {
            count
        }
    }

    /// The order in which an epoch takes the samples.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        shuffle(
            &mut order,
            &mut generator(self.seed, Purpose::Order, epoch, 0),
        );
        order.truncate(self.training_length());
        order
    }

    /// This process's part of so many samples that follow each other.
    fn share(&self, samples: usize) -> Range<usize> {
        share(samples, self.part, self.parts)
    }

    /// This process's samples of an epoch's batches, from batch `first` on.
    pub fn training_samples(&self, epoch: u64, first: usize) -> Vec<Vec<usize>> {
        let order = self.order(epoch);
        let batches = order.chunks(self.batch_size).skip(first);
        batches.map(|b| b[self.share(b.len())].to_vec()).collect()
    }

    /// An epoch's batches in its own random order, from batch `first` on.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn training(&self, epoch: u64, first: usize) -> std::io::Result<Batches> {
        let mut batches = self.start_batches(self.training_samples(epoch, first), Some(epoch))?;
        batches.mixing = Some(Mixing {
            augmentation: self.augmentation,
            size: self.preprocessing.crop,
            seed: self.seed,
            epoch,
            batch: first as u64,
        });
        Ok(batches)
    }

    /// This process's samples in their order, prepared as for classification.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn evaluation(&self) -> std::io::Result<Batches> {
        let samples: Vec<usize> = self.share(self.samples.len()).collect();
        let batches = samples.chunks(self.batch_size).map(<[usize]>::to_vec);
        self.start_batches(batches.collect(), None)
    }

    /// Samples as they are named, in that order, prepared as for classification. A batch that is not
    /// full does not wait for long.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn as_named(
        &self,
        samples: impl Iterator<Item = usize> + Send + 'static,
    ) -> std::io::Result<Batches> {
        self.start(samples, Sizes::AtMost(self.batch_size), None)
    }

    fn start_batches(
        &self,
        batches: Vec<Vec<usize>>,
        epoch: Option<u64>,
    ) -> std::io::Result<Batches> {
        let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
        let order = batches.into_iter().flatten();
        self.start(order, Sizes::Known(sizes.into_iter()), epoch)
    }

    fn start(
        &self,
        order: impl Iterator<Item = usize> + Send + 'static,
        sizes: Sizes,
        epoch: Option<u64>,
    ) -> std::io::Result<Batches> {
        let plan = self.clone();
        let work = move |index: usize, budget: &Budget| (index, plan.load(index, epoch, budget));
        Ok(Batches {
            pipeline: Pipeline::start(order, self.threads, work)?,
            samples: self.samples.clone(),
            sizes,
            mixing: None,
        })
    }

    fn load(
        &self,
        index: usize,
        epoch: Option<u64>,
        budget: &Budget,
    ) -> Result<Vec<f32>, ImageError> {
        let preprocessing = &self.preprocessing;
        let Some(epoch) = epoch else {
            return Ok(normalize(&self.crop(index, budget)?, preprocessing));
        };
        let mut rng = generator(self.seed, Purpose::Augment, epoch, index as u64);
        let augmentation = &self.augmentation;
        if augmentation.augment == Augment::None {
            let pixels = self.crop(index, budget)?.to_vec();
            return Ok(augmentation.finish(pixels, preprocessing, &mut rng));
        }
        if let Some(Kept::Whole(image)) = self.cache.get(index) {
            return Ok(augmentation.prepare(image, preprocessing, &mut rng));
        }
        let image = Arc::new(self.decode(index, budget)?);
        let prepared = augmentation.prepare(&image, preprocessing, &mut rng);
        self.cache.keep(index, &Kept::Whole(image));
        Ok(prepared)
    }

    fn decode(&self, index: usize, budget: &Budget) -> Result<Rgb, ImageError> {
        match self.samples[index].picture.read()? {
            Source::Bytes(bytes) => self.decoder.decode_within(&bytes, budget),
            Source::Decoded(image) => Ok(image),
        }
    }

    /// Whether a picture is the same to `crop` when it is read for that alone.
    fn is_read_whole(&self, image: &Rgb) -> bool {
        self.decoder.exact || reduction([image.width, image.height], &self.preprocessing) == 1
    }

    /// A sample resized and cropped as for classification.
    fn crop(&self, index: usize, budget: &Budget) -> Result<Arc<[u8]>, ImageError> {
        let preprocessing = &self.preprocessing;
        let pixels: Arc<[u8]> = match self.cache.get(index) {
            Some(Kept::Cropped(pixels)) => return Ok(pixels.clone()),
            Some(Kept::Whole(image)) if self.is_read_whole(image) => {
                crop_pixels(image, preprocessing)
            }
            _ => match self.samples[index].picture.read()? {
                Source::Bytes(bytes) => {
                    let decoder = &self.decoder;
                    let picture = decoder.decode_for_within(preprocessing, &bytes, budget)?;
                    crop_view(&picture, preprocessing)
                }
                Source::Decoded(image) => crop_pixels(&image, preprocessing),
            },
        }
        .into();
        self.cache.keep(index, &Kept::Cropped(pixels.clone()));
        Ok(pixels)
    }
}

impl Iterator for Batches {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let (count, patience) = match &mut self.sizes {
            Sizes::Known(sizes) => (sizes.next()?, None),
            Sizes::AtMost(count) => (*count, Some(PATIENCE)),
        };
        let mut batch = Batch {
            pixels: Vec::new(),
            samples: Vec::with_capacity(count),
            labels: Vec::with_capacity(count),
            own_share: None,
            skipped: Vec::new(),
        };
        for place in 0..count {
            let wait = patience.filter(|_| place > 0);
            let (index, result) = match self.pipeline.next(wait) {
                Next::Item(item) => item,
                Next::End if place == 0 => return None,
                Next::End | Next::Waiting => break,
            };
            let sample = &self.samples[index];
            match result {
                Ok(pixels) => {
                    if batch.pixels.is_empty() {
                        batch.pixels.reserve_exact(pixels.len() * count);
                    }
                    batch.pixels.extend_from_slice(&pixels);
                    batch.samples.push(index);
                    batch.labels.push(sample.label);
                }
                Err(error) => batch.skipped.push(Skipped {
                    name: sample.picture.name(),
                    reason: error.to_string(),
                }),
            }
        }
        if let Some(mixing) = &mut self.mixing {
            mixing.mix(&mut batch);
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{CacheLimit, IdxImages, Images, Picture};

    /// Twenty-one pictures of one colour each, the seventh unreadable.
    fn plan(folder: &std::path::Path, batch_size: usize, threads: usize) -> BatchPlan {
        let mut bytes = vec![0, 0, 8, 3];
        bytes.extend([20u32, 2, 2].iter().flat_map(|n| n.to_be_bytes()));
        bytes.extend((0..80).map(|v| v / 4));
        std::fs::write(folder.join("images"), bytes).unwrap();
        let mut labels = vec![0, 0, 8, 1, 0, 0, 0, 20];
        labels.extend(0..20);
        std::fs::write(folder.join("labels"), labels).unwrap();
        let images = IdxImages::open(folder, ["images", "labels"]).unwrap();
        let images = Arc::new(Images::Grey(images));
        let mut samples: Vec<Sample> = (0..20)
            .map(|index| Sample {
                picture: Picture::Held {
                    images: images.clone(),
                    index,
                },
                label: index,
            })
            .collect();
        let missing = Picture::File(folder.join("missing.png"));
        samples.insert(
            7,
            Sample {
                picture: missing,
                label: 0,
            },
        );
        BatchPlan {
            cache: Cache::new(samples.len(), CacheLimit::default()),
            samples: samples.into(),
            decoder: Decoder {
                max_pixels: 1000,
                background: None,
                exact: false,
            },
            preprocessing: Preprocessing::torchvision(2, 2).normalized([0.0; 3], [1.0; 3]),
            augmentation: Augmentation::NONE,
            batch_size,
            seed: 5,
            threads,
            parts: 1,
            part: 0,
        }
    }

    fn labels(batches: Batches) -> Vec<Vec<usize>> {
        batches.map(|b| b.labels).collect()
    }

    #[test]
    fn an_epoch_takes_every_sample_once_in_an_order_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path(), 4, 3);
        let first = labels(plan.training(0, 0).unwrap());
        assert_eq!(first.len(), plan.training_batches());
        assert_eq!(first, labels(plan.training(0, 0).unwrap()));
        assert_ne!(first, labels(plan.training(1, 0).unwrap()));
        // A last batch of one is left out.
        assert_eq!(first.iter().flatten().count() + 1, 20);
        let rest = labels(plan.training(0, 2).unwrap());
        assert_eq!(rest, first[2..]);
        assert_eq!(
            labels(plan.training(0, 9).unwrap()),
            Vec::<Vec<usize>>::new()
        );
    }

    #[test]
    fn parts_of_batches_are_the_batches() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path(), 6, 2);
        let whole = plan.training_samples(3, 1);
        for parts in [2, 3, 5, 8] {
            let of_part = |part| BatchPlan {
                parts,
                part,
                ..plan.clone()
            };
            let all: Vec<_> = (0..parts)
                .map(|p| of_part(p).training_samples(3, 1))
                .collect();
            for (index, batch) in whole.iter().enumerate() {
                let joined: Vec<usize> = all.iter().flat_map(|own| own[index].clone()).collect();
                assert_eq!(&joined, batch);
            }
            let evaluated = (0..parts).flat_map(|p| of_part(p).evaluation().unwrap());
            let labels: Vec<usize> = evaluated.flat_map(|b| b.labels).collect();
            assert_eq!(labels, (0..20).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_and_the_rest_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let batches: Vec<Batch> = plan(folder.path(), 6, 2).evaluation().unwrap().collect();
        assert_eq!(batches.len(), 4);
        assert_eq!(batches[0].labels, [0, 1, 2, 3, 4, 5]);
        assert_eq!(batches[1].labels, [6, 7, 8, 9, 10]);
        assert!(batches[1].skipped[0].name.ends_with("missing.png"));
        assert_eq!(batches[1].pixels.len(), 5 * 2 * 2 * 3);
        assert_eq!(batches[1].pixels[0], 6.0 / 255.0);
        assert_eq!(batches[3].labels, [17, 18, 19]);
    }
}
