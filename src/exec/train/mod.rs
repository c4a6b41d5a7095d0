//! The compiled training plan: a network's forward and backward pass on the CPU, on our own
//! kernels.
//!
//! [`PlanStep`] compiles the graph for the shape of a batch and keeps the plan for the next. A
//! convolution's output is the only thing of it that is kept for the way back: batch norm and
//! activation are computed while the next convolution reads it, and again when gradients need
//! them. Going back, whoever computes the gradient behind an activation masks it and takes the sums
//! that the batch norm before it needs, while the values are in the cache; the convolution before
//! that turns it into the gradient at its own output while it reads it. Parameter gradients leave
//! as soon as they are known. All values of a batch share one arena.
//!
//! A batch norm on stored statistics that nobody trains becomes part of the convolution's weights,
//! and a clipping activation behind one is applied where the output lies.
//!
//! What is frozen, and reads nothing that is not, is computed by the inference plan.
//!
//! The order of all sums follows from shapes alone: the same batch gives the same bits with any
//! number of threads.

mod conv;
mod lower;
mod operation;
mod values;

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::var_builder::VarBuilder;
use rand_chacha::ChaCha8Rng;

use super::cpu::{Options, Plan, Pool};
use super::params::with_values;
use super::step::{Others, TrainingStep, Variables};
use crate::graph::{Graph, NodeId};
use crate::kernels::memory::Buffer;
use crate::kernels::rowwise;
use crate::ranks::Collectives;
use lower::{Lowered, Step, Trained};
use values::{Memory, Norm, ParameterId, Shared};

/// [`TrainingStep`] by a compiled plan, on the CPU.
pub struct PlanStep {
    graph: Arc<Graph>,
    variables: Variables,
    trained: Trained,
    /// By parameter of the graph: its index among the trained ones.
    indices: Vec<Option<usize>>,
    names: Vec<String>,
    options: Options,
    pool: Pool,
    others: Others,
    /// Plans by number and size of images, the last used first.
    plans: Vec<(Shape, Compiled)>,
    /// Whether the first plan has run forward, and not backward since.
    ready: bool,
}

/// Images of a batch, height and width.
type Shape = [usize; 3];

/// Plans that are kept: whole batches, and the rest at the end of an epoch.
const PLANS: usize = 2;

struct Compiled {
    /// Time spent in each step so far.
    timings: Vec<Duration>,
    lowered: Lowered,
    arena: Buffer,
    /// Computes what is frozen.
    frozen: Option<Plan>,
}

impl PlanStep {
    /// # Errors
    /// Where the threads cannot be started.
    pub fn new(graph: Graph, variables: &Variables, options: Options) -> Result<Self> {
        let pool = Pool::new(options.threads).map_err(candle_core::Error::wrap)?;
        let trained = Trained::new(&graph, |name| variables.is_trained(name));
        let names: Vec<String> = graph.parameters().map(|p| p.name.clone()).collect();
        let place = |name: &String| variables.parameters().iter().position(|(n, _)| n == name);
        let indices = names.iter().map(place).collect();
        Ok(Self {
            graph: Arc::new(graph),
            variables: variables.clone(),
            trained,
            indices,
            names,
            options,
            pool,
            others: Others::default(),
            plans: Vec::new(),
            ready: false,
        })
    }

    /// Brings the plan for batches of this shape to the front.
    fn compile(&mut self, shape: Shape) -> Result<()> {
        if let Some(index) = self.plans.iter().position(|(s, _)| *s == shape) {
            self.plans[..=index].rotate_right(1);
            return Ok(());
        }
        let [count, height, width] = shape;
        let size = [height, width];
        let lowered = lower::lower(&self.graph, &self.trained, count, size, self.options)?;
        let given: Vec<NodeId> = lowered.inputs.iter().map(|(node, _)| *node).collect();
        let frozen = match given.iter().max() {
            Some(&last) if given != [self.graph.input()] => {
                let tensors = self.variables.tensors().clone().into_iter().collect();
                let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
                let graph = self.graph.until(last);
                let plan = Plan::compile(&graph, &vb, size, &given, self.options);
                Some(plan.map_err(candle_core::Error::wrap)?)
            }
            _ => None,
        };
        let len = lowered
            .places
            .iter()
            .map(|(offset, len)| offset + len)
            .max();
        self.plans.truncate(PLANS - 1);
        let mut arena = Buffer::default();
        arena.reserve(len.unwrap_or(0));
        let plan = Compiled {
            timings: vec![Duration::ZERO; lowered.steps.len()],
            lowered,
            arena,
            frozen,
        };
        self.plans.insert(0, (shape, plan));
        Ok(())
    }
}

