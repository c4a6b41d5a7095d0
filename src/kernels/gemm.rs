//! Matrix products whose left side is an image as it lies in memory, and convolutions by them.
//!
//! The right side (the weights) is packed once into panels: a few vectors of columns, all rows of
//! them one after the other. The left side is never packed. A row of it is a pixel: a pointer and
//! `taps`, the places behind it where runs of `depth` values begin; for a 3x3 convolution three
//! runs of three pixels each. A tile of six rows (twelve, where vectors are of sixteen values) and a
//! panel is held in registers while the whole depth passes, so that each output is one chain of fused
//! multiply-adds in the order of the depth, whatever tile it is in: its bits depend on nothing else.
//!
//! On a matrix unit (`gemm/amx.rs`) all this is different: both sides are split into tiles of their own, the
//! right one early where it is kept.

#[cfg(target_arch = "x86_64")]
mod amx;

use std::ops::Range;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use pulp::{NullaryFnOnce, Simd, WithSimd};

use super::elementwise;
use super::isa::{Isa, load, prefetch, prefetch_far, store};
use super::memory::{Block, Slab};
use super::{Source, Target, Window};
use crate::graph::Activation;

/// The right side of a product, packed for an instruction set.
pub struct Packed {
    isa: Isa,
    panels: Vec<Panel>,
    /// All panels' values.
    values: Values,
    /// Rows: the depth of the product.
    depth: usize,
    /// Values are those of tiles for a matrix unit, for a left side with runs of so many values.
    split: Option<usize>,
    /// Each tap has a chain of additions of its own, and the chains are added up.
    chains: bool,
}

enum Values {
    Own(Vec<f32>),
    /// In a slab, once they are packed.
    Stored(Arc<OnceLock<Block>>),
    /// Where [`Packed::lend`] said.
    Lent(AtomicPtr<f32>),
}

/// A block of columns.
#[derive(Clone, Copy, Debug)]
struct Panel {
    /// First column, and how many are not padding.
    start: usize,
    columns: usize,
    /// Width in vectors: 1, 2 or 3.
    vectors: usize,
    /// Where its values begin.
    offset: usize,
}

impl Packed {
    /// Packs `depth` rows of `columns` values, `value(row, column)` each.
    pub fn new(
        isa: Isa,
        depth: usize,
        columns: usize,
        value: impl Fn(usize, usize) -> f32,
    ) -> Self {
        Self::filled(isa, depth, columns, |panel, to| {
            set_panel(panel, to, isa.lanes(), &value);
        })
    }

