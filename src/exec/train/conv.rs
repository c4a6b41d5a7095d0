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
//! Layers with many weights and few pixels go another way, in `wide.rs`.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::values::{
    Destination, Feed, Memory, NormId, OutputGradient, ParameterId, Shared, Strip, ValueId,
};
use super::wide::{self, Wide};
use crate::graph::{Activation, Conv2d};
use crate::kernels::depthwise::Depthwise;
use crate::kernels::gemm::{Epilogue, Packed, Rows, gemm};
use crate::kernels::memory::{Buffer, LARGE_PAGE_VALUES, in_large_pages};
use crate::kernels::transposed::{self, PANEL, Panels, pack_row, padded};
use crate::kernels::winograd::LINE;
use crate::kernels::winograd_training::{
    self, Frequencies, Kernels, Side, TilePanels, TileSums, Tiles,
};
use crate::kernels::{
    Dims, Isa, Layout, Source, Target, Window, depthwise_gradient, prefetch, prefetch_far, rowwise,
};

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
}

/// One convolution or linear layer.
pub(super) struct Layer {
    pub name: String,
    pub conv: Conv2d,
    pub window: Window,
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

/// A convolution by Winograd's tiles.
#[derive(Clone, Copy)]
pub(super) enum Tiling {
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

pub(super) struct Backward {
    pub from: OutputGradient,
    /// Trained weights: where the sums are kept.
    pub weights: Option<WeightSums>,
    /// A trained bias: partial sums `[blocks, outputs]`.
    pub bias: Option<Vec<f32>>,
    pub input: Option<InputGradient>,
}

/// How a weight gradient is summed over the blocks.
pub(super) enum WeightSums {
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

pub(super) struct InputGradient {
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
pub(super) struct Phase {
    pub y: usize,
    pub x: usize,
    /// Taps down and across, those of every stride-th row and column.
    pub taps: [usize; 2],
    /// For each group: depth in the order of gradient rows, columns, outputs.
    pub groups: Vec<Product>,
}

/// A product whose depth is divided: a chain of a thousand additions loses more digits than the
/// sum of four chains of a quarter, and what PyTorch's libraries do is as good. A matrix unit's is whole: its
/// sums are not such chains.
pub(super) struct Product {
    /// Values behind each tap.
    run: usize,
    /// Parts of the depth that are multiplied together, panel by panel, so that what they are added to
    /// stays in the first cache: few enough that the second holds the rows of a block.
    together: Vec<Vec<Part>>,
}

/// A part of a product's depth.
struct Part {
    /// Where it begins.
    start: usize,
    packed: Packed,
}

/// The right sides of some products, one after the other: `[depth, columns]`, or `[columns, depth]`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    values: &'a [f32],
    transposed: bool,
}

/// Some columns of a product, and where each of its rows begins there.
struct PanelRows {
    columns: Range<usize>,
    rows: Vec<*mut f32>,
}

impl Product {
    const DEPTH: usize = 256;
    /// Parts that are multiplied together.
    const TOGETHER: usize = 4;

    fn new(isa: Isa, rows: usize, [runs, run]: [usize; 2], columns: usize) -> Self {
        let isa = isa.for_product(rows, [runs, run], columns);
        if isa.has_matrix_unit() {
            let packed = Packed::borrowing_runs(isa, [runs, run], columns);
            let together = vec![vec![Part { start: 0, packed }]];
            return Self { run, together };
        }
        let mut bounds = vec![0];
        if run > Self::DEPTH {
            let pieces = run.div_ceil(Self::DEPTH);
            let ends = |of: usize| (1..=pieces).map(move |piece| of * run + piece * run / pieces);
            bounds.extend((0..runs).flat_map(ends));
        } else {
            let step = (Self::DEPTH / run).max(1);
            bounds.extend(
                (step..runs)
                    .step_by(step)
                    .chain([runs])
                    .map(|end| end * run),
            );
        }
        let parts: Vec<&[usize]> = bounds.windows(2).collect();
        let together = parts.chunks(Self::TOGETHER).map(|parts| {
            let (first, end) = (parts[0][0], parts[parts.len() - 1][1]);
            let part = |part: &&[usize]| {
                let rows = part[0] - first..part[1] - first;
                Part {
                    start: part[0],
                    packed: Packed::borrowing_part(isa, end - first, rows, columns),
                }
            };
            parts.iter().map(part).collect()
        });
        let together = together.collect();
        Self { run, together }
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        self.together.iter().flatten()
    }

