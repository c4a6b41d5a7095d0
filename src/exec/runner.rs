use candle_core::{Device, Tensor};
use candle_nn::var_builder::VarBuilder;

use super::cpu::{Options, Plan, PlanError};
use super::eager::Eager;
use super::memory::with_advice;
use crate::graph::{Graph, NodeId};

/// A network ready to classify images of one size, on whichever device: the compiled plan on the
/// CPU, kernels of our own on a CUDA device, candle's operations elsewhere.
pub struct Runner {
    engine: Engine,
    size: [usize; 2],
}

enum Engine {
    Cpu(Box<Plan>),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::CudaNetwork, Device),
    Device(Eager, Device),
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
        let device = vb.device().clone();
        let engine = if device.is_cpu() {
            Engine::Cpu(Box::new(Plan::compile(
                &graph,
                vb,
                size,
                &[output],
                options,
            )?))
        } else {
            let graph = graph.until(output);
            graph.shapes(size[0], size[1])?;
            match device {
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => {
                    let network = super::cuda::CudaNetwork::new(graph, vb, options.precision)?;
                    Engine::Cuda(network, device)
                }
                _ => Engine::Device(Eager::new(graph, vb)?, device),
            }
        };
        Ok(Self { engine, size })
    }

    /// The plan, on the CPU.
    pub fn plan(&self) -> Option<&Plan> {
        match &self.engine {
            Engine::Cpu(plan) => Some(plan),
            _ => None,
        }
    }

    /// The output, `[count, features]` where it is a vector, of images `[count, H, W, 3]`.
    ///
    /// # Errors
    /// Where the device fails; where its memory is too small, with the batch that would fit.
    pub fn run(&mut self, images: &[f32], count: usize) -> candle_core::Result<Vec<f32>> {
        let [h, w] = self.size;
        let device = match &mut self.engine {
            Engine::Cpu(plan) => {
                plan.run(images, count);
                return Ok(plan.output(0).to_vec());
            }
            #[cfg(feature = "cuda")]
            Engine::Cuda(_, device) => device.clone(),
            Engine::Device(_, device) => device.clone(),
        };
        let pass = |count: usize| {
            let images = &images[..count * h * w * 3];
            self.run_there(&Tensor::from_slice(images, (count, h, w, 3), &device)?)
        };
        with_advice(pass(count), count, |count| pass(count).map(drop))
    }

    /// The same of images that are on the device already.
    ///
    /// # Errors
    /// Where the device fails, and on the CPU, whose images are no tensors.
    pub fn run_there(&self, images: &Tensor) -> candle_core::Result<Vec<f32>> {
        let output = match &self.engine {
            Engine::Cpu(_) => candle_core::bail!("the CPU's plan takes values"),
            #[cfg(feature = "cuda")]
            Engine::Cuda(network, _) => network.forward(images)?,
            Engine::Device(eager, _) => {
                eager.forward(&images.permute((0, 3, 1, 2))?.contiguous()?)?
            }
        };
        output.flatten_all()?.to_vec1()
    }
}
