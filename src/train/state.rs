use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::settings::Settings;
use crate::exec::params::{LoadReport, TensorSource};
use crate::weights::{Checkpoint, Description, WeightsError, write_tensors};

/// The version of checkpoints that this program writes, and the newest that it reads.
const FORMAT_VERSION: u32 = 1;

/// Where a run stands. Random numbers are functions of the seed and the position
/// ([`crate::data::generator`]), and the learning rate is one of the step, so that neither needs a
/// state of its own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Epochs done.
    pub epoch: u64,
    /// Batches done of the next one.
    pub batch: u64,
    /// Steps of the optimiser.
    pub step: u64,
    /// Training loss of the unfinished epoch, summed over its images.
    #[serde(with = "exact")]
    pub loss_sum: f64,
    /// Images of the unfinished epoch so far, and those that were named rightly.
    pub images: u64,
    pub correct: u64,
    pub best: Option<Best>,
    /// Time spent so far.
    pub seconds: f64,
    /// Nothing more to do.
    pub finished: bool,
}

/// The best epoch so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// From 1.
    pub epoch: u64,
    #[serde(with = "exact")]
    pub accuracy: f64,
    #[serde(with = "exact")]
    pub macro_f1: f64,
}

/// Floats by their bits: what is read back must compare equal.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        u64::deserialize(deserializer).map(f64::from_bits)
    }
}

/// What a checkpoint says of itself.
#[derive(Serialize, Deserialize)]
struct Header {
    format_version: u32,
    training: Training,
}

#[derive(Serialize, Deserialize)]
struct Training {
    /// In TOML, which keeps every digit.
    settings: String,
    /// What the model file will say.
    model: Description,
    /// Of the samples' names and classes.
    data_fingerprint: String,
    progress: Progress,
}

/// Why a run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error("{path}: not a checkpoint that this version reads: {reason}")]
    Format { path: String, reason: String },
    #[error("{path}: no tensor {tensor} of shape {shape:?}")]
    Tensor {
        path: String,
        tensor: String,
        shape: Vec<usize>,
    },
}

/// A run's state in a file.
pub struct State {
    pub settings: Settings,
    pub model: Description,
    pub data_fingerprint: String,
    pub progress: Progress,
    file: Arc<Checkpoint>,
    path: String,
}

impl State {
    /// Writes a checkpoint, whole or not at all.
    ///
    /// # Errors
    /// Where the file cannot be written; the one before it is left.
    pub fn write(
        path: &Path,
        settings: &Settings,
        model: &Description,
        data_fingerprint: &str,
        progress: &Progress,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), StateError> {
        let header = Header {
            format_version: FORMAT_VERSION,
            training: Training {
                settings: settings.to_toml(),
                model: model.clone(),
                data_fingerprint: data_fingerprint.to_string(),
                progress: progress.clone(),
            },
        };
        let text = serde_json::to_string(&header).map_err(|e| StateError::Format {
            path: path.display().to_string(),
            reason: e.to_string(),
        })?;
        Ok(write_tensors(path, tensors, text)?)
    }

    /// # Errors
    /// Where the file is missing, or is no checkpoint of this version.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let shown = path.display().to_string();
        let file = Checkpoint::open(path)?;
        let format = |reason: String| StateError::Format {
            path: shown.clone(),
            reason,
        };
        let text = file
            .description()
            .ok_or_else(|| format("it has no header".into()))?;
        let parse = |e: serde_json::Error| format(e.to_string());
        let version: Version = serde_json::from_str(text).map_err(parse)?;
        if version.format_version > FORMAT_VERSION {
            return Err(format(format!(
                "format version {}, the newest known is {FORMAT_VERSION} (get a newer sconce)",
                version.format_version
            )));
        }
        let header: Header = serde_json::from_str(text).map_err(parse)?;
        let Training {
            settings,
            model,
            data_fingerprint,
            progress,
        } = header.training;
        let settings = Settings::from_toml(&settings).map_err(format)?;
        Ok(Self {
            settings,
            model,
            data_fingerprint,
            progress,
            file: Arc::new(file),
            path: shown,
        })
    }

    /// The network's tensors, under their own names.
    pub fn weights(&self) -> Arc<dyn TensorSource> {
        Arc::new(Weights(self.file.clone()))
    }

    /// Whether a network got all its tensors from here.
    ///
    /// # Errors
    /// Names the first that is missing.
    pub fn check_complete(&self, report: &LoadReport) -> Result<(), StateError> {
        let mismatched = report
            .mismatched
            .iter()
            .map(|(name, (shape, _))| (name, shape));
        let missing = report.missing.iter().map(|name| (name, &NO_SHAPE));
        match missing.chain(mismatched).next() {
            None => Ok(()),
            Some((tensor, shape)) => Err(StateError::Tensor {
                path: self.path.clone(),
                tensor: tensor.clone(),
                shape: shape.clone(),
            }),
        }
    }

    /// A tensor of that name and shape.
    ///
    /// # Errors
    /// Where the file has none.
    pub fn tensor(&self, name: &str, like: &Tensor) -> Result<Tensor, StateError> {
        self.values(name, like.dims(), like.device())
            .ok_or_else(|| StateError::Tensor {
                path: self.path.clone(),
                tensor: name.to_string(),
                shape: like.dims().to_vec(),
            })
    }

    fn values(&self, name: &str, shape: &[usize], device: &Device) -> Option<Tensor> {
        if self.file.shape(name)? != shape {
            return None;
        }
        Tensor::from_vec(self.file.read(name).ok()?, shape, device).ok()
    }
}

static NO_SHAPE: Vec<usize> = Vec::new();

/// What the names of the network's tensors begin with.
pub const WEIGHTS: &str = "weights.";

struct Weights(Arc<Checkpoint>);

impl TensorSource for Weights {
    fn names(&self) -> Vec<String> {
        let names = self.0.names();
        let names = names.iter().filter_map(|n| n.strip_prefix(WEIGHTS));
        names.map(str::to_string).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(&format!("{WEIGHTS}{name}"))
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        self.0.read(&format!("{WEIGHTS}{name}"))
    }
}