/// A parameter as it is now.
fn parameter<'a>(
    names: &[String],
    variables: &'a Variables,
    id: ParameterId,
) -> Result<&'a Tensor> {
    match variables.tensors().get(&names[id]) {
        Some(tensor) => Ok(tensor),
        None => bail!("parameter {} is missing", names[id]),
    }
}

impl Compiled {
    /// Takes the parameters as they are now.
    fn load(&mut self, names: &[String], variables: &Variables, pool: &Pool) -> Result<()> {
        let tensor = |id: ParameterId| parameter(names, variables, id);
        let values = |id: ParameterId| with_values(tensor(id)?, |v| v.to_vec());
        for norm in &mut self.lowered.norms {
            norm.weight = values(norm.parameters[0])?;
        }
        for operation in &mut self.lowered.operations {
            // Only known parameters are asked for.
            operation.load(|id| values(id).unwrap_or_default());
        }
        // The largest first, so that the threads end together.
        let mut order: Vec<usize> = (0..self.lowered.layers.len()).collect();
        order.sort_by_key(|&layer| std::cmp::Reverse(self.lowered.layers[layer].conv.weights()));
        let pointer = Shared(self.lowered.layers.as_mut_ptr().cast());
        let failed = std::sync::Mutex::new(None);
        pool.run(order.len(), |task| {
            // SAFETY: each task has a layer of its own.
            let layer = unsafe { &mut *pointer.get().cast::<conv::Layer>().add(order[task]) };
            let mut load = || -> Result<()> {
                let weight = tensor(layer.weight)?.clone();
                let bias = layer.bias.map(values).transpose()?;
                let norm = match &layer.folded {
                    None => None,
                    Some(folded) => {
                        let [a, b, c, d] = folded.parameters;
                        Some([values(a)?, values(b)?, values(c)?, values(d)?])
                    }
                };
                with_values(&weight, |weight| layer.load(weight, bias.as_deref(), norm))
            };
            if let Err(error) = load() {
                *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
            }
        });
        match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Writes images `[N, 3, H, W]`, or what the frozen part makes of them.
    fn write_inputs(&mut self, images: &[f32], [count, h, w]: Shape, pool: &Pool) {
        let pixels = h * w;
        let channels_last = |to: *mut f32| {
            let to = Shared(to);
            pool.run(count * h, |task| {
                let (image, y) = (task / h, task % h);
                // SAFETY: a row of the input, the task's own.
                let out = unsafe {
                    let to = to.get().add((image * pixels + y * w) * 3);
                    std::slice::from_raw_parts_mut(to, w * 3)
                };
                for (c, plane) in images[image * 3 * pixels..][..3 * pixels]
                    .chunks_exact(pixels)
                    .enumerate()
                {
                    for (out, &value) in out.chunks_exact_mut(3).zip(&plane[y * w..][..w]) {
                        out[c] = value;
                    }
                }
            });
        };
        let Some(frozen) = &mut self.frozen else {
            let (_, input) = self.lowered.inputs[0];
            let (offset, _) = self.lowered.places[input];
            // SAFETY: the input lies inside the arena.
            channels_last(unsafe { self.arena.pointer().add(offset) });
            return;
        };
        let mut values = vec![0.0; images.len()];
        channels_last(values.as_mut_ptr());
        frozen.run(&values, count);
        for (index, &(_, value)) in self.lowered.inputs.iter().enumerate() {
            let (offset, len) = self.lowered.places[value];
            let to = self.arena.write(offset..offset + len);
            to.copy_from_slice(frozen.output(index));
        }
    }
}

impl TrainingStep for PlanStep {
    fn parameters(&self) -> &[(String, Var)] {
        self.variables.parameters()
    }

    fn buffers(&self) -> &[(String, Var)] {
        self.variables.buffers()
    }

    fn train_with(&mut self, others: Others) -> Result<()> {
        self.others = others;
        Ok(())
    }

