//! The gradient of the weights: products of input windows and gradients, summed over all pixels.

use super::super::values::{Memory, Shared, ValueId};
use super::{Block, Layer, room, wide};
use crate::kernels::memory::{Buffer, in_large_pages};
use crate::kernels::transposed::{self, PANEL, Panels, pack_row, padded};
use crate::kernels::winograd::LINE;
use crate::kernels::winograd_training::{self, TileSums};
use crate::kernels::{Source, Window, prefetch};

/// How a weight gradient is summed over the blocks.
pub enum WeightSums {
    /// Blocks in so many runs, each with sums of its own, `[lanes, groups, depth, outputs]`.
    Lanes { lanes: usize, sums: ValueId },
    /// All pixels of input windows and gradients are kept as panels, and multiplied afterwards:
    /// for weights that are too many to have several sums of them.
    Panels {
        a: ValueId,
        z: ValueId,
        /// None where the product is the gradient as it is wanted ([`Layer::is_direct`]), and for tiles.
        sums: Option<ValueId>,
    },
}

/// A lane's sums should stay below this, in values.
const LANE_SUMS: usize = 256 << 10;
/// Runs of blocks: enough for as many threads to share them evenly.
const LANES: usize = 8;

/// Rows of a weight gradient with so many that a task computes from panels: many, since a matrix unit splits the
/// other side for each task anew, but enough tasks for several threads.
fn part_rows(rows: usize) -> usize {
    const MOST: usize = 16 * PANEL;
    const TASKS: usize = 8;
    if rows >= TASKS * MOST { MOST } else { MOST / 2 }
}

/// Copies a few values, without the call that a copy of any length is.
///
/// # Safety
/// As many values lie behind `from`.
#[inline(always)]
unsafe fn copy_run(from: *const f32, to: &mut [f32]) {
    const STEP: usize = 8;
    let len = to.len();
    // SAFETY: as the caller promises; the last eight may be some of those before again.
    unsafe {
        if !(STEP..=8 * STEP).contains(&len) {
            from.copy_to_nonoverlapping(to.as_mut_ptr(), len);
            return;
        }
        let last = len - STEP;
        for at in (0..last).step_by(STEP).chain([last]) {
            let values = from.add(at).cast::<[f32; STEP]>().read_unaligned();
            to.as_mut_ptr()
                .add(at)
                .cast::<[f32; STEP]>()
                .write_unaligned(values);
        }
    }
}

/// Shape of the weight sums: depth of a group, its outputs padded to panels. For Winograd's
/// algorithm a group is a frequency.
pub struct SumShape {
    groups: usize,
    /// Inputs of a group times taps.
    pub depth: usize,
    pub outputs: usize,
}

impl SumShape {
    fn window_panels(&self) -> usize {
        padded(self.depth) / PANEL
    }

    fn gradient_panels(&self) -> usize {
        padded(self.outputs) / PANEL
    }

    /// From a group to the next, where each has so many values.
    fn apart(&self, values: usize) -> usize {
        match self.groups {
            1 => values,
            _ => values + LINE,
        }
    }

    /// From a group's window panels of so many rows to the next group's.
    pub fn windows_apart(&self, rows: usize) -> usize {
        self.apart(self.window_panels() * PANEL * rows)
    }

    /// From a group's gradient panels of so many rows to the next group's.
    pub fn gradients_apart(&self, rows: usize) -> usize {
        self.apart(self.gradient_panels() * PANEL * rows)
    }

    /// From a group's sums to the next group's.
    pub fn sums_apart(&self) -> usize {
        self.apart(self.depth * padded(self.outputs))
    }

    pub fn len(&self) -> usize {
        self.groups * self.sums_apart()
    }
}

impl Layer {
    pub(super) fn sum_shape(&self) -> SumShape {
        if self.is_winograd() {
            return SumShape {
                groups: 36,
                depth: self.input.c,
                outputs: self.output.c,
            };
        }
        let [kh, kw] = self.window.kernel;
        SumShape {
            groups: self.conv.groups,
            depth: kh * kw * self.input.c / self.conv.groups,
            outputs: self.output.c / self.conv.groups,
        }
    }

