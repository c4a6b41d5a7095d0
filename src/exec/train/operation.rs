//! Everything in training that is not a convolution or a linear layer.

use std::cell::RefCell;
use std::ops::Range;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::super::step::Others;
use super::values::{Destination, Feed, Memory, NormId, ParameterId, Shared, ValueId};
use crate::graph::Activation;
use crate::kernels::pool::max_row;
use crate::kernels::{Dims, Window, attention, attention_gradient, elementwise, norm, rowwise};

/// One operation.
pub(super) struct Operation {
    pub name: String,
    pub kind: Kind,
    pub inputs: Vec<Feed>,
    /// Of the first input.
    pub input: Dims,
    pub output: Dims,
    pub value: ValueId,
    pub backward: Option<Backward>,
}

pub(super) struct Backward {
    pub gradient: ValueId,
    /// By input; None where no gradient is wanted.
    pub destinations: Vec<Option<Destination>>,
    /// Whether the operation's own parameters are trained.
    pub parameters: bool,
}

pub(super) enum Kind {
    /// Batch norm, a second input added, activation: a lazy feed that several read.
    Apply {
        activation: Option<Activation>,
        norms: Vec<NormId>,
    },
    Concat {
        interleave: bool,
    },
    Shuffle {
        groups: usize,
    },
    /// `argmax` keeps which tap of the window was the largest.
    MaxPool {
        window: Window,
        argmax: ValueId,
    },
    AveragePool {
        window: Window,
    },
    GlobalAveragePool,
    /// The second input may be one pixel.
    Multiply,
    /// `mask` keeps what each value is multiplied with.
    Dropout {
        p: f64,
        mask: ValueId,
    },
    ClassToken {
        parameter: ParameterId,
        token: Vec<f32>,
    },
    Positions {
        parameter: ParameterId,
        /// Positions as they are added: `[T, dim]`.
        values: Vec<f32>,
        /// From the parameter's grid to the image's, where they differ.
        resampling: Option<Resampling>,
    },
    LayerNorm {
        parameters: [ParameterId; 2],
        weight: Vec<f32>,
        bias: Vec<f32>,
        eps: f64,
    },
    /// Reads queries, keys and values side by side.
    Attention {
        heads: usize,
    },
    SelectToken {
        index: usize,
    },
}

impl Kind {
    /// What it is forward and backward, for a list of timings.
    pub fn label(&self) -> [&'static str; 2] {
        match self {
            Kind::Apply { .. } => ["norm and activation", "norm and activation, backward"],
            Kind::Concat { .. } => ["concat", "concat, backward"],
            Kind::Shuffle { .. } => ["channel shuffle", "channel shuffle, backward"],
            Kind::MaxPool { .. } => ["max pool", "max pool, backward"],
            Kind::AveragePool { .. } => ["average pool", "average pool, backward"],
            Kind::GlobalAveragePool => ["global pool", "global pool, backward"],
            Kind::Multiply => ["multiply", "multiply, backward"],
            Kind::Dropout { .. } => ["dropout", "dropout, backward"],
            Kind::ClassToken { .. } => ["class token", "class token, backward"],
            Kind::Positions { .. } => ["positions", "positions, backward"],
            Kind::LayerNorm { .. } => ["layer norm", "layer norm, backward"],
            Kind::Attention { .. } => ["attention", "attention, backward"],
            Kind::SelectToken { .. } => ["select token", "select token, backward"],
        }
    }
}

/// Weights of the rows `[height, grid]` and columns `[width, grid]` of another grid.
pub(super) struct Resampling {
    pub prefix: usize,
    pub grid: usize,
    pub rows: Vec<f32>,
    pub columns: Vec<f32>,
}

impl Resampling {
    /// Calls `f` with each pair of tokens (image's, parameter's) and the weight between them.
    fn for_pairs(&self, mut f: impl FnMut(usize, usize, f32)) {
        for token in 0..self.prefix {
            f(token, token, 1.0);
        }
        let mut token = self.prefix;
        for row in self.rows.chunks_exact(self.grid) {
            for column in self.columns.chunks_exact(self.grid) {
                for (pixel, position) in (self.prefix..).take(self.grid * self.grid).enumerate() {
                    let weight = row[pixel / self.grid] * column[pixel % self.grid];
                    if weight != 0.0 {
                        f(token, position, weight);
                    }
                }
                token += 1;
            }
        }
    }
}