    /// As [`Packed::new`], where the values of a row follow each other.
    pub fn of_rows<'a>(
        isa: Isa,
        depth: usize,
        columns: usize,
        row: impl Fn(usize) -> &'a [f32],
    ) -> Self {
        Self::filled(isa, depth, columns, |panel, to| {
            for (index, to) in to.chunks_exact_mut(panel.vectors * isa.lanes()).enumerate() {
                to[..panel.columns].copy_from_slice(&row(index)[panel.start..][..panel.columns]);
            }
        })
    }

    /// As [`Packed::new`], where the values of a column follow each other, each times `scale`.
    pub fn of_columns<'a>(
        isa: Isa,
        depth: usize,
        columns: usize,
        scale: f32,
        column: impl Fn(usize) -> &'a [f32],
    ) -> Self {
        Self::filled(isa, depth, columns, |panel, to| {
            let width = panel.vectors * isa.lanes();
            for place in 0..panel.columns {
                let from = &column(panel.start + place)[..depth];
                for (to, value) in to.chunks_exact_mut(width).zip(from) {
                    to[place] = value * scale;
                }
            }
        })
    }

    /// A product whose panels `fill` fills; padding is zero.
    fn filled(isa: Isa, depth: usize, columns: usize, fill: impl Fn(&Panel, &mut [f32])) -> Self {
        let panels = panels(columns, isa.lanes(), depth * isa.lanes());
        let len = |panel: &Panel| depth * panel.vectors * isa.lanes();
        let mut values = vec![0.0; panels.iter().map(len).sum()];
        for panel in &panels {
            fill(panel, &mut values[panel.offset..][..len(panel)]);
        }
        Self {
            isa,
            panels,
            values: Values::Own(values),
            depth,
            split: None,
            chains: false,
        }
    }

    /// Other values in the place of the old ones, `value(row, column)` each.
    pub fn refill(&mut self, value: impl Fn(usize, usize) -> f32) {
        let Values::Own(values) = &mut self.values else {
            unreachable!("weights that change are not kept in a slab");
        };
        for panel in &self.panels {
            let len = self.depth * panel.vectors * self.isa.lanes();
            let to = &mut values[panel.offset..][..len];
            set_panel(panel, to, self.isa.lanes(), &value);
        }
    }

    /// As [`Packed::new`], but without memory: values are where [`Packed::lend`] says.
    pub fn borrowing(isa: Isa, depth: usize, columns: usize) -> Self {
        Self::borrowing_part(isa, depth, 0..depth, columns)
    }

    /// Some rows of a product with `depth` of them, without memory. All parts of it are lent the same, as
    /// many values as [`Packed::values_len`] of the last one: a panel's rows follow each other.
    pub fn borrowing_part(isa: Isa, depth: usize, rows: Range<usize>, columns: usize) -> Self {
        let mut panels = panels(columns, isa.lanes(), depth * isa.lanes());
        for panel in &mut panels {
            panel.offset += rows.start * panel.vectors * isa.lanes();
        }
        Self {
            isa,
            panels,
            values: Values::Lent(AtomicPtr::default()),
            depth: rows.len(),
            split: None,
            chains: false,
        }
    }

    /// As [`Packed::borrowing`], for a left side with so many `taps` and runs of so many values: whole panels
    /// are brought by [`Packed::set_lent_panel`], if it is for a matrix unit.
    pub fn borrowing_runs(isa: Isa, [taps, run]: [usize; 2], columns: usize) -> Self {
        Self {
            values: Values::Lent(AtomicPtr::default()),
            ..Self::unfilled(isa, [taps, run], columns)
        }
    }

    /// The same product with a sum for each tap, which are added up: short chains of additions lose fewer
    /// digits. A matrix unit's sums are not such chains, and stay as they are.
    pub fn in_chains(self) -> Self {
        Self {
            chains: true,
            ..self
        }
    }

    /// Whether panels are brought as a whole.
    pub fn is_split(&self) -> bool {
        self.split.is_some()
    }

    /// Brings a panel's values, `[depth, width]` and whatever follows, to memory that was lent.
    ///
    /// # Safety
    /// Behind the pointer that was lent lie [`Packed::values_len`] values, and nobody else touches those
    /// of the panel.
    pub unsafe fn set_lent_panel(&self, panel: usize, values: &[f32]) {
        let to = self.pointer().cast_mut();
        let panel = &self.panels[panel];
        let len = self.depth * panel.vectors * self.isa.lanes();
        // SAFETY: as the caller promises.
        unsafe { self.split_panel(panel, &values[..len], to) };
    }

    /// Brings some panels to memory that was lent, from a matrix that is `[depth, columns]`, or `[columns,
    /// depth]` where it is `transposed`. For a product of one tap that [`Packed::is_split`].
    ///
    /// # Safety
    /// As [`Packed::set_lent_panel`], for those panels.
    ///
    /// # Panics
    /// Where the matrix has another size.
    pub unsafe fn set_lent_matrix(&self, panels: Range<usize>, matrix: &[f32], transposed: bool) {
        assert!(self.split == Some(self.depth) && matrix.len() == self.depth * self.columns());
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as the caller promises.
        unsafe {
            amx::split_matrix(self, &self.panels[panels], matrix, transposed);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (panels, transposed);
    }

    /// Where the values are from now on.
    ///
    /// # Panics
    /// Where the product has memory of its own.
    pub fn lend(&self, values: *mut f32) {
        let Values::Lent(place) = &self.values else {
            unreachable!("the product has memory of its own");
        };
        place.store(values, Ordering::Relaxed);
    }

    /// The first of a panel's columns and how many there are, and where its rows are in memory that was
    /// lent, or in `whole` where [`Packed::is_split`]; what is behind the columns of the last panel becomes
    /// zero.
    ///
    /// # Safety
    /// Behind the pointer that was lent lie [`Packed::values_len`] values, and nobody else touches those
    /// of the panel.
    pub unsafe fn lent_rows(
        &self,
        panel: usize,
        whole: &mut Vec<f32>,
        rows: &mut Vec<*mut f32>,
    ) -> Range<usize> {
        let panel = &self.panels[panel];
        let width = panel.vectors * self.isa.lanes();
        let place = if self.is_split() {
            whole.resize(whole.len().max(self.depth * width), 0.0);
            whole.as_mut_ptr()
        } else {
            self.pointer().wrapping_add(panel.offset).cast_mut()
        };
        for row in 0..self.depth {
            // SAFETY: values of the panel, as the caller promises.
            unsafe {
                let start = place.add(row * width);
                start
                    .add(panel.columns)
                    .write_bytes(0, width - panel.columns);
                rows.push(start);
            }
        }
        panel.start..panel.start + panel.columns
    }

    /// Writes some rows from `first` on, and `count` columns from `column` on, to memory that was lent.
    ///
    /// # Safety
    /// Behind the pointer that was lent lie [`Packed::values_len`] values, and nobody else touches those
    /// rows of those columns.
    #[inline(always)]
    pub unsafe fn set_lent<const N: usize>(
        &self,
        first: usize,
        column: usize,
        rows: &[[f32; N]],
        count: usize,
    ) {
        assert!(first + rows.len() <= self.depth && count <= N);
        let lanes = self.isa.lanes();
        let before = |panel: &&Panel| panel.start + panel.columns <= column;
        for panel in self.panels.iter().skip_while(before) {
            let start = panel.start.max(column);
            let end = (panel.start + panel.columns).min(column + count);
            if start >= end {
                break;
            }
            let width = panel.vectors * lanes;
            // SAFETY: rows of the panel, as the caller promises.
            unsafe {
                let to = self.pointer().cast_mut();
                let mut to = to.add(panel.offset + first * width + start - panel.start);
                for row in rows {
                    if end - start == N {
                        to.cast::<[f32; N]>().write_unaligned(*row);
                    } else {
                        let from = &row[start - column..end - column];
                        to.copy_from_nonoverlapping(from.as_ptr(), from.len());
                    }
                    to = to.add(width);
                }
            }
        }
    }

    /// As [`Packed::new`], with values that [`Packed::store`] brings later: for a left side with so many
    /// `taps`, and runs of so many values.
    pub fn unfilled(isa: Isa, [taps, run]: [usize; 2], columns: usize) -> Self {
        let depth = taps * run;
        let split = isa.has_matrix_unit().then_some(run);
        let vector = split.map_or(depth * isa.lanes(), |run| split_len(depth, run));
        Self {
            isa,
            panels: panels(columns, isa.lanes(), vector),
            values: Values::Stored(Arc::default()),
            depth,
            split,
            chains: false,
        }
    }

    /// The same product again: what is stored in one of them, the other has too.
    ///
    /// # Panics
    /// Where it is not one of [`Packed::unfilled`].
    pub fn share(&self) -> Self {
        let Values::Stored(block) = &self.values else {
            unreachable!("values of its own are not shared");
        };
        Self {
            isa: self.isa,
            panels: self.panels.clone(),
            values: Values::Stored(block.clone()),
            depth: self.depth,
            split: self.split,
            chains: self.chains,
        }
    }

    /// Packs a convolution's weights `[outputs, inputs, area]`, as PyTorch has them, into memory
    /// of the slab, each output times its `scale`. Rows are `[area, inputs]`.
    ///
    /// # Panics
    /// Where the weights are those of another product, or are there already.
    pub fn store(&self, slab: &Slab, weight: &[f32], [inputs, area]: [usize; 2], scale: &[f64]) {
        assert_eq!(inputs * area, self.depth);
        assert_eq!(weight.len(), self.depth * scale.len());
        // SAFETY: the panels make up all of the block.
        let block = unsafe { slab.reserve(self.values_len()) };
        self.isa.compiled(
            #[inline(always)]
            || {
                let mut whole = Vec::new();
                for panel in &self.panels {
                    let len = self.depth * panel.vectors * self.isa.lanes();
                    let to = if self.split.is_some() {
                        whole.clear();
                        whole.resize(len, 0.0);
                        &mut whole[..]
                    } else {
                        // SAFETY: each panel has a part of the block, which is filled with zeros before
                        // it becomes a slice.
                        unsafe {
                            let to = block.pointer().add(panel.offset);
                            to.write_bytes(0, len);
                            std::slice::from_raw_parts_mut(to, len)
                        }
                    };
                    let columns = panel.start..panel.start + panel.columns;
                    let weight = &weight[columns.start * self.depth..columns.end * self.depth];
                    pack_panel(to, weight, [inputs, area], &scale[columns]);
                    // SAFETY: the panel's part of the block.
                    unsafe { self.split_panel(panel, &whole, block.pointer()) };
                }
            },
        );
        self.adopt(block);
    }

    /// Takes the values of all panels from a block that holds them.
    pub(super) fn adopt(&self, block: Block) {
        let Values::Stored(place) = &self.values else {
            unreachable!("values of its own are not stored elsewhere");
        };
        assert_eq!(block.len(), self.values_len());
        assert!(place.set(block).is_ok(), "weights are packed once");
    }

    /// # Safety
    /// Behind `to` lie all values, and nobody else touches those of the panel.
    unsafe fn split_panel(&self, panel: &Panel, values: &[f32], to: *mut f32) {
        #[cfg(target_arch = "x86_64")]
        if let Some(run) = self.split {
            // SAFETY: as the caller promises.
            unsafe { amx::split_panel(panel, values, [self.depth / run, run], to) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (panel, values, to);
    }

    /// For each panel its first column, its width, and where its values begin.
    pub(super) fn panels(&self) -> impl Iterator<Item = [usize; 3]> {
        let lanes = self.isa.lanes();
        let panels = self.panels.iter();
        panels.map(move |p| [p.start, p.vectors * lanes, p.offset])
    }

    /// Values of all panels, padding included.
    pub fn values_len(&self) -> usize {
        self.panels
            .last()
            .map_or(0, |p| p.offset + self.panel_len(p))
    }

    fn panel_len(&self, panel: &Panel) -> usize {
        match self.split {
            Some(run) => panel.vectors * split_len(self.depth, run),
            None => self.depth * panel.vectors * self.isa.lanes(),
        }
    }

    fn pointer(&self) -> *const f32 {
        match &self.values {
            Values::Own(values) => values.as_ptr(),
            Values::Stored(block) => block
                .get()
                .expect("weights are packed before they are used")
                .as_ptr(),
            Values::Lent(values) => values.load(Ordering::Relaxed),
        }
    }

    #[cfg(test)]
    fn values(&self) -> &[f32] {
        // SAFETY: products in tests are packed and have memory of their own.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.values_len()) }
    }

    /// Rows of the right side.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Columns of the right side.
    pub fn columns(&self) -> usize {
        self.panels
            .last()
            .map_or(0, |panel| panel.start + panel.columns)
    }

    /// Number of panels: the product can be shared by them.
    pub fn panel_count(&self) -> usize {
        self.panels.len()
    }

    /// Rows of a tile that the product prefers.
    pub const TILE_ROWS: usize = 6;

    /// Rows that are split for a matrix unit at a time.
    pub const SPLIT_ROWS: usize = 256;
}

/// Fills a panel's columns, `value(row, column)` each.
fn set_panel(panel: &Panel, to: &mut [f32], lanes: usize, value: &impl Fn(usize, usize) -> f32) {
    for (row, to) in to.chunks_exact_mut(panel.vectors * lanes).enumerate() {
        for (column, to) in to[..panel.columns].iter_mut().enumerate() {
            *to = value(row, panel.start + column);
        }
    }
}

/// One panel of [`Packed::store`], of a few outputs `[outputs, inputs, area]`.
#[inline(always)]
fn pack_panel(to: &mut [f32], weight: &[f32], [inputs, area]: [usize; 2], scale: &[f64]) {
    // Of an output at a time: lines that are read, and lines that are written, stay in the cache.
    const BLOCK: usize = 64;
    let depth = inputs * area;
    let width = to.len() / depth;
    for start in (0..inputs).step_by(BLOCK) {
        let count = BLOCK.min(inputs - start);
        for tap in 0..area {
            let row = (tap * inputs + start) * width;
            let to = &mut to[row..row + count * width];
            for (column, &scale) in scale.iter().enumerate() {
                let from = &weight[column * depth + start * area..][..count * area];
                let mut scaled = [0.0_f32; BLOCK];
                if area == 1 {
                    for (to, &w) in scaled.iter_mut().zip(from) {
                        *to = (f64::from(w) * scale) as f32;
                    }
                } else {
                    for (to, taps) in scaled.iter_mut().zip(from.chunks_exact(area)) {
                        *to = (f64::from(taps[tap]) * scale) as f32;
                    }
                }
                for (row, value) in to.chunks_exact_mut(width).zip(scaled) {
                    row[column] = value;
                }
            }
        }
    }
}

/// Values of sixteen columns in tiles of a matrix unit.
fn split_len(depth: usize, run: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    return amx::steps([depth / run, run]) * crate::kernels::amx::TILE;
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("there is no matrix unit: {depth}, {run}")
}

/// Panels of two vectors; a rest of up to one vector makes the last panel three wide. The values of a vector's
/// columns are so many.
fn panels(columns: usize, lanes: usize, vector: usize) -> Vec<Panel> {
    let mut panels = Vec::new();
    let mut start = 0;
    let mut offset = 0;
    while start < columns {
        let rest = columns - start;
        let vectors = match rest.div_ceil(lanes) {
            3 => 3,
            1 => 1,
            _ => 2,
        };
        let panel = Panel {
            start,
            columns: rest.min(vectors * lanes),
            vectors,
            offset,
        };
        offset += vectors * vector;
        start += panel.columns;
        panels.push(panel);
    }
    panels
}

/// What is stored: the product plus bias, plus residual, through the activation.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// For each column, or empty.
    pub bias: &'a [f32],
    pub activation: Option<Activation>,
}

/// What a layer stores, see [`Epilogue`].
pub struct Store {
    pub bias: Vec<f32>,
    pub activation: Option<Activation>,
}

impl Store {
    pub fn epilogue(&self) -> Epilogue<'_> {
        Epilogue {
            bias: &self.bias,
            activation: self.activation,
        }
    }
}

