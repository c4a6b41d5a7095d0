//! Images in: finding them, decoding, the preprocessing that a network was trained with, data sets
//! and batches to train on.

mod augment;
mod batches;
mod cache;
mod cifar;
mod dataset;
mod decode;
mod held;
mod idx;
mod input;
mod jpeg;
mod loader;
mod named;
mod part;
mod pipeline;
mod preprocess;
mod random;
mod resize;
mod sorted;
mod tables;
mod twins;
mod watch;

pub use augment::{
    Augment, Augmentation, Mix, Operation, color_jitter, erased_part, rand_augment, random_part,
    resized_part, trivial_augment,
};
pub use batches::{Batch, BatchPlan, Batches, Skipped};
pub use cache::{Cache, CacheLimit, default_cache_bytes};
pub use cifar::CifarError;
pub(crate) use dataset::shuffle;
pub use dataset::{Dataset, DatasetError, Notices, Picture, Sample, fingerprint};
pub use decode::{Decoder, ImageError, Rgb, View, parse_color};
pub use held::{ColourImages, EncodedImages, Images};
pub use idx::{IdxError, IdxImages};
pub use input::{Found, Input, InputError, Inputs, PathList};
pub use loader::{Loaded, Loader, Prepared};
pub use part::{LabelledImages, Part};
pub use pipeline::{Next, THREAD_NAME};
pub use preprocess::{crop_pixels, crop_view, mirror, normalize, prepare};
pub use random::{Purpose, generator};
pub use sorted::{Sorting, sort_into};
pub use watch::Watch;

/// Files of more bytes are not read.
pub const MAX_FILE_BYTES: u64 = 512 << 20;