    /// Rows of a block in the product that gives the weights' gradient (tiles or pixels), and
    /// where they begin among those of all blocks.
    pub(super) fn product_rows(&self, block: &Block) -> (usize, usize) {
        if !self.is_winograd() {
            return block.pixels(self.output);
        }
        let columns = self.tiles(1).columns;
        let start = block.image * self.tiles(self.output.h).count() + block.y / 4 * columns;
        (start, block.images * self.tiles(block.rows).count())
    }

    pub(super) fn all_product_rows(&self) -> usize {
        self.blocks.iter().map(|b| self.product_rows(b).1).sum()
    }

    /// Whether panels of gradients times panels of windows are the weights' gradient in PyTorch's
    /// layout, `[outputs, inputs]`, without padding.
    fn is_direct(&self) -> bool {
        self.is_pointwise() && self.conv.groups == 1 && self.input.c.is_multiple_of(PANEL)
    }

    /// Runs of blocks that a weight gradient is summed in, and the values that it takes; or the
    /// values of window panels, gradient panels and, where they are wanted, sums.
    pub fn plan_weight_sums(&self) -> Result<(usize, usize), ([usize; 2], Option<usize>)> {
        let lanes = LANES.min(self.blocks.len());
        if self.is_depthwise() {
            let [kh, kw] = self.window.kernel;
            return Ok((lanes, lanes * kh * kw * self.output.c));
        }
        let shape = self.sum_shape();
        if shape.len() <= LANE_SUMS {
            return Ok((lanes, lanes * shape.len()));
        }
        let rows = self.all_product_rows();
        Err((
            [
                shape.groups * shape.windows_apart(rows),
                shape.groups * shape.gradients_apart(rows),
            ],
            (!self.is_direct() && !self.is_winograd()).then(|| shape.len()),
        ))
    }

    /// A block's part of a weight gradient: as products into the run's sums, or as panels.
    #[allow(clippy::too_many_arguments)] // two strips, where they lie, and scratch
    pub(super) fn add_weight_gradient(
        &self,
        memory: &Memory,
        sums: &WeightSums,
        block: &Block,
        run: usize,
        first: bool,
        (input, window, channel): (&Source, &Window, usize),
        dz: &Source,
        own: usize,
        (window_panels, gradient_panels, line): (&mut Buffer, &mut Buffer, &mut Vec<f32>),
    ) {
        let shape = self.sum_shape();
        let (start, pixels) = block.pixels(self.output);
        // Rows behind each other in a panel, and the first of the block.
        let (a, z, in_panel, at) = match *sums {
            WeightSums::Lanes { .. } => {
                let (a, z) = (shape.windows_apart(pixels), shape.gradients_apart(pixels));
                let a = room(window_panels, shape.groups * a).as_mut_ptr();
                let z = room(gradient_panels, shape.groups * z).as_mut_ptr();
                (a, z, pixels, 0)
            }
            WeightSums::Panels { a, z, .. } => {
                let all = memory.count * self.output.pixels();
                (memory.pointer(a), memory.pointer(z), all, start)
            }
        };
        let stride = in_panel * PANEL;
        let windows_apart = shape.windows_apart(in_panel);
        let gradients_apart = shape.gradients_apart(in_panel);
        let ins = self.input.c / shape.groups;
        let taps = self.taps(&input.layout);
        let run_len = shape.depth / taps.len();
        line.resize(line.len().max(shape.depth), 0.0);
        let line = &mut line[..shape.depth];
        let mut row = at;
        memory.isa.compiled(
            #[inline(always)]
            || {
                for (image, y) in block.image_rows() {
                    for x in 0..self.output.w {
                        // SAFETY: windows inside the strip, a row of the panels that is the task's own.
                        unsafe {
                            let from = input.image(image);
                            let from = from.add(window.offset(&input.layout, y, x) + channel);
                            for group in 0..shape.groups {
                                let from = from.add(group * ins);
                                let values = if taps.len() == 1 {
                                    std::slice::from_raw_parts(from, run_len)
                                } else {
                                    for (tap, to) in taps.iter().zip(line.chunks_exact_mut(run_len))
                                    {
                                        copy_run(from.add(*tap), to);
                                    }
                                    &line[..]
                                };
                                let to = a.add(group * windows_apart);
                                pack_row(values, to, stride, row);
                            }
                            let dz = dz.image(image).add(dz.layout.offset(own + y, x));
                            for group in 0..shape.groups {
                                let from = dz.add(group * shape.outputs);
                                let values = std::slice::from_raw_parts(from, shape.outputs);
                                let to = z.add(group * gradients_apart);
                                pack_row(values, to, stride, row);
                            }
                        }
                        row += 1;
                    }
                }
            },
        );
        let WeightSums::Lanes { sums, .. } = *sums else {
            return;
        };
        // SAFETY: the run's sums are the task's own.
        let out = unsafe { memory.part(sums, run * shape.len(), shape.len()) };
        let leading = padded(shape.outputs);
        for group in 0..shape.groups {
            // SAFETY: the panels were just filled.
            unsafe {
                let a = Panels {
                    pointer: a.add(group * windows_apart),
                    stride,
                };
                let z = Panels {
                    pointer: z.add(group * gradients_apart),
                    stride,
                };
                let out = out[group * shape.sums_apart()..].as_mut_ptr();
                let (k, n) = (0..shape.depth, 0..shape.outputs);
                transposed::product(memory.isa, a, z, pixels, k, n, out, leading, !first);
            }
        }
    }

