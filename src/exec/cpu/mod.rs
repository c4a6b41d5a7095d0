//! The compiled inference plan: a network on the CPU, on our own kernels.
//!
//! [`Plan::compile`] walks the graph once for one input size. Batch norms are folded into the
//! convolutions before them; residual sums and activations become part of the convolution's
//! store; reshapes, dropout and channel slices disappear. Weights are packed, or transformed for
//! Winograd's algorithm, once. Then steps that pass a value only between themselves are joined:
//! a depthwise convolution with the product before and the one after it, a gate with the
//! projection that it is for, a mean with the step that computes what it is the mean of. Every
//! value that is left gets a place in one arena, shared by values that are never alive together,
//! with a border of zeros as wide as its readers' windows reach. Values are `[N, H, W, C]`; a
//! sequence is an image of width 1, a vector one of a single pixel.
//!
//! Steps run one after the other, each as a number of tasks for a small pool of threads. An
//! image's result has the same bits for any number of threads and any batch: algorithms are
//! chosen by the layer, and no sum is split among tasks. How a step is divided may depend on the
//! threads and the batch, since no bit does.
//!
//! # Where to change what
//! - `lower`: which kernel a layer gets (`lower`'s `convolution`, for example, chooses between
//!   product, Winograd, depthwise and grouped), what is folded and joined, and borders.
//! - `step`: how a step of each kind is divided into tasks, and which kernel a task calls.
//! - `arena`: which values share memory.
//! - `pool` and `shares`: who does which task.
//! - [`crate::kernels`]: the computations; each file begins with its idea.
//!
//! A new kernel: write it in [`crate::kernels`] over parts of an output that the caller chooses,
//! test it against a plain loop in `kernels/tests.rs`, give it a `Kind` in `step`, a line in
//! `Step::run`, and a condition in `lower` that depends on the layer's shape alone. The
//! networks' tests then hold it to the reference, to the same bits for any threads and batch, and
//! `sconce bench -m NAME -v` shows what it takes.

pub(in crate::exec) mod arena;
pub(in crate::exec) mod lower;
mod pool;
mod shares;
mod step;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_nn::var_builder::VarBuilder;

use crate::exec::Precision;
use crate::graph::{Graph, GraphError, NodeId};
use crate::kernels::memory::{Buffer, Slab};
use crate::kernels::{Dims, Isa, Layout, Source, Target};
use arena::{Slot, ValueId};
pub use pool::Pool;
use step::Step;

/// A network compiled for one input size.
pub struct Plan {
    steps: Vec<Step>,
    slots: Vec<Slot>,
    layouts: Vec<Layout>,
    input: ValueId,
    outputs: Vec<(ValueId, Dims)>,
    /// By output.
    results: Vec<Vec<f32>>,
    /// Larger batches are run in parts of so many.
    images_at_once: usize,
    arena: Buffer,
    /// For steps that need memory of their own.
    scratch: Buffer,
    pool: Pool,
    /// Time spent in each step so far.
    timings: Vec<Duration>,
}

/// A batch is run in parts whose values take about as much memory as this, or as the weights,
/// where those are more: what one step writes should still be in the cache when the next reads
/// it, and weights that do not fit there should be read for several images at once.
const CACHE_VALUES: usize = (24 << 20) / size_of::<f32>();

/// How a network is computed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub threads: usize,
    /// No algorithm that changes digits (Winograd's).
    pub exact: bool,
    pub isa: Isa,
    /// What a CUDA device computes with; the CPU computes in float32.
    pub precision: Precision,
}

impl Options {
    /// With so many threads, everything else as the machine allows.
    pub fn threads(threads: usize) -> Self {
        Self {
            threads: threads.max(1),
            exact: false,
            isa: Isa::detect(),
            precision: Precision::F32,
        }
    }

    /// Without algorithms that change digits.
    pub fn exact(self, exact: bool) -> Self {
        Self { exact, ..self }
    }

