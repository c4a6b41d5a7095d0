//! Weights: where they come from, what a model file says of itself, and the network they make.

mod file;
mod labels;
mod model_file;
mod resolve;

pub use file::{SafetensorsFile, WeightsError};
pub use labels::{LabelsError, imagenet_labels, read_labels};
pub use model_file::{Description, FORMAT_VERSION};
pub use resolve::{Model, ModelError, Request, WeightsChoice, resolve};