    /// The sums as a gradient in PyTorch's layout.
    pub(super) fn weight_gradient(&self, memory: &Memory, sums: &WeightSums) -> Vec<f32> {
        let [kh, kw] = self.window.kernel;
        let area = kh * kw;
        if self.is_depthwise() {
            let WeightSums::Lanes { lanes, sums } = *sums else {
                unreachable!("depthwise weights are few");
            };
            let channels = self.output.c;
            let values = memory.values(sums);
            let sum = |c: usize, tap: usize| {
                let at = |lane: usize| values[(lane * area + tap) * channels + c];
                (0..lanes).map(at).sum::<f32>()
            };
            return (0..channels * area)
                .map(|i| sum(i / area, i % area))
                .collect();
        }
        let shape = self.sum_shape();
        let (lanes, values) = match *sums {
            WeightSums::Lanes { lanes, sums } => (lanes, sums),
            WeightSums::Panels { a, z, sums: None } if self.is_winograd() => {
                let channels = [self.input.c, self.output.c];
                let len = channels[0] * channels[1] * area;
                let mut gradient = in_large_pages(len);
                let (tiles, to) = (self.all_product_rows(), gradient.as_mut_ptr());
                // SAFETY: the panels have been filled, and all of the gradient is written.
                unsafe {
                    wide::weights_gradient(memory, [a, z], tiles, channels, to);
                    gradient.set_len(len);
                }
                return gradient;
            }
            WeightSums::Panels { a, z, sums: None } => {
                return self.multiply_directly(memory, &shape, a, z);
            }
            WeightSums::Panels {
                a,
                z,
                sums: Some(sums),
            } => {
                self.multiply_panels(memory, &shape, a, z, sums);
                (1, sums)
            }
        };
        let values = memory.values(values);
        let leading = padded(shape.outputs);
        let ins = self.input.c / self.conv.groups;
        let len = self.output.c * ins * area;
        let mut gradient = in_large_pages(len);
        let to = Shared(gradient.as_mut_ptr());
        // Outputs in blocks of a panel, so that a line that is read is used.
        let blocks = shape.gradient_panels();
        if self.is_winograd() {
            let values = Shared(values.as_ptr().cast_mut());
            memory.pool.run(blocks, |block| {
                let stride = ins * area;
                // SAFETY: the sums are there; inside the gradient, and this task's outputs alone.
                unsafe {
                    let sums = TileSums {
                        pointer: values.get().add(block * PANEL),
                        frequency: shape.sums_apart(),
                        leading,
                        lanes,
                        lane: shape.len(),
                    };
                    let to = to.get().add(block * PANEL * stride);
                    winograd_training::gradient_of_weights(memory.isa, sums, ins, to, stride);
                }
            });
            // SAFETY: the blocks are all outputs, of which there are whole panels.
            unsafe { gradient.set_len(len) };
            return gradient;
        }
        memory.pool.run(shape.groups * blocks, |task| {
            // Inputs at a time: sixteen rows of the gradient are filled side by side, each with
            // whole lines.
            const INPUTS: usize = 64;
            let (group, block) = (task / blocks, task % blocks);
            let first = block * PANEL;
            let outputs = PANEL.min(shape.outputs - first);
            let mut rows = vec![[0.0; PANEL]; INPUTS * area];
            for start in (0..ins).step_by(INPUTS) {
                let inputs = INPUTS.min(ins - start);
                for tap in 0..area {
                    for i in 0..inputs {
                        let k = tap * ins + start + i;
                        let at = group * shape.sums_apart() + k * leading + first;
                        // Rows lie far apart, so that the processor does not foresee them.
                        prefetch(values.as_ptr().wrapping_add(at + 8 * leading), PANEL);
                        let row = &mut rows[i * area + tap];
                        row.copy_from_slice(&values[at..][..PANEL]);
                        for lane in 1..lanes {
                            let part = &values[lane * shape.len() + at..][..PANEL];
                            row.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
                        }
                    }
                }
                for o in 0..outputs {
                    let place = ((group * shape.outputs + first + o) * ins + start) * area;
                    for (index, row) in rows[..inputs * area].iter().enumerate() {
                        // SAFETY: inside the gradient, and this task's outputs alone.
                        unsafe { to.get().add(place + index).write(row[o]) };
                    }
                }
            }
        });
        // SAFETY: the tasks are all groups and outputs.
        unsafe { gradient.set_len(len) };
        gradient
    }