    fn panels(&self) -> usize {
        self.parts().next().map_or(0, |p| p.packed.panel_count())
    }

    /// Values of the packed weights.
    pub fn len(&self) -> usize {
        let len = |parts: &Vec<Part>| parts.last().map_or(0, |part| part.packed.values_len());
        self.together.iter().map(len).sum()
    }

    /// The whole product, if it is one for a matrix unit.
    fn split(&self) -> Option<&Packed> {
        let packed = &self.together[0][0].packed;
        packed.is_split().then_some(packed)
    }

    /// Packs the weights of some products into a value: `fill(product, panels)` writes up to so many
    /// neighbouring panels, each some columns of all rows. Products for a matrix unit are made of a `matrix`
    /// at once, where there is one.
    fn pack(
        products: &[&Self],
        memory: &Memory,
        place: ValueId,
        neighbours: usize,
        fill: impl Fn(usize, &[PanelRows]) + Sync,
        matrix: Option<Matrix>,
    ) {
        // At least so many tasks, for several threads to share.
        const TASKS: usize = 8;
        // SAFETY: the value is this step's own.
        let mut values = unsafe { memory.part(place, 0, memory.values(place).len()) };
        let mut tasks = Vec::new();
        for (index, product) in products.iter().enumerate() {
            for parts in &product.together {
                let len = parts.last().map_or(0, |part| part.packed.values_len());
                let (own, rest) = std::mem::take(&mut values).split_at_mut(len);
                for part in parts {
                    part.packed.lend(own.as_mut_ptr());
                }
                values = rest;
            }
            let panels = product.panels();
            let step = (panels * products.len() / TASKS).clamp(1, neighbours);
            let starts = (0..panels).step_by(step);
            tasks.extend(starts.map(|start| (index, start..(start + step).min(panels))));
        }
        memory.pool.run(tasks.len(), |task| {
            let (index, panels) = tasks[task].clone();
            if let (Some(matrix), Some(packed)) = (matrix, products[index].split()) {
                let len = matrix.values.len() / products.len();
                let values = &matrix.values[index * len..][..len];
                // SAFETY: each panel is one task's.
                return unsafe { packed.set_lent_matrix(panels, values, matrix.transposed) };
            }
            WHOLE.with_borrow_mut(|whole| {
                whole.resize_with(whole.len().max(panels.len()), Vec::new);
                let rows_of = |(panel, whole): (usize, &mut Vec<f32>)| {
                    let (mut rows, mut columns) = (Vec::new(), 0..0);
                    for part in products[index].parts() {
                        // SAFETY: each panel is one task's.
                        columns = unsafe { part.packed.lent_rows(panel, whole, &mut rows) };
                    }
                    PanelRows { columns, rows }
                };
                let filled: Vec<PanelRows> = panels.clone().zip(&mut *whole).map(rows_of).collect();
                fill(index, &filled);
                if let Some(packed) = products[index].split() {
                    for (panel, values) in panels.zip(whole) {
                        // SAFETY: as above.
                        unsafe { packed.set_lent_panel(panel, values) };
                    }
                }
            });
        });
    }

