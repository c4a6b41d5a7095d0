//! The compiled inference plan: a network on the CPU, on our own kernels.
//!
//! [`Plan::compile`] walks the graph once for one input size. Batch norms are folded into the
//! convolutions before them; residual sums and activations become part of the convolution's
//! store; reshapes and dropout disappear. Every value that is left gets a place in one arena,
//! shared by values that are never alive together. Values are `[N, H, W, C]`; a sequence is an
//! image of width 1, a vector one of a single pixel.
//!
//! Steps run one after the other; the rows of a step are shared among the threads in blocks
//! that depend on the layer's shape alone, so that the result has the same bits for any number of
//! threads and any batch.

mod arena;
mod lower;
mod step;

use std::sync::Arc;

use candle_nn::var_builder::VarBuilder;

use crate::graph::{Graph, GraphError, NodeId};
use crate::kernels::Dims;
use arena::Arena;
use step::Step;

/// A network compiled for one input size.
pub struct Plan {
    steps: Vec<Step>,
    values: Vec<arena::Slot>,
    input: arena::ValueId,
    outputs: Vec<(arena::ValueId, Dims)>,
    arena: Arena,
    pool: Arc<rayon::ThreadPool>,
}

/// What can go wrong while a plan is compiled.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Parameters(#[from] candle_core::Error),
    #[error("cannot start {threads} threads: {reason}")]
    Threads { threads: usize, reason: String },
}

impl Plan {
    /// Compiles the graph for images of `[height, width]`, with parameters from `vb`.
    ///
    /// `outputs` are the nodes whose values [`Plan::output`] gives after a run; a node that is
    /// asked for is never fused away.
    ///
    /// # Errors
    /// Where the image is too small for the network, a parameter cannot be had, or threads cannot
    /// be started.
    pub fn compile(
        graph: &Graph,
        vb: &VarBuilder,
        [height, width]: [usize; 2],
        outputs: &[NodeId],
        threads: usize,
    ) -> Result<Self, PlanError> {
        let lowered = lower::lower(graph, vb, [height, width], outputs)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("plan-{i}"))
            .build()
            .map_err(|e| PlanError::Threads {
                threads,
                reason: e.to_string(),
            })?;
        Ok(Self {
            steps: lowered.steps,
            values: arena::place(&lowered.lifetimes),
            input: lowered.input,
            outputs: lowered.outputs,
            arena: Arena::default(),
            pool: Arc::new(pool),
        })
    }

    /// Runs a batch of `count` images `[count, H, W, 3]`.
    ///
    /// # Panics
    /// Where `images` has another length.
    pub fn run(&mut self, images: &[f32], count: usize) {
        let per_image = arena::per_image(&self.values);
        self.arena.reserve(per_image * count);
        let input = self.values[self.input].range(count);
        self.arena.write(input).copy_from_slice(images);
        let Self {
            steps,
            values,
            arena,
            pool,
            ..
        } = self;
        pool.install(|| {
            for step in steps {
                let output = values[step.output].range(count);
                let inputs: Vec<_> = step
                    .inputs
                    .iter()
                    .map(|&i| values[i].range(count))
                    .collect();
                let (output, inputs) = arena.split(output, &inputs);
                step.run(&inputs, output, count);
            }
        });
    }

    /// The value of the `index`th node asked for, `[count, H, W, C]`, after a run of `count`
    /// images.
    pub fn output(&self, index: usize, count: usize) -> &[f32] {
        let (value, _) = self.outputs[index];
        self.arena.read(self.values[value].range(count))
    }

    /// Height, width and channels of the `index`th node asked for.
    pub fn output_dims(&self, index: usize) -> Dims {
        self.outputs[index].1
    }
}