/// Rows of a product: where each begins in the left side, in the output and in the residual.
pub struct Rows {
    inputs: Vec<*const f32>,
    outputs: Vec<*mut f32>,
    residuals: Vec<*const f32>,
}

impl Rows {
    /// No rows.
    pub const fn new() -> Self {
        Self {
            inputs: Vec::new(),
            outputs: Vec::new(),
            residuals: Vec::new(),
        }
    }

    /// Forgets all rows, and keeps their memory.
    pub fn clear(&mut self) {
        self.inputs.clear();
        self.outputs.clear();
        self.residuals.clear();
    }

    /// Makes the product one that is added to what the outputs hold.
    pub fn add_to_outputs(&mut self) {
        self.residuals.clear();
        let outputs = self.outputs.iter().map(|output| output.cast_const());
        self.residuals.extend(outputs);
    }

    /// Makes the product one that is stored.
    pub fn replace_outputs(&mut self) {
        self.residuals.clear();
    }

    /// Adds a row.
    pub fn push(&mut self, input: *const f32, output: *mut f32, residual: Option<*const f32>) {
        self.inputs.push(input);
        self.outputs.push(output);
        self.residuals.extend(residual);
    }

    /// Adds `count` rows that follow each other, each pair being where the first is and how far
    /// the next.
    ///
    /// # Safety
    /// All of them lie in the same allocation as the first.
    pub(super) unsafe fn push_line(
        &mut self,
        count: usize,
        (input, input_step): (*const f32, usize),
        (output, output_step): (*mut f32, usize),
        residual: Option<(*const f32, usize)>,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            self.inputs
                .extend((0..count).map(|i| input.add(i * input_step)));
            self.outputs
                .extend((0..count).map(|i| output.add(i * output_step)));
            if let Some((residual, step)) = residual {
                self.residuals
                    .extend((0..count).map(|i| residual.add(i * step)));
            }
        }
    }

    /// Multiplies the rows, each a run of `depth` values, by `factor(row)`, value by value: in
    /// `buffer`, where the rows lie from then on. What they were is not touched.
    ///
    /// # Safety
    /// Behind every input pointer lie `depth` values that nobody writes.
    pub unsafe fn weigh<'a>(
        &mut self,
        isa: Isa,
        depth: usize,
        buffer: &mut Vec<f32>,
        factor: impl Fn(usize) -> &'a [f32],
    ) {
        buffer.resize(buffer.len().max(self.inputs.len() * depth), 0.0);
        let places = buffer.chunks_exact_mut(depth);
        for (row, (input, place)) in self.inputs.iter_mut().zip(places).enumerate() {
            // SAFETY: as the caller promises.
            let values = unsafe { std::slice::from_raw_parts(*input, depth) };
            elementwise::multiply(isa, values, factor(row), place);
            *input = place.as_ptr();
        }
    }

    /// The output pixels `pixels` of a convolution over a batch, counted through all images.
    /// `channel` is where the group's input begins, `column` where its output does.
    ///
    /// # Safety
    /// The batches have those pixels, and the input enough border for the window.
    #[allow(clippy::too_many_arguments)] // all of a convolution's geometry
    pub unsafe fn set_pixels(
        &mut self,
        pixels: Range<usize>,
        window: &Window,
        input: &Source,
        output: &Target,
        residual: Option<&Source>,
        [channel, column]: [usize; 2],
    ) {
        self.clear();
        let dims = output.layout.dims;
        let (mut image, rest) = (pixels.start / dims.pixels(), pixels.start % dims.pixels());
        let (mut y, mut x) = (rest / dims.w, rest % dims.w);
        let mut left = pixels.len();
        while left > 0 {
            // As many pixels as the row has: they follow each other at equal distances.
            let count = left.min(dims.w - x);
            // SAFETY: the pixels are the batches', as the caller promises.
            unsafe {
                let from = window.offset(&input.layout, y, x) + channel;
                let from = input.image(image).add(from);
                let step = window.stride * input.layout.dims.c;
                let to = output.layout.offset(y, x) + column;
                let to = output.image(image).add(to);
                let other = residual.map(|residual| {
                    let other = residual.layout.offset(y, x) + column;
                    (residual.image(image).add(other), dims.c)
                });
                self.push_line(count, (from, step), (to, dims.c), other);
            }
            left -= count;
            (x, y) = (0, y + 1);
            if y == dims.h {
                (y, image) = (0, image + 1);
            }
        }
    }
}

