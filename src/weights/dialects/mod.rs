//! The names under which other libraries keep the parameters of our networks.
//!
//! A family's file has tables: our module, theirs. A module's tensors (`weight`, `running_mean`)
//! are called the same everywhere. A row may also name a single tensor, or several of theirs that
//! make up one of ours. Tables for a block are repeated for every block of the network.

mod efficientnet_lite;
mod mobilenet_v1;
mod mobilenet_v2;
mod mobilenet_v3;
mod resnet;
mod shufflenet_v1;
mod vision_transformer;

use std::collections::HashMap;
use std::fmt;

pub use vision_transformer::TRANSFORMERS_EPS;

use crate::models::Architecture;

/// Whose names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Torchvision,
    Timm,
    Transformers,
    /// The code that a network's authors published, or a port of it.
    Authors,
    Pytorchcv,
    /// Our names for a network that the library they come from does not have.
    Sconce,
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dialect::Torchvision => "torchvision",
            Dialect::Timm => "timm",
            Dialect::Transformers => "transformers",
            Dialect::Authors => "the authors' code",
            Dialect::Pytorchcv => "pytorchcv",
            Dialect::Sconce => "sconce",
        })
    }
}

/// Where one of our modules or tensors is kept.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// A module or tensor of that name.
    At(&'static str),
    /// A 1x1 convolution in the place of a linear layer.
    Pointwise(&'static str),
    /// Three tensors that follow each other in the first dimension of ours.
    Joined([&'static str; 3]),
}

use Place::{At, Joined, Pointwise};

/// Our names, and where they are kept.
type Rows = &'static [(&'static str, Place)];

/// What one of our tensors is called, and made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Theirs {
    /// One name, or several whose tensors are joined along the first dimension.
    pub names: Vec<String>,
    /// Two dimensions of 1 at the end that ours has not.
    pub pointwise: bool,
}

/// All names of one network in one dialect.
pub struct Table {
    pub dialect: Dialect,
    /// The configuration that goes with the names, where it is not the one asked for: libraries
    /// differ in padding and epsilons too.
    pub architecture: Architecture,
    /// By our module or tensor; None where the names are ours.
    names: Option<HashMap<String, Theirs>>,
}

impl Table {
    /// Our own names, which are those of `dialect`.
    fn ours(dialect: Dialect, architecture: Architecture) -> Self {
        Self {
            dialect,
            architecture,
            names: None,
        }
    }

    fn new(dialect: Dialect, architecture: Architecture) -> Self {
        Self {
            names: Some(HashMap::new()),
            ..Self::ours(dialect, architecture)
        }
    }

    /// Rows for what is in the network once.
    fn outer(self, rows: Rows) -> Self {
        self.block("", "", rows)
    }

    /// Rows for a block, whose names begin with `ours` and `theirs`.
    fn block(mut self, ours: &str, theirs: &str, rows: Rows) -> Self {
        let names = self.names.get_or_insert_default();
        for (name, place) in rows {
            let their = |name: &str| format!("{theirs}{name}");
            let (all, pointwise) = match place {
                At(name) => (vec![their(name)], false),
                Pointwise(name) => (vec![their(name)], true),
                Joined(parts) => (parts.iter().map(|n| their(n)).collect(), false),
            };
            let place = Theirs {
                names: all,
                pointwise,
            };
            names.insert(format!("{ours}{name}"), place);
        }
        self
    }

    /// What our tensor of that name is called. None: the dialect has no such tensor.
    pub fn theirs(&self, ours: &str) -> Option<Theirs> {
        let Some(names) = &self.names else {
            return Some(Theirs {
                names: vec![ours.to_string()],
                pointwise: false,
            });
        };
        if let Some(whole) = names.get(ours) {
            return Some(whole.clone());
        }
        let (module, leaf) = ours.rsplit_once('.')?;
        let module = names.get(module)?;
        Some(Theirs {
            names: module.names.iter().map(|n| format!("{n}.{leaf}")).collect(),
            pointwise: module.pointwise && leaf == "weight",
        })
    }
}

/// Every dialect that knows the network; the first is ours.
pub fn tables(architecture: &Architecture) -> Vec<Table> {
    let own = |dialect| Table::ours(dialect, *architecture);
    match architecture {
        Architecture::ResNet(config) => resnet::tables(config),
        Architecture::MobileNetV1(config) => mobilenet_v1::tables(config),
        Architecture::MobileNetV2(config) => mobilenet_v2::tables(config),
        Architecture::MobileNetV3(config) => mobilenet_v3::tables(config),
        Architecture::ShuffleNetV1(config) => shufflenet_v1::tables(config),
        Architecture::ShuffleNetV2(_) => vec![own(Dialect::Torchvision)],
        Architecture::VisionTransformer(config) => vision_transformer::tables(config),
        Architecture::EfficientNetLite(config) => efficientnet_lite::tables(config),
    }
}
