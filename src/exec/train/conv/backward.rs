//! The backward pass: the gradient of the input here, that of the weights in `weight_gradient.rs`.

use std::ops::Range;

use super::super::values::{
    Destination, Memory, OutputGradient, ParameterId, Shared, Strip, ValueId,
};
use super::product::{Matrix, PanelRows, Product};
use super::tiles::{TileScratch, Tiling, transform_weights};
use super::wide::Wide;
use super::{Block, Layer, SCRATCH, Scratch, WeightSums, Weights, room};
use crate::graph::Conv2d;
use crate::kernels::crop::Crop;
use crate::kernels::depthwise::Depthwise;
use crate::kernels::gemm::{Epilogue, Rows};
use crate::kernels::memory::in_large_pages;
use crate::kernels::winograd::LINE;
use crate::kernels::winograd_training::{Frequencies, Side};
use crate::kernels::{
    Border, Dims, Isa, Layout, Source, Target, Window, depthwise_gradient, prefetch_far, rowwise,
};

pub struct Backward {
    pub from: OutputGradient,
    /// Trained weights: where the sums are kept.
    pub weights: Option<WeightSums>,
    /// A trained bias: partial sums `[blocks, outputs]`.
    pub bias: Option<Vec<f32>>,
    pub input: Option<InputGradient>,
}

pub struct InputGradient {
    pub destination: Destination,
    pub phases: Vec<Phase>,
    /// Stride 1 depthwise: the convolution with the kernel turned round.
    pub turned: Option<Depthwise>,
    /// Where the products of the phases, or the frequencies, are packed; or transformed tiles, and what comes
    /// out behind them.
    pub place: ValueId,
    /// Winograd: transformed weights, or those that never are all there.
    pub frequencies: Option<Frequencies>,
    pub wide: Option<Wide>,
}

impl InputGradient {
    /// Values of the place.
    pub fn len(&self) -> usize {
        let wide = |wide: &Wide| wide.panels_len() + wide.output_len();
        let frequencies = self.frequencies.as_ref().map_or(0, Frequencies::values_len);
        let products = self.phases.iter().flat_map(|phase| &phase.groups);
        let products = products.map(Product::len).sum::<usize>();
        products + frequencies + self.wide.as_ref().map_or(0, wide)
    }
}

/// Input pixels whose row and column plus padding leave the remainders `y` and `x` by the stride:
/// they meet the same taps of the kernel.
pub struct Phase {
    pub y: usize,
    pub x: usize,
    /// Taps down and across, those of every stride-th row and column.
    pub taps: [usize; 2],
    /// For each group: depth in the order of gradient rows, columns, outputs.
    pub groups: Vec<Product>,
}

/// The gradient of whole kernels from that of what is left of them.
fn whole_gradient(memory: &Memory, crop: &Crop, cut: &[f32]) -> Vec<f32> {
    // Kernels of a task.
    const KERNELS: usize = 16 << 10;
    let [whole, left] = crop.areas();
    let count = cut.len() / left;
    let mut gradient = in_large_pages(count * whole);
    let to = Shared(gradient.as_mut_ptr());
    memory.pool.run(count.div_ceil(KERNELS), |task| {
        let kernels = task * KERNELS..((task + 1) * KERNELS).min(count);
        // SAFETY: the task's own kernels, in a vector with room for all; zeros before they are lent.
        let out = unsafe {
            let out = to.get().add(kernels.start * whole);
            out.write_bytes(0, kernels.len() * whole);
            std::slice::from_raw_parts_mut(out, kernels.len() * whole)
        };
        crop.restore(&cut[kernels.start * left..kernels.end * left], out);
    });
    // SAFETY: the tasks are all kernels.
    unsafe { gradient.set_len(count * whole) };
    gradient
}