impl Default for Rows {
    fn default() -> Self {
        Self::new()
    }
}

/// The product of `rows` with some panels, stored.
///
/// # Safety
/// Behind every input pointer, at every tap, lie `packed`'s depth over the number of taps values;
/// behind every output pointer (and residual, where there are any) all columns of the panels; and
/// nobody else touches those outputs.
pub unsafe fn gemm(
    packed: &Packed,
    panels: Range<usize>,
    rows: &Rows,
    taps: &[usize],
    epilogue: Epilogue,
) {
    debug_assert_eq!(packed.depth % taps.len(), 0);
    let product = Product {
        packed,
        panels: &packed.panels[panels],
        rows,
        taps,
        epilogue,
    };
    #[cfg(target_arch = "x86_64")]
    if packed.isa.has_matrix_unit() {
        // SAFETY: as the caller promises.
        return unsafe { product.on_matrix_unit() };
    }
    packed.isa.dispatch(product);
}

/// How many rows of a panel are asked for ahead of those that are multiplied: vectors of sixteen are used
/// up faster than a processor fetches them by itself from its second-level cache.
const AHEAD: usize = 8;

/// What is asked for while a panel is multiplied: the values behind it, which are the next panel's. They come
/// from memory or a shared cache, which the first tile of that panel would wait for otherwise: a processor
/// does not look that far ahead. Each tile asks for its share, a place for each row of weights.
#[derive(Clone, Copy)]
struct Next {
    at: *const f32,
    /// Values from a place to the next.
    step: usize,
}