    /// # Safety
    /// As [`gemm`]; the rows are those of a product that is stored.
    unsafe fn multiply(&self, rows: &mut Rows, taps: &[usize], bias: &[f32]) {
        for parts in &self.together {
            let panels = self.panels();
            // One part is multiplied at once: nothing is read again.
            let step = if parts.len() > 1 { 1 } else { panels.max(1) };
            for panel in (0..panels).step_by(step) {
                for Part { start, packed } in parts {
                    if *start == 0 {
                        rows.replace_outputs();
                    } else {
                        rows.add_to_outputs();
                    }
                    let within = [taps[start / self.run] + start % self.run];
                    let taps = match packed.depth() < self.run {
                        true => &within[..],
                        false => &taps[start / self.run..][..packed.depth() / self.run],
                    };
                    let epilogue = Epilogue {
                        bias: if *start == 0 { bias } else { &[] },
                        activation: None,
                    };
                    // SAFETY: as the caller promises.
                    unsafe { gemm(packed, panel..panel + step, rows, taps, epilogue) };
                }
            }
        }
    }
}

/// A lane's sums should stay below this, in values.
pub(super) const LANE_SUMS: usize = 256 << 10;
/// Runs of blocks: enough for as many threads to share them evenly.
const LANES: usize = 8;
/// A block's strips should stay in the second-level cache.
const STRIP_VALUES: usize = 64 << 10;
/// Weights that the second-level cache holds.
const CACHED_WEIGHTS: usize = 256 << 10;
/// Pixels of a batch from which more weights than that are worth transforming, and from which they had better be
/// transformed once for all of them.
const WIDE_PIXELS: Range<usize> = 100..1200;
const WINOGRAD_VALUES: usize = 128 << 10;
/// Rows of a weight gradient with so many that a task computes from panels: many, since a matrix unit splits the
/// other side for each task anew, but enough tasks for several threads.
fn part_rows(rows: usize) -> usize {
    const MOST: usize = 16 * PANEL;
    const TASKS: usize = 8;
    if rows >= TASKS * MOST { MOST } else { MOST / 2 }
}

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
    /// Panels that are filled as a whole.
    static WHOLE: RefCell<Vec<Vec<f32>>> = RefCell::default();
    /// Each thread's scratch, kept from step to step.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Scratch of a convolution by tiles.
struct TileScratch<'a> {
    panels: &'a mut Buffer,
    products: &'a mut Buffer,
    rows: &'a mut Rows,
}

/// Transforms weights to their place for the step.
fn transform_weights(
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

/// So many values of scratch. It is made of large pages: small ones lie anywhere in memory, so that much less
/// than a cache holds keeps throwing itself out of it.
pub(super) fn room(values: &mut Buffer, len: usize) -> &mut [f32] {
    values.reserve(len.next_multiple_of(LARGE_PAGE_VALUES));
    values.write(0..len)
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
struct SumShape {
    groups: usize,
    /// Inputs of a group times taps.
    depth: usize,
    outputs: usize,
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
    fn windows_apart(&self, rows: usize) -> usize {
        self.apart(self.window_panels() * PANEL * rows)
    }

    /// From a group's gradient panels of so many rows to the next group's.
    fn gradients_apart(&self, rows: usize) -> usize {
        self.apart(self.gradient_panels() * PANEL * rows)
    }

    /// From a group's sums to the next group's.
    fn sums_apart(&self) -> usize {
        self.apart(self.depth * padded(self.outputs))
    }

    fn len(&self) -> usize {
        self.groups * self.sums_apart()
    }
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
            // More than fits: weights are read once a block, and are several times larger.
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

    fn sum_shape(&self) -> SumShape {
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

    fn is_winograd(&self) -> bool {
        self.tiling.is_some()
    }

    /// Tiles over some rows of the output.
    fn tiles(&self, rows: usize) -> Tiles {
        Tiles::over(rows, self.output.w)
    }

    /// Rows of a block in the product that gives the weights' gradient (tiles or pixels), and
    /// where they begin among those of all blocks.
    fn product_rows(&self, block: &Block) -> (usize, usize) {
        if !self.is_winograd() {
            return block.pixels(self.output);
        }
        let columns = self.tiles(1).columns;
        let start = block.image * self.tiles(self.output.h).count() + block.y / 4 * columns;
        (start, block.images * self.tiles(block.rows).count())
    }

    fn all_product_rows(&self) -> usize {
        self.blocks.iter().map(|b| self.product_rows(b).1).sum()
    }

    fn is_depthwise(&self) -> bool {
        matches!(self.weights, Weights::Depthwise(_))
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

    /// Takes the parameters as they are now, with those of a norm that becomes part of them.
    pub fn load(&mut self, weight: &[f32], bias: Option<&[f32]>, norm: Option<[Vec<f32>; 4]>) {
        let (Some(folded), Some([gamma, beta, mean, variance])) = (&mut self.folded, norm) else {
            return self.load_plain(weight, bias);
        };
        let mut shift = vec![0.0; gamma.len()];
        for c in 0..gamma.len() {
            let scale = f64::from(gamma[c]) / (f64::from(variance[c]) + folded.eps).sqrt();
            let bias = bias.map_or(0.0, |bias| f64::from(bias[c]));
            folded.scale[c] = scale as f32;
            shift[c] = (f64::from(beta[c]) + (bias - f64::from(mean[c])) * scale) as f32;
        }
        let scaled = self.scaled(weight).into_owned();
        self.load_plain(&scaled, Some(&shift));
    }

    /// Weights times the scales of a norm that is part of them.
    fn scaled<'a>(&self, weight: &'a [f32]) -> Cow<'a, [f32]> {
        let Some(folded) = &self.folded else {
            return weight.into();
        };
        let mut scaled = weight.to_vec();
        folded.scale_rows(&mut scaled);
        scaled.into()
    }

    fn load_plain(&mut self, weight: &[f32], bias: Option<&[f32]>) {
        let [kh, kw] = self.window.kernel;
        let area = kh * kw;
        let channels = self.output.c;
        match bias {
            Some(bias) => self.bias_values.copy_from_slice(bias),
            None => self.bias_values.fill(0.0),
        }
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

    /// Packs the products of the forward pass, which comes next. [`Weights::Wide`] are multiplied at once.
    pub fn pack_forward(&self, memory: &Memory, weight: &[f32]) {
        let (groups, place) = match &self.weights {
            Weights::Dense { groups, place } => (groups, place),
            Weights::Winograd { frequencies, place } => {
                let weight = self.scaled(weight);
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
                let (weight, bias) = (self.scaled(weight), &self.bias_values);
                // SAFETY: all tiles have been transformed; the output is this layer's.
                return unsafe {
                    wide.multiply(memory, &weight, panels, bias, memory.pointer(self.z));
                };
            }
            Weights::Depthwise(_) => return,
        };
        let weight = self.scaled(weight);
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

    /// Packs the products of the backward pass, which comes next. [`Weights::Wide`] are multiplied at once, as
    /// soon as all blocks have been gone through.
    pub fn pack_backward(&self, memory: &Memory, weight: &[f32]) {
        let Some(backward) = &self.backward else {
            return;
        };
        let Some(input) = &backward.input else {
            return;
        };
        let weight = self.scaled(weight);
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

    /// Whether windows are single pixels, so that a row of the input is a row of the product.
    fn is_pointwise(&self) -> bool {
        self.window.kernel == [1, 1] && self.window.before == [0, 0]
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

    /// The strip of input that tiles over a block read.
    fn fill_tiles(
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

    fn forward_tiles(
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
    fn convolve_tiles(
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
                border: crate::kernels::Border {
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

    /// A block's part of the sums U of a weight gradient: as products into the run's sums, or as
    /// panels.
    #[allow(clippy::too_many_arguments)] // two strips, where they lie, and scratch
    fn add_tile_gradient(
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

    /// Transforms the tiles of a block's strips, as an input, into panels of all tiles.
    ///
    /// # Safety
    /// The strips reach as far as the tiles; the panels' rows are the caller's own.
    unsafe fn transform_block(
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

    fn zeros(&self) -> Vec<f32> {
        vec![0.0; self.output.c]
    }

    /// A block's part of a weight gradient: as products into the run's sums, or as panels.
    #[allow(clippy::too_many_arguments)] // two strips, where they lie, and scratch
    fn add_weight_gradient(
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
    fn weight_gradient(&self, memory: &Memory, sums: &WeightSums) -> Vec<f32> {
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

impl Block {
    /// Images and rows of the block, counted within it.
    fn image_rows(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let rows = self.rows;
        (0..self.images).flat_map(move |image| (0..rows).map(move |y| (image, y)))
    }
}
