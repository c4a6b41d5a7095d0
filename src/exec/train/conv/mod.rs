//! Convolutions and linear layers in training: forward, and the gradients of input, weights and
//! bias.
//!
//! A task is a block: some rows of one image's output, or some whole images. Forward, it fills a
//! strip of input rows (the batch norm and activation before it computed on the way), multiplies,
//! and takes the moments of what it wrote while that is still in the cache. Backward, it fills a
//! strip of the output's gradient (from the gradient behind the batch norm) and one of the input,
//! adds to the weights' gradient and hands the input's gradient on.
//!
//! Blocks, and with them the order of all sums, follow from the layer's shape alone.
//!
//! This file has what a layer is, and what it reads; `product.rs` multiplies windows, `tiles.rs`
//! is Winograd's algorithm, and `wide.rs` is that for layers with many weights and few pixels.

mod backward;
mod forward;
mod product;
mod tiles;
mod weight_gradient;
mod wide;

use std::borrow::Cow;
use std::cell::RefCell;

use super::values::{Feed, Memory, NormId, ParameterId, Strip, ValueId};
use crate::graph::{Activation, Conv2d};
use crate::kernels::crop::Crop;
use crate::kernels::depthwise::Depthwise;
use crate::kernels::gemm::Rows;
use crate::kernels::memory::{Buffer, LARGE_PAGE_VALUES};
use crate::kernels::winograd_training::Frequencies;
use crate::kernels::{Dims, Isa, Layout, Source, Window};
pub(super) use backward::Backward;
pub(super) use product::Product;
pub(super) use tiles::Tiling;
pub(super) use weight_gradient::WeightSums;
use wide::Wide;

/// What a task of a layer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub image: usize,
    /// More than one only where `rows` are all.
    pub images: usize,
    pub y: usize,
    pub rows: usize,
}

impl Block {
    /// Divides the outputs of a batch into blocks of about `pixels`; where an image is divided, its
    /// blocks begin at multiples of `multiple` rows.
    pub fn divide(count: usize, output: Dims, pixels: usize, multiple: usize) -> Vec<Self> {
        let Dims { h, .. } = output;
        if output.pixels() <= pixels {
            let images = (pixels / output.pixels()).clamp(1, count.div_ceil(8).max(1));
            return (0..count)
                .step_by(images)
                .map(|image| Block {
                    image,
                    images: images.min(count - image),
                    y: 0,
                    rows: h,
                })
                .collect();
        }
        let rows = h.div_ceil(output.pixels().div_ceil(pixels));
        let rows = rows.next_multiple_of(multiple);
        (0..count)
            .flat_map(|image| {
                (0..h).step_by(rows).map(move |y| Block {
                    image,
                    images: 1,
                    y,
                    rows: rows.min(h - y),
                })
            })
            .collect()
    }

    /// First pixel, counted through all images, and how many.
    pub fn pixels(&self, dims: Dims) -> (usize, usize) {
        let start = self.image * dims.pixels() + self.y * dims.w;
        (start, self.images * self.rows * dims.w)
    }

    /// Images and rows of the block, counted within it.
    fn image_rows(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let rows = self.rows;
        (0..self.images).flat_map(move |image| (0..rows).map(move |y| (image, y)))
    }
}

/// One convolution or linear layer.
pub(super) struct Layer {
    pub name: String,
    /// Its kernel is what `crop` leaves of the parameter's.
    pub conv: Conv2d,
    pub window: Window,
    pub crop: Option<Crop>,
    /// What is left of the weights, where there is a `crop`.
    pub cut: Vec<f32>,
    /// Channels are those that are read, not all of the value's.
    pub input: Dims,
    pub output: Dims,
    pub feed: Feed,
    pub z: ValueId,
    pub weight: ParameterId,
    pub bias: Option<ParameterId>,
    /// The norm that wants the moments of the output.
    pub moments: Option<NormId>,
    /// A norm on stored statistics that nobody trains, as part of weights and bias.
    pub folded: Option<Folded>,
    /// A clipping activation, which the output has gone through where it lies.
    pub activation: Option<Activation>,
    pub blocks: Vec<Block>,
    /// How the gradients are computed, where it is by tiles. The output mostly is too.
    pub tiling: Option<Tiling>,
    pub weights: Weights,
    pub bias_values: Vec<f32>,
    pub backward: Option<Backward>,
}

/// A batch norm as a scale and a shift for each output.
pub(super) struct Folded {
    /// Weight, bias, mean, variance.
    pub parameters: [ParameterId; 4],
    pub eps: f64,
    pub scale: Vec<f32>,
}