impl Layer {
    pub fn new_input_gradient(
        isa: Isa,
        conv: &Conv2d,
        tiling: Option<Tiling>,
        (images, input): (usize, Dims),
        destination: Destination,
    ) -> InputGradient {
        let pixels = images * input.pixels();
        let empty = InputGradient {
            destination,
            phases: Vec::new(),
            turned: None,
            place: 0,
            frequencies: None,
            wide: None,
        };
        match tiling {
            Some(Tiling::Whole) => {
                let channels = [conv.out_channels, conv.in_channels];
                return InputGradient {
                    frequencies: Some(Frequencies::new(isa, channels, false)),
                    ..empty
                };
            }
            Some(Tiling::Piecewise) => {
                return InputGradient {
                    wide: Some(Wide::new(isa, conv.out_channels, images, input, true)),
                    ..empty
                };
            }
            None => {}
        }
        let [kh, kw] = conv.kernel;
        let s = conv.stride;
        let (ins, outs) = (
            conv.in_channels / conv.groups,
            conv.out_channels / conv.groups,
        );
        let depthwise = conv.is_depthwise();
        let along = |size: usize, phase: usize| size.saturating_sub(phase).div_ceil(s);
        let mut phases = Vec::new();
        for y in 0..s {
            for x in 0..s {
                let taps = [along(kh, y), along(kw, x)];
                let (runs, run) = match conv.groups {
                    1 => (taps[0], taps[1] * outs),
                    _ => (taps[0] * taps[1], outs),
                };
                let pack = |_| Product::new(isa, pixels / (s * s), [runs, run], ins);
                let groups = if depthwise || runs * run == 0 {
                    Vec::new()
                } else {
                    (0..conv.groups).map(pack).collect()
                };
                phases.push(Phase { y, x, taps, groups });
            }
        }
        let turned = (depthwise && s == 1).then(|| Depthwise {
            isa,
            window: Window {
                kernel: conv.kernel,
                stride: 1,
                before: [0, 0],
            },
            weights: vec![0.0; kh * kw * conv.out_channels],
        });
        InputGradient {
            phases,
            turned,
            ..empty
        }
    }

    /// Packs the products of the backward pass, which comes next. [`Weights::Wide`] are multiplied at once, as
    /// soon as all blocks have been gone through.
    pub fn pack_backward(&self, memory: &Memory, weight: &[f32]) {
        let Some(backward) = &self.backward else {
            return;
        };
        let Some(input) = &backward.input else {
            return;
        };
        let weight = self.own_weights(weight);
        if let Some(frequencies) = &input.frequencies {
            let weight = (&*weight, self.input.c);
            return transform_weights(memory, frequencies, input.place, weight, true);
        }
        if let Some(wide) = &input.wide {
            self.backward_blocks(memory, backward);
            let place = memory.pointer(input.place);
            let bias = vec![0.0; self.input.c];
            // SAFETY: all tiles have been transformed; what comes out lies behind them.
            return unsafe {
                let to = place.add(wide.panels_len());
                wide.multiply(memory, &weight, wide.panels(place), &bias, to);
            };
        }
        let [kh, kw] = self.window.kernel;
        let area = kh * kw;
        let s = self.conv.stride;
        let groups = self.conv.groups;
        let (ins, outs) = (self.input.c / groups, self.output.c / groups);
        let of_phase = |phase| std::iter::repeat(phase).zip(0..groups);
        let places: Vec<(&Phase, usize)> = input
            .phases
            .iter()
            .filter(|phase| !phase.groups.is_empty())
            .flat_map(of_phase)
            .collect();
        let products: Vec<&Product> = places.iter().map(|&(p, group)| &p.groups[group]).collect();
        let fill = |index: usize, panels: &[PanelRows]| {
            // The panels' part of an output's weights is short, and the next output's is far.
            const OUTPUTS_AHEAD: usize = 8;
            let (phase, group) = places[index];
            let [ty, tx] = phase.taps;
            let (first, last) = (&panels[0].columns, &panels[panels.len() - 1].columns);
            for o in 0..outs {
                let weights = &weight[(group * outs + o) * ins * area..][..ins * area];
                let ahead = weights.as_ptr().wrapping_add(OUTPUTS_AHEAD * ins * area);
                for line in (first.start * area..last.end * area).step_by(LINE) {
                    prefetch_far(ahead.wrapping_add(line));
                }
                for PanelRows { columns, rows } in panels {
                    let from = &weights[columns.start * area..columns.end * area];
                    for tap in 0..ty * tx {
                        let (y, x) = (tap / tx, tap % tx);
                        let (ky, kx) = (phase.y + (ty - 1 - y) * s, phase.x + (tx - 1 - x) * s);
                        // SAFETY: columns of the panel.
                        let to = unsafe {
                            std::slice::from_raw_parts_mut(rows[tap * outs + o], columns.len())
                        };
                        if area == 1 {
                            to.copy_from_slice(from);
                            continue;
                        }
                        let from = from[ky * kw + kx..].iter().step_by(area);
                        to.iter_mut().zip(from).for_each(|(to, &value)| *to = value);
                    }
                }
            }
        };
        // Of an output's weights in one panel, single values for each input are only a line or two side by
        // side, which is slow to read.
        let neighbours = if area == 1 { 4 } else { 1 };
        let matrix = (area == 1).then_some(Matrix {
            values: &weight,
            transposed: false,
        });
        Product::pack(&products, memory, input.place, neighbours, fill, matrix);
    }