/// Values of the widest panel: three vectors of sixteen.
const WIDEST: usize = 48;

struct Product<'a> {
    packed: &'a Packed,
    panels: &'a [Panel],
    rows: &'a Rows,
    taps: &'a [usize],
    epilogue: Epilogue<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.packed.chains {
            false => self.multiply::<S, false>(simd),
            true => self.multiply::<S, true>(simd),
        }
    }
}

/// Divides `count` rows into as few tiles of at most `most` rows as can be, of sizes as equal as
/// can be: pairs of a size and how often. Small tiles are slow, since a processor starts two
/// multiply-adds a cycle and each takes four: 49 rows are four tiles of six and five of five.
pub(super) fn tiles(count: usize, most: usize) -> [(usize, usize); 2] {
    let tiles = count.div_ceil(most).max(1);
    let (size, larger) = (count / tiles, count % tiles);
    [(size + 1, larger), (size, tiles - larger)]
}

/// So many tiles of a size, from a row of a panel on.
struct Tiles<'a, S> {
    product: &'a Product<'a>,
    simd: S,
    panel: &'a Panel,
    row: usize,
    times: usize,
    next: &'a mut Next,
}

impl<S: Simd> Tiles<'_, S> {
    /// A function of its own for each size: all of them in one take the compiler three times as long.
    ///
    /// # Safety
    /// The contract of [`gemm`]; there are so many rows.
    #[inline(never)]
    unsafe fn run<const TOP: usize, const BELOW: usize, const NV: usize, const CHAINS: bool>(self) {
        self.simd
            .vectorize(OfSize::<S, TOP, BELOW, NV, CHAINS>(self));
    }
}

