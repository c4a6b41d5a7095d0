//! From what a person asked for (`-m`, `--weights`, `--labels`) to a network with its weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use super::{
    Description, LabelsError, SafetensorsFile, WeightsError, imagenet_labels, read_labels,
};
use crate::exec::Runner;
use crate::exec::cpu::{Options, PlanError};
use crate::exec::params::{LoadReport, Params, TensorSource};
use crate::graph::Graph;
use crate::models::registry::{self, IMAGENET_CLASSES, UnknownModel};
use crate::models::{Architecture, Preprocessing, Pretrained, Source};

/// What a person asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// A registry name, or the path of a model file.
    pub model: String,
    pub weights: WeightsChoice,
    pub labels: Option<PathBuf>,
    pub seed: u64,
}

/// `--weights`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightsChoice {
    /// Those that the model's name stands for.
    Published,
    /// Random ones.
    None,
    File(PathBuf),
}

/// A network, its weights, and all that is needed to classify with them.
pub struct Model {
    /// For people: `mobilenet_v2.tv`, or the name in the model file.
    pub name: String,
    pub architecture: Architecture,
    pub graph: Graph,
    pub params: Arc<Params>,
    /// Class names, in the order of the logits.
    pub labels: Vec<String>,
    pub preprocessing: Preprocessing,
    pub temperature: f64,
    /// Where the weights came from, for messages.
    weights_from: Option<String>,
}

/// Why a request cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("-m {0} (sconce models lists all)")]
    Unknown(UnknownModel),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Labels(#[from] LabelsError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("{path}: does not say what network it is (name it with -m NAME --weights {path})")]
    Undescribed { path: String },
    #[error("-m {model}: {file} is a {family} of another configuration (leave -m NAME out)")]
    OtherArchitecture {
        model: String,
        file: String,
        family: &'static str,
    },
    #[error(
        "-m {name}: its weights are not on this machine (get {from} as safetensors and give it with --weights FILE)"
    )]
    NotHere { name: String, from: String },
    #[error("-m {name}: no weights have been published for it (give some with --weights FILE)")]
    Unpublished { name: String },
    #[error("--weights {file}: no tensor {tensor} of two dimensions, so it is no {name}")]
    NoHead {
        file: String,
        tensor: String,
        name: String,
    },
    #[error("{file} does not fit {name}: {} (is it another network's?)", describe(.report))]
    Incomplete {
        file: String,
        name: String,
        report: Box<LoadReport>,
    },
    #[error("{from}: {labels} class names for a network of {classes} classes")]
    LabelCount {
        from: String,
        labels: usize,
        classes: usize,
    },
}

fn describe(report: &LoadReport) -> String {
    let mut parts = Vec::new();
    if let Some(first) = report.missing.first() {
        parts.push(format!(
            "{} tensors missing, first {first}",
            report.missing.len()
        ));
    }
    if let Some((name, (wanted, held))) = report.mismatched.first_key_value() {
        parts.push(format!(
            "{} of another shape, first {name}: {held:?} for {wanted:?}",
            report.mismatched.len()
        ));
    }
    parts.join("; ")
}

/// Finds the network and its weights.
///
/// # Errors
/// See [`ModelError`].
pub fn resolve(request: &Request) -> Result<Model, ModelError> {
    let mut model = if is_file(&request.model) {
        from_model_file(request)?
    } else {
        from_registry(request)?
    };
    let mut labels_from = model.name.clone();
    if let Some(path) = &request.labels {
        model.labels = read_labels(path)?;
        labels_from = path.display().to_string();
    }
    let classes = model.graph.num_classes();
    if model.labels.len() != classes {
        return Err(ModelError::LabelCount {
            from: labels_from,
            labels: model.labels.len(),
            classes,
        });
    }
    Ok(model)
}

/// Whether `-m` names a file rather than a network.
fn is_file(model: &str) -> bool {
    let path = Path::new(model);
    path.extension().is_some_and(|e| e == "safetensors")
        || path.components().count() > 1
        || (registry::find(model).is_err() && path.is_file())
}

fn from_model_file(request: &Request) -> Result<Model, ModelError> {
    let path = Path::new(&request.model);
    let file = SafetensorsFile::open(path)?;
    let Some(description) = describe_file(&file, path)? else {
        return Err(ModelError::Undescribed {
            path: request.model.clone(),
        });
    };
    let (source, from) = match &request.weights {
        WeightsChoice::Published => (Some(file), Some(request.model.clone())),
        WeightsChoice::None => (None, None),
        WeightsChoice::File(path) => (
            Some(SafetensorsFile::open(path)?),
            Some(path.display().to_string()),
        ),
    };
    let choice = (description.name.clone(), description.architecture);
    build(choice, Some(description), source, from, request.seed)
}

