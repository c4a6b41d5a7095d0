//! The steps of a plan, and how each is divided into tasks.

use std::cell::RefCell;
use std::ops::Range;

use super::arena::ValueId;
use super::pool::Pool;
use super::shares::Shares;
use crate::graph::Activation;
use crate::kernels::bottleneck::{self, Bottleneck};
use crate::kernels::depthwise::Depthwise;
use crate::kernels::gemm::{Epilogue, Packed, Rows, Store, gemm};
use crate::kernels::grouped::Grouped;
use crate::kernels::grouped_strip::GroupedStrip;
use crate::kernels::memory::{Buffer, second_level_values};
use crate::kernels::pool::{Reduction, average, pool};
use crate::kernels::winograd::{self, Winograd};
use crate::kernels::{Dims, Isa, Source, Target, Window, attention, elementwise, norm};

/// One operation on values of the arena.
pub(super) struct Step {
    /// The node whose value it gives.
    pub name: String,
    pub kind: Kind,
    pub isa: Isa,
    /// What the kind says that it reads, in order.
    pub inputs: Vec<View>,
    pub output: ValueId,
    /// Where the sums of the output's lines go, `[H, 1, C]`, if they are wanted: a mean of the
    /// whole map needs no second look at it then.
    pub line_sums: Option<ValueId>,
}

/// A value, or some of its channels. Only convolutions and [`Kind::Concat`] read parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub value: ValueId,
    pub start: usize,
    pub channels: usize,
}

