//! Grad-CAM (Selvaraju et al. 2017, <https://arxiv.org/abs/1610.02391>): where in a photo a class was
//! seen.

use candle_core::{IndexOp, Tensor, Var};

use super::{ExplainError, Inside, Map};
use crate::exec::eager::{Mode, Observed};
use crate::graph::{NodeId, Op, Shape};

/// Where a class was seen, and what the network said.
#[derive(Clone, Debug)]
pub struct Activation {
    /// Of the node's size, not negative.
    pub map: Map,
    pub class: usize,
    pub logits: Vec<f32>,
}

/// The node whose maps the head sees: the last one before the last pooling over a whole map.
///
/// # Errors
/// Where the network has no such pooling.
pub fn last_map(inside: &Inside) -> Result<NodeId, ExplainError> {
    let mut nodes = inside.graph().nodes().iter().rev();
    nodes
        .find(|node| node.op == Op::GlobalAvgPool)
        .map(|node| node.inputs[0])
        .ok_or(ExplainError::NoMaps)
}

/// The mean gradient of a class's logit over each channel's map weighs that map; their sum, where
/// positive, is the activation. Without a class, of the one with the largest logit.
///
/// # Errors
/// Where the node gives no feature maps, or the device refuses.
pub fn grad_cam(
    inside: &Inside,
    photo: &[f32],
    node: NodeId,
    class: Option<usize>,
) -> Result<Activation, ExplainError> {
    let shape = inside.shape(node);
    let Shape::Map { height, width, .. } = shape else {
        return Err(ExplainError::NoMap {
            name: inside.graph().node(node).name.clone(),
            shape: shape.to_string(),
        });
    };
    // The node's value becomes a variable: what comes before it is not differentiated.
    let mut maps: Option<Var> = None;
    let logits =
        inside
            .eager
            .forward_replaced(
                &inside.image(photo)?,
                Mode::Eval,
                &mut |id, observed| match observed {
                    Observed::Output(value) if id == node => {
                        let variable = Var::from_tensor(&value.detach())?;
                        Ok(Some(maps.insert(variable).as_tensor().clone()))
                    }
                    _ => Ok(None),
                },
            )?;
    let all: Vec<f32> = logits.i(0)?.to_vec1()?;
    let largest = (0..all.len()).max_by(|&a, &b| all[a].total_cmp(&all[b]));
    let class = class.or(largest).unwrap_or(0);
    let gradients = logits.i((0, class))?.backward()?;
    let map = match maps {
        Some(maps) => match gradients.get(maps.as_tensor()) {
            Some(gradient) => weighed(maps.as_tensor(), gradient)?,
            None => vec![0.0; height * width],
        },
        None => Vec::new(),
    };
    Ok(Activation {
        map: Map {
            height,
            width,
            values: map,
        },
        class,
        logits: all,
    })
}

fn weighed(maps: &Tensor, gradient: &Tensor) -> candle_core::Result<Vec<f32>> {
    let weights = gradient.mean_keepdim((2, 3))?;
    let sum = maps.broadcast_mul(&weights)?.sum(1)?;
    sum.relu()?.flatten_all()?.to_vec1()
}