struct OfSize<'a, S, const TOP: usize, const BELOW: usize, const NV: usize, const CHAINS: bool>(
    Tiles<'a, S>,
);

impl<S: Simd, const TOP: usize, const BELOW: usize, const NV: usize, const CHAINS: bool>
    NullaryFnOnce for OfSize<'_, S, TOP, BELOW, NV, CHAINS>
{
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Tiles {
            product,
            simd,
            panel,
            row,
            times,
            next,
        } = self.0;
        // Here, so that it stays in registers.
        let mut soon = *next;
        for index in 0..times {
            let row = row + index * (TOP + BELOW);
            // SAFETY: the contract of `Tiles::run`.
            unsafe { product.tile::<S, TOP, BELOW, NV, CHAINS>(simd, panel, row, &mut soon) };
        }
        *next = soon;
    }
}

/// All rows of one panel, as tiles of two sizes.
macro_rules! panel_in_tiles {
    ($name:ident, $vectors:literal, most $most:literal, $($top:literal + $below:literal)*) => {
        #[inline(always)]
        unsafe fn $name<S: Simd, const CHAINS: bool>(&self, simd: S, panel: &Panel) {
            let mut row = 0;
            let mut next = self.next::<S>(panel, self.rows.inputs.len().div_ceil($most));
            for (size, times) in tiles(self.rows.inputs.len(), $most) {
                let tiles = Tiles {
                    product: self,
                    simd,
                    panel,
                    row,
                    times,
                    next: &mut next,
                };
                match size {
                    // SAFETY: tiles cover the rows; the rest is the contract of `gemm`.
                    $(size if size == $top + $below => unsafe {
                        tiles.run::<$top, $below, $vectors, CHAINS>();
                    },)*
                    _ => {}
                }
                row += size * times;
            }
        }
    };
}

