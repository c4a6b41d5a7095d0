//! A folder of files that describe and hold a network, as timm and transformers keep them: on the
//! hub or on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::config::{Configuration, configuration};
use super::{ModelError, WeightsError};
use crate::hub::{Hub, HubError, Repository};

/// Where the files are.
pub enum Folder<'a> {
    Local(&'a Path),
    Hub {
        hub: &'a Hub,
        repository: Repository,
        /// Whether the hub is asked for files that this machine has.
        update: bool,
    },
}

/// What a folder holds.
pub struct Found {
    /// None where the weights describe themselves.
    pub configuration: Option<Configuration>,
    /// A file of weights, or the index of several.
    pub weights: PathBuf,
}

/// Files that may hold the weights, the preferred first.
pub const WEIGHTS: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

impl Folder<'_> {
    /// For messages.
    pub fn name(&self) -> String {
        match self {
            Folder::Local(path) => path.display().to_string(),
            Folder::Hub { repository, .. } => repository.to_string(),
        }
    }

    /// A file's path on this machine; None where the folder has no such file.
    fn file(&self, name: &str) -> Result<Option<PathBuf>, ModelError> {
        match self {
            Folder::Local(path) => {
                let path = path.join(name);
                Ok(path.is_file().then_some(path))
            }
            Folder::Hub {
                hub,
                repository,
                update,
            } => {
                if !update && let Some(path) = hub.cached(repository, name) {
                    return Ok(Some(path));
                }
                match hub.fetch(repository, name) {
                    Ok(path) => Ok(Some(path)),
                    Err(HubError::NoFile { .. }) => Ok(None),
                    // Not here, and it is not known whether it is there: an optional file.
                    Err(HubError::Offline { .. }) if !WEIGHTS[..1].contains(&name) => Ok(None),
                    Err(error) => Err(error.into()),
                }
            }
        }
    }

    /// The weights, with all files that an index names.
    ///
    /// # Errors
    /// Where there are none, or they cannot be had.
    pub fn weights(&self) -> Result<PathBuf, ModelError> {
        let offline_first = |name: &str| match self {
            // Nothing is asked of the hub where any form is here.
            Folder::Hub {
                hub,
                repository,
                update: false,
            } => hub.cached(repository, name),
            _ => None,
        };
        let mut found = None;
        if let Some((name, path)) = WEIGHTS
            .iter()
            .find_map(|name| offline_first(name).map(|path| (*name, path)))
        {
            found = Some((name, path));
        } else {
            for name in WEIGHTS {
                if let Some(path) = self.file(name)? {
                    found = Some((name, path));
                    break;
                }
            }
        }
        let Some((name, path)) = found else {
            return Err(ModelError::NoWeights {
                folder: self.name(),
                tried: WEIGHTS.join(", "),
            });
        };
        if name.ends_with(".index.json") {
            let format = |reason: String| WeightsError::Format {
                path: path.display().to_string(),
                reason,
            };
            let index: Index =
                serde_json::from_slice(&read(&path)?).map_err(|e| format(e.to_string()))?;
            let mut parts: Vec<String> = index.weight_map.into_values().collect();
            parts.sort();
            parts.dedup();
            for part in parts {
                if part.contains(['/', '\\']) || part.starts_with('.') {
                    return Err(format(format!("its index names {part:?}")).into());
                }
                if self.file(&part)?.is_none() {
                    return Err(ModelError::NoWeights {
                        folder: self.name(),
                        tried: part,
                    });
                }
            }
        }
        Ok(path)
    }

    /// Brings everything here; gives the path of the weights.
    ///
    /// # Errors
    /// Where the weights cannot be had.
    pub fn fetch(&self) -> Result<PathBuf, ModelError> {
        for name in ["config.json", "preprocessor_config.json"] {
            self.file(name)?;
        }
        self.weights()
    }

    /// All that is needed to use the network.
    ///
    /// # Errors
    /// Where a file cannot be had, or the configuration is of a network that sconce does not know.
    pub fn find(&self) -> Result<Found, ModelError> {
        let configuration = match self.file("config.json")? {
            None => None,
            Some(path) => {
                let preprocessor = self.file("preprocessor_config.json")?;
                let preprocessor = preprocessor.as_deref().map(read).transpose()?;
                let parsed = configuration(&read(&path)?, preprocessor.as_deref());
                let parsed = parsed.map_err(|reason| ModelError::Configuration {
                    folder: self.name(),
                    reason,
                })?;
                Some(parsed)
            }
        };
        Ok(Found {
            configuration,
            weights: self.weights()?,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, WeightsError> {
    fs::read(path).map_err(|error| WeightsError::Io {
        path: path.display().to_string(),
        error,
    })
}