impl Folded {
    /// Multiplies each output's row with its scale: weights, or their gradient.
    fn scale_rows(&self, values: &mut [f32]) {
        let rows = values.chunks_exact_mut(values.len() / self.scale.len());
        for (row, scale) in rows.zip(&self.scale) {
            row.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

/// Weights as the kernels read them, filled anew for each step.
pub(super) enum Weights {
    /// A product for each group, packed right before it is used: all layers' at once would take as
    /// much memory as the parameters again.
    Dense {
        groups: Vec<Product>,
        place: ValueId,
    },
    /// For Winograd's tiles, transformed right before they are used.
    Winograd {
        frequencies: Frequencies,
        place: ValueId,
    },
    /// For Winograd's tiles too, and transformed while they are used: the place is the tiles'.
    Wide {
        wide: Wide,
        place: ValueId,
    },
    Depthwise(Depthwise),
}

impl Weights {
    /// Unfilled products of windows, for so many pixels.
    fn dense(isa: Isa, conv: &Conv2d, pixels: usize) -> Self {
        let [kh, kw] = conv.kernel;
        let (ins, outs) = (
            conv.in_channels / conv.groups,
            conv.out_channels / conv.groups,
        );
        // Runs of values that follow each other behind a window's first.
        let (runs, run) = match conv.groups {
            1 => (kh, kw * ins),
            _ => (kh * kw, ins),
        };
        let pack = |_| Product::new(isa, pixels, [runs, run], outs);
        let groups = (0..conv.groups).map(pack).collect();
        Self::Dense { groups, place: 0 }
    }

    fn on_matrix_unit(&self) -> bool {
        matches!(self, Self::Dense { groups, .. } if groups[0].split().is_some())
    }
}

/// A block's strips should stay in the second-level cache.
const STRIP_VALUES: usize = 64 << 10;
/// More than fit, for tiles: their weights are read once a block, and are several times as many.
const WINOGRAD_VALUES: usize = 128 << 10;
/// Weights that the second-level cache holds.
const CACHED_WEIGHTS: usize = 256 << 10;

#[derive(Default)]
struct Scratch {
    input: Buffer,
    gradient: Buffer,
    result: Buffer,
    window_panels: Buffer,
    gradient_panels: Buffer,
    line: Vec<f32>,
    rows: Rows,
}

thread_local! {
    /// Each thread's scratch, kept from step to step.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// So many values of scratch. It is made of large pages: small ones lie anywhere in memory, so that much less
/// than a cache holds keeps throwing itself out of it.
fn room(values: &mut Buffer, len: usize) -> &mut [f32] {
    values.reserve(len.next_multiple_of(LARGE_PAGE_VALUES));
    values.write(0..len)
}

impl Layer {
    /// The blocks of a batch, such that a block's strips stay in the cache.
    pub fn blocks(
        conv: &Conv2d,
        tiling: Option<Tiling>,
        weights: &Weights,
        (count, output): (usize, Dims),
    ) -> Vec<Block> {
        let widest = conv.in_channels * conv.stride * conv.stride + conv.out_channels;
        if tiling.is_some() {
            let pixels = (WINOGRAD_VALUES / widest).clamp(128, 512);
            return Block::divide(count, output, pixels, 4);
        }
        // Weights that the second-level cache does not hold are read anew for every block.
        let least = if weights.on_matrix_unit() {
            // It has multiplied them sooner than they are read; strips of windows need the cache too.
            if conv.kernel == [1, 1] { 400 } else { 200 }
        } else if conv.weights() > CACHED_WEIGHTS {
            128
        } else {
            96
        };
        Block::divide(count, output, (STRIP_VALUES / widest).clamp(least, 512), 1)
    }

    /// Unfilled weights for a layer with so many pixels in a batch; products have no place yet.
    pub fn new_weights(
        isa: Isa,
        conv: &Conv2d,
        window: Window,
        (images, output): (usize, Dims),
        tiling: Option<Tiling>,
    ) -> Weights {
        let [kh, kw] = conv.kernel;
        let pixels = images * output.pixels();
        let channels = [conv.in_channels, conv.out_channels];
        // Products of windows on a matrix unit lose fewer digits than tiles, and what the first layers lose, which
        // are narrow, those behind them multiply.
        const NARROW: usize = 128;
        let tiling = tiling.filter(|_| {
            let narrow = channels.iter().any(|&c| c < NARROW);
            !narrow || !Weights::dense(isa, conv, pixels).on_matrix_unit()
        });
        match tiling {
            Some(Tiling::Piecewise) => {
                return Weights::Wide {
                    wide: Wide::new(isa, conv.in_channels, images, output, false),
                    place: 0,
                };
            }
            Some(Tiling::Whole) => {
                return Weights::Winograd {
                    frequencies: Frequencies::new(isa, channels, true),
                    place: 0,
                };
            }
            None => {}
        }
        if conv.is_depthwise() {
            // The window of a strip, which begins with the first row that is read.
            let window = Window {
                before: [0, window.before[1]],
                ..window
            };
            return Weights::Depthwise(Depthwise {
                isa,
                window,
                weights: vec![0.0; kh * kw * conv.out_channels],
            });
        }
        Weights::dense(isa, conv, pixels)
    }

    fn is_depthwise(&self) -> bool {
        matches!(self.weights, Weights::Depthwise(_))
    }

    /// Whether windows are single pixels, so that a row of the input is a row of the product.
    fn is_pointwise(&self) -> bool {
        self.window.kernel == [1, 1] && self.window.before == [0, 0]
    }

    /// Takes the parameters as they are now, with those of a norm that becomes part of them. Weights of
    /// products are packed later, right before they are used.
    pub fn load(&mut self, weight: &[f32], bias: Option<&[f32]>, norm: Option<[Vec<f32>; 4]>) {
        match bias {
            Some(bias) => self.bias_values.copy_from_slice(bias),
            None => self.bias_values.fill(0.0),
        }
        if let (Some(folded), Some([gamma, beta, mean, variance])) = (&mut self.folded, norm) {
            for (c, bias) in self.bias_values.iter_mut().enumerate() {
                let scale = f64::from(gamma[c]) / (f64::from(variance[c]) + folded.eps).sqrt();
                folded.scale[c] = scale as f32;
                *bias =
                    (f64::from(beta[c]) + (f64::from(*bias) - f64::from(mean[c])) * scale) as f32;
            }
        }
        if let Some(crop) = &self.crop {
            self.cut = crop.cut(weight);
        }
        if self.is_depthwise() {
            let weight = self.own_weights(weight).into_owned();
            self.load_depthwise(&weight);
        }
    }

    /// What is left of the weights, times the scales of a norm that is part of them.
    fn own_weights<'a>(&'a self, weight: &'a [f32]) -> Cow<'a, [f32]> {
        let weight = self.crop.as_ref().map_or(weight, |_| &self.cut);
        let Some(folded) = &self.folded else {
            return weight.into();
        };
        let mut scaled = weight.to_vec();
        folded.scale_rows(&mut scaled);
        scaled.into()
    }

    fn load_depthwise(&mut self, weight: &[f32]) {
        let [kh, kw] = self.window.kernel;
        let area = kh * kw;
        let channels = self.output.c;
        if let Weights::Depthwise(conv) = &mut self.weights {
            for tap in 0..area {
                for c in 0..channels {
                    conv.weights[tap * channels + c] = weight[c * area + tap];
                }
            }
        }
        let input = self.backward.as_mut().and_then(|b| b.input.as_mut());
        if let Some(turned) = input.and_then(|input| input.turned.as_mut()) {
            for tap in 0..area {
                for c in 0..channels {
                    turned.weights[tap * channels + c] = weight[c * area + area - 1 - tap];
                }
            }
        }
    }

    /// The strip of input that a block's windows read, and its first row.
    fn input_strip(&self, block: &Block) -> (Strip, isize) {
        let Window {
            kernel: [kh, kw],
            stride,
            before: [top, left],
        } = self.window;
        let reach = (self.output.w - 1) * stride + kw;
        let strip = Strip {
            rows: (block.rows - 1) * stride + kh,
            left,
            right: reach.saturating_sub(left + self.input.w),
            dims: self.input,
        };
        (strip, (block.y * stride) as isize - top as isize)
    }

    /// The input of a block: read where it lies, or in a strip. With the window that reads it, and
    /// the channel where it begins.
    fn block_input(
        &self,
        memory: &Memory,
        block: &Block,
        scratch: &mut Buffer,
    ) -> (Source, Window, usize) {
        if let (Feed::Plain(view), true) = (self.feed, self.is_pointwise()) {
            let start =
                block.image * self.input.pixels() + block.y * self.window.stride * self.input.w;
            let layout = Layout::plain(Dims {
                c: view.stride,
                ..self.input
            });
            // SAFETY: a place in the value.
            let pointer = unsafe { memory.pointer(view.value).add(start * view.stride) };
            return (Source::at(pointer, layout), self.window, view.start);
        }
        let (strip, first) = self.input_strip(block);
        let values = room(scratch, strip.len() * block.images);
        for (index, out) in values.chunks_exact_mut(strip.len()).enumerate() {
            let start = (block.image + index) * self.input.pixels();
            strip.fill(first, self.input.h, out, |pixel, pixels, out| {
                memory.read(&self.feed, start + pixel, pixels, out);
            });
        }
        let window = Window {
            before: [0, self.window.before[1]],
            ..self.window
        };
        (Source::new(values, strip.layout(), block.images), window, 0)
    }

    /// Places of contiguous runs behind a window's first value, for one group or all channels.
    fn taps(&self, input: &Layout) -> Vec<usize> {
        let [kh, kw] = self.window.kernel;
        let row = input.row_stride();
        if self.conv.groups == 1 && input.dims.c == self.input.c {
            return (0..kh).map(|ky| ky * row).collect();
        }
        let columns = |ky: usize| (0..kw).map(move |kx| ky * row + kx * input.dims.c);
        (0..kh).flat_map(columns).collect()
    }
}