impl Product<'_> {
    #[inline(always)]
    fn multiply<S: Simd, const CHAINS: bool>(&self, simd: S) {
        for panel in self.panels {
            // SAFETY: the contract of `gemm`.
            unsafe {
                match (panel.vectors, S::F32_LANES) {
                    (1, _) => self.narrow_panel::<S, CHAINS>(simd, panel),
                    (2, 16) => self.tall_panel::<S, CHAINS>(simd, panel),
                    (2, _) => self.panel::<S, CHAINS>(simd, panel),
                    (_, 16) => self.tall_wide_panel::<S, CHAINS>(simd, panel),
                    (_, _) => self.wide_panel::<S, CHAINS>(simd, panel),
                }
            }
        }
    }

    panel_in_tiles!(narrow_panel, 1, most 12,
        1 + 0 2 + 0 3 + 0 4 + 0 5 + 0 6 + 0 6 + 1 6 + 2 6 + 3 6 + 4 6 + 5 6 + 6);
    panel_in_tiles!(panel, 2, most 6, 1 + 0 2 + 0 3 + 0 4 + 0 5 + 0 6 + 0);
    panel_in_tiles!(wide_panel, 3, most 3, 1 + 0 2 + 0 3 + 0);
    // Vectors of sixteen come with twice as many registers.
    panel_in_tiles!(tall_panel, 2, most 12,
        1 + 0 2 + 0 3 + 0 4 + 0 5 + 0 6 + 0 6 + 1 6 + 2 6 + 3 6 + 4 6 + 5 6 + 6);
    panel_in_tiles!(tall_wide_panel, 3, most 8,
        1 + 0 2 + 0 3 + 0 4 + 0 4 + 1 4 + 2 4 + 3 4 + 4);

    /// `TOP` rows and `BELOW` more: in two parts, since the compiler leaves long loops over sums as they are,
    /// and then keeps no sum in a register.
    #[inline(always)]
    unsafe fn tile<
        S: Simd,
        const TOP: usize,
        const BELOW: usize,
        const NV: usize,
        const CHAINS: bool,
    >(
        &self,
        simd: S,
        panel: &Panel,
        row: usize,
        next: &mut Next,
    ) {
        let lanes = S::F32_LANES;
        let run = self.packed.depth / self.taps.len();
        // SAFETY: the contract of `gemm`; the panel holds depth x NV vectors.
        unsafe {
            self.prefetch::<TOP>(panel, row, NV * lanes);
            self.prefetch::<BELOW>(panel, row + TOP, NV * lanes);
            let bias = self.bias::<S, NV>(simd, panel);
            let mut top = [bias; TOP];
            let mut below = [bias; BELOW];
            let zeros = [simd.splat_f32s(0.0); NV];
            // Sums of the chains before the one that goes on.
            let (mut ended_top, mut ended_below) = ([zeros; TOP], [zeros; BELOW]);
            let mut weights = self.packed.pointer().add(panel.offset);
            let inputs = self.rows.inputs.as_ptr().add(row);
            for (index, &tap) in self.taps.iter().enumerate() {
                if CHAINS && index > 0 {
                    add_tile(simd, &mut ended_top, &top);
                    add_tile(simd, &mut ended_below, &below);
                    (top, below) = ([zeros; TOP], [zeros; BELOW]);
                }
                let mut top_pixels = [std::ptr::null::<f32>(); TOP];
                for (r, pixel) in top_pixels.iter_mut().enumerate() {
                    *pixel = (*inputs.add(r)).add(tap);
                }
                let mut pixels_below = [std::ptr::null::<f32>(); BELOW];
                for (r, pixel) in pixels_below.iter_mut().enumerate() {
                    *pixel = (*inputs.add(TOP + r)).add(tap);
                }
                for k in 0..run {
                    let mut columns = [simd.splat_f32s(0.0); NV];
                    for (v, column) in columns.iter_mut().enumerate() {
                        *column = load::<S>(weights.add(v * lanes));
                        if lanes == 16 {
                            prefetch(weights.wrapping_add((v + AHEAD * NV) * lanes), lanes);
                        }
                    }
                    weights = weights.add(NV * lanes);
                    if lanes == 16 {
                        prefetch_far(next.at);
                        next.at = next.at.wrapping_add(next.step);
                    }
                    for r in 0..TOP {
                        let value = simd.splat_f32s(*top_pixels[r].add(k));
                        for v in 0..NV {
                            top[r][v] = simd.mul_add_e_f32s(value, columns[v], top[r][v]);
                        }
                    }
                    for r in 0..BELOW {
                        let value = simd.splat_f32s(*pixels_below[r].add(k));
                        for v in 0..NV {
                            below[r][v] = simd.mul_add_e_f32s(value, columns[v], below[r][v]);
                        }
                    }
                }
            }
            if CHAINS {
                add_tile(simd, &mut top, &ended_top);
                add_tile(simd, &mut below, &ended_below);
            }
            self.finish::<S, TOP, NV>(simd, panel, row, top);
            self.finish::<S, BELOW, NV>(simd, panel, row + TOP, below);
        }
    }

    /// What the `tiles` tiles of a panel ask for.
    #[inline(always)]
    fn next<S: Simd>(&self, panel: &Panel, tiles: usize) -> Next {
        let end = panel.offset + self.packed.panel_len(panel);
        Next {
            at: self.packed.pointer().wrapping_add(end),
            step: (panel.vectors * S::F32_LANES).div_ceil(tiles.max(1)),
        }
    }

    /// Asks for what the tile's end adds and overwrites. Each row of a tile is a line or two far from the
    /// next one, which the processor does not foresee.
    #[inline(always)]
    unsafe fn prefetch<const MR: usize>(&self, panel: &Panel, row: usize, count: usize) {
        // SAFETY: the contract of `gemm`.
        unsafe {
            if !self.rows.residuals.is_empty() {
                let residuals = self.rows.residuals.as_ptr().add(row);
                for r in 0..MR {
                    prefetch((*residuals.add(r)).wrapping_add(panel.start), count);
                }
            }
            let outputs = self.rows.outputs.as_ptr().add(row);
            for r in 0..MR {
                prefetch((*outputs.add(r)).wrapping_add(panel.start), count);
            }
        }
    }

    /// The panel's bias: what its sums begin with.
    #[inline(always)]
    unsafe fn bias<S: Simd, const NV: usize>(&self, simd: S, panel: &Panel) -> [S::f32s; NV] {
        let lanes = S::F32_LANES;
        let mut vectors = [simd.splat_f32s(0.0); NV];
        if self.epilogue.bias.is_empty() {
            return vectors;
        }
        let bias = &self.epilogue.bias[panel.start..panel.start + panel.columns];
        let mut buffer = [0.0; WIDEST];
        let mut from = bias.as_ptr();
        if panel.columns < NV * lanes {
            buffer[..bias.len()].copy_from_slice(bias);
            from = buffer.as_ptr();
        }
        for (v, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: as many columns as the vectors hold, or the buffer.
            *vector = unsafe { load::<S>(from.add(v * lanes)) };
        }
        vectors
    }

    /// Residual, activation and the store of a tile.
    #[inline(always)]
    unsafe fn finish<S: Simd, const MR: usize, const NV: usize>(
        &self,
        simd: S,
        panel: &Panel,
        row: usize,
        mut sums: [[S::f32s; NV]; MR],
    ) {
        let lanes = S::F32_LANES;
        // SAFETY: the contract of `gemm`.
        unsafe {
            if panel.columns < NV * lanes {
                return self.finish_part(simd, panel, row, &sums);
            }
            let outputs = self.rows.outputs.as_ptr().add(row);
            if !self.rows.residuals.is_empty() {
                let residuals = self.rows.residuals.as_ptr().add(row);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let residual = (*residuals.add(r)).add(panel.start);
                    for (v, sum) in sums.iter_mut().enumerate() {
                        *sum = simd.add_f32s(*sum, load::<S>(residual.add(v * lanes)));
                    }
                }
            }
            // Chosen once for the tile; what is cheap is done in registers.
            let sums = match self.epilogue.activation {
                None => sums,
                Some(Activation::Relu) => activate_tile(simd, Activation::Relu, sums),
                Some(Activation::Relu6) => activate_tile(simd, Activation::Relu6, sums),
                Some(Activation::HardSwish) => activate_tile(simd, Activation::HardSwish, sums),
                Some(_) => sums,
            };
            for (r, sums) in sums.into_iter().enumerate() {
                let output = (*outputs.add(r)).add(panel.start);
                for (v, sum) in sums.into_iter().enumerate() {
                    store::<S>(output.add(v * lanes), sum);
                }
            }
            if let Some(activation @ (Activation::Gelu | Activation::HardSigmoid)) =
                self.epilogue.activation
            {
                for output in &self.rows.outputs[row..row + MR] {
                    let output = output.add(panel.start);
                    for v in 0..NV {
                        let value = load::<S>(output.add(v * lanes));
                        let value = elementwise::activate_vector(simd, activation, value);
                        store::<S>(output.add(v * lanes), value);
                    }
                }
            }
        }
    }

    /// The same where the panel is wider than the columns that are left: through a buffer.
    #[inline(always)]
    unsafe fn finish_part<S: Simd, const NV: usize>(
        &self,
        simd: S,
        panel: &Panel,
        row: usize,
        sums: &[[S::f32s; NV]],
    ) {
        let lanes = S::F32_LANES;
        let mut buffer = [0.0; WIDEST];
        for (r, sums) in sums.iter().enumerate() {
            // SAFETY: the contract of `gemm`; vectors lie in the buffer, columns in the output.
            unsafe {
                let output = (*self.rows.outputs.as_ptr().add(row + r)).add(panel.start);
                if !self.rows.residuals.is_empty() {
                    let residual = (*self.rows.residuals.as_ptr().add(row + r)).add(panel.start);
                    std::ptr::copy_nonoverlapping(residual, buffer.as_mut_ptr(), panel.columns);
                }
                for (v, &sum) in sums.iter().enumerate() {
                    let place = buffer.as_mut_ptr().add(v * lanes);
                    let mut value = sum;
                    if !self.rows.residuals.is_empty() {
                        value = simd.add_f32s(value, load::<S>(place));
                    }
                    if let Some(activation) = self.epilogue.activation {
                        value = elementwise::activate_vector(simd, activation, value);
                    }
                    store::<S>(place, value);
                }
                std::ptr::copy_nonoverlapping(buffer.as_ptr(), output, panel.columns);
            }
        }
    }
}

