use std::io;
use std::path::Path;

use safetensors::{SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};

use super::formats::{WeightsError, format_error, map};
use super::write_whole;
use crate::models::{Architecture, Preprocessing};

/// The version of [`Description`] that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// What a model file says of itself: all that is needed to classify with it, kept as JSON under
/// the key `sconce` of the safetensors metadata.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    pub format_version: u32,
    /// The network's name, for people.
    pub name: String,
    pub architecture: Architecture,
    /// Class names, in the order of the logits.
    pub labels: Vec<String>,
    pub preprocessing: Preprocessing,
    /// Logits are divided by it before softmax.
    #[serde(default = "one")]
    pub temperature: f64,
}

fn one() -> f64 {
    1.0
}

impl Description {
    /// Reads and checks a description.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
            /// Checkpoints of training have it.
            #[serde(default)]
            training: Option<serde::de::IgnoredAny>,
        }
        // The version first: a file of tomorrow may say things that today's parser cannot take.
        let version: Version = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if version.format_version > FORMAT_VERSION {
            return Err(format!(
                "format version {}, the newest known is {FORMAT_VERSION}",
                version.format_version
            ));
        }
        if version.training.is_some() {
            return Err(
                "it is a checkpoint of training; model.safetensors beside it is the model".into(),
            );
        }
        let description: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        description.architecture.check()?;
        description.preprocessing.check()?;
        if !(description.temperature.is_finite() && description.temperature > 0.0) {
            return Err("temperature must be above 0".into());
        }
        Ok(description)
    }
}

/// Changes what a model file says its temperature is. Tensors and everything else that it says
/// stay as they are, to the bit; the file is replaced whole or not at all.
///
/// # Errors
/// Where it is no model file, or cannot be written; then it is left as it was.
pub fn set_temperature(path: &Path, temperature: f64) -> Result<(), WeightsError> {
    let io = |error| WeightsError::Io {
        path: path.display().to_string(),
        error,
    };
    let broken = |error: SafeTensorError| format_error(path, error.to_string());
    // A link stays a link.
    let target = path.canonicalize().map_err(io)?;
    let written = {
        let bytes = map(&target)?;
        let (_, header) = SafeTensors::read_metadata(bytes.as_slice()).map_err(broken)?;
        let mut metadata = header.metadata().clone().unwrap_or_default();
        let described = |reason: String| WeightsError::Description {
            path: path.display().to_string(),
            reason,
        };
        let text = metadata.get("sconce");
        let text = text.ok_or_else(|| described("there is none".into()))?;
        Description::parse(text).map_err(described)?;
        // Not by way of `Description`, which may not know all that the file says.
        let mut description: serde_json::Value =
            serde_json::from_str(text).map_err(|e| described(e.to_string()))?;
        description["temperature"] = temperature.into();
        metadata.insert("sconce".into(), description.to_string());
        let tensors = SafeTensors::deserialize(bytes.as_slice()).map_err(broken)?;
        write_whole(&target, |temporary| {
            let written =
                safetensors::serialize_to_file(tensors.tensors(), Some(metadata), temporary);
            written.map_err(|e| match e {
                SafeTensorError::IoError(e) => e,
                other => io::Error::other(other.to_string()),
            })
        })
    };
    written.map_err(io)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::models::registry;
    use crate::weights::{Checkpoint, write_tensors};

    #[test]
    fn a_new_temperature_changes_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let architecture = registry::find("resnet18").unwrap().row.architecture;
        let description = Description {
            format_version: FORMAT_VERSION,
            name: "resnet18".into(),
            architecture,
            labels: vec!["a".into(), "b".into()],
            preprocessing: registry::DEFAULT_PREPROCESSING,
            temperature: 1.0,
        };
        let mut text: serde_json::Value = serde_json::to_value(&description).unwrap();
        text["of_tomorrow"] = "kept".into();
        let tensors = ["b", "a"].map(|name| {
            let tensor = Tensor::arange(0f32, 5.0, &Device::Cpu).unwrap();
            (name.to_string(), tensor)
        });
        write_tensors(&path, &BTreeMap::from(tensors), text.to_string()).unwrap();
        let before = fs::read(&path).unwrap();
        set_temperature(&path, 1.5).unwrap();
        let said = |path: &Path| {
            let file = Checkpoint::open(path).unwrap();
            let text = file.description().unwrap().to_string();
            (Description::parse(&text).unwrap(), text)
        };
        let (read, raw) = said(&path);
        assert_eq!(read.temperature, 1.5);
        assert!(raw.contains("of_tomorrow"));
        assert_eq!(
            Description {
                temperature: 1.0,
                ..read
            },
            description
        );
        set_temperature(&path, 1.0).unwrap();
        assert!(fs::read(&path).unwrap() == before);
        let plain = folder.path().join("plain.safetensors");
        fs::write(&plain, b"x").unwrap();
        assert!(set_temperature(&plain, 2.0).is_err());
        assert_eq!(fs::read(&plain).unwrap(), b"x");
        #[cfg(unix)]
        {
            let link = folder.path().join("link.safetensors");
            std::os::unix::fs::symlink(&path, &link).unwrap();
            set_temperature(&link, 3.0).unwrap();
            assert!(link.is_symlink());
            assert_eq!(said(&path).0.temperature, 3.0);
        }
    }
}
