//! What a Vision Transformer's class token attends to.

use candle_core::{D, IndexOp, Tensor};

use super::{ExplainError, Inside, Map};
use crate::exec::eager::{Mode, Observed};
use crate::graph::{NodeId, Op};

/// The attention of all layers for one photo.
#[derive(Clone, Debug)]
pub struct AttentionMaps {
    /// By layer: its name and its weights `[heads, T, T]`, rows sum to 1.
    layers: Vec<(String, Tensor)>,
    pub logits: Vec<f32>,
}

/// Runs the network on a prepared photo `[H, W, 3]`.
///
/// # Errors
/// Where the network has no attention, or the device refuses.
pub fn attention_maps(inside: &Inside, photo: &[f32]) -> Result<AttentionMaps, ExplainError> {
    let nodes = inside.graph().nodes();
    if !nodes
        .iter()
        .any(|node| matches!(node.op, Op::SelfAttention { .. }))
    {
        let model = inside.name.clone();
        return Err(ExplainError::NoAttention { model });
    }
    let mut layers = Vec::new();
    let image = inside.image(photo)?;
    let logits =
        inside
            .eager
            .forward_observed(&image, Mode::Eval, &mut |id: NodeId, observed| {
                if let Observed::Attention(weights) = observed {
                    layers.push((nodes[id.index()].name.clone(), weights.i(0)?));
                }
                Ok(())
            })?;
    Ok(AttentionMaps {
        layers,
        logits: logits.i(0)?.to_vec1()?,
    })
}

impl AttentionMaps {
    /// Attention rollout (Abnar & Zuidema 2020, <https://arxiv.org/abs/2005.00928>): the layers'
    /// weights, each the mean of its heads and half of the identity for the residual connection,
    /// multiplied; the class token's row over the patches.
    ///
    /// # Errors
    /// Where the device refuses.
    pub fn rollout(&self) -> candle_core::Result<Map> {
        let mut rollout: Option<Tensor> = None;
        for (_, weights) in &self.layers {
            let mean = weights.mean(0)?;
            let identity = Tensor::eye(mean.dim(0)?, mean.dtype(), mean.device())?;
            let mixed = ((mean + identity)? * 0.5)?;
            let mixed = mixed.broadcast_div(&mixed.sum_keepdim(D::Minus1)?)?;
            rollout = Some(match rollout {
                None => mixed,
                Some(before) => mixed.matmul(&before)?,
            });
        }
        match rollout {
            Some(rollout) => over_patches(&rollout),
            None => candle_core::bail!("no attention was seen"),
        }
    }

    /// What the class token attends to in one layer (None: the last): one head, or the mean of all.
    ///
    /// # Errors
    /// Where there is no such layer or head.
    pub fn layer(&self, name: Option<&str>, head: Option<usize>) -> Result<Map, ExplainError> {
        let names = || self.layers.iter().map(|(name, _)| name.clone()).collect();
        let inside = |layer: &str, name: &str| {
            layer
                .strip_prefix(name)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let found = match name {
            None => self.layers.last(),
            Some(name) => self.layers.iter().find(|(layer, _)| inside(layer, name)),
        };
        let Some((layer, weights)) = found else {
            return Err(ExplainError::NoAttentionNode {
                name: name.unwrap_or_default().to_string(),
                nodes: names(),
            });
        };
        let weights = match head {
            None => weights.mean(0)?,
            Some(head) if head < weights.dim(0)? => weights.i(head)?,
            Some(head) => {
                return Err(ExplainError::Head {
                    head,
                    name: layer.clone(),
                    last: weights.dim(0)? - 1,
                });
            }
        };
        Ok(over_patches(&weights)?)
    }
}

/// The class token's row of `[T, T]` without itself, over the square of patches.
fn over_patches(weights: &Tensor) -> candle_core::Result<Map> {
    let row: Vec<f32> = weights.i(0)?.to_vec1()?;
    let side = (row.len() - 1).isqrt();
    Ok(Map {
        height: side,
        width: side,
        values: row[row.len() - side * side..].to_vec(),
    })
}