fn from_registry(request: &Request) -> Result<Model, ModelError> {
    let choice = registry::find(&request.model).map_err(ModelError::Unknown)?;
    let name = choice.name();
    let architecture = choice.row.architecture;
    let (source, from, description) = match &request.weights {
        WeightsChoice::None => (None, None, None),
        WeightsChoice::Published => {
            let Some(weights) = choice.weights else {
                return Err(ModelError::Unpublished { name });
            };
            (Some(published(&name, weights)?), Some(name.clone()), None)
        }
        WeightsChoice::File(path) => {
            let file = SafetensorsFile::open(path)?;
            let shown = path.display().to_string();
            let description = describe_file(&file, path)?;
            if let Some(d) = &description
                && d.architecture != architecture
            {
                return Err(ModelError::OtherArchitecture {
                    model: request.model.clone(),
                    family: d.architecture.family(),
                    file: shown,
                });
            }
            (Some(file), Some(shown), description)
        }
    };
    let mut model = build(
        (name, architecture),
        description,
        source,
        from,
        request.seed,
    )?;
    if model.labels.is_empty() {
        model.preprocessing = choice.preprocessing();
        model.labels = match model.graph.num_classes() {
            IMAGENET_CLASSES => imagenet_labels(),
            // TensorFlow's networks put a class for everything else before ImageNet's.
            1001 => ["background".into()]
                .into_iter()
                .chain(imagenet_labels())
                .collect(),
            classes => (0..classes).map(|i| format!("class {i}")).collect(),
        };
    }
    Ok(model)
}

fn describe_file(file: &SafetensorsFile, path: &Path) -> Result<Option<Description>, WeightsError> {
    let parse = |text| {
        Description::parse(text).map_err(|reason| WeightsError::Description {
            path: path.display().to_string(),
            reason,
        })
    };
    file.description().map(parse).transpose()
}

/// The weights that a registry row stands for, where this machine has them.
fn published(name: &str, weights: &Pretrained) -> Result<SafetensorsFile, ModelError> {
    #[cfg(feature = "embedded")]
    if weights.is_embedded() {
        static BYTES: &[u8] = include_bytes!("../../weights/mobilenet_v2.safetensors");
        return Ok(SafetensorsFile::from_static(BYTES)?);
    }
    let from = match weights.source {
        Source::Torchvision { file, .. } => format!("torchvision's {file}"),
        Source::Hub { repo } => format!("hub:{repo}"),
    };
    Err(ModelError::NotHere {
        name: name.to_string(),
        from,
    })
}

/// Labels and preprocessing are the description's; without one, labels stay empty.
fn build(
    (name, architecture): (String, Architecture),
    description: Option<Description>,
    source: Option<SafetensorsFile>,
    weights_from: Option<String>,
    seed: u64,
) -> Result<Model, ModelError> {
    let described = description.as_ref().map(|d| d.labels.len());
    let classes = match &source {
        None => described.unwrap_or(IMAGENET_CLASSES),
        Some(source) => {
            let any = architecture.graph(IMAGENET_CLASSES);
            let tensor = format!("{}.weight", any.head().name);
            match source.shape(&tensor).as_deref() {
                Some(&[classes, _]) if classes > 0 => classes,
                _ => {
                    return Err(ModelError::NoHead {
                        file: weights_from.unwrap_or_default(),
                        tensor,
                        name,
                    });
                }
            }
        }
    };
    let source = source.map(|s| Arc::new(s) as Arc<dyn TensorSource>);
    let (labels, preprocessing, temperature) = match description {
        Some(d) => (d.labels, d.preprocessing, d.temperature),
        None => (Vec::new(), registry::DEFAULT_PREPROCESSING, 1.0),
    };
    Ok(Model {
        name,
        architecture,
        graph: architecture.graph(classes),
        params: Params::new(source, seed),
        labels,
        preprocessing,
        temperature,
        weights_from,
    })
}

impl Model {
    /// Where the weights came from, None where they are random.
    pub fn weights_from(&self) -> Option<&str> {
        self.weights_from.as_deref()
    }

    /// The network ready to classify images of `size` `[H, W]` on that device.
    ///
    /// # Errors
    /// Where the weights lack a tensor that the network needs, or the device refuses.
    pub fn runner(
        &self,
        device: &Device,
        size: [usize; 2],
        options: Options,
    ) -> Result<Runner, ModelError> {
        let vb = self.params.var_builder(device);
        let runner = Runner::new(self.graph.clone(), &vb, size, options)?;
        let report = self.params.report();
        match &self.weights_from {
            Some(file) if !report.is_complete() => Err(ModelError::Incomplete {
                file: file.clone(),
                name: self.name.clone(),
                report: Box::new(report),
            }),
            _ => Ok(runner),
        }
    }
}
