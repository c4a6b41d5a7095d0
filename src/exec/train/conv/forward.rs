//! The forward pass.

use super::super::values::Memory;
use super::product::{Matrix, PanelRows, Product};
use super::tiles::transform_weights;
use super::{Layer, SCRATCH, Scratch, Weights};
use crate::kernels::gemm::Epilogue;
use crate::kernels::{Dims, Layout, Target, prefetch_far, rowwise};

impl Layer {
    /// Packs the products of the forward pass, which comes next. [`Weights::Wide`] are multiplied at once.
    pub fn pack_forward(&self, memory: &Memory, weight: &[f32]) {
        let (groups, place) = match &self.weights {
            Weights::Dense { groups, place } => (groups, place),
            Weights::Winograd { frequencies, place } => {
                let weight = self.own_weights(weight);
                let weight = (&*weight, self.input.c);
                return transform_weights(memory, frequencies, *place, weight, false);
            }
            Weights::Wide { wide, place } => {
                let panels = wide.panels(memory.pointer(*place));
                memory.pool.run(self.blocks.len(), |index| {
                    SCRATCH.with_borrow_mut(|scratch| {
                        let block = &self.blocks[index];
                        let tiles = self.tiles(block.rows);
                        let strips = self.fill_tiles(memory, block, tiles, &mut scratch.input);
                        // SAFETY: the block's tiles are the task's own.
                        unsafe { self.transform_block(memory, block, &strips, panels) };
                    });
                });
                let (weight, bias) = (self.own_weights(weight), &self.bias_values);
                // SAFETY: all tiles have been transformed; the output is this layer's.
                return unsafe {
                    wide.multiply(memory, &weight, panels, bias, memory.pointer(self.z));
                };
            }
            Weights::Depthwise(_) => return,
        };
        let weight = self.own_weights(weight);
        let [kh, kw] = self.window.kernel;
        let area = kh * kw;
        let ins = self.input.c / self.conv.groups;
        let each = weight.len() / self.conv.groups;
        let products: Vec<&Product> = groups.iter().collect();
        let matrix = (area == 1).then_some(Matrix {
            values: &weight,
            transposed: true,
        });
        let fill = |group: usize, panels: &[PanelRows]| {
            for PanelRows { columns, rows } in panels {
                // Of a few values of each output at a time: lines that are read, and lines that are written,
                // stay in the cache.
                const BLOCK: usize = 16;
                const BLOCKS_AHEAD: usize = 4;
                let weight = &weight[group * each..][..each];
                // The product's rows are `[area, inputs]`, an output's weights `[inputs, area]`.
                let places = |i: usize| (0..area).map(move |tap| rows[tap * ins + i]);
                let places: Vec<*mut f32> = (0..ins).flat_map(places).collect();
                for (block, places) in places.chunks(BLOCK).enumerate() {
                    for (place, column) in columns.clone().enumerate() {
                        let from = &weight[column * ins * area + block * BLOCK..];
                        // Outputs' weights lie too far apart for a processor to foresee so many.
                        prefetch_far(from.as_ptr().wrapping_add(BLOCKS_AHEAD * BLOCK));
                        let from = &from[..places.len()];
                        for (to, &value) in places.iter().zip(from) {
                            // SAFETY: a column of the panel's.
                            unsafe { *to.add(place) = value };
                        }
                    }
                }
            }
        };
        Product::pack(&products, memory, *place, 1, fill, matrix);
    }

    /// Computes the output, and the moments that its norm wants.
    pub fn forward(&self, memory: &Memory) {
        memory.pool.run(self.blocks.len(), |index| {
            SCRATCH.with_borrow_mut(|scratch| self.forward_block(memory, index, scratch));
        });
    }

    fn forward_block(&self, memory: &Memory, index: usize, scratch: &mut Scratch) {
        let block = &self.blocks[index];
        let (start, pixels) = block.pixels(self.output);
        let channels = self.output.c;
        // SAFETY: the block's pixels are the task's own.
        let z = unsafe { memory.part(self.z, start * channels, pixels * channels) };
        let layout = Layout::plain(Dims {
            h: block.rows,
            ..self.output
        });
        let output = Target::new(z, layout, block.images);
        match &self.weights {
            Weights::Winograd { frequencies, .. } => {
                self.forward_tiles(memory, frequencies, block, &output, scratch);
                return self.finish_block(memory, index, z);
            }
            Weights::Wide { .. } => return self.finish_block(memory, index, z),
            Weights::Dense { .. } | Weights::Depthwise(_) => {}
        }
        let (input, window, channel) = self.block_input(memory, block, &mut scratch.input);
        let groups = self.conv.groups;
        match &self.weights {
            Weights::Winograd { .. } | Weights::Wide { .. } => unreachable!("computed above"),
            Weights::Depthwise(conv) => {
                debug_assert_eq!(conv.window, window);
                let epilogue = Epilogue {
                    bias: &self.bias_values,
                    activation: None,
                };
                for image in 0..block.images {
                    // SAFETY: rows of the strip and of the block.
                    unsafe {
                        conv.rows(&input, &output, None, epilogue, image, 0..block.rows);
                    }
                }
            }
            Weights::Dense { groups: packed, .. } => {
                let taps = self.taps(&input.layout);
                let (ins, outs) = (self.input.c / groups, channels / groups);
                for (group, product) in packed.iter().enumerate() {
                    let places = [channel + group * ins, group * outs];
                    let bias = &self.bias_values[group * outs..][..outs];
                    // SAFETY: pixels of the block, windows inside the strip.
                    unsafe {
                        let rows = &mut scratch.rows;
                        rows.set_pixels(0..pixels, &window, &input, &output, None, places);
                        product.multiply(rows, &taps, bias);
                    }
                }
            }
        }
        self.finish_block(memory, index, z);
    }

    /// The activation of a block's output, or its moments.
    fn finish_block(&self, memory: &Memory, index: usize, z: &mut [f32]) {
        let channels = self.output.c;
        if let Some(activation) = self.activation {
            rowwise::clip(memory.isa, activation, z);
        }
        if let Some(norm) = self.moments {
            let norm = memory.norm(norm);
            // SAFETY: the block is the task's own.
            let partial = unsafe { memory.partial(&norm.moments, index, 2 * channels) };
            let (mean, squares) = partial.split_at_mut(channels);
            rowwise::moments(memory.isa, z, mean, squares);
        }
    }
}
