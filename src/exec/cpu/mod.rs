//! The compiled inference plan: a network on the CPU, on our own kernels.
//!
//! [`Plan::compile`] walks the graph once for one input size. Batch norms are folded into the
//! convolutions before them; residual sums and activations become part of the convolution's
//! store; reshapes, dropout and channel slices disappear. Weights are packed, or transformed for
//! Winograd's algorithm, once. Every value that is left gets a place in one arena, shared by
//! values that are never alive together, with a border of zeros as wide as its readers' windows
//! reach. Values are `[N, H, W, C]`; a sequence is an image of width 1, a vector one of a single
//! pixel.
//!
//! Steps run one after the other, each as a number of tasks for a small pool of threads. An
//! image's result has the same bits for any number of threads and any batch: algorithms are
//! chosen by the layer, and no sum is split among tasks.

mod arena;
mod lower;
mod pool;
mod step;

use candle_nn::var_builder::VarBuilder;

use crate::graph::{Graph, GraphError, NodeId};
use crate::kernels::{Dims, Isa, Layout, Source, Target};
use arena::{Buffer, Slot, ValueId};
use pool::Pool;
use step::Step;

/// A network compiled for one input size.
pub struct Plan {
    steps: Vec<Step>,
    slots: Vec<Slot>,
    layouts: Vec<Layout>,
    input: ValueId,
    outputs: Vec<(ValueId, Dims)>,
    arena: Buffer,
    /// For steps that need memory of their own.
    scratch: Buffer,
    pool: Pool,
}

/// How a plan computes.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub threads: usize,
    /// No algorithm that changes digits (Winograd's).
    pub exact: bool,
    pub isa: Isa,
}

impl Options {
    /// With so many threads, everything else as the machine allows.
    pub fn threads(threads: usize) -> Self {
        Self {
            threads: threads.max(1),
            exact: false,
            isa: Isa::detect(),
        }
    }

    /// Without algorithms that change digits.
    pub fn exact(self, exact: bool) -> Self {
        Self { exact, ..self }
    }
}

/// What can go wrong while a plan is compiled.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Parameters(#[from] candle_core::Error),
    #[error("--threads {threads}: cannot start them: {source} (use fewer)")]
    Threads {
        threads: usize,
        source: std::io::Error,
    },
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
        size: [usize; 2],
        outputs: &[NodeId],
        options: Options,
    ) -> Result<Self, PlanError> {
        let pool = Pool::new(options.threads).map_err(|source| PlanError::Threads {
            threads: options.threads,
            source,
        })?;
        let lowered = lower::lower(graph, vb, size, outputs, options)?;
        let slots = arena::place(&lowered.lifetimes);
        Ok(Self {
            steps: lowered.steps,
            slots: lowered.memory_of.iter().map(|&v| slots[v]).collect(),
            layouts: lowered.layouts,
            input: lowered.input,
            outputs: lowered.outputs,
            arena: Buffer::default(),
            scratch: Buffer::default(),
            pool,
        })
    }

    /// Runs a batch of `count` images `[count, H, W, 3]`.
    ///
    /// # Panics
    /// Where `images` has another length.
    pub fn run(&mut self, images: &[f32], count: usize) {
        self.arena.reserve(arena::per_image(&self.slots) * count);
        self.write_input(images, count);
        for step in &self.steps {
            let layout = |value: ValueId| self.layouts[value];
            let ranges: Vec<_> = step
                .inputs
                .iter()
                .map(|v| self.slots[v.value].range(count))
                .collect();
            let (output, inputs) = self
                .arena
                .split(self.slots[step.output].range(count), &ranges);
            let inputs: Vec<Source> = inputs
                .into_iter()
                .zip(&step.inputs)
                .map(|(values, view)| Source::new(values, layout(view.value), count))
                .collect();
            let output = Target::new(output, layout(step.output), count);
            step.run(&self.pool, &inputs, output, count, &mut self.scratch);
        }
    }

    fn write_input(&mut self, images: &[f32], count: usize) {
        let layout = self.layouts[self.input];
        let Dims { h, w, c } = layout.dims;
        assert_eq!(images.len(), count * h * w * c, "a batch of another size");
        let values = self.arena.write(self.slots[self.input].range(count));
        let target = Target::new(values, layout, count);
        for (index, row) in images.chunks_exact(w * c).enumerate() {
            // SAFETY: `values` is borrowed for these writes alone.
            unsafe {
                if index % h == 0 {
                    target.clear_border(index / h);
                }
                target.row(index / h, index % h).copy_from_slice(row);
            }
        }
    }

    /// The value of the `index`th node asked for, `[count, H, W, C]`, after a run of `count`
    /// images.
    pub fn output(&self, index: usize, count: usize) -> Vec<f32> {
        let (value, dims) = self.outputs[index];
        let values = self.arena.read(self.slots[value].range(count));
        let source = Source::new(values, self.layouts[value], count);
        let mut result = Vec::with_capacity(dims.len() * count);
        for image in 0..count {
            for y in 0..dims.h {
                // SAFETY: `values` is borrowed, so nobody writes it.
                result.extend_from_slice(unsafe { source.row(image, y) });
            }
        }
        result
    }

    /// Height, width and channels of the `index`th node asked for.
    pub fn output_dims(&self, index: usize) -> Dims {
        self.outputs[index].1
    }
}