pub(super) enum Kind {
    // A convolution or linear layer stores its sum plus bias, plus the step's second input where it
    // has one, through the activation.
    /// Also linear layers, as convolutions over the tokens (or the one pixel).
    Conv {
        window: Window,
        /// For each group, depth in the order of kernel rows, columns, channels.
        groups: Vec<Packed>,
        store: Store,
        /// A pointwise one's input is multiplied by the second input, of one pixel; the residual
        /// is the third then.
        gated: bool,
    },
    Winograd {
        conv: Winograd,
        store: Store,
    },
    Depthwise {
        conv: Depthwise,
        store: Store,
    },
    /// Groups of four channels, or eight.
    Grouped {
        conv: Grouped,
        store: Store,
    },
    /// Groups of eight or sixteen channels.
    GroupedStrip {
        conv: GroupedStrip,
        store: Store,
    },
    /// A depthwise convolution with those before and after it.
    Bottleneck(Box<Bottleneck>),
    /// A batch norm that follows no convolution.
    ScaleShift {
        scale: Vec<f32>,
        shift: Vec<f32>,
    },
    Activation(Activation),
    Add,
    /// The second input may be one pixel.
    Multiply,
    /// Inputs' channels one after the other; two of equal width in turn where `interleave`.
    Concat {
        interleave: bool,
    },
    ChannelShuffle {
        groups: usize,
    },
    Pool {
        reduction: Reduction,
        window: Window,
    },
    /// The mean over all pixels, or over those that the input's lines are sums of.
    GlobalAvgPool {
        pixels: usize,
    },
    /// The token, then the input's.
    ClassToken {
        token: Vec<f32>,
    },
    /// Adds a constant of the image's shape.
    AddConstant {
        values: Vec<f32>,
    },
    LayerNorm {
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

#[derive(Default)]
struct Scratch {
    rows: Rows,
    /// Rows that were multiplied by a gate.
    gated: Vec<f32>,
    /// A group's channels of some rows.
    strip: Vec<f32>,
    attention: attention::Scratch,
}

thread_local! {
    /// Each thread's scratch, kept from step to step.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// About how many tasks a step is divided into, where it is large enough.
const TASKS: usize = 8;
/// Scratch values of the Winograd tiles that a worker has in hand: they stay in its second-level cache.
const WORKER_VALUES: usize = 160 << 10;
/// Winograd tiles that a worker takes at least, as weights are read again for each lot of them.
const WORKER_TILES: usize = 24;

impl Kind {
    /// What it is, for a list of timings.
    pub fn label(&self) -> &'static str {
        match self {
            Kind::Conv { .. } => "product",
            Kind::Winograd { .. } => "winograd",
            Kind::Depthwise { .. } => "depthwise",
            Kind::Grouped { .. } | Kind::GroupedStrip { .. } => "grouped",
            Kind::Bottleneck(_) => "bottleneck",
            Kind::ScaleShift { .. } => "scale and shift",
            Kind::Activation(_) => "activation",
            Kind::Add => "add",
            Kind::Multiply => "multiply",
            Kind::Concat { .. } => "concat",
            Kind::ChannelShuffle { .. } => "channel shuffle",
            Kind::Pool { .. } => "pool",
            Kind::GlobalAvgPool { .. } => "global pool",
            Kind::ClassToken { .. } => "class token",
            Kind::AddConstant { .. } => "positions",
            Kind::LayerNorm { .. } => "layer norm",
            Kind::Attention { .. } => "attention",
            Kind::SelectToken { .. } => "select token",
        }
    }
}

impl Step {
    /// All values that it reads or writes.
    pub fn values(&self) -> impl Iterator<Item = ValueId> {
        let inputs = self.inputs.iter().map(|view| view.value);
        inputs.chain([self.output]).chain(self.line_sums)
    }

    /// Computes the output for a batch of `count` images.
    ///
    /// In every task below, the rows, pixels or channels that are written are the task's own, and
    /// inputs are written by nobody: the plan's arena keeps them apart. That is the contract of
    /// the kernels.
    pub fn run(
        &self,
        threads: &Pool,
        inputs: &[Source],
        output: Target,
        line_sums: Option<Target>,
        count: usize,
        scratch: &mut Buffer,
    ) {
        let run = Run {
            step: self,
            threads,
            inputs,
            output,
            line_sums,
            count,
        };
        let isa = self.isa;
        let channels = output.layout.dims.c;
        match &self.kind {
            Kind::Conv {
                window,
                groups,
                store,
                gated,
            } => run.convolution(window, groups, store, *gated),
            Kind::Winograd { conv, store } => run.winograd(conv, store, scratch),
            Kind::Depthwise { conv, store } => run.for_row_blocks(|image, rows| {
                // SAFETY: see above.
                unsafe {
                    let (residual, epilogue) = (inputs.get(1), store.epilogue());
                    conv.rows(&inputs[0], &output, residual, epilogue, image, rows.clone());
                    run.sum_lines(image, rows);
                }
            }),
            Kind::Grouped { conv, store } => run.for_row_blocks(|image, rows| {
                // SAFETY: see above.
                unsafe {
                    let residual = inputs.get(1);
                    conv.rows(&inputs[0], &output, residual, store.epilogue(), image, rows);
                }
            }),
            Kind::GroupedStrip { conv, store } => run.for_row_blocks(|image, rows| {
                SCRATCH.with_borrow_mut(|Scratch { strip, .. }| {
                    let (residual, epilogue) = (inputs.get(1), store.epilogue());
                    // SAFETY: see above.
                    unsafe {
                        conv.rows(&inputs[0], &output, residual, epilogue, image, rows, strip);
                    }
                });
            }),
            Kind::Bottleneck(block) => run.bottleneck(block, scratch),
            Kind::ScaleShift { scale, shift } => run.for_rows(|image, y, out| {
                elementwise::scale_shift(isa, run.row(0, image, y), scale, shift, out);
            }),
            Kind::Activation(activation) => run.for_rows(|image, y, out| {
                elementwise::activate(isa, *activation, run.row(0, image, y), out);
            }),
            Kind::Add => run.for_rows(|image, y, out| {
                elementwise::add(isa, run.row(0, image, y), run.row(1, image, y), out);
            }),
            Kind::Multiply => run.for_rows(|image, y, out| {
                let gate = inputs[1].layout.dims != inputs[0].layout.dims;
                let factor = run.row(1, image, if gate { 0 } else { y });
                elementwise::multiply(isa, run.row(0, image, y), factor, out);
            }),
            Kind::Concat { interleave } => run.for_rows(|image, y, out| {
                let row = |i: usize| (run.row(i, image, y), inputs[i].layout.dims.c);
                if *interleave {
                    let [(a, ac), (b, bc)] = [row(0), row(1)];
                    let [from_a, from_b] = [self.inputs[0].start, self.inputs[1].start];
                    let pixels = a.chunks_exact(ac).zip(b.chunks_exact(bc));
                    for (out, (a, b)) in out.chunks_exact_mut(channels).zip(pixels) {
                        let pairs = out.as_chunks_mut().0.iter_mut();
                        for ((out, &a), &b) in pairs.zip(&a[from_a..]).zip(&b[from_b..]) {
                            *out = [a, b];
                        }
                    }
                    return;
                }
                let mut to = 0;
                for (i, view) in self.inputs.iter().enumerate() {
                    let (row, stride) = row(i);
                    let place = (channels, to);
                    let from = (stride, view.start);
                    elementwise::copy_channels(row, from, out, place, view.channels);
                    to += view.channels;
                }
            }),
            Kind::ChannelShuffle { groups } => run.for_rows(|image, y, out| {
                elementwise::channel_shuffle(run.row(0, image, y), channels, *groups, out);
            }),
            Kind::Pool { reduction, window } => run.for_row_blocks(|image, rows| {
                // SAFETY: see above.
                unsafe { pool(isa, *reduction, window, &inputs[0], &output, image, rows) };
            }),
            Kind::GlobalAvgPool { pixels } => {
                const BLOCK: usize = 64;
                let blocks = channels.div_ceil(BLOCK);
                run.tasks(count * blocks, |task| {
                    let (image, start) = (task / blocks, task % blocks * BLOCK);
                    let part = start..(start + BLOCK).min(channels);
                    // SAFETY: see above.
                    unsafe {
                        let out = output.image(image).add(output.layout.offset(0, 0) + start);
                        let out = std::slice::from_raw_parts_mut(out, part.len());
                        average(isa, &inputs[0], image, part, *pixels, out);
                    }
                });
            }
            Kind::ClassToken { token } => run.for_rows(|image, y, out| match y.checked_sub(1) {
                None => out.copy_from_slice(token),
                Some(y) => out.copy_from_slice(run.row(0, image, y)),
            }),
            Kind::AddConstant { values } => run.for_rows(|image, y, out| {
                let constant = &values[y * out.len()..(y + 1) * out.len()];
                elementwise::add(isa, run.row(0, image, y), constant, out);
            }),
            Kind::LayerNorm { weight, bias, eps } => run.for_rows(|image, y, out| {
                norm::layer_norm(isa, run.row(0, image, y), weight, bias, *eps, out);
            }),
            Kind::Attention { heads } => {
                let Dims { h: tokens, c, .. } = output.layout.dims;
                run.tasks(count * heads, |task| {
                    let (image, head) = (task / heads, task % heads);
                    SCRATCH.with_borrow_mut(|scratch| {
                        // SAFETY: see above; sequences have no border.
                        unsafe {
                            let qkv = inputs[0].image(image);
                            let qkv = std::slice::from_raw_parts(qkv, inputs[0].layout.len());
                            let shape = (tokens, c, *heads);
                            let out = output.image(image);
                            attention::head(isa, qkv, shape, head, &mut scratch.attention, out);
                        }
                    });
                });
            }
            Kind::SelectToken { index } => run.for_rows(|image, _, out| {
                out.copy_from_slice(run.row(0, image, *index));
            }),
        }
    }
}

/// Working memory that tasks divide among themselves.
struct Memory(*mut f32);

// SAFETY: an address; tasks use parts of their own.
unsafe impl Sync for Memory {}

impl Memory {
    /// Where a part begins.
    ///
    /// # Safety
    /// It lies in the memory.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: as the caller promises.
        unsafe { self.0.add(offset) }
    }
}

/// A step at work.
struct Run<'a> {
    step: &'a Step,
    threads: &'a Pool,
    inputs: &'a [Source],
    output: Target,
    line_sums: Option<Target>,
    count: usize,
}

