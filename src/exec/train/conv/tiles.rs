//! Convolutions by Winograd's tiles.

use std::ops::Range;

use super::super::values::{Memory, Strip, ValueId};
use super::{Block, CACHED_WEIGHTS, Layer, Scratch, WeightSums, room};
use crate::graph::Conv2d;
use crate::kernels::gemm::Rows;
use crate::kernels::memory::Buffer;
use crate::kernels::transposed::{self, PANEL, Panels, padded};
use crate::kernels::winograd_training::{self, Frequencies, Kernels, Side, TilePanels, Tiles};
use crate::kernels::{Dims, Isa, Source, Target};

/// Pixels of a batch from which more than [`CACHED_WEIGHTS`] are worth transforming, and from which they had better
/// be transformed once for all of them.
const WIDE_PIXELS: Range<usize> = 100..1200;

/// A convolution by Winograd's tiles.
#[derive(Clone, Copy)]
pub enum Tiling {
    /// Weights are transformed once for all pixels.
    Whole,
    /// They are transformed piece by piece, while they are multiplied (`wide.rs`).
    Piecewise,
}

impl Tiling {
    /// The best way for a convolution with so many images in a batch, if it is one by tiles.
    pub fn of(conv: &Conv2d, images: usize, output: Dims) -> Option<Self> {
        let possible = conv.padding.is_same_size(3)
            && conv.kernel == [3, 3]
            && conv.stride == 1
            && conv.groups == 1
            && conv.in_channels.min(conv.out_channels) >= 32
            && conv.in_channels.is_multiple_of(PANEL)
            && conv.out_channels.is_multiple_of(PANEL)
            && Tiles::pay_off(output.h, output.w);
        let pixels = images * output.pixels();
        match conv.weights() > CACHED_WEIGHTS {
            _ if !possible => None,
            true if pixels < WIDE_PIXELS.start => None,
            true if pixels < WIDE_PIXELS.end => Some(Self::Piecewise),
            _ => Some(Self::Whole),
        }
    }
}

/// Scratch of a convolution by tiles.
pub struct TileScratch<'a> {
    pub panels: &'a mut Buffer,
    pub products: &'a mut Buffer,
    pub rows: &'a mut Rows,
}

/// Transforms weights to their place for the step.
pub fn transform_weights(
    memory: &Memory,
    frequencies: &Frequencies,
    place: ValueId,
    (weight, inputs): (&[f32], usize),
    turned: bool,
) {
    // SAFETY: the value is this step's own.
    frequencies.lend(unsafe { memory.part(place, 0, frequencies.values_len()) });
    let kernels = Kernels {
        weight,
        inputs,
        turned,
    };
    memory.pool.run(frequencies.parts(), |part| {
        // SAFETY: each part is one task's.
        unsafe { frequencies.load(kernels, [0, 0], part) };
    });
}

/// Panels in scratch for so many tiles.
fn tile_panels(scratch: &mut Buffer, channels: usize, count: usize) -> TilePanels {
    let place = room(scratch, TilePanels::len(channels, count));
    TilePanels::new(place.as_mut_ptr(), channels, count)
}

impl Layer {
    pub(super) fn is_winograd(&self) -> bool {
        self.tiling.is_some()
    }

    /// Tiles over some rows of the output.
    pub(super) fn tiles(&self, rows: usize) -> Tiles {
        Tiles::over(rows, self.output.w)
    }

    /// The strip of input that tiles over a block read.
    pub(super) fn fill_tiles(
        &self,
        memory: &Memory,
        block: &Block,
        tiles: Tiles,
        scratch: &mut Buffer,
    ) -> Source {
        let strip = Strip {
            rows: tiles.strip_rows(),
            left: 1,
            right: tiles.right(self.input.w),
            dims: self.input,
        };
        let values = room(scratch, strip.len() * block.images);
        for (index, out) in values.chunks_exact_mut(strip.len()).enumerate() {
            let start = (block.image + index) * self.input.pixels();
            strip.fill(
                block.y as isize - 1,
                self.input.h,
                out,
                |pixel, pixels, out| {
                    memory.read(&self.feed, start + pixel, pixels, out);
                },
            );
        }
        Source::new(values, strip.layout(), block.images)
    }

