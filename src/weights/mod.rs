//! Weights: reading files of every format, names of every library, what a model file says of
//! itself, and the way from `-m` and `--weights` to a network.
//!
//! Three steps lead from a file to a network's tensors.
//!
//! 1. [`Checkpoint::open`] reads a file, whatever its format: safetensors, what `torch.save`
//!    writes, or an index of several such files. It gives float32 tensors by the file's names.
//! 2. [`fit()`] finds out whose names they are, and brings them under ours for an [`Architecture`].
//!    It is not strict: its [`LoadReport`] lists what was loaded, missing, mismatched and
//!    unexpected. The backbone must be there whole, else the error names the network of the
//!    registry that the file looks like. For the head there is a choice ([`Head`]): the file's with
//!    its number of classes, or one for so many classes, which is the file's where it has as many
//!    and a fresh one otherwise (or always, with `reset`).
//! 3. [`Fitted::source`](fit::Fitted) goes into [`Params`], which hands out plain tensors or
//!    variables and initialises what is missing.
//!
//! [`resolve()`] does all three for what a person asked for on the command line, and
//! [`resolve_for_training`] the same with a head for other classes:
//!
//! ```no_run
//! # use sconce::weights::{resolve_for_training, Request, WeightsChoice};
//! # use sconce::exec::params::Params;
//! # use sconce::hub::Hub;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let request = Request {
//!     model: "resnet34".into(),
//!     weights: WeightsChoice::File("resNet34.pth".into()),
//!     labels: None,
//!     seed: 0,
//!     hub: Hub::new(),
//! };
//! let model = resolve_for_training(&request, 5, false)?;
//! let params = Params::trainable(model.source.clone(), request.seed);
//! # Ok(())
//! # }
//! ```
//!
//! [`Architecture`]: crate::models::Architecture
//! [`LoadReport`]: crate::exec::params::LoadReport
//! [`Params`]: crate::exec::params::Params

mod classes;
mod config;
mod dialects;
mod export;
mod fit;
mod folder;
mod formats;
mod labels;
mod model_file;
pub mod protobuf;
mod resolve;
mod write;

pub use classes::{ClassError, match_classes};
pub use config::{Configuration, configuration};
pub use dialects::Dialect;
pub use export::{DType, ExportError};
pub use fit::{FitError, Fitted, Head, closest, fit};
pub use formats::{Checkpoint, WeightsError};
pub use labels::{LabelsError, imagenet_labels, read_labels};
pub use model_file::{Description, FORMAT_VERSION, set_temperature};
pub use resolve::{
    Model, ModelError, Request, WeightsChoice, cached, fetch, fetch_repository, resolve,
    resolve_for_training,
};
pub use write::{write_tensors, write_whole};
