//! Convolutions by Winograd's tiles whose weights are many and whose pixels are few, as in the last stage of a
//! ResNet.
//!
//! Transformed weights are four times as many, and memory would give them more slowly than they are multiplied.
//! So they are never written: all tiles of the batch are transformed, and a task multiplies them for some of
//! the outputs with weights that it transforms a piece at a time. What it adds to stays in its cache. The weights'
//! gradient goes the same way back, for all layers by tiles whose sums are too many to have several of them.

use std::cell::RefCell;
use std::ops::Range;

use super::super::values::{Memory, Shared, ValueId};
use super::room;
use crate::kernels::gemm::Rows;
use crate::kernels::memory::Buffer;
use crate::kernels::transposed::{self, PANEL, Panels};
use crate::kernels::winograd::apart;
use crate::kernels::winograd_training::{
    self, FREQUENCIES, Frequencies, Kernels, TilePanels, TileSums, Tiles,
};
use crate::kernels::{Dims, Isa, Layout, Target};

/// A convolution, or the gradient of one's input.
pub struct Wide {
    isa: Isa,
    inputs: usize,
    /// Of the whole batch.
    images: usize,
    /// Its outputs are as many as the inputs' pixels.
    output: Dims,
    tiles: Tiles,
    /// The gradient of the input.
    turned: bool,
}

/// Inputs and outputs whose weights are transformed together: with the sums of [`TILES`] they stay in a
/// second-level cache.
const INPUTS: usize = 64;
const OUTPUTS: usize = 64;
/// Tiles that a task multiplies, at most, if they are not of one image.
const TILES: usize = 128;
/// Tasks that there should be, for several threads to share.
const TASKS: usize = 8;

