//! Feature maps of named nodes.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{ExplainError, Inside, Map};
use crate::exec::eager::{Mode, Observed};
use crate::graph::{NodeId, Shape};

/// What a node gives for one photo, `[channels, height, width]`.
///
/// Of a transformer's tokens `[T, D]` each of the D values is a map over the grid of patches; a class
/// token is left out.
#[derive(Clone, Debug)]
pub struct FeatureMaps {
    pub name: String,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub values: Vec<f32>,
}

/// In which order channels are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As the network numbers them.
    Index,
    /// The largest sum of squares first.
    Energy,
}

impl FeatureMaps {
    /// One channel.
    pub fn map(&self, channel: usize) -> Map {
        let pixels = self.height * self.width;
        Map {
            height: self.height,
            width: self.width,
            values: self.values[channel * pixels..][..pixels].to_vec(),
        }
    }

    /// The first `count` channels in that order.
    pub fn ordered(&self, order: Order, count: usize) -> Vec<usize> {
        let mut channels: Vec<usize> = (0..self.channels).collect();
        if order == Order::Energy {
            let pixels = self.height * self.width;
            let energy = |values: &[f32]| values.iter().map(|&v| f64::from(v).powi(2)).sum();
            let energies: Vec<f64> = self.values.chunks_exact(pixels).map(energy).collect();
            channels.sort_by(|&a, &b| energies[b].total_cmp(&energies[a]));
        }
        channels.truncate(count);
        channels
    }

    /// `[C, H, W]`
    ///
    /// # Errors
    /// None that input can cause.
    pub fn tensor(&self) -> candle_core::Result<Tensor> {
        let shape = (self.channels, self.height, self.width);
        Tensor::from_slice(&self.values, shape, &candle_core::Device::Cpu)
    }
}

/// The feature maps of some nodes for a prepared photo `[H, W, 3]`, in the order of the nodes.
///
/// # Errors
/// Where a node gives no maps, or the device refuses.
pub fn feature_maps(
    inside: &Inside,
    photo: &[f32],
    nodes: &[NodeId],
) -> Result<Vec<FeatureMaps>, ExplainError> {
    for &node in nodes {
        grid(inside, node)?;
    }
    let mut found = BTreeMap::new();
    let image = inside.image(photo)?;
    inside
        .eager
        .forward_observed(&image, Mode::Eval, &mut |id, observed| {
            if let Observed::Output(value) = observed
                && nodes.contains(&id)
            {
                found.insert(id, value.clone());
            }
            Ok(())
        })?;
    nodes
        .iter()
        .filter_map(|node| Some((*node, found.get(node)?)))
        .map(|(node, value)| {
            let [channels, height, width] = grid(inside, node)?;
            let value = match inside.shape(node) {
                Shape::Tokens { length, .. } => {
                    let patches = height * width;
                    value
                        .narrow(1, length - patches, patches)?
                        .transpose(1, 2)?
                }
                _ => value.clone(),
            };
            Ok(FeatureMaps {
                name: inside.graph().node(node).name.clone(),
                channels,
                height,
                width,
                values: value.flatten_all()?.to_vec1()?,
            })
        })
        .collect()
}

/// Channels, height and width of a node's maps.
fn grid(inside: &Inside, node: NodeId) -> Result<[usize; 3], ExplainError> {
    let shape = inside.shape(node);
    match shape {
        Shape::Map {
            channels,
            height,
            width,
        } => return Ok([channels, height, width]),
        Shape::Tokens { length, dim } => {
            let side = length.isqrt();
            // All are patches, or all but the class token.
            if length - side * side <= 1 {
                return Ok([dim, side, side]);
            }
        }
        Shape::Vector { .. } => {}
    }
    Err(ExplainError::NoMap {
        name: inside.graph().node(node).name.clone(),
        shape: shape.to_string(),
    })
}

/// One node of each stage: the last that gives maps.
pub fn stage_maps(inside: &Inside) -> Vec<NodeId> {
    let ids: Vec<NodeId> = inside.graph().ids().collect();
    let stages = inside.graph().stages();
    let last = |range: std::ops::Range<usize>| {
        let mut nodes = ids[range].iter().rev().copied();
        // Maps of one pixel are means, not maps.
        nodes.find(|&node| grid(inside, node).is_ok_and(|[_, h, w]| h * w > 1))
    };
    stages
        .into_iter()
        .filter_map(|stage| last(stage.nodes))
        .collect()
}