    fn forward(&mut self, images: &Tensor, generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let (count, channels, height, width) = images.dims4()?;
        if channels != 3 || count == 0 {
            bail!(
                "images of {channels} channels in a batch of {count}: one or more of 3 are needed"
            );
        }
        self.ready = false;
        let shape = [count, height, width];
        self.compile(shape)?;
        let Self {
            plans,
            pool,
            options,
            names,
            variables,
            others,
            ..
        } = self;
        let plan = &mut plans[0].1;
        plan.load(names, variables, pool)?;
        let images = images.contiguous()?;
        with_values(&images, |images| plan.write_inputs(images, shape, pool))?;
        let norms = plan.lowered.norms.as_mut_ptr();
        let memory = Memory {
            isa: options.isa,
            pool,
            count,
            base: plan.arena.pointer(),
            places: &plan.lowered.places,
            norms,
        };
        for (step, timing) in plan.lowered.steps.iter().zip(&mut plan.timings) {
            let started = Instant::now();
            match *step {
                Step::Layer(layer) => {
                    let layer = &plan.lowered.layers[layer];
                    let weight = parameter(names, variables, layer.weight)?;
                    with_values(weight, |weight| layer.pack_forward(&memory, weight))?;
                    layer.forward(&memory);
                }
                Step::Operation(index) => {
                    plan.lowered.operations[index].forward(&memory, generator, others);
                }
                // SAFETY: no task runs, and nobody else holds the norm.
                Step::Norm(norm) => {
                    finish_norm(unsafe { &mut *norms.add(norm) }, names, variables, others)?
                }
                _ => break,
            }
            *timing += started.elapsed();
        }
        let logits = memory.values(plan.lowered.logits).to_vec();
        self.ready = true;
        Tensor::from_vec(logits, (count, self.graph.num_classes()), &Device::Cpu)
    }

    fn backward(
        &mut self,
        logits_gradient: &Tensor,
        sink: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        if !std::mem::take(&mut self.ready) {
            bail!("backward without a forward pass before it");
        }
        let ([count, ..], plan) = &mut self.plans[0];
        let lowered = &mut plan.lowered;
        let Some(gradient) = lowered.logits_gradient else {
            return Ok(());
        };
        let (offset, len) = lowered.places[gradient];
        let to = plan.arena.write(offset..offset + len);
        let source = logits_gradient.contiguous()?;
        with_values(&source, |values| {
            if values.len() != len {
                bail!("a gradient of {} values for {len} logits", values.len());
            }
            to.copy_from_slice(values);
            Ok(())
        })??;
        let norms = plan.lowered.norms.as_mut_ptr();
        let memory = Memory {
            isa: self.options.isa,
            pool: &self.pool,
            count: *count,
            base: plan.arena.pointer(),
            places: &plan.lowered.places,
            norms,
        };
        let mut result = Ok(());
        let mut emit = |id: ParameterId, values: Vec<f32>| {
            let Some(index) = self.indices[id] else {
                return;
            };
            if result.is_ok() {
                let shape = self.variables.parameters()[index].1.shape();
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu);
                result = tensor.and_then(|tensor| sink(index, tensor));
            }
        };
        for (step, timing) in plan.lowered.steps.iter().zip(&mut plan.timings) {
            let started = Instant::now();
            match *step {
                Step::NormBackward(norm) => {
                    // SAFETY: no task runs, and nobody else holds the norm.
                    let norm = unsafe { &mut *norms.add(norm) };
                    norm_backward(norm, &self.others, &mut emit);
                }
                Step::LayerBackward(layer) => {
                    let layer = &plan.lowered.layers[layer];
                    let weight = parameter(&self.names, &self.variables, layer.weight)?;
                    with_values(weight, |weight| layer.pack_backward(&memory, weight))?;
                    layer.backward(&memory, &mut emit);
                }
                Step::OperationBackward(index) => {
                    plan.lowered.operations[index].backward(&memory, &mut emit);
                }
                Step::Zero(view) => {
                    // SAFETY: the only task.
                    let all =
                        unsafe { memory.part(view.value, 0, memory.values(view.value).len()) };
                    for pixel in all.chunks_exact_mut(view.stride) {
                        pixel[view.start..][..view.channels].fill(0.0);
                    }
                }
                Step::Copy { from, to } | Step::Add { from, to } => {
                    let add = matches!(step, Step::Add { .. });
                    const CHUNK: usize = 16 << 10;
                    let from = memory.values(from);
                    self.pool.run(from.len().div_ceil(CHUNK), |task| {
                        let start = task * CHUNK;
                        let from = &from[start..(start + CHUNK).min(from.len())];
                        // SAFETY: the chunk is the task's own.
                        let to = unsafe { memory.part(to, start, from.len()) };
                        if add {
                            rowwise::accumulate(memory.isa, from, to);
                        } else {
                            to.copy_from_slice(from);
                        }
                    });
                }
                Step::Layer(_) | Step::Norm(_) | Step::Operation(_) | Step::Loss => continue,
            }
            *timing += started.elapsed();
        }
        result
    }

    /// Of the plan that was used last.
    fn timings(&self) -> Vec<(&str, &'static str, Duration)> {
        let Some((_, plan)) = self.plans.first() else {
            return Vec::new();
        };
        let steps = plan.lowered.steps.iter().zip(&plan.timings);
        let labelled = steps.map(|(&step, &time)| {
            let (name, label) = plan.lowered.describe(step);
            (name, label, time)
        });
        labelled.collect()
    }
}