    /// Computes the gradients; `emit` is given those of weights and bias, in PyTorch's layout.
    pub fn backward(&self, memory: &Memory, mut emit: impl FnMut(ParameterId, Vec<f32>)) {
        let Some(backward) = &self.backward else {
            return;
        };
        match &backward.input {
            Some(InputGradient {
                wide: Some(wide),
                destination,
                place,
                ..
            }) => memory.pool.run(self.blocks.len(), |index| {
                let block = &self.blocks[index];
                let (start, pixels) = block.pixels(self.input);
                let channels = self.input.c;
                let at = wide.panels_len() + start * channels;
                // SAFETY: the block's pixels and partial sums are the task's own.
                unsafe {
                    let values = memory.part(*place, at, pixels * channels);
                    memory.deliver(destination, start, values, index);
                }
            }),
            _ => self.backward_blocks(memory, backward),
        }
        if let Some(sums) = &backward.weights {
            let mut gradient = self.weight_gradient(memory, sums);
            if let Some(folded) = &self.folded {
                folded.scale_rows(&mut gradient);
            }
            if let Some(crop) = &self.crop {
                gradient = whole_gradient(memory, crop, &gradient);
            }
            emit(self.weight, gradient);
        }
        if let (Some(partials), Some(bias)) = (&backward.bias, self.bias) {
            let mut sums = vec![0.0_f64; self.output.c];
            for block in partials.chunks_exact(self.output.c) {
                let pairs = sums.iter_mut().zip(block);
                pairs.for_each(|(sum, &part)| *sum += f64::from(part));
            }
            let mut gradient: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
            if let Some(folded) = &self.folded {
                folded.scale_rows(&mut gradient);
            }
            emit(bias, gradient);
        }
    }

    fn backward_blocks(&self, memory: &Memory, backward: &Backward) {
        let blocks = self.blocks.len();
        let runs = match backward.weights {
            Some(WeightSums::Lanes { lanes, .. }) => lanes,
            _ => blocks,
        };
        memory.pool.run(runs, |run| {
            SCRATCH.with_borrow_mut(|scratch| {
                for index in run * blocks / runs..(run + 1) * blocks / runs {
                    let first = index == run * blocks / runs;
                    self.backward_block(memory, backward, index, (run, first), scratch);
                }
            });
        });
    }

    /// Rows of the input whose gradient a block computes.
    fn owned_rows(&self, block: &Block) -> Range<usize> {
        let edge = |y: usize| match y {
            0 => 0,
            y if y == self.output.h => self.input.h,
            y => (y * self.window.stride).min(self.input.h),
        };
        edge(block.y)..edge(block.y + block.rows)
    }

