use candle_core::{Device, Tensor};
use candle_nn::var_builder::VarBuilder;

use super::cpu::{Options, Plan, PlanError};
use super::eager::Eager;
use crate::graph::Graph;

/// A network ready to classify images of one size, on whichever device: the compiled plan on the
/// CPU, candle's operations elsewhere.
pub struct Runner {
    engine: Engine,
    size: [usize; 2],
}

enum Engine {
    Cpu(Box<Plan>),
    Device(Eager, Device),
}

impl Runner {
    /// Prepares the network for images of `size` `[H, W]`; `options` count on the CPU only.
    ///
    /// # Errors
    /// As [`Plan::compile`], or where the device refuses.
    pub fn new(
        graph: Graph,
        vb: &VarBuilder,
        size: [usize; 2],
        options: Options,
    ) -> Result<Self, PlanError> {
        let engine = if vb.device().is_cpu() {
            let output = graph.output();
            Engine::Cpu(Box::new(Plan::compile(
                &graph,
                vb,
                size,
                &[output],
                options,
            )?))
        } else {
            graph.shapes(size[0], size[1])?;
            Engine::Device(Eager::new(graph, vb)?, vb.device().clone())
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

    /// Logits `[count, classes]` of images `[count, H, W, 3]`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn logits(&mut self, images: &[f32], count: usize) -> candle_core::Result<Vec<f32>> {
        match &mut self.engine {
            Engine::Cpu(plan) => {
                plan.run(images, count);
                Ok(plan.output(0).to_vec())
            }
            Engine::Device(eager, device) => {
                let [h, w] = self.size;
                let images = Tensor::from_slice(images, (count, h, w, 3), device)?
                    .permute((0, 3, 1, 2))?
                    .contiguous()?;
                eager.forward(&images)?.flatten_all()?.to_vec1()
            }
        }
    }
}