    /// All pixels' gradients times all pixels' windows, `[outputs, inputs]`.
    fn multiply_directly(
        &self,
        memory: &Memory,
        shape: &SumShape,
        a: ValueId,
        z: ValueId,
    ) -> Vec<f32> {
        let (inputs, outputs) = (shape.depth, shape.outputs);
        let pixels = self.all_product_rows();
        let panels = |value: ValueId| Panels {
            pointer: memory.pointer(value),
            stride: pixels * PANEL,
        };
        let (a, z) = (panels(a), panels(z));
        let mut gradient = in_large_pages(outputs * inputs);
        let to = Shared(gradient.as_mut_ptr());
        let each = part_rows(outputs);
        memory.pool.run(outputs.div_ceil(each), |task| {
            let part = task * each..((task + 1) * each).min(outputs);
            // SAFETY: the panels have been filled; the part's rows of the gradient are the task's.
            unsafe {
                let out = to.get();
                transposed::product(
                    memory.isa,
                    z,
                    a,
                    pixels,
                    part,
                    0..inputs,
                    out,
                    inputs,
                    false,
                );
            }
        });
        // SAFETY: the parts are all outputs, and inputs are whole panels.
        unsafe { gradient.set_len(outputs * inputs) };
        gradient
    }

    /// All pixels' windows times all pixels' gradients.
    fn multiply_panels(
        &self,
        memory: &Memory,
        shape: &SumShape,
        a: ValueId,
        z: ValueId,
        sums: ValueId,
    ) {
        let pixels = self.all_product_rows();
        let stride = pixels * PANEL;
        let leading = padded(shape.outputs);
        let each = part_rows(shape.depth);
        let parts = shape.depth.div_ceil(each);
        memory.pool.run(shape.groups * parts, |task| {
            let (group, part) = (task / parts, task % parts);
            let k = part * each..((part + 1) * each).min(shape.depth);
            // SAFETY: the panels have been filled; the part's rows of the sums are the task's.
            unsafe {
                let panels = |value: ValueId, apart: usize| Panels {
                    pointer: memory.pointer(value).add(group * apart),
                    stride,
                };
                let a = panels(a, shape.windows_apart(pixels));
                let z = panels(z, shape.gradients_apart(pixels));
                let out = memory.pointer(sums).add(group * shape.sums_apart());
                let n = 0..shape.outputs;
                transposed::product(memory.isa, a, z, pixels, k, n, out, leading, false);
            }
        });
    }
}
