//! Looking inside a network: what its nodes hold for a photo, where a class was seen, what attention
//! attends to, and what its weights look like.
//!
//! All of it runs on [`Eager`]: a node can be watched there, or its value be made a variable that the
//! rest of the network is differentiated by.

mod attention;
mod cam;
mod kernels;
mod maps;

pub use attention::{AttentionMaps, attention_maps};
pub use cam::{Activation, grad_cam, last_map};
pub use kernels::{Difference, Histogram, Kernel, Statistics, differences, kernels};
pub use maps::{FeatureMaps, Order, feature_maps, stage_maps};

use candle_core::{Device, Tensor};

use crate::exec::eager::Eager;
use crate::exec::params::Params;
use crate::graph::{Graph, GraphError, NodeId, Shape};
use crate::weights::Model;

/// Names that are offered instead of one that is not there.
const OFFERED: usize = 3;

/// Why a network cannot be looked into.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("the network has no node named {name} (near it: {})", .near.join(", "))]
    Node { name: String, near: Vec<String> },
    #[error("{name} gives {shape}, which is no feature map (sconce models NAME lists shapes)")]
    NoMap { name: String, shape: String },
    #[error("{name} is no attention node (there is {})", .nodes.join(", "))]
    NoAttentionNode { name: String, nodes: Vec<String> },
    #[error("{model} has no attention (leave --method out, or take grad-cam)")]
    NoAttention { model: String },
    #[error("the network has no feature maps to weigh (take --method attention)")]
    NoMaps,
    #[error("head {head} is not there: {name} has heads 0 to {last}")]
    Head {
        head: usize,
        name: String,
        last: usize,
    },
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Those of some names that a person who wrote another may have meant.
pub fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut near: Vec<(usize, &str)> = names
        .map(|other| (strsim::damerau_levenshtein(name, other), other))
        .collect();
    near.sort();
    let near = near.iter().take(OFFERED);
    near.map(|(_, name)| name.to_string()).collect()
}

/// A network to look into.
pub struct Inside {
    eager: Eager,
    name: String,
    device: Device,
    /// Of every node, for images of the network's size.
    shapes: Vec<Shape>,
    size: usize,
}

/// A map of numbers over a picture, `[height, width]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Map {
    pub height: usize,
    pub width: usize,
    pub values: Vec<f32>,
}

impl Map {
    /// The same with values from 0 to 1; a flat map is all zeros.
    pub fn normalized(&self) -> Self {
        let smallest = self.values.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = self
            .values
            .iter()
            .copied()
            .fold(f32::NEG_INFINITY, f32::max);
        let range = largest - smallest;
        let scaled = |&v: &f32| {
            if range > 0.0 {
                (v - smallest) / range
            } else {
                0.0
            }
        };
        Self {
            values: self.values.iter().map(scaled).collect(),
            ..*self
        }
    }

    /// Resampled to a square of `side` pixels, linearly between the centres of values.
    pub fn resized(&self, side: usize) -> Self {
        let place = |at: usize, count: usize| {
            let at = (at as f32 + 0.5) * count as f32 / side as f32 - 0.5;
            let at = at.clamp(0.0, (count - 1) as f32);
            let low = at.floor() as usize;
            (low, (low + 1).min(count - 1), at - at.floor())
        };
        let mut values = Vec::with_capacity(side * side);
        for y in 0..side {
            let (top, bottom, down) = place(y, self.height);
            for x in 0..side {
                let (left, right, along) = place(x, self.width);
                let value = |y: usize, x: usize| self.values[y * self.width + x];
                let line = |y: usize| value(y, left) * (1.0 - along) + value(y, right) * along;
                values.push(line(top) * (1.0 - down) + line(bottom) * down);
            }
        }
        Self {
            height: side,
            width: side,
            values,
        }
    }
}

impl Inside {
    /// The network with its weights on a device, for images of its own size.
    ///
    /// # Errors
    /// Where the weights cannot be read, or the device refuses.
    pub fn new(model: &Model, device: &Device) -> Result<Self, ExplainError> {
        let params = Params::new(model.source.clone(), model.seed);
        let size = model.preprocessing.crop;
        Ok(Self {
            shapes: model.graph.shapes(size, size)?,
            eager: Eager::new(model.graph.clone(), &params.var_builder(device))?,
            name: model.name.clone(),
            device: device.clone(),
            size,
        })
    }

    pub fn graph(&self) -> &Graph {
        self.eager.graph()
    }

    /// The shape of what a node gives for one image.
    pub fn shape(&self, node: NodeId) -> Shape {
        self.shapes[node.index()]
    }

    /// The node of that name, or the last one of the module of that name.
    ///
    /// # Errors
    /// Where there is none: names a few that are near.
    pub fn find(&self, name: &str) -> Result<NodeId, ExplainError> {
        let graph = self.graph();
        graph.find(name).ok_or_else(|| ExplainError::Node {
            name: name.to_string(),
            near: nearest(name, graph.nodes().iter().map(|node| &*node.name)),
        })
    }

    /// A prepared picture `[H, W, 3]` as the network takes it, `[1, 3, H, W]`.
    fn image(&self, pixels: &[f32]) -> candle_core::Result<Tensor> {
        Tensor::from_slice(pixels, (1, self.size, self.size, 3), &self.device)?
            .permute((0, 3, 1, 2))?
            .contiguous()
    }
}