impl Run<'_> {
    /// Runs tasks, and clears the output's border beside them: each thread beside the lines of which
    /// it writes most, if tasks are in their order.
    fn tasks(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if self.output.layout.is_plain() {
            self.threads.run(tasks, task);
            return;
        }
        let height = self.output.layout.dims.h;
        let (parts, lines) = (self.threads.threads(), self.count * height);
        // A part's share of the tasks, then its border.
        let share = |part: usize| part * tasks / parts;
        self.threads.run(tasks + parts, |index| {
            let part = (0..parts).rfind(|&part| share(part) + part <= index);
            let part = part.unwrap_or(0);
            if index - part < share(part + 1) {
                return task(index - part);
            }
            let end = (part + 1) * lines / parts;
            let mut line = part * lines / parts;
            while line < end {
                let (image, y) = (line / height, line % height);
                let rows = y..(y + end - line).min(height);
                line += rows.len();
                // SAFETY: the border belongs to no other task.
                unsafe { self.output.clear_border(image, rows) };
            }
        });
    }

    /// A row of an input.
    fn row(&self, input: usize, image: usize, y: usize) -> &[f32] {
        // SAFETY: nobody writes a step's inputs; the image and row are those of an output.
        unsafe { self.inputs[input].row(image, y) }
    }

    /// Shares blocks of output rows.
    fn for_row_blocks(&self, f: impl Fn(usize, Range<usize>) + Sync) {
        let rows = self.output.layout.dims.h;
        let blocks = if self.count >= TASKS { 2 } else { TASKS };
        let block = rows.div_ceil(blocks);
        let blocks = rows.div_ceil(block);
        self.tasks(self.count * blocks, |task| {
            let start = task % blocks * block;
            f(task / blocks, start..(start + block).min(rows));
        });
    }

    /// Shares output rows.
    fn for_rows(&self, f: impl Fn(usize, usize, &mut [f32]) + Sync) {
        self.for_row_blocks(|image, rows| {
            for y in rows {
                // SAFETY: the row is this task's own.
                f(image, y, unsafe { self.output.row(image, y) });
            }
        });
    }

    /// Sums lines of the output, where that is wanted.
    ///
    /// # Safety
    /// The lines are the task's own, and computed.
    unsafe fn sum_lines(&self, image: usize, lines: Range<usize>) {
        let Some(sums) = &self.line_sums else { return };
        for y in lines {
            // SAFETY: as the caller promises.
            let (line, sums) = unsafe { (self.output.row(image, y), sums.row(image, y)) };
            elementwise::sum_pixels(self.step.isa, line, sums);
        }
    }

    fn convolution(&self, window: &Window, groups: &[Packed], store: &Store, gated: bool) {
        let Self {
            step,
            inputs,
            output,
            count,
            ..
        } = *self;
        let view = step.inputs[0];
        let layout = inputs[0].layout;
        let [kh, kw] = window.kernel;
        let ins = view.channels / groups.len();
        let outs = output.layout.dims.c / groups.len();
        let row = layout.row_stride();
        // Runs of contiguous values behind a window's first pixel.
        let whole_rows = groups.len() == 1 && view.channels == layout.dims.c;
        let taps: Vec<usize> = if whole_rows {
            (0..kh).map(|ky| ky * row).collect()
        } else {
            let columns = |ky: usize| (0..kw).map(move |kx| ky * row + kx * layout.dims.c);
            (0..kh).flat_map(columns).collect()
        };
        let pixels = count * output.layout.dims.pixels();
        let panels = groups[0].panel_count();
        let depth = groups[0].depth();
        let on_matrix_unit = groups[0].is_split();
        let (block, part) =
            self.division(pixels, panels, groups.len(), depth, gated, on_matrix_unit);
        let (blocks, parts) = (pixels.div_ceil(block), panels.div_ceil(part));
        self.tasks(blocks * groups.len() * parts, |task| {
            let (block_index, rest) =
                (task / (groups.len() * parts), task % (groups.len() * parts));
            let (group, part_index) = (rest / parts, rest % parts);
            let start = block_index * block;
            let pixels = start..(start + block).min(pixels);
            let panels = part_index * part..((part_index + 1) * part).min(panels);
            let places = [view.start + group * ins, group * outs];
            let epilogue = Epilogue {
                bias: &store.bias[group * outs..(group + 1) * outs],
                activation: store.activation,
            };
            SCRATCH.with_borrow_mut(
                |Scratch {
                     rows,
                     gated: buffer,
                     ..
                 }| {
                    // SAFETY: the kernels' contract, see `Step::run`; the input's border is as wide
                    // as its readers' windows reach.
                    unsafe {
                        let residual = inputs.get(1 + usize::from(gated));
                        let first = pixels.start;
                        rows.set_pixels(pixels, window, &inputs[0], &output, residual, places);
                        if gated {
                            let image = |row: usize| (first + row) / output.layout.dims.pixels();
                            rows.weigh(step.isa, depth, buffer, |row| self.row(1, image(row), 0));
                        }
                        gemm(&groups[group], panels, rows, &taps, epilogue);
                    }
                },
            );
        });
    }

    /// How a product of so many rows and panels is shared: rows of a block, and panels of a part.
    ///
    /// Of a few divisions with blocks that the cache holds, the one that is estimated to end
    /// first; an estimate is the time of the thread with the most tasks.
    /// Rows that are multiplied by a gate are so for every part anew.
    fn division(
        &self,
        rows: usize,
        panels: usize,
        groups: usize,
        depth: usize,
        gated: bool,
        on_matrix_unit: bool,
    ) -> (usize, usize) {
        const TILE: usize = Packed::TILE_ROWS;
        // Of a task, in products of a row and a panel's column of vectors.
        const OVERHEAD: usize = 4_000;
        let threads = self.threads.threads();
        // They stay in the second-level cache while panels pass.
        let block_values = second_level_values() * 3 / 8;
        // A matrix unit splits as many as it has room for.
        let most = match on_matrix_unit {
            true => Packed::SPLIT_ROWS,
            false => (block_values / depth).clamp(4 * TILE, 40 * TILE),
        };
        let fewest_blocks = rows.div_ceil(most);
        let mut best = (usize::MAX, (rows, panels));
        for blocks in fewest_blocks..fewest_blocks + 2 * threads {
            let block = rows.div_ceil(blocks);
            let blocks = rows.div_ceil(block);
            // Tiles are as equal as can be; small ones take as long as one of four rows.
            let effective = block.max(4 * block.div_ceil(TILE));
            for parts in 1..=panels.min(4 * threads) {
                let part = panels.div_ceil(parts);
                let tasks = blocks * panels.div_ceil(part) * groups;
                let task = effective * part * depth;
                let gates = if gated { block * depth / 4 } else { 0 };
                let time = tasks.div_ceil(threads) * (task + gates + OVERHEAD);
                best = best.min((time, (block, part)));
            }
        }
        best.1
    }

    fn bottleneck(&self, block: &Bottleneck, scratch: &mut Buffer) {
        let Self { inputs, output, .. } = *self;
        let height = output.layout.dims.h;
        let lines = self.count * height;
        let workers = self.threads.threads().min(lines);
        // No two workers write to one cache line.
        let each = block.scratch_len().next_multiple_of(64);
        scratch.reserve(workers * each);
        let memory = Memory(scratch.write(0..workers * each).as_mut_ptr());
        let shares = Shares::new(lines, workers);
        self.tasks(workers, |index| {
            SCRATCH.with_borrow_mut(|Scratch { rows, .. }| {
                // SAFETY: the kernels' contract, see `Step::run`; each worker has its own part of
                // the memory, and lines that no other worker gets.
                unsafe {
                    let mut worker = bottleneck::Worker::new(block, memory.at(index * each));
                    while let Some(lines) = shares.next(index, block.lines(), height) {
                        let image = lines.start / height;
                        let lines = lines.start - image * height..lines.end - image * height;
                        let (input, residual) = (&inputs[0], inputs.get(1));
                        worker.compute(input, &output, residual, image, lines.clone(), rows);
                        self.sum_lines(image, lines);
                    }
                }
            });
        });
    }

    fn winograd(&self, conv: &Winograd, store: &Store, scratch: &mut Buffer) {
        let tiles = self.count * conv.tiles(self.output.layout.dims);
        let workers = self.threads.threads();
        if tiles >= workers * WORKER_TILES {
            self.winograd_by_tiles(conv, store, scratch, tiles, workers);
        } else {
            self.winograd_by_frequencies(conv, store, scratch, tiles);
        }
    }

    /// Every worker takes tiles through all three phases: what lies between them stays in its cache.
    fn winograd_by_tiles(
        &self,
        conv: &Winograd,
        store: &Store,
        scratch: &mut Buffer,
        tiles: usize,
        workers: usize,
    ) {
        let most = conv.tiles_within(WORKER_VALUES).max(WORKER_TILES);
        let [transformed, products] = conv.scratch(most);
        // No two workers write to one cache line.
        let each = (transformed + products).next_multiple_of(64);
        scratch.reserve(workers * each);
        let memory = Memory(scratch.write(0..workers * each).as_mut_ptr());
        let shares = Shares::new(tiles, workers);
        self.tasks(workers, |index| {
            SCRATCH.with_borrow_mut(|Scratch { rows, .. }| {
                // SAFETY: the kernels' contract, see `Step::run`; each worker has its own part of
                // the memory, and tiles that no other worker gets.
                unsafe {
                    let scratch = winograd::Scratch {
                        transformed: memory.at(index * each),
                        products: memory.at(index * each + transformed),
                        tiles: most,
                    };
                    while let Some(part) = shares.next(index, most, tiles) {
                        let start = part.start;
                        conv.transform(&self.inputs[0], &scratch, start, part.clone());
                        for frequency in 0..conv.frequencies() {
                            conv.multiply(&scratch, frequency, part.len(), rows);
                        }
                        let (residual, epilogue) = (self.inputs.get(1), store.epilogue());
                        conv.finish(&self.output, residual, epilogue, &scratch, start, part);
                    }
                }
            });
        });
    }

    /// All tiles are transformed, then each product is one worker's: weights are read only once.
    fn winograd_by_frequencies(
        &self,
        conv: &Winograd,
        store: &Store,
        scratch: &mut Buffer,
        tiles: usize,
    ) {
        let Self { inputs, output, .. } = *self;
        let [transformed, products] = conv.scratch(tiles);
        scratch.reserve(transformed + products);
        let values = scratch.write(0..transformed + products);
        let (transformed, products) = values.split_at_mut(transformed);
        let scratch = winograd::Scratch {
            transformed: transformed.as_mut_ptr(),
            products: products.as_mut_ptr(),
            tiles,
        };
        let block = tiles.div_ceil(TASKS);
        let blocks = tiles.div_ceil(block);
        let part = |task: usize| task * block..((task + 1) * block).min(tiles);
        // SAFETY: the kernels' contract, see `Step::run`; a phase ends before the next.
        self.threads.run(blocks, |task| unsafe {
            conv.transform(&inputs[0], &scratch, 0, part(task));
        });
        self.threads.run(conv.frequencies(), |frequency| {
            SCRATCH.with_borrow_mut(|Scratch { rows, .. }| unsafe {
                conv.multiply(&scratch, frequency, tiles, rows);
            });
        });
        self.tasks(blocks, |task| unsafe {
            let (residual, epilogue) = (inputs.get(1), store.epilogue());
            conv.finish(&output, residual, epilogue, &scratch, 0, part(task));
        });
    }
}
