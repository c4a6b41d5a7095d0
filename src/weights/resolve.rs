//! From what a person asked for (`-m`, `--weights`, `--labels`) to a network with its weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;

use super::fit::{self, FitError, Fitted, Head};
use super::folder::{Folder, Found, WEIGHTS};
use super::{Checkpoint, Description, LabelsError, WeightsError, imagenet_labels, read_labels};
use crate::exec::Runner;
use crate::exec::cpu::{Options, PlanError};
use crate::exec::params::{LoadReport, Params, TensorSource};
use crate::graph::{Graph, NodeId};
use crate::hub::{Hub, HubError, Repository};
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
    /// Where published weights come from.
    pub hub: Hub,
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
    /// The weights under our names; None: random ones.
    pub source: Option<Arc<dyn TensorSource>>,
    /// How the weights met the network; None where they are random.
    pub report: Option<LoadReport>,
    /// Of what the weights lack.
    pub seed: u64,
    /// Class names, in the order of the logits.
    pub labels: Vec<String>,
    pub preprocessing: Preprocessing,
    pub temperature: f64,
    /// The model file that says all this, where there is one and the weights are its own.
    pub file: Option<PathBuf>,
    /// Where the weights came from and whose names they have, for messages.
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
    #[error(
        "{path}: does not say what network it is (name it: -m {} --weights {path})", .closest.unwrap_or("NAME")
    )]
    Undescribed {
        path: String,
        /// The network that it looks like.
        closest: Option<&'static str>,
    },
    #[error("-m {model}: {file} is a {family} of another configuration (leave -m NAME out)")]
    OtherArchitecture {
        model: String,
        file: String,
        family: &'static str,
    },
    #[error(
        "-m {name}: its weights are not on this machine, and HF_HUB_OFFLINE is set (fetch them where there is a network: sconce download {name})"
    )]
    NotHere { name: String },
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error("{folder}: no weights there (looked for {tried})")]
    NoWeights { folder: String, tried: String },
    #[error("{folder}: {reason}")]
    Configuration { folder: String, reason: String },
    #[error("-m {name}: no weights have been published for it (give some with --weights FILE)")]
    Unpublished { name: String },
    #[error("{file} does not fit {name}: {reason}")]
    Fit {
        file: String,
        name: String,
        reason: FitError,
    },
    #[error("{from}: {labels} class names for a network of {classes} classes")]
    LabelCount {
        from: String,
        labels: usize,
        classes: usize,
    },
}