    pub(super) fn forward_tiles(
        &self,
        memory: &Memory,
        weights: &Frequencies,
        block: &Block,
        output: &Target,
        scratch: &mut Scratch,
    ) {
        let tiles = self.tiles(block.rows);
        let input = self.fill_tiles(memory, block, tiles, &mut scratch.input);
        let strips = (&input, block.images);
        self.convolve_tiles(
            memory.isa,
            weights,
            tiles,
            strips,
            &self.bias_values,
            output,
            TileScratch {
                panels: &mut scratch.window_panels,
                products: &mut scratch.result,
                rows: &mut scratch.rows,
            },
        );
    }

    /// A convolution of the strips of some images, by tiles.
    #[allow(clippy::too_many_arguments)] // weights, a strip, an output
    pub(super) fn convolve_tiles(
        &self,
        isa: Isa,
        weights: &Frequencies,
        tiles: Tiles,
        strips: (&Source, usize),
        bias: &[f32],
        output: &Target,
        scratch: TileScratch,
    ) {
        let (input, images) = strips;
        let count = tiles.count() * images;
        let (ins, outs) = (input.layout.dims.c, output.layout.dims.c);
        let panels = tile_panels(scratch.panels, ins, count);
        let products = room(
            scratch.products,
            winograd_training::products_len(count, outs),
        );
        // SAFETY: the strips reach as far as the tiles; the scratch and the output are the task's.
        unsafe {
            winograd_training::transform(isa, Side::Input, tiles, strips, panels, 0);
            let pointer = products.as_mut_ptr();
            winograd_training::multiply(weights, panels, count, pointer, scratch.rows, false);
            for image in 0..images {
                let first = image * tiles.count();
                winograd_training::finish(
                    isa,
                    tiles,
                    products.as_ptr(),
                    (first, count),
                    bias,
                    output,
                    image,
                );
            }
        }
    }

    /// Transforms the tiles of a block's strips, as an input, into panels of all tiles.
    ///
    /// # Safety
    /// The strips reach as far as the tiles; the panels' rows are the caller's own.
    pub(super) unsafe fn transform_block(
        &self,
        memory: &Memory,
        block: &Block,
        strips: &Source,
        panels: TilePanels,
    ) {
        let tiles = self.tiles(block.rows);
        let (first, _) = self.product_rows(block);
        let strips = (strips, block.images);
        // SAFETY: as the caller promises.
        unsafe {
            winograd_training::transform(memory.isa, Side::Input, tiles, strips, panels, first);
        }
    }

    /// A block's part of the sums U of a weight gradient: as products into the run's sums, or as
    /// panels.
    #[allow(clippy::too_many_arguments)] // two strips, where they lie, and scratch
    pub(super) fn add_tile_gradient(
        &self,
        memory: &Memory,
        sums: &WeightSums,
        block: &Block,
        (run, first): (usize, bool),
        tiles: Tiles,
        strips: [(Side, &Source); 2],
        scratch: [&mut Buffer; 2],
    ) {
        let shape = self.sum_shape();
        let (start, count) = self.product_rows(block);
        let channels = [self.input.c, self.output.c];
        let (panels, at) = match *sums {
            WeightSums::Lanes { .. } => {
                let [a, z] = scratch;
                let a = tile_panels(a, channels[0], count);
                ([a, tile_panels(z, channels[1], count)], 0)
            }
            WeightSums::Panels { a, z, .. } => {
                let rows = self.all_product_rows();
                let panels = |value: ValueId, channels: usize| {
                    TilePanels::new(memory.pointer(value), channels, rows)
                };
                ([panels(a, channels[0]), panels(z, channels[1])], start)
            }
        };
        for ((side, strip), to) in strips.into_iter().zip(panels) {
            let strips = (strip, block.images);
            // SAFETY: the strips reach as far as the tiles; rows of the panels that are the task's own.
            unsafe { winograd_training::transform(memory.isa, side, tiles, strips, to, at) };
        }
        let WeightSums::Lanes { sums, .. } = *sums else {
            return;
        };
        // SAFETY: the run's sums are the task's own.
        let out = unsafe { memory.part(sums, run * shape.len(), shape.len()) };
        for (frequency, out) in out.chunks_exact_mut(shape.sums_apart()).enumerate() {
            let [a, z] = panels.map(|panels| Panels {
                // SAFETY: inside the panels.
                pointer: unsafe { panels.pointer.add(frequency * panels.frequency) },
                stride: panels.panel,
            });
            let (k, n) = (0..shape.depth, 0..shape.outputs);
            let out = out.as_mut_ptr();
            let leading = padded(shape.outputs);
            // SAFETY: the panels were just filled.
            unsafe { transposed::product(memory.isa, a, z, count, k, n, out, leading, !first) };
        }
    }
}
