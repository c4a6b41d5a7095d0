use serde::{Deserialize, Serialize};

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