/// Finds the network and its weights, to classify with.
///
/// # Errors
/// See [`ModelError`].
pub fn resolve(request: &Request) -> Result<Model, ModelError> {
    let mut model = find(request, Head::FromFile)?;
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

/// Finds the network and its weights, to train it further on so many classes. The head is the
/// weights' own where it has as many and `reset_head` is off; else it is missing from the model's
/// `source` and `report`, and whoever asks [`Params`] for it gets a fresh one. Class names are
/// those of the weights, whatever the number asked for.
///
/// # Errors
/// See [`ModelError`]; `--labels` is not looked at.
pub fn resolve_for_training(
    request: &Request,
    classes: usize,
    reset_head: bool,
) -> Result<Model, ModelError> {
    let head = Head::Classes {
        count: classes,
        reset: reset_head,
    };
    find(request, head)
}

fn find(request: &Request, head: Head) -> Result<Model, ModelError> {
    if let Some(repository) = request.model.strip_prefix("hub:") {
        let folder = Folder::Hub {
            hub: &request.hub,
            repository: Repository::parse(repository)?,
            update: false,
        };
        from_folder(request, &folder, head)
    } else if Path::new(&request.model).join("config.json").is_file() {
        from_folder(request, &Folder::Local(Path::new(&request.model)), head)
    } else if is_file(&request.model) {
        from_model_file(request, head)
    } else {
        from_registry(request, head)
    }
}

/// Whether `-m` names a file rather than a network.
fn is_file(model: &str) -> bool {
    let path = Path::new(model);
    path.extension().is_some_and(|e| e == "safetensors")
        || path.components().count() > 1
        || (registry::find(model).is_err() && path.is_file())
}

fn from_model_file(request: &Request, head: Head) -> Result<Model, ModelError> {
    let path = Path::new(&request.model);
    let file = Checkpoint::open(path)?;
    let Some(description) = describe_file(&file, path)? else {
        return Err(ModelError::Undescribed {
            path: request.model.clone(),
            closest: fit::closest(&file),
        });
    };
    let (source, from) = match &request.weights {
        WeightsChoice::Published => (Some(file), Some(request.model.clone())),
        WeightsChoice::None => (None, None),
        WeightsChoice::File(path) => (
            Some(Checkpoint::open(path)?),
            Some(path.display().to_string()),
        ),
    };
    let choice = (description.name.clone(), description.architecture);
    let mut model = build(
        choice,
        Some(description),
        source.zip(from),
        head,
        request.seed,
    )?;
    if request.weights == WeightsChoice::Published {
        model.file = Some(path.to_path_buf());
    }
    Ok(model)
}

/// A repository or a folder as timm and transformers write them; or one with a model file of ours.
fn from_folder(request: &Request, folder: &Folder, head: Head) -> Result<Model, ModelError> {
    let Found {
        configuration,
        weights,
    } = folder.find()?;
    let Some(configuration) = configuration else {
        let model = weights.display().to_string();
        let request = Request {
            model,
            ..request.clone()
        };
        let mut model = from_model_file(&request, head)?;
        if let Folder::Hub { .. } = folder {
            // A cache's file is not this program's to change.
            model.file = None;
        }
        return Ok(model);
    };
    let (file, from) = match &request.weights {
        WeightsChoice::Published => (Some(Checkpoint::open(&weights)?), folder.name()),
        WeightsChoice::None => (None, String::new()),
        WeightsChoice::File(path) => (Some(Checkpoint::open(path)?), path.display().to_string()),
    };
    let name = match folder {
        Folder::Hub { .. } => folder.name(),
        Folder::Local(_) => configuration.name.clone(),
    };
    let choice = (name, configuration.architecture);
    let mut model = build(choice, None, file.zip(Some(from)), head, request.seed)?;
    // The configuration knows better than the names in the file what epsilons there are.
    model.set_epsilons(&configuration.architecture);
    model.preprocessing = configuration.preprocessing;
    model.labels = configuration.labels;
    if model.labels.is_empty() {
        model.labels = default_labels(model.graph.num_classes());
    }
    Ok(model)
}

fn from_registry(request: &Request, head: Head) -> Result<Model, ModelError> {
    let choice = registry::find(&request.model).map_err(ModelError::Unknown)?;
    let name = choice.name();
    let architecture = choice.row.architecture;
    let (source, from, description) = match &request.weights {
        WeightsChoice::None => (None, None, None),
        WeightsChoice::Published => {
            let Some(weights) = choice.weights else {
                return Err(ModelError::Unpublished { name });
            };
            let file = published(&name, weights, &request.hub)?;
            (Some(file), Some(name.clone()), None)
        }
        WeightsChoice::File(path) => {
            let file = Checkpoint::open(path)?;
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
        source.zip(from),
        head,
        request.seed,
    )?;
    if model.labels.is_empty() {
        model.preprocessing = choice.preprocessing();
        model.labels = default_labels(model.graph.num_classes());
    }
    Ok(model)
}

fn describe_file(file: &Checkpoint, path: &Path) -> Result<Option<Description>, WeightsError> {
    let parse = |text| {
        Description::parse(text).map_err(|reason| WeightsError::Description {
            path: path.display().to_string(),
            reason,
        })
    };
    file.description().map(parse).transpose()
}

/// What classes are called where nobody says it.
fn default_labels(classes: usize) -> Vec<String> {
    match classes {
        IMAGENET_CLASSES => imagenet_labels(),
        // TensorFlow's networks put a class for everything else before ImageNet's.
        1001 => ["background".into()]
            .into_iter()
            .chain(imagenet_labels())
            .collect(),
        classes => (0..classes).map(|i| format!("class {i}")).collect(),
    }
}

/// The weights that a registry row stands for: the binary's own, else this machine's, else they
/// are fetched.
fn published(name: &str, weights: &Pretrained, hub: &Hub) -> Result<Checkpoint, ModelError> {
    #[cfg(feature = "embedded")]
    if weights.is_embedded() {
        static BYTES: &[u8] = include_bytes!("../../weights/mobilenet_v2.safetensors");
        return Ok(Checkpoint::from_static(BYTES)?);
    }
    let path = match cached(weights, hub) {
        Some(path) => path,
        None if hub.is_offline() => {
            return Err(ModelError::NotHere { name: name.into() });
        }
        None => {
            hub.note(&format!("{name}: fetching its weights, once"));
            fetch(weights, hub)?
        }
    };
    Ok(Checkpoint::open(&path)?)
}

/// The file of published weights, where this machine has it.
pub fn cached(weights: &Pretrained, hub: &Hub) -> Option<PathBuf> {
    match weights.source {
        Source::Torchvision { file, .. } => hub.cached_url(&hub.torchvision_url(file)),
        Source::Hub { repo } => {
            let repository = Repository::parse(repo).ok()?;
            let names = WEIGHTS.iter().filter(|name| !name.ends_with(".json"));
            names.clone().find_map(|name| hub.cached(&repository, name))
        }
    }
}

/// Fetches published weights, or makes sure that the newest are here; gives the file's path.
///
/// # Errors
/// Where they cannot be had.
pub fn fetch(weights: &Pretrained, hub: &Hub) -> Result<PathBuf, ModelError> {
    match weights.source {
        Source::Torchvision { file, .. } => Ok(hub.fetch_url(&hub.torchvision_url(file))?),
        Source::Hub { repo } => fetch_repository(&Repository::parse(repo)?, hub),
    }
}

/// Fetches a repository's weights and what describes them; gives the path of the weights.
///
/// # Errors
/// Where they cannot be had, or it is not a network's repository.
pub fn fetch_repository(repository: &Repository, hub: &Hub) -> Result<PathBuf, ModelError> {
    let folder = Folder::Hub {
        hub,
        repository: repository.clone(),
        update: true,
    };
    folder.fetch()
}

/// Labels and preprocessing are the description's; without one, labels stay empty.
fn build(
    (name, architecture): (String, Architecture),
    description: Option<Description>,
    weights: Option<(Checkpoint, String)>,
    head: Head,
    seed: u64,
) -> Result<Model, ModelError> {
    let described = description.as_ref().map(|d| d.labels.len());
    let (labels, preprocessing, temperature) = match description {
        Some(d) => (d.labels, d.preprocessing, d.temperature),
        None => (Vec::new(), registry::DEFAULT_PREPROCESSING, 1.0),
    };
    let model = |architecture, graph| Model {
        name: name.clone(),
        architecture,
        graph,
        source: None,
        report: None,
        seed,
        labels,
        preprocessing,
        temperature,
        file: None,
        weights_from: None,
    };
    let Some((file, from)) = weights else {
        let classes = match head {
            Head::FromFile => described.unwrap_or(IMAGENET_CLASSES),
            Head::Classes { count, .. } => count,
        };
        return Ok(model(architecture, architecture.graph(classes)));
    };
    let fitted = fit::fit(Arc::new(file), &architecture, head);
    let Fitted {
        architecture,
        graph,
        source,
        report,
        dialect,
    } = fitted.map_err(|reason| ModelError::Fit {
        file: from.clone(),
        name: name.clone(),
        reason,
    })?;
    Ok(Model {
        source: Some(source),
        report: Some(report),
        weights_from: Some(format!("{from} (names of {dialect})")),
        ..model(architecture, graph)
    })
}

impl Model {
    /// Takes over what the names in a file cannot tell: the epsilon of layer norms.
    fn set_epsilons(&mut self, configured: &Architecture) {
        if let (Architecture::VisionTransformer(held), Architecture::VisionTransformer(said)) =
            (&mut self.architecture, configured)
            && held.layer_norm_eps != said.layer_norm_eps
        {
            held.layer_norm_eps = said.layer_norm_eps;
            self.graph = self.architecture.graph(self.graph.num_classes());
        }
    }

    /// Where the weights came from, None where they are random.
    pub fn weights_from(&self) -> Option<&str> {
        self.weights_from.as_deref()
    }

    /// The network ready to classify images of `size` `[H, W]` on that device.
    ///
    /// # Errors
    /// Where the weights cannot be read, the image is too small, or the device refuses.
    pub fn runner(
        &self,
        device: &Device,
        size: [usize; 2],
        options: Options,
    ) -> Result<Runner, ModelError> {
        self.runner_to(self.graph.output(), device, size, options)
    }

    /// The same, for what a node before the logits gives.
    ///
    /// # Errors
    /// As [`Model::runner`].
    pub fn runner_to(
        &self,
        output: NodeId,
        device: &Device,
        size: [usize; 2],
        options: Options,
    ) -> Result<Runner, ModelError> {
        let params = Params::new(self.source.clone(), self.seed);
        let vb = params.var_builder(device);
        let graph = self.graph.until(output);
        Ok(Runner::new(graph, &vb, size, output, options)?)
    }
}