#[inline(always)]
fn add_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    sums: &mut [[S::f32s; NV]; MR],
    others: &[[S::f32s; NV]; MR],
) {
    for (sums, others) in sums.iter_mut().zip(others) {
        for (sum, other) in sums.iter_mut().zip(others) {
            *sum = simd.add_f32s(*sum, *other);
        }
    }
}

#[inline(always)]
fn activate_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    activation: Activation,
    mut tile: [[S::f32s; NV]; MR],
) -> [[S::f32s; NV]; MR] {
    // Loops, not `map`: closures would not be compiled for the instruction set.
    for row in &mut tile {
        for value in row {
            *value = elementwise::activate_vector(simd, activation, *value);
        }
    }
    tile
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn stored_weights_are_those_that_are_packed_one_by_one() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let slab = Slab::default();
        for number in 0..60 {
            let isa = [Isa::detect(), Isa::portable()][number % 2];
            let inputs = rng.random_range(1..150);
            let outputs = rng.random_range(1..70);
            let area = [1, 1, 4, 9, 25][rng.random_range(0..5)];
            let depth = inputs * area;
            let weight: Vec<f32> = (0..outputs * depth)
                .map(|_| rng.random_range(-1.0..1.0))
                .collect();
            let scale: Vec<f64> = (0..outputs).map(|_| rng.random_range(-2.0..2.0)).collect();
            let expected = Packed::new(isa.vectors_only(), depth, outputs, |row, o| {
                let (tap, i) = (row / inputs, row % inputs);
                (f64::from(weight[(o * inputs + i) * area + tap]) * scale[o]) as f32
            });
            let packed = Packed::unfilled(isa.vectors_only(), [area, inputs], outputs);
            packed.share().store(&slab, &weight, [inputs, area], &scale);
            assert!(packed.values() == expected.values(), "case {number}");
        }
    }
}