/// A norm's scale and shift, from the batch's moments or the stored statistics; the former also
/// enter the running statistics, the variance without its bias, as PyTorch has it.
fn finish_norm(
    norm: &mut Norm,
    names: &[String],
    variables: &Variables,
    others: &Others,
) -> Result<()> {
    let values = |id| with_values(parameter(names, variables, id)?, |v| v.to_vec());
    let [_, bias, running_mean, running_variance] = norm.parameters;
    let (mean, variance) = if norm.batch {
        let (mut mean, mut variance) = norm.join_moments();
        norm.total = norm.count as f64;
        if let Some(ranks) = synchronized(others) {
            norm.total = join_ranks(ranks, others.absent, norm.total, &mut mean, &mut variance);
        }
        let m = norm.momentum;
        let unbiased = norm.total / (norm.total - 1.0);
        let update = |id: ParameterId, new: &[f64], factor: f64| -> Result<()> {
            let old = values(id)?;
            let blend =
                |(&old, &new): (&f32, &f64)| (f64::from(old) * (1.0 - m) + new * factor * m) as f32;
            let blended: Vec<f32> = old.iter().zip(new).map(blend).collect();
            let buffers = variables.buffers();
            let Some((_, buffer)) = buffers.iter().find(|(name, _)| *name == names[id]) else {
                return Ok(());
            };
            buffer.set(&Tensor::from_vec(blended, buffer.shape(), &Device::Cpu)?)
        };
        update(running_mean, &mean, 1.0)?;
        update(running_variance, &variance, unbiased)?;
        (mean, variance)
    } else {
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<f64>>();
        (wide(values(running_mean)?), wide(values(running_variance)?))
    };
    let bias = values(bias)?;
    for c in 0..norm.channels {
        let inverse = 1.0 / (variance[c] + norm.eps).sqrt();
        let scale = f64::from(norm.weight[c]) * inverse;
        norm.mean[c] = mean[c] as f32;
        norm.inverse_deviation[c] = inverse;
        norm.scale[c] = scale as f32;
        norm.shift[c] = (f64::from(bias[c]) - mean[c] * scale) as f32;
    }
    Ok(())
}

/// The processes whose batch norms go by common statistics.
fn synchronized(others: &Others) -> Option<&dyn Collectives> {
    others.ranks.others().filter(|_| others.sync_norms)
}

/// Means and variances of all ranks' values from those of the own ones, of which there are `count` (none
/// of which count where the rank is absent). Gives how many there are in all.
fn join_ranks(
    ranks: &dyn Collectives,
    absent: bool,
    count: f64,
    mean: &mut [f64],
    variance: &mut [f64],
) -> f64 {
    let count = if absent { 0.0 } else { count };
    let squares = |(m, v): (&f64, &f64)| count * (v + m * m);
    let mut sums: Vec<f64> = mean.iter().map(|m| count * m).collect();
    sums.extend(mean.iter().zip(&*variance).map(squares));
    sums.push(count);
    ranks.sum(&mut sums);
    let total = sums[2 * mean.len()];
    let (firsts, seconds) = sums.split_at(mean.len());
    for (c, (first, second)) in firsts.iter().zip(seconds).enumerate() {
        mean[c] = first / total;
        variance[c] = (second / total - mean[c] * mean[c]).max(0.0);
    }
    total
}

/// What turns the gradient behind a norm into the one before it, and the gradients of its weight
/// and bias: of the own images, whose sum over all ranks comes later.
fn norm_backward(norm: &mut Norm, others: &Others, emit: &mut impl FnMut(ParameterId, Vec<f32>)) {
    let (sums, products) = norm.join_sums();
    let (mut all_sums, mut all_products) = (sums.clone(), products.clone());
    if norm.batch
        && let Some(ranks) = synchronized(others)
    {
        let mut both = [&all_sums[..], &all_products].concat();
        if others.absent {
            both.fill(0.0);
        }
        ranks.sum(&mut both);
        all_products = both.split_off(norm.channels);
        all_sums = both;
    }
    let count = norm.total;
    for c in 0..norm.channels {
        let inverse = norm.inverse_deviation[c];
        let a = f64::from(norm.weight[c]) * inverse;
        norm.a[c] = a as f32;
        if norm.batch {
            norm.b[c] = (-a * inverse * inverse * all_products[c] / count) as f32;
            norm.c[c] = (-a * all_sums[c] / count) as f32;
        }
    }
    if norm.sums.is_empty() {
        return;
    }
    let weight = products.iter().zip(&norm.inverse_deviation);
    let weight = weight.map(|(p, inverse)| (p * inverse) as f32).collect();
    emit(norm.parameters[0], weight);
    let bias = sums.into_iter().map(|s| s as f32).collect();
    emit(norm.parameters[1], bias);
}