    /// With these numbers on a CUDA device.
    pub fn precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
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

/// Packs all weights, several layers at a time; gives the number of values that they are.
fn pack(jobs: Vec<lower::Job>, pool: &Pool) -> candle_core::Result<usize> {
    let slab = Slab::default();
    let failed: Mutex<Option<candle_core::Error>> = Mutex::default();
    pool.each(jobs, |job| {
        if let Err(error) = job(&slab) {
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            failed.get_or_insert(error);
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(slab.stored()),
    }
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
        let mut lowered = lower::lower(graph, vb, size, outputs, options)?;
        let weights = pack(std::mem::take(&mut lowered.jobs), &pool)?;
        let slots = arena::place(&lowered.lifetimes);
        let values = CACHE_VALUES.max(weights);
        let images_at_once = (values / arena::per_image(&slots).max(1)).max(1);
        Ok(Self {
            timings: vec![Duration::ZERO; lowered.steps.len()],
            steps: lowered.steps,
            slots: lowered.memory_of.iter().map(|&v| slots[v]).collect(),
            layouts: lowered.layouts,
            input: lowered.input,
            results: vec![Vec::new(); lowered.outputs.len()],
            outputs: lowered.outputs,
            images_at_once,
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
        let per_image = self.layouts[self.input].dims.len();
        assert_eq!(images.len(), count * per_image, "a batch of another size");
        self.results.iter_mut().for_each(Vec::clear);
        for part in images.chunks(per_image * self.images_at_once.min(count.max(1))) {
            self.run_part(part, part.len() / per_image);
            self.keep_results(part.len() / per_image);
        }
    }

    fn run_part(&mut self, images: &[f32], count: usize) {
        self.arena.reserve(arena::per_image(&self.slots) * count);
        self.write_input(images, count);
        for (step, timing) in self.steps.iter().zip(&mut self.timings) {
            let started = Instant::now();
            let layout = |value: ValueId| self.layouts[value];
            let ranges: Vec<_> = step
                .inputs
                .iter()
                .map(|v| self.slots[v.value].range(count))
                .collect();
            let written = [Some(step.output), step.line_sums];
            let written = written.map(|v| v.map_or(0..0, |v| self.slots[v].range(count)));
            let ([output, sums], inputs) = self.arena.split_many(written, &ranges);
            let inputs: Vec<Source> = inputs
                .into_iter()
                .zip(&step.inputs)
                .map(|(values, view)| Source::new(values, layout(view.value), count))
                .collect();
            let output = Target::new(output, layout(step.output), count);
            let sums = step.line_sums.map(|v| Target::new(sums, layout(v), count));
            step.run(&self.pool, &inputs, output, sums, count, &mut self.scratch);
            *timing += started.elapsed();
        }
    }

    fn write_input(&mut self, images: &[f32], count: usize) {
        let layout = self.layouts[self.input];
        let Dims { h, w, c } = layout.dims;
        let values = self.arena.write(self.slots[self.input].range(count));
        let target = Target::new(values, layout, count);
        const ROWS: usize = 16;
        let blocks = h.div_ceil(ROWS);
        self.pool.run(count * blocks, |task| {
            let (image, start) = (task / blocks, task % blocks * ROWS);
            // SAFETY: `values` is borrowed for these writes alone; each task writes its own rows and
            // the border beside them.
            unsafe {
                let rows = start..(start + ROWS).min(h);
                target.clear_border(image, rows.clone());
                for y in rows {
                    let from = (image * h + y) * w * c;
                    target
                        .row(image, y)
                        .copy_from_slice(&images[from..from + w * c]);
                }
            }
        });
    }

    /// Copies the values that were asked for out of the arena.
    fn keep_results(&mut self, count: usize) {
        for (&(value, dims), result) in self.outputs.iter().zip(&mut self.results) {
            let values = self.arena.read(self.slots[value].range(count));
            let source = Source::new(values, self.layouts[value], count);
            for image in 0..count {
                for y in 0..dims.h {
                    // SAFETY: `values` is borrowed, so nobody writes it.
                    result.extend_from_slice(unsafe { source.row(image, y) });
                }
            }
        }
    }

    /// The value of the `index`th node asked for, `[count, H, W, C]`, for the images of the last
    /// run.
    pub fn output(&self, index: usize) -> &[f32] {
        &self.results[index]
    }

    /// For every step the node that it begins with, what kind of step it is, and the time spent in
    /// it over all runs.
    pub fn timings(&self) -> impl Iterator<Item = (&str, &'static str, Duration)> {
        let steps = self.steps.iter().zip(&self.timings);
        steps.map(|(step, &time)| (step.name.as_str(), step.kind.label(), time))
    }

    /// Height, width and channels of the `index`th node asked for.
    pub fn output_dims(&self, index: usize) -> Dims {
        self.outputs[index].1
    }
}