/// Values of a task's chunk of pixels.
const CHUNK_VALUES: usize = 16 << 10;

#[derive(Default)]
struct Scratch {
    a: Vec<f32>,
    b: Vec<f32>,
    attention: attention::Scratch,
    gradient: attention_gradient::Scratch,
}

thread_local! {
    /// Each thread's scratch, kept from step to step.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn room(values: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if values.len() < len {
        values.resize(len, 0.0);
    }
    &mut values[..len]
}

/// The part of a window that lies inside an axis of length `size`: taps, and where they begin.
fn inside(at: usize, window: &Window, axis: usize, size: usize) -> (Range<usize>, usize) {
    let start = at * window.stride;
    let before = window.before[axis];
    let first = before.saturating_sub(start);
    let end = window.kernel[axis].min((size + before).saturating_sub(start));
    (first..end.max(first), start + first - before)
}

impl Operation {
    /// Pixels of a chunk, and how many chunks a batch has.
    fn chunks(&self, count: usize) -> (usize, usize) {
        let chunk = (CHUNK_VALUES / self.output.c).max(1);
        (chunk, (count * self.output.pixels()).div_ceil(chunk))
    }

    /// Rows of an image's input that a task computes the gradient of, and how many tasks an image
    /// has.
    fn row_blocks(&self) -> (usize, usize) {
        let rows = (4 * CHUNK_VALUES / (self.input.w * self.input.c)).clamp(1, self.input.h);
        (rows, self.input.h.div_ceil(rows))
    }

    /// How many partial sums the norm behind a lazy input gets.
    pub fn blocks(&self, count: usize) -> usize {
        match self.kind {
            Kind::GlobalAveragePool | Kind::Multiply => count,
            Kind::MaxPool { .. } | Kind::AveragePool { .. } => count * self.row_blocks().1,
            _ => self.chunks(count).1,
        }
    }

    /// Takes the parameters as they are now.
    pub fn load(&mut self, parameter: impl Fn(ParameterId) -> Vec<f32>) {
        match &mut self.kind {
            Kind::ClassToken {
                parameter: id,
                token,
            } => *token = parameter(*id),
            Kind::Positions {
                parameter: id,
                values,
                resampling,
            } => {
                let positions = parameter(*id);
                let Some(resampling) = resampling else {
                    *values = positions;
                    return;
                };
                values.fill(0.0);
                let dim = self.output.c;
                resampling.for_pairs(|to, from, weight| {
                    let from = &positions[from * dim..][..dim];
                    let to = &mut values[to * dim..][..dim];
                    to.iter_mut().zip(from).for_each(|(t, f)| *t += weight * f);
                });
            }
            Kind::LayerNorm {
                parameters,
                weight,
                bias,
                ..
            } => {
                *weight = parameter(parameters[0]);
                *bias = parameter(parameters[1]);
            }
            _ => {}
        }
    }

    /// Runs `f(first pixel, pixels, chunk)` over all pixels of the output.
    fn for_chunks(&self, memory: &Memory, f: impl Fn(usize, usize, usize, &mut Scratch) + Sync) {
        let (chunk, chunks) = self.chunks(memory.count);
        let all = memory.count * self.output.pixels();
        memory.pool.run(chunks, |index| {
            let start = index * chunk;
            let pixels = chunk.min(all - start);
            SCRATCH.with_borrow_mut(|scratch| f(start, pixels, index, scratch));
        });
    }

    fn for_images(&self, memory: &Memory, f: impl Fn(usize, &mut Scratch) + Sync) {
        memory.pool.run(memory.count, |image| {
            SCRATCH.with_borrow_mut(|scratch| f(image, scratch));
        });
    }