    fn backward_block(
        &self,
        memory: &Memory,
        backward: &Backward,
        index: usize,
        (run, first): (usize, bool),
        scratch: &mut Scratch,
    ) {
        let block = &self.blocks[index];
        let channels = self.output.c;
        let owned = self.owned_rows(block);
        let stride = self.window.stride;
        let [top, left] = self.window.before;
        let [kh, kw] = self.window.kernel;
        // The strip of gradient rows: those of the block, and those that the input's gradient
        // reaches.
        let (mut low, mut high) = (block.y as isize, (block.y + block.rows) as isize);
        let (mut before, mut after) = (0, 0);
        if backward.input.is_some() {
            let reach = |k: usize| k.div_ceil(stride) as isize - 1;
            if !owned.is_empty() {
                low = low.min(((owned.start + top) / stride) as isize - reach(kh));
                high = high.max(((owned.end - 1 + top) / stride) as isize + 1);
            }
            before = kw.div_ceil(stride) - 1;
            after = ((self.input.w - 1 + left) / stride + 1).saturating_sub(self.output.w);
        }
        if self.is_winograd() {
            let tiles = self.tiles(block.rows);
            low = block.y as isize - 1;
            high = low + tiles.strip_rows() as isize;
            (before, after) = (1, tiles.right(self.output.w));
        }
        let strip = Strip {
            rows: (high - low) as usize,
            left: before,
            right: after,
            dims: self.output,
        };
        let Scratch {
            input,
            gradient,
            result,
            window_panels,
            gradient_panels,
            line,
            rows,
        } = scratch;
        let dz = if self.is_pointwise() && stride == 1 && backward.from.is_plain() {
            // As it lies there: the strip would be a copy.
            let (start, _) = block.pixels(self.output);
            // SAFETY: a place in the value.
            let pointer = unsafe { memory.pointer(backward.from.gradient).add(start * channels) };
            Source::at(pointer, strip.layout())
        } else {
            let values = room(gradient, strip.len() * block.images);
            for (image, out) in values.chunks_exact_mut(strip.len()).enumerate() {
                let start = (block.image + image) * self.output.pixels();
                strip.fill(low, self.output.h, out, |pixel, pixels, out| {
                    memory.read_gradient(&backward.from, start + pixel, pixels, out);
                });
            }
            Source::new(values, strip.layout(), block.images)
        };
        // Where the block's own rows begin in the strip.
        let own = (block.y as isize - low) as usize;
        if let Some(partials) = &backward.bias {
            // SAFETY: the block is the task's own.
            let sums = unsafe { memory.partial(partials, index, channels) };
            sums.fill(0.0);
            for (image, y) in block.image_rows() {
                // SAFETY: a row of the strip.
                let row = unsafe { dz.row(image, own + y) };
                rowwise::sum_rows(memory.isa, row, sums);
            }
        }
        if let (Some(sums), true) = (&backward.weights, self.is_winograd()) {
            let tiles = self.tiles(block.rows);
            let windows = self.fill_tiles(memory, block, tiles, input);
            let strips = [(Side::Input, &windows), (Side::Gradient, &dz)];
            let panels = [&mut *window_panels, &mut *gradient_panels];
            self.add_tile_gradient(memory, sums, block, (run, first), tiles, strips, panels);
        } else if let Some(sums) = &backward.weights {
            let (windows, window, channel) = self.block_input(memory, block, input);
            if self.is_depthwise() {
                let WeightSums::Lanes { sums, .. } = *sums else {
                    unreachable!("depthwise weights are few");
                };
                let len = kh * kw * channels;
                // SAFETY: the run's sums are the task's own; rows of both strips.
                unsafe {
                    let sums = memory.part(sums, run * len, len);
                    if first {
                        sums.fill(0.0);
                    }
                    // The gradient's rows from the block's first on.
                    let at = own * dz.layout.row_stride();
                    let dz = Source::at(dz.image(0).add(at), dz.layout);
                    for image in 0..block.images {
                        let rows = 0..block.rows;
                        depthwise_gradient::weights(
                            memory.isa, &window, &windows, &dz, image, rows, sums,
                        );
                    }
                }
            } else {
                let source = (&windows, &window, channel);
                let panels = (&mut *window_panels, &mut *gradient_panels, line);
                self.add_weight_gradient(memory, sums, block, run, first, source, &dz, own, panels);
            }
        }
        let Some(to) = &backward.input else {
            return;
        };
        if let Some(wide) = &to.wide {
            let panels = wide.panels(memory.pointer(to.place));
            // SAFETY: the block's tiles are the task's own.
            return unsafe { self.transform_block(memory, block, &dz, panels) };
        }
        let width = self.input.w * self.input.c;
        let values = room(result, block.images * owned.len() * width);
        let out_layout = Layout::plain(Dims {
            h: owned.len(),
            ..self.input
        });
        let out = Target::new(values, out_layout, block.images);
        if let Some(weights) = &to.frequencies {
            let tiles = self.tiles(block.rows);
            let scratch = TileScratch {
                panels: window_panels,
                products: gradient_panels,
                rows,
            };
            let strips = (&dz, block.images);
            let bias = vec![0.0; self.input.c];
            self.convolve_tiles(memory.isa, weights, tiles, strips, &bias, &out, scratch);
        } else if !owned.is_empty() {
            // SAFETY: the strip reaches as far as the taps of the block's own rows.
            unsafe { self.input_gradient(memory, to, block, &dz, low, owned.clone(), &out, rows) };
        }
        // Whole images, or rows of one: contiguous.
        let start = block.image * self.input.pixels() + owned.start * self.input.w;
        // SAFETY: the block's pixels and partial sums are the task's own.
        unsafe { memory.deliver(&to.destination, start, values, index) };
    }

