use candle_core::{Device, Tensor};
use candle_nn::var_builder::VarBuilder;

use super::cpu::{Options, Plan, PlanError};
use super::eager::{Eager, Mode, Observed};
use crate::graph::{Graph, NodeId};

/// A network ready to classify images of one size, on whichever device: the compiled plan on the
/// CPU, candle's operations elsewhere.
pub struct Runner {
    engine: Engine,
    size: [usize; 2],
}

enum Engine {
    Cpu(Box<Plan>),
    Device(Eager, Device, NodeId),
}

impl Runner {
    /// Prepares the network for images of `size` `[H, W]`; `options` count on the CPU only. What
    /// it gives is the value of `output`: logits, or those of a node before them.
    ///
    /// # Errors
    /// As [`Plan::compile`], or where the device refuses.
    pub fn new(
        graph: Graph,
        vb: &VarBuilder,
        size: [usize; 2],
        output: NodeId,
        options: Options,
    ) -> Result<Self, PlanError> {
        let engine = if vb.device().is_cpu() {
            Engine::Cpu(Box::new(Plan::compile(
                &graph,
                vb,
                size,
                &[output],
                options,
            )?))
        } else {
            graph.shapes(size[0], size[1])?;
            Engine::Device(Eager::new(graph, vb)?, vb.device().clone(), output)
        };
        Ok(Self { engine, size })
    }

    /// The plan, on the CPU.
    pub fn plan(&self) -> Option<&Plan> {
        match &self.engine {
            Engine::Cpu(plan) => Some(plan),
            Engine::Device(..) => None,
        }
    }

    /// The output, `[count, features]` where it is a vector, of images `[count, H, W, 3]`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn run(&mut self, images: &[f32], count: usize) -> candle_core::Result<Vec<f32>> {
        match &mut self.engine {
            Engine::Cpu(plan) => {
                plan.run(images, count);
                Ok(plan.output(0).to_vec())
            }
            Engine::Device(eager, device, output) => {
                let [h, w] = self.size;
                let images = Tensor::from_slice(images, (count, h, w, 3), device)?
                    .permute((0, 3, 1, 2))?
                    .contiguous()?;
                let mut found = None;
                eager.forward_observed(&images, Mode::Eval, &mut |id, observed| {
                    if let Observed::Output(value) = observed
                        && id == *output
                    {
                        found = Some(value.clone());
                    }
                    Ok(())
                })?;
                match found {
                    Some(value) => value.flatten_all()?.to_vec1(),
                    None => Ok(Vec::new()),
                }
            }
        }
    }
}