    /// The output's pixels `start..`.
    ///
    /// # Safety
    /// They are the task's own.
    #[allow(clippy::mut_from_ref)] // the contract makes the pixels the caller's own
    unsafe fn out<'a>(&self, memory: &'a Memory, start: usize, pixels: usize) -> &'a mut [f32] {
        let c = self.output.c;
        // SAFETY: as the caller promises.
        unsafe { memory.part(self.value, start * c, pixels * c) }
    }

    /// Computes the output. Dropout draws from the generator.
    pub fn forward(&self, memory: &Memory, generator: &mut ChaCha8Rng, others: &Others) {
        let isa = memory.isa;
        let Dims { c, .. } = self.output;
        let pixels_of_image = self.output.pixels();
        // In all tasks below, the output's pixels are the task's own.
        match &self.kind {
            Kind::Apply { activation, .. } => self.for_chunks(memory, |start, pixels, _, _| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, start, pixels) };
                match &self.inputs[..] {
                    [base] => memory.read(&with_activation(*base, *activation), start, pixels, out),
                    [base, residual, ..] => {
                        memory.read(base, start, pixels, out);
                        memory.add(residual, start, pixels, *activation, out);
                    }
                    [] => unreachable!("something is applied to"),
                }
            }),
            Kind::Concat { interleave } => self.for_chunks(memory, |start, pixels, _, scratch| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, start, pixels) };
                let mut to = 0;
                for (index, feed) in self.inputs.iter().enumerate() {
                    let channels = feed.channels();
                    let values = room(&mut scratch.a, pixels * channels);
                    memory.read(feed, start, pixels, values);
                    if *interleave {
                        let pairs = values.chunks_exact(channels).zip(out.chunks_exact_mut(c));
                        for (values, out) in pairs {
                            let pairs = out.as_chunks_mut::<2>().0.iter_mut().zip(values);
                            pairs.for_each(|(out, &value)| out[index] = value);
                        }
                    } else {
                        let (from, place) = ((channels, 0), (c, to));
                        elementwise::copy_channels(values, from, out, place, channels);
                    }
                    to += channels;
                }
            }),
            Kind::Shuffle { groups } => self.for_chunks(memory, |start, pixels, _, scratch| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, start, pixels) };
                let values = room(&mut scratch.a, pixels * c);
                memory.read(&self.inputs[0], start, pixels, values);
                elementwise::channel_shuffle(values, c, *groups, out);
            }),
            Kind::MaxPool { window, argmax } => {
                let rows = self.output.h;
                memory.pool.run(memory.count * rows, |task| {
                    SCRATCH.with_borrow_mut(|scratch| {
                        let (image, y) = (task / rows, task % rows);
                        let start = task * self.output.w;
                        // SAFETY: see above; the same pixels of `argmax`.
                        let (out, places) = unsafe {
                            (
                                self.out(memory, start, self.output.w),
                                memory.part(*argmax, start * c, self.output.w * c),
                            )
                        };
                        self.max_pool_row(memory, window, (image, y), scratch, out, places);
                    });
                });
            }
            Kind::AveragePool { window } => {
                let rows = self.output.h;
                memory.pool.run(memory.count * rows, |task| {
                    SCRATCH.with_borrow_mut(|scratch| {
                        let (image, y) = (task / rows, task % rows);
                        // SAFETY: see above.
                        let out = unsafe { self.out(memory, task * self.output.w, self.output.w) };
                        self.average_pool_row(memory, window, (image, y), scratch, out);
                    });
                });
            }
            Kind::GlobalAveragePool => self.for_images(memory, |image, scratch| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, image, 1) };
                let Dims { h, w, c } = self.input;
                let row = room(&mut scratch.a, w * c);
                let sum = room(&mut scratch.b, c);
                out.fill(0.0);
                for y in 0..h {
                    memory.read(&self.inputs[0], (image * h + y) * w, w, row);
                    sum.fill(0.0);
                    rowwise::sum_rows(isa, row, sum);
                    rowwise::accumulate(isa, sum, out);
                }
                let count = (h * w) as f32;
                out.iter_mut().for_each(|v| *v /= count);
            }),
            Kind::Multiply => self.for_images(memory, |image, _| {
                let start = image * pixels_of_image;
                // SAFETY: see above.
                let out = unsafe { self.out(memory, start, pixels_of_image) };
                let [x, factor] = self.factors(memory, image);
                elementwise::multiply(isa, x, factor, out);
            }),
            Kind::Dropout { p, mask } => {
                let keep = 1.0 - p;
                let all = memory.count * pixels_of_image;
                // SAFETY: the only task.
                let (mask, out) =
                    unsafe { (memory.part(*mask, 0, all * c), self.out(memory, 0, all)) };
                memory.read(&self.inputs[0], 0, all, out);
                others.draw(generator, pixels_of_image * c, |generator| {
                    for (value, mask) in out.iter_mut().zip(mask) {
                        let kept = generator.random::<f64>() < keep;
                        *mask = if kept { (1.0 / keep) as f32 } else { 0.0 };
                        *value *= *mask;
                    }
                });
            }
            Kind::ClassToken { token, .. } => self.for_images(memory, |image, _| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, image * pixels_of_image, pixels_of_image) };
                let (first, rest) = out.split_at_mut(c);
                first.copy_from_slice(token);
                let tokens = pixels_of_image - 1;
                memory.read(&self.inputs[0], image * tokens, tokens, rest);
            }),
            Kind::Positions { values, .. } => self.for_images(memory, |image, _| {
                let start = image * pixels_of_image;
                // SAFETY: see above.
                let out = unsafe { self.out(memory, start, pixels_of_image) };
                memory.read(&self.inputs[0], start, pixels_of_image, out);
                rowwise::accumulate(isa, values, out);
            }),
            Kind::LayerNorm {
                weight, bias, eps, ..
            } => self.for_chunks(memory, |start, pixels, _, scratch| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, start, pixels) };
                let x = room(&mut scratch.a, pixels * c);
                memory.read(&self.inputs[0], start, pixels, x);
                norm::layer_norm(isa, x, weight, bias, *eps, out);
            }),
            Kind::Attention { heads } => {
                let qkv = memory.values(self.inputs[0].value());
                let len = pixels_of_image * 3 * c;
                memory.pool.run(memory.count * heads, |task| {
                    let (image, head) = (task / heads, task % heads);
                    SCRATCH.with_borrow_mut(|scratch| {
                        let shape = (pixels_of_image, c, *heads);
                        let scratch = &mut scratch.attention;
                        // SAFETY: a head's columns are the task's own.
                        unsafe {
                            let out = memory.pointer(self.value).add(image * pixels_of_image * c);
                            let qkv = &qkv[image * len..][..len];
                            attention::head(isa, qkv, shape, head, scratch, out);
                        }
                    });
                });
            }
            Kind::SelectToken { index } => self.for_images(memory, |image, _| {
                // SAFETY: see above.
                let out = unsafe { self.out(memory, image, 1) };
                memory.read(&self.inputs[0], image * self.input.h + index, 1, out);
            }),
        }
    }

    /// The two inputs of a product, for one image; the second may be one pixel.
    fn factors<'a>(&self, memory: &'a Memory, image: usize) -> [&'a [f32]; 2] {
        [0, 1].map(|index| {
            let values = memory.values(self.inputs[index].value());
            let len = values.len() / memory.count;
            &values[image * len..][..len]
        })
    }

    /// The rows of the input that a row of windows reads, and their number.
    fn pool_rows<'a>(
        &self,
        memory: &Memory,
        (image, start, rows): (usize, usize, usize),
        scratch: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let Dims { h, w, c } = self.input;
        let values = room(scratch, rows * w * c);
        memory.read(&self.inputs[0], (image * h + start) * w, rows * w, values);
        values
    }

    fn max_pool_row(
        &self,
        memory: &Memory,
        window: &Window,
        (image, y): (usize, usize),
        scratch: &mut Scratch,
        out: &mut [f32],
        places: &mut [f32],
    ) {
        let Dims { h, w, c } = self.input;
        let (down, start) = inside(y, window, 0, h);
        let values = self.pool_rows(memory, (image, start, down.len()), &mut scratch.a);
        max_row(memory.isa, window, values, down, w, c, out, places);
    }

    fn average_pool_row(
        &self,
        memory: &Memory,
        window: &Window,
        (image, y): (usize, usize),
        scratch: &mut Scratch,
        out: &mut [f32],
    ) {
        let Dims { h, w, c } = self.input;
        let (down, start) = inside(y, window, 0, h);
        let values = self.pool_rows(memory, (image, start, down.len()), &mut scratch.a);
        let scale = 1.0 / (window.kernel[0] * window.kernel[1]) as f32;
        out.fill(0.0);
        memory.isa.compiled(
            #[inline(always)]
            || {
                for (x, out) in out.chunks_exact_mut(c).enumerate() {
                    let (across, left) = inside(x, window, 1, w);
                    for row in 0..down.len() {
                        for column in 0..across.len() {
                            let pixel = &values[(row * w + left + column) * c..][..c];
                            out.iter_mut().zip(pixel).for_each(|(o, v)| *o += v);
                        }
                    }
                    out.iter_mut().for_each(|v| *v *= scale);
                }
            },
        );
    }

    /// Hands the inputs' gradients on; `emit` is given those of the operation's parameters.
    pub fn backward(&self, memory: &Memory, mut emit: impl FnMut(ParameterId, Vec<f32>)) {
        let Some(backward) = &self.backward else {
            return;
        };
        let isa = memory.isa;
        let c = self.output.c;
        let gradients = memory.values(backward.gradient);
        let gradient = |start: usize, pixels: usize| &gradients[start * c..][..pixels * c];
        let destination = backward.destinations.first().and_then(Option::as_ref);
        let pixels_of_image = self.output.pixels();
        // In all tasks below, the pixels that are delivered are the task's own.
        match &self.kind {
            Kind::Apply { activation, norms } => {
                self.for_chunks(memory, |start, pixels, chunk, _| {
                    // SAFETY: see above.
                    let g = unsafe { memory.part(backward.gradient, start * c, pixels * c) };
                    let inputs = &self.inputs;
                    match (activation, inputs.len()) {
                        (None, _) => {}
                        (Some(_), 1) => {
                            let feed = with_activation(inputs[0], *activation);
                            memory.mask(&feed, start, g);
                        }
                        (Some(activation), _) => {
                            let y = &memory.values(self.value)[start * c..][..pixels * c];
                            rowwise::mask_by_output(isa, y, *activation, g);
                        }
                    }
                    for &norm in norms {
                        let feed = inputs
                            .iter()
                            .find(|f| matches!(f, Feed::Lazy { norm: Some(n), .. } if *n == norm));
                        let Some(feed) = feed else { continue };
                        let z = &memory.values(feed.value())[start * c..][..pixels * c];
                        // SAFETY: the chunk's sums are the task's own.
                        unsafe { memory.sum_gradient(norm, g, z, chunk) };
                    }
                });
            }
            Kind::Concat { interleave } => {
                self.for_chunks(memory, |start, pixels, chunk, scratch| {
                    let g = gradient(start, pixels);
                    let mut from = 0;
                    for (index, feed) in self.inputs.iter().enumerate() {
                        let channels = feed.channels();
                        if let Some(destination) = &backward.destinations[index] {
                            let part = room(&mut scratch.a, pixels * channels);
                            if *interleave {
                                let pairs = part.chunks_exact_mut(channels);
                                for (part, g) in pairs.zip(g.chunks_exact(c)) {
                                    let pairs = part.iter_mut().zip(g.as_chunks::<2>().0);
                                    pairs.for_each(|(part, g)| *part = g[index]);
                                }
                            } else {
                                let place = (channels, 0);
                                elementwise::copy_channels(g, (c, from), part, place, channels);
                            }
                            // SAFETY: see above.
                            unsafe { memory.deliver(destination, start, part, chunk) };
                        }
                        from += channels;
                    }
                });
            }
            Kind::Shuffle { groups } => self.for_chunks(memory, |start, pixels, chunk, scratch| {
                let Some(destination) = destination else {
                    return;
                };
                let part = room(&mut scratch.a, pixels * c);
                elementwise::channel_shuffle(gradient(start, pixels), c, c / groups, part);
                // SAFETY: see above.
                unsafe { memory.deliver(destination, start, part, chunk) };
            }),
            Kind::MaxPool { window, argmax } => {
                let places = memory.values(*argmax);
                self.pool_backward(memory, window, |pixel, tap, out| {
                    let tap = tap as f32;
                    let values = gradient(pixel, 1).iter().zip(&places[pixel * c..][..c]);
                    for (out, (&g, &place)) in out.iter_mut().zip(values) {
                        *out += if place == tap { g } else { 0.0 };
                    }
                });
            }
            Kind::AveragePool { window } => {
                let scale = 1.0 / (window.kernel[0] * window.kernel[1]) as f32;
                self.pool_backward(memory, window, |pixel, _, out| {
                    let pairs = out.iter_mut().zip(gradient(pixel, 1));
                    pairs.for_each(|(out, g)| *out += scale * g);
                });
            }
            Kind::GlobalAveragePool => self.for_images(memory, |image, scratch| {
                let Some(destination) = destination else {
                    return;
                };
                let pixels = self.input.pixels();
                let part = room(&mut scratch.a, pixels * c);
                let scale = 1.0 / pixels as f32;
                let g = gradient(image, 1);
                for part in part.chunks_exact_mut(c) {
                    let pairs = part.iter_mut().zip(g);
                    pairs.for_each(|(part, g)| *part = g * scale);
                }
                // SAFETY: see above.
                unsafe { memory.deliver(destination, image * pixels, part, image) };
            }),
            Kind::Multiply => self.for_images(memory, |image, scratch| {
                let g = gradient(image * pixels_of_image, pixels_of_image);
                let [x, factor] = self.factors(memory, image);
                let pixels = factor.len() / c;
                if let Some(destination) = destination {
                    let part = room(&mut scratch.a, g.len());
                    elementwise::multiply(isa, g, factor, part);
                    // SAFETY: see above.
                    unsafe { memory.deliver(destination, image * pixels_of_image, part, image) };
                }
                if let Some(destination) = &backward.destinations[1] {
                    let part = room(&mut scratch.a, factor.len());
                    part.fill(0.0);
                    isa.compiled(
                        #[inline(always)]
                        || {
                            let blocks = g.chunks_exact(factor.len());
                            for (g, x) in blocks.zip(x.chunks_exact(factor.len())) {
                                let values = g.iter().zip(x);
                                for (part, (g, x)) in part.iter_mut().zip(values) {
                                    *part += g * x;
                                }
                            }
                        },
                    );
                    // SAFETY: see above.
                    unsafe { memory.deliver(destination, image * pixels, part, image) };
                }
            }),
            Kind::Dropout { mask, .. } => {
                self.for_chunks(memory, |start, pixels, chunk, scratch| {
                    let Some(destination) = destination else {
                        return;
                    };
                    let part = room(&mut scratch.a, pixels * c);
                    let mask = &memory.values(*mask)[start * c..][..pixels * c];
                    elementwise::multiply(isa, gradient(start, pixels), mask, part);
                    // SAFETY: see above.
                    unsafe { memory.deliver(destination, start, part, chunk) };
                })
            }
            Kind::ClassToken { parameter, .. } => {
                let tokens = pixels_of_image - 1;
                self.for_images(memory, |image, _| {
                    let Some(destination) = destination else {
                        return;
                    };
                    let g = gradient(image * pixels_of_image + 1, tokens);
                    // SAFETY: see above.
                    unsafe { memory.deliver(destination, image * tokens, g, image) };
                });
                if backward.parameters {
                    let firsts = (0..memory.count).map(|i| gradient(i * pixels_of_image, 1));
                    emit(*parameter, sum_of(firsts, c));
                }
            }
            Kind::Positions {
                parameter,
                resampling,
                ..
            } => {
                self.for_images(memory, |image, _| {
                    let Some(destination) = destination else {
                        return;
                    };
                    let start = image * pixels_of_image;
                    let g = gradient(start, pixels_of_image);
                    // SAFETY: see above.
                    unsafe { memory.deliver(destination, start, g, image) };
                });
                if backward.parameters {
                    let images =
                        (0..memory.count).map(|i| gradient(i * pixels_of_image, pixels_of_image));
                    let sum = sum_of(images, pixels_of_image * c);
                    let Some(resampling) = resampling else {
                        return emit(*parameter, sum);
                    };
                    let grid = resampling.prefix + resampling.grid * resampling.grid;
                    let mut positions = vec![0.0; grid * c];
                    resampling.for_pairs(|from, to, weight| {
                        let from = &sum[from * c..][..c];
                        let to = &mut positions[to * c..][..c];
                        to.iter_mut().zip(from).for_each(|(t, f)| *t += weight * f);
                    });
                    emit(*parameter, positions);
                }
            }
            Kind::LayerNorm {
                parameters,
                weight,
                eps,
                ..
            } => {
                let blocks = self.chunks(memory.count).1;
                let mut partials = vec![0.0; blocks * 2 * c];
                let partial = Shared(partials.as_mut_ptr());
                self.for_chunks(memory, |start, pixels, chunk, scratch| {
                    // SAFETY: the chunk's sums are the task's own.
                    let sums = unsafe {
                        std::slice::from_raw_parts_mut(partial.get().add(chunk * 2 * c), 2 * c)
                    };
                    let x = room(&mut scratch.a, pixels * c);
                    memory.read(&self.inputs[0], start, pixels, x);
                    let dx = room(&mut scratch.b, pixels * c);
                    let g = gradient(start, pixels);
                    norm::layer_norm_gradient(isa, x, g, weight, *eps, dx, sums);
                    if let Some(destination) = destination {
                        // SAFETY: see above.
                        unsafe { memory.deliver(destination, start, dx, chunk) };
                    }
                });
                if backward.parameters {
                    let mut sum = sum_of(partials.chunks_exact(2 * c), 2 * c);
                    let bias = sum.split_off(c);
                    emit(parameters[0], sum);
                    emit(parameters[1], bias);
                }
            }
            Kind::Attention { heads } => {
                let Some(Destination::Plain { view, add: false }) = destination else {
                    return;
                };
                let qkv = memory.values(self.inputs[0].value());
                let len = pixels_of_image * 3 * c;
                memory.pool.run(memory.count * heads, |task| {
                    let (image, head) = (task / heads, task % heads);
                    SCRATCH.with_borrow_mut(|scratch| {
                        let shape = (pixels_of_image, c, *heads);
                        let g = gradient(image * pixels_of_image, pixels_of_image);
                        let scratch = &mut scratch.gradient;
                        // SAFETY: a head's columns are the task's own.
                        unsafe {
                            let out = memory.pointer(view.value).add(image * len);
                            let qkv = &qkv[image * len..][..len];
                            attention_gradient::head(isa, qkv, g, shape, head, scratch, out);
                        }
                    });
                });
            }
            Kind::SelectToken { index } => self.for_images(memory, |image, scratch| {
                let Some(destination) = destination else {
                    return;
                };
                let tokens = self.input.pixels();
                let part = room(&mut scratch.a, tokens * c);
                part.fill(0.0);
                part[index * c..][..c].copy_from_slice(gradient(image, 1));
                // SAFETY: see above.
                unsafe { memory.deliver(destination, image * tokens, part, image) };
            }),
        }
    }

    /// Gathers, for blocks of input rows, what `add(output pixel, tap, gradient)` gives for every
    /// window that a pixel is in.
    fn pool_backward(
        &self,
        memory: &Memory,
        window: &Window,
        add: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) {
        let destination = self
            .backward
            .as_ref()
            .and_then(|b| b.destinations[0].as_ref());
        let Some(destination) = destination else {
            return;
        };
        let Dims { h, w, c } = self.input;
        let (rows, blocks) = self.row_blocks();
        memory.pool.run(memory.count * blocks, |task| {
            let (image, first) = (task / blocks, task % blocks * rows);
            let own = first..(first + rows).min(h);
            SCRATCH.with_borrow_mut(|scratch| {
                let part = room(&mut scratch.a, own.len() * w * c);
                part.fill(0.0);
                // Windows that reach into the rows.
                let reach = (own.start + window.before[0] + 1).saturating_sub(window.kernel[0]);
                let outputs = reach.div_ceil(window.stride)
                    ..((own.end - 1 + window.before[0]) / window.stride + 1).min(self.output.h);
                memory.isa.compiled(
                    #[inline(always)]
                    || {
                        for oy in outputs {
                            let (down, start) = inside(oy, window, 0, h);
                            for ox in 0..self.output.w {
                                let pixel = (image * self.output.h + oy) * self.output.w + ox;
                                let (across, left) = inside(ox, window, 1, w);
                                for (row, ky) in down.clone().enumerate() {
                                    let y = start + row;
                                    if !own.contains(&y) {
                                        continue;
                                    }
                                    for (column, kx) in across.clone().enumerate() {
                                        let at = ((y - own.start) * w + left + column) * c;
                                        let tap = ky * window.kernel[1] + kx;
                                        add(pixel, tap, &mut part[at..][..c]);
                                    }
                                }
                            }
                        }
                    },
                );
                let start = (image * h + own.start) * w;
                // SAFETY: the block's rows and sums are the task's own.
                unsafe { memory.deliver(destination, start, part, task) };
            });
        });
    }
}

/// A feed with an activation at its end.
fn with_activation(feed: Feed, activation: Option<Activation>) -> Feed {
    match (feed, activation) {
        (
            Feed::Lazy {
                value,
                channels,
                norm,
                ..
            },
            Some(_),
        ) => Feed::Lazy {
            value,
            channels,
            norm,
            activation,
        },
        (Feed::Plain(view), Some(_)) => Feed::Lazy {
            value: view.value,
            channels: view.channels,
            norm: None,
            activation,
        },
        (feed, None) => feed,
    }
}

/// Sum of vectors, in float64.
fn sum_of<'a>(vectors: impl Iterator<Item = &'a [f32]>, len: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f64; len];
    for vector in vectors {
        let pairs = sums.iter_mut().zip(vector);
        pairs.for_each(|(sum, &value)| *sum += f64::from(value));
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}