    /// The input's gradient for rows `owned` of the block's images, from the strip that begins at
    /// gradient row `low`.
    #[allow(clippy::too_many_arguments)] // two strips and where they lie
    unsafe fn input_gradient(
        &self,
        memory: &Memory,
        to: &InputGradient,
        block: &Block,
        dz: &Source,
        low: isize,
        owned: Range<usize>,
        out: &Target,
        rows: &mut Rows,
    ) {
        let s = self.window.stride;
        let [top, left] = self.window.before;
        let [_, kw] = self.window.kernel;
        let widest = kw.div_ceil(s);
        let groups = self.conv.groups;
        let (ins, outs) = (self.input.c / groups, self.output.c / groups);
        let strip = dz.layout;
        let row = strip.row_stride();
        // Where the first gradient pixel of an input pixel's window lies in the strip.
        let place = |y: usize, x: usize, taps: [usize; 2]| {
            let strip_y = ((y + top) / s) as isize - (taps[0] as isize - 1) - low;
            let strip_x = (x + left) / s + (widest - 1) - (taps[1] - 1);
            strip_y as usize * row + strip_x * strip.dims.c
        };
        if let Some(turned) = &to.turned {
            // The window of the first own pixel begins a kernel before it.
            let at = place(owned.start, 0, self.window.kernel);
            let shifted = Layout {
                border: Border {
                    left: 0,
                    right: strip.border.left + strip.border.right + strip.dims.w - self.input.w,
                    ..strip.border
                },
                dims: Dims {
                    w: self.input.w,
                    ..strip.dims
                },
            };
            debug_assert_eq!(shifted.row_stride(), row);
            let zeros = Epilogue {
                bias: &self.zeros(),
                activation: None,
            };
            for image in 0..block.images {
                // SAFETY: as the caller promises.
                unsafe {
                    let source = Source::at(dz.image(image).add(at), shifted);
                    let out = Target::at(out.image(image), out.layout);
                    turned.rows(&source, &out, None, zeros, 0, 0..owned.len());
                }
            }
            return;
        }
        for phase in &to.phases {
            let [ty, tx] = phase.taps;
            // First row and column of the phase.
            let begin =
                |at: usize, before: usize, phase: usize| at + (phase + s - (at + before) % s) % s;
            let own_rows = (begin(owned.start, top, phase.y)..owned.end).step_by(s);
            let columns = (begin(0, left, phase.x)..self.input.w).step_by(s);
            let c = self.input.c;
            if ty * tx == 0 {
                for image in 0..block.images {
                    for y in own_rows.clone() {
                        // SAFETY: the row is the task's own.
                        let row = unsafe { out.row(image, y - owned.start) };
                        for x in columns.clone() {
                            row[x * c..][..c].fill(0.0);
                        }
                    }
                }
                continue;
            }
            if self.is_depthwise() {
                let Weights::Depthwise(conv) = &self.weights else {
                    unreachable!("depthwise layers have depthwise weights");
                };
                let taps: Vec<[usize; 2]> = (0..ty * tx)
                    .map(|tap| {
                        let (y, x) = (tap / tx, tap % tx);
                        let (ky, kx) = (phase.y + (ty - 1 - y) * s, phase.x + (tx - 1 - x) * s);
                        [y * row + x * c, (ky * kw + kx) * c]
                    })
                    .collect();
                for image in 0..block.images {
                    for y in own_rows.clone() {
                        // SAFETY: as the caller promises.
                        unsafe {
                            let out = out.row(image, y - owned.start);
                            for x in columns.clone() {
                                let from = dz.image(image).add(place(y, x, phase.taps));
                                let out = &mut out[x * c..][..c];
                                let weights = conv.weights.as_ptr();
                                depthwise_gradient::pixel(memory.isa, from, weights, &taps, out);
                            }
                        }
                    }
                }
                continue;
            }
            let taps: Vec<usize> = if groups == 1 {
                (0..ty).map(|y| y * row).collect()
            } else {
                let columns = |y: usize| (0..tx).map(move |x| y * row + x * strip.dims.c);
                (0..ty).flat_map(columns).collect()
            };
            for (group, product) in phase.groups.iter().enumerate() {
                rows.clear();
                for image in 0..block.images {
                    for y in own_rows.clone() {
                        // SAFETY: as the caller promises.
                        unsafe {
                            let to = out.row(image, y - owned.start).as_mut_ptr();
                            let from = dz.image(image);
                            for x in columns.clone() {
                                let from = from.add(place(y, x, phase.taps) + group * outs);
                                rows.push(from, to.add(x * c + group * ins), None);
                            }
                        }
                    }
                }
                // SAFETY: as the caller promises.
                unsafe { product.multiply(rows, &taps, &[]) };
            }
        }
    }

    fn zeros(&self) -> Vec<f32> {
        vec![0.0; self.output.c]
    }
}