#[derive(Default)]
struct Scratch {
    weights: Buffer,
    sums: Buffer,
    rows: Rows,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Wide {
    pub fn new(isa: Isa, inputs: usize, images: usize, output: Dims, turned: bool) -> Self {
        Self {
            isa,
            inputs,
            images,
            output,
            tiles: Tiles::over(output.h, output.w),
            turned,
        }
    }

    /// Values of the transformed tiles.
    pub fn panels_len(&self) -> usize {
        TilePanels::len(self.inputs, self.images * self.tiles.count())
    }

    /// Values of the output.
    pub fn output_len(&self) -> usize {
        self.images * self.output.len()
    }

    /// The transformed tiles, where they have been put.
    pub fn panels(&self, place: *mut f32) -> TilePanels {
        TilePanels::new(place, self.inputs, self.images * self.tiles.count())
    }

    /// Images and outputs of the tasks.
    fn tasks(&self) -> Vec<(Range<usize>, Range<usize>)> {
        let split = |len: usize, step: usize| {
            (0..len)
                .step_by(step)
                .map(move |start| start..len.min(start + step))
        };
        let images = (TILES / self.tiles.count()).max(1);
        let outputs = match self.images.div_ceil(images) * self.output.c / OUTPUTS {
            TASKS.. => OUTPUTS,
            _ => OUTPUTS / 2,
        };
        split(self.images, images)
            .flat_map(|images| {
                split(self.output.c, outputs).map(move |outputs| (images.clone(), outputs))
            })
            .collect()
    }

    /// Multiplies transformed tiles with weights `[outputs, inputs, 3, 3]` of the convolution.
    ///
    /// # Safety
    /// The panels are those of all tiles, and behind `output` lie [`Wide::output_len`] values; no task runs.
    pub unsafe fn multiply(
        &self,
        memory: &Memory,
        weight: &[f32],
        panels: TilePanels,
        bias: &[f32],
        output: *mut f32,
    ) {
        let tasks = self.tasks();
        let output = Shared(output);
        let kernels = Kernels {
            weight,
            inputs: if self.turned {
                self.output.c
            } else {
                self.inputs
            },
            turned: self.turned,
        };
        memory.pool.run(tasks.len(), |task| {
            let (images, outputs) = tasks[task].clone();
            let bias = &bias[outputs.clone()];
            // SAFETY: as the caller promises; images and outputs are this task's own.
            unsafe {
                let place = output.get().add(outputs.start);
                SCRATCH.with_borrow_mut(|scratch| {
                    self.multiply_part(kernels, panels, images, outputs, bias, place, scratch);
                });
            }
        });
    }

    /// # Safety
    /// As [`Wide::multiply`], for some images and outputs; `output` is where the first image has those.
    #[allow(clippy::too_many_arguments)] // weights, tiles, an output, and parts of them
    unsafe fn multiply_part(
        &self,
        kernels: Kernels,
        panels: TilePanels,
        images: Range<usize>,
        outputs: Range<usize>,
        bias: &[f32],
        output: *mut f32,
        scratch: &mut Scratch,
    ) {
        let each = self.tiles.count();
        let count = images.len() * each;
        let Scratch {
            weights,
            sums,
            rows,
        } = scratch;
        let sums = room(sums, winograd_training::products_len(count, outputs.len()));
        for start in (0..self.inputs).step_by(INPUTS) {
            let depth = INPUTS.min(self.inputs - start);
            // A digit decides on which side of a ReLU's corner an output is; behind a gradient is no corner.
            let chains = !self.turned;
            let piece = Frequencies::new(self.isa, [depth, outputs.len()], chains);
            piece.lend(room(weights, piece.values_len()));
            let tiles = panels.part(images.start * each, start);
            // SAFETY: the weights are lent for this; the tiles are there.
            unsafe {
                for part in 0..piece.parts() {
                    piece.load(kernels, [start, outputs.start], part);
                }
                let sums = sums.as_mut_ptr();
                winograd_training::multiply(&piece, tiles, count, sums, rows, start > 0);
            }
        }
        let target = Target::at(output, Layout::plain(self.output));
        for (index, image) in images.enumerate() {
            let place = (index * each, count);
            // SAFETY: outputs of the task's own.
            unsafe {
                winograd_training::finish(
                    self.isa,
                    self.tiles,
                    sums.as_ptr(),
                    place,
                    bias,
                    &target,
                    image,
                );
            }
        }
    }
}

/// The gradient of weights `[outputs, inputs, 3, 3]` from all tiles' windows and gradients. The sums of tiles, as
/// many as transformed weights, stay in a cache too.
///
/// # Safety
/// The values hold panels of so many tiles, and behind `to` lies the gradient; no task runs.
pub unsafe fn weights_gradient(
    memory: &Memory,
    [windows, gradients]: [ValueId; 2],
    tiles: usize,
    [inputs, outputs]: [usize; 2],
    to: *mut f32,
) {
    let windows = TilePanels::new(memory.pointer(windows), inputs, tiles);
    let gradients = TilePanels::new(memory.pointer(gradients), outputs, tiles);
    let to = Shared(to);
    // As few tasks as keep several threads busy: each reads its parts of the panels anew.
    let blocks = outputs.div_ceil(OUTPUTS);
    let parts = TASKS.div_ceil(blocks).min(inputs.div_ceil(INPUTS));
    let each = inputs.div_ceil(parts).next_multiple_of(INPUTS);
    memory.pool.run(blocks * parts, |task| {
        let (block, part) = (task / parts, task % parts);
        let outputs = block * OUTPUTS..outputs.min((block + 1) * OUTPUTS);
        let leading = outputs.len();
        let part = part * each..inputs.min((part + 1) * each);
        SCRATCH.with_borrow_mut(|Scratch { sums, .. }| {
            for start in part.step_by(INPUTS) {
                let inputs_here = INPUTS.min(inputs - start);
                let frequency = apart(inputs_here, leading);
                let sums = room(sums, FREQUENCIES * frequency);
                let windows = windows.part(0, start);
                let gradients = gradients.part(0, outputs.start);
                for (index, sums) in sums.chunks_exact_mut(frequency).enumerate() {
                    let [a, z] = [windows, gradients].map(|panels| Panels {
                        pointer: panels.pointer.wrapping_add(index * panels.frequency),
                        stride: panels.panel,
                    });
                    let (k, n) = (0..inputs_here, 0..leading);
                    let sums = sums.as_mut_ptr();
                    // SAFETY: as the caller promises.
                    unsafe {
                        transposed::product(memory.isa, a, z, tiles, k, n, sums, leading, false);
                    }
                }
                for first in (0..leading).step_by(PANEL) {
                    let sums = TileSums {
                        pointer: sums[first..].as_ptr(),
                        frequency,
                        leading,
                        lanes: 1,
                        lane: 0,
                    };
                    // SAFETY: outputs of the task's own.
                    unsafe {
                        let to = to.get().add(((outputs.start + first) * inputs + start) * 9);
                        let stride = inputs * 9;
                        winograd_training::gradient_of_weights(
                            memory.isa,
                            sums,
                            inputs_here,
                            to,
                            stride,
                        );
                    }
                }
            }
        });
    });
}
