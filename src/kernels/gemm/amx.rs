//! [`gemm`](super::gemm) on matrix units, see [`crate::kernels::amx`].
//!
//! The left side is split right before it is multiplied, some of the depth at a time, so that the second-level
//! cache holds what it becomes while all columns pass. Where there are several such parts of the depth, sums
//! wait in memory for the next. The right side is split once, if it is kept ([`Packed::is_split`]): by column of
//! tiles, all steps of the depth one after the other. Else two columns of tiles are split at a time, for all
//! rows. Each run of values behind a tap is filled up to whole vectors with zeros.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{Packed, Panel, Product};
use crate::kernels::amx::{
    SIDE, SUMS, SUMS_WIDTH, Soon, TILE, Tiles, Unit, split, turned, with_memory,
};
use crate::kernels::elementwise;
use crate::kernels::isa::{load, prefetch, prefetch_far, store};

/// Steps of which the left side is split at a time: a tile has 72 KiB then.
const STEPS: usize = 24;

#[derive(Default)]
struct Scratch {
    depth: Vec<Depth>,
    columns: Vec<Columns>,
}

thread_local! {
    /// Each thread's, kept from product to product.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Up to sixteen columns of the right side.
#[derive(Clone, Copy, Default)]
struct Columns {
    /// The first of them, and how many are not padding.
    start: usize,
    count: usize,
    /// Where their values begin among all, and how far apart rows are; or where their tiles do.
    offset: usize,
    apart: usize,
}

/// Sixteen of the depth, or what is left of a run.
#[derive(Clone, Copy, Default)]
struct Depth {
    /// Where they are behind a row's beginning on the left.
    left: usize,
    /// The first row on the right, and how many.
    right: usize,
    count: usize,
}

/// The depth in vectors, an even number of them: runs of so many values behind each tap.
fn set_depth(vectors: &mut Vec<Depth>, taps: impl Iterator<Item = usize>, run: usize) {
    vectors.clear();
    for (tap, left) in taps.enumerate() {
        vectors.extend((0..run).step_by(SIDE).map(|start| Depth {
            left: left + start,
            right: tap * run + start,
            count: SIDE.min(run - start),
        }));
    }
    if !vectors.len().is_multiple_of(2) {
        vectors.push(Depth::default());
    }
}

/// Steps of a product with so many taps and runs.
pub(super) fn steps([taps, run]: [usize; 2]) -> usize {
    (taps * run.div_ceil(SIDE)).div_ceil(2)
}

/// Splits a panel, `[depth, width]`.
///
/// # Safety
/// Behind `to` lie all panels, and nobody else touches this one.
pub(super) unsafe fn split_panel(
    panel: &Panel,
    values: &[f32],
    [taps, run]: [usize; 2],
    to: *mut f32,
) {
    let width = panel.vectors * SIDE;
    assert_eq!(values.len(), taps * run * width);
    let mut vectors = Vec::new();
    set_depth(&mut vectors, std::iter::repeat_n(0, taps), run);
    for tile in 0..panel.vectors {
        // SAFETY: the panel's columns, and their place.
        unsafe {
            let from = values.as_ptr().add(tile * SIDE);
            let to = to.add(panel.offset + tile * steps([taps, run]) * TILE);
            split_columns(from, width, &vectors, to.cast());
        }
    }
}

/// Splits some panels of a matrix, `[depth, columns]` or the transposed one.
///
/// # Safety
/// Behind the product's pointer lie all its values, and nobody else touches those of the panels.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn split_matrix(
    packed: &Packed,
    panels: &[Panel],
    matrix: &[f32],
    transposed: bool,
) {
    let (depth, columns) = (packed.depth, packed.columns());
    let steps = steps([1, depth]);
    let tiles = panels.iter().flat_map(|panel| {
        (0..panel.vectors).map(|tile| {
            let start = panel.start + tile * SIDE;
            let to = packed
                .pointer()
                .wrapping_add(panel.offset + tile * steps * TILE);
            (
                start,
                SIDE.min(columns - start),
                to.cast_mut().cast::<u32>(),
            )
        })
    });
    let tiles: Vec<_> = tiles.collect();
    // Step by step: of each row of the matrix, the columns of all tiles lie side by side.
    for step in 0..steps {
        for &(start, count, to) in &tiles {
            // SAFETY: a step of a tile; values of the matrix.
            unsafe {
                let [first, second] = [0, 1].map(|half| {
                    let row = (step * 2 + half) * SIDE;
                    let rows = SIDE.min(depth.saturating_sub(row));
                    if transposed {
                        load_square(matrix, [start, count], depth, [row, rows], true)
                    } else {
                        load_square(matrix, [row, rows], columns, [start, count], false)
                    }
                });
                for row in 0..SIDE {
                    split(first[row], second[row], to.add(step * TILE + row * SIDE));
                }
            }
        }
    }
}

/// Up to sixteen rows and columns of a matrix of so many columns, each where it starts and how many; the rest
/// are zeros.
#[target_feature(enable = "avx512f")]
fn load_square(
    matrix: &[f32],
    [row, rows]: [usize; 2],
    columns: usize,
    [column, count]: [usize; 2],
    transposed: bool,
) -> [__m512; SIDE] {
    // Rows that are asked for before they are read, or columns of each row.
    const AHEAD: usize = 4 * SIDE;
    let mask = ((1_u32 << count) - 1) as u16;
    let mut vectors = [_mm512_setzero_ps(); SIDE];
    let rows = if count == 0 { 0 } else { rows };
    for (index, vector) in vectors.iter_mut().enumerate().take(rows) {
        let from = &matrix[(row + index) * columns + column..][..count];
        let ahead = if transposed { AHEAD } else { AHEAD * columns };
        prefetch_far(from.as_ptr().wrapping_add(ahead));
        // SAFETY: so many values; what is masked is not read.
        *vector = unsafe { _mm512_maskz_loadu_ps(mask, from.as_ptr()) };
    }
    if transposed { turned(vectors) } else { vectors }
}

impl Product<'_> {
    /// The product on this thread's matrix unit.
    ///
    /// # Safety
    /// The contract of [`super::gemm`], and there is a unit.
    pub(super) unsafe fn on_matrix_unit(&self) {
        SCRATCH.with_borrow_mut(|scratch| {
            let count = self.rows.inputs.len();
            let run = self.packed.depth / self.taps.len();
            // Runs of whole vectors are the same tiles, however many there are.
            let same =
                |of: usize| of == run || (of.is_multiple_of(SIDE) && run.is_multiple_of(SIDE));
            assert!(self.packed.split.is_none_or(same));
            set_depth(&mut scratch.depth, self.taps.iter().copied(), run);
            self.set_columns(&mut scratch.columns);
            let blocks = count.div_ceil(Packed::SPLIT_ROWS).max(1);
            for block in 0..blocks {
                let rows = block * count / blocks..(block + 1) * count / blocks;
                // SAFETY: as the caller promises.
                unsafe { self.block(rows, &scratch.depth, &scratch.columns) };
            }
        });
    }

    fn set_columns(&self, columns: &mut Vec<Columns>) {
        let of_panel = |panel: &Panel| {
            let panel = *panel;
            let apart = panel.vectors * SIDE;
            let next = match self.packed.split {
                Some(run) => super::split_len(self.packed.depth, run),
                None => SIDE,
            };
            (0..panel.vectors).map(move |tile| Columns {
                start: panel.start + tile * SIDE,
                count: SIDE.min(panel.columns - tile * SIDE),
                offset: panel.offset + tile * next,
                apart,
            })
        };
        columns.clear();
        columns.extend(self.panels.iter().flat_map(of_panel));
    }

    /// The product of some rows with all columns.
    ///
    /// # Safety
    /// As [`Product::on_matrix_unit`].
    unsafe fn block(&self, rows: Range<usize>, depth: &[Depth], columns: &[Columns]) {
        if rows.is_empty() {
            return;
        }
        let all_steps = depth.len() / 2;
        // Parts of the depth, as equal as can be.
        let parts = all_steps.div_ceil(STEPS);
        let longest = all_steps.div_ceil(parts);
        let left_tiles = rows.len().div_ceil(SIDE);
        let tile_rows = rows.len().div_ceil(left_tiles);
        let blocks = left_tiles.div_ceil(2);
        // Sums of all the block wait for the next part of the depth, where there is one.
        let kept = match parts {
            1 => 1,
            _ => columns.len().div_ceil(2) * blocks,
        };
        let right_tiles = if self.packed.is_split() { 0 } else { 2 };
        let [left_len, right_len] = [left_tiles, right_tiles].map(|tiles| tiles * longest * TILE);
        let unit = Unit::new(tile_rows);
        with_memory(left_len + right_len + kept * SUMS, |memory| {
            let left = memory.cast::<u32>();
            let scratch_right = left.wrapping_add(left_len);
            let all_sums = memory.wrapping_add(left_len + right_len);
            for part in 0..parts {
                let first = part * all_steps / parts;
                let depth = &depth[2 * first..2 * ((part + 1) * all_steps / parts)];
                let steps = depth.len() / 2;
                let apart = steps * TILE;
                for (tile, start) in rows.clone().step_by(tile_rows).enumerate() {
                    let end = rows.end.min(start + tile_rows);
                    for (row, input) in self.rows.inputs[start..end].iter().enumerate() {
                        let to = left.wrapping_add(tile * apart + row * SIDE);
                        // SAFETY: a row of a tile in the memory; the rest is the contract of `gemm`.
                        unsafe { split_row(*input, depth, to) };
                    }
                }
                for (pair, pair_columns) in columns.chunks(2).enumerate() {
                    let next = columns.get(2 * pair + 2);
                    // SAFETY: the panels have those columns, and the memory room for two of their tiles.
                    let right = unsafe { self.right(pair_columns, first, depth, scratch_right) };
                    for block in 0..blocks {
                        let place = if parts > 1 { pair * blocks + block } else { 0 };
                        let sums = all_sums.wrapping_add(place * SUMS);
                        let start = rows.start + 2 * block * tile_rows;
                        let count = (left_tiles - 2 * block).min(2);
                        let rows = start..rows.end.min(start + count * tile_rows);
                        let left = Tiles {
                            count,
                            first: left.wrapping_add(2 * block * apart),
                            apart,
                        };
                        let last = part + 1 == parts;
                        if last {
                            self.prefetch_ends(rows.clone(), pair_columns);
                        }
                        if part > 0 {
                            // The next block's.
                            for line in 0..SUMS / SIDE {
                                prefetch_far(sums.wrapping_add(SUMS + line * SIDE));
                            }
                        }
                        let soon = next.map_or(Soon::NOTHING, |next| {
                            self.soon(next, first, depth, [block, blocks])
                        });
                        // SAFETY: tiles of both sides with so many steps, and a block of the memory.
                        unsafe { unit.multiply(left, right, steps, sums, part > 0, soon) };
                        if last {
                            self.packed.isa.dispatch(Finish {
                                product: self,
                                columns: pair_columns,
                                rows,
                                tile_rows,
                                sums,
                            });
                        }
                    }
                }
            }
        });
    }

    /// Tiles of some columns for a part of the depth, which begins with step `first`: where they are kept, or
    /// split to `memory`.
    ///
    /// # Safety
    /// The panels have those columns; behind `memory` is room for their tiles, if they are to be split.
    unsafe fn right(
        &self,
        columns: &[Columns],
        first: usize,
        depth: &[Depth],
        memory: *mut u32,
    ) -> Tiles {
        let values = self.packed.pointer();
        if let Some(run) = self.packed.split {
            let place = values.wrapping_add(columns[0].offset + first * TILE);
            return Tiles {
                count: columns.len(),
                first: place.cast(),
                apart: super::split_len(self.packed.depth, run),
            };
        }
        let apart = depth.len() / 2 * TILE;
        for (tile, of) in columns.iter().enumerate() {
            let from = values.wrapping_add(of.offset);
            // SAFETY: as the caller promises.
            unsafe { split_columns(from, of.apart, depth, memory.add(tile * apart)) };
        }
        Tiles {
            count: columns.len(),
            first: memory,
            apart,
        }
    }

    /// What one of the blocks before the columns `next` asks for: its share of what lies there.
    fn soon(
        &self,
        next: &Columns,
        first: usize,
        depth: &[Depth],
        [block, blocks]: [usize; 2],
    ) -> Soon {
        // Values of a step, of both columns.
        let (start, step) = match self.packed.split {
            Some(_) => (next.offset + first * TILE, 2 * TILE),
            None => {
                let start = next.offset + depth[0].right * next.apart;
                (start, 2 * SIDE * next.apart)
            }
        };
        let lines = (step / SIDE).div_ceil(blocks);
        let start = start + block * depth.len() / 2 * lines * SIDE;
        Soon {
            at: self.packed.pointer().wrapping_add(start),
            lines,
        }
    }

    /// Asks for what a block's end adds and overwrites.
    fn prefetch_ends(&self, rows: Range<usize>, columns: &[Columns]) {
        let (start, count) = (columns[0].start, columns.len() * SIDE);
        for output in &self.rows.outputs[rows.clone()] {
            prefetch(output.wrapping_add(start), count);
        }
        if !self.rows.residuals.is_empty() {
            for residual in &self.rows.residuals[rows] {
                prefetch(residual.wrapping_add(start), count);
            }
        }
    }
}

/// Splits some of the depth of sixteen columns, whose rows lie `apart` values from each other.
///
/// # Safety
/// Behind `from` lie all rows, behind `to` as many steps of a tile, for the caller alone.
#[target_feature(enable = "avx512f")]
unsafe fn split_columns(from: *const f32, apart: usize, depth: &[Depth], to: *mut u32) {
    for (step, [first, second]) in depth.as_chunks::<2>().0.iter().enumerate() {
        for row in 0..SIDE {
            let value = |of: &Depth| {
                if row >= of.count {
                    return _mm512_setzero_ps();
                }
                // SAFETY: a row of the columns.
                unsafe { _mm512_loadu_ps(from.add((of.right + row) * apart)) }
            };
            // SAFETY: as the caller promises.
            unsafe {
                split(
                    value(first),
                    value(second),
                    to.add(step * TILE + row * SIDE),
                )
            };
        }
    }
}

/// Splits some of the depth of a row, to a row of a tile.
///
/// # Safety
/// Behind `from` lie the values of that depth, behind `to` as many steps of the row, for the caller alone.
#[target_feature(enable = "avx512f")]
unsafe fn split_row(from: *const f32, depth: &[Depth], to: *mut u32) {
    for (step, pair) in depth.as_chunks::<2>().0.iter().enumerate() {
        let [first, second] = pair.each_ref().map(|of| {
            let from = from.wrapping_add(of.left);
            // SAFETY: values of the row; what is masked is not read.
            unsafe {
                if of.count == SIDE {
                    return _mm512_loadu_ps(from);
                }
                _mm512_maskz_loadu_ps(((1_u32 << of.count) - 1) as u16, from)
            }
        });
        // SAFETY: as the caller promises.
        unsafe { split(first, second, to.add(step * TILE)) };
    }
}

/// Bias, residual, activation and the store of a block of sums.
struct Finish<'a> {
    product: &'a Product<'a>,
    columns: &'a [Columns],
    rows: Range<usize>,
    /// Rows of the upper tiles; those of the lower begin at [`SIDE`].
    tile_rows: usize,
    sums: *const f32,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        assert_eq!(S::F32_LANES, SIDE);
        let Self { product, sums, .. } = self;
        let mut buffer = [0.0; SIDE];
        for (tile, columns) in self.columns.iter().enumerate() {
            let whole = columns.count == SIDE;
            let mut bias = simd.splat_f32s(0.0);
            if !product.epilogue.bias.is_empty() {
                let values = &product.epilogue.bias[columns.start..][..columns.count];
                buffer[..columns.count].copy_from_slice(values);
                // SAFETY: the buffer has so many values.
                bias = unsafe { load::<S>(buffer.as_ptr()) };
            }
            for (index, row) in self.rows.clone().enumerate() {
                let place = match index.checked_sub(self.tile_rows) {
                    Some(below) => SIDE + below,
                    None => index,
                };
                // SAFETY: the block has that row of sums; the rest is the contract of `gemm`.
                unsafe {
                    let sum = load::<S>(sums.add(place * SUMS_WIDTH + tile * SIDE));
                    let mut value = simd.add_f32s(sum, bias);
                    if let Some(&residual) = product.rows.residuals.get(row) {
                        let residual = residual.add(columns.start);
                        let other = if whole {
                            load::<S>(residual)
                        } else {
                            residual.copy_to_nonoverlapping(buffer.as_mut_ptr(), columns.count);
                            load::<S>(buffer.as_ptr())
                        };
                        value = simd.add_f32s(value, other);
                    }
                    if let Some(activation) = product.epilogue.activation {
                        value = elementwise::activate_vector(simd, activation, value);
                    }
                    let output = (*product.rows.outputs.as_ptr().add(row)).add(columns.start);
                    if whole {
                        store::<S>(output, value);
                    } else {
                        store::<S>(buffer.as_mut_ptr(), value);
                        buffer
                            .as_ptr()
                            .copy_to_nonoverlapping(output, columns.count);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::{Epilogue, Rows, gemm};
    use super::*;
    use crate::kernels::Isa;
    use crate::kernels::memory::Slab;

    /// The product of `left`, `[rows, depth]`.
    fn product(packed: &Packed, left: &[f32], rows: usize) -> Vec<f32> {
        let columns = packed.columns();
        let mut out = vec![f32::NAN; rows * columns];
        let mut of = Rows::new();
        let depth = packed.depth();
        for (left, out) in left.chunks_exact(depth).zip(out.chunks_exact_mut(columns)) {
            of.push(left.as_ptr(), out.as_mut_ptr(), None);
        }
        let nothing = Epilogue {
            bias: &[],
            activation: None,
        };
        // SAFETY: rows of so many values.
        unsafe { gemm(packed, 0..packed.panel_count(), &of, &[0], nothing) };
        out
    }

    /// Normal values of many magnitudes.
    fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
        let value = |_| rng.random_range(-1.0_f32..1.0) * 2.0_f32.powi(rng.random_range(-6..3));
        (0..count).map(value).collect()
    }

    #[test]
    fn sums_of_three_parts_are_as_exact_as_those_of_vectors() {
        let unit = Isa::detect().with_matrix_unit();
        if !unit.has_matrix_unit() {
            return; // no AVX-512
        }
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for _ in 0..40 {
            let [rows, columns] = [0; 2].map(|_| rng.random_range(1..70));
            let depth = rng.random_range(30..3000);
            let left = random(&mut rng, rows * depth);
            let right = random(&mut rng, depth * columns);
            let error = |isa: Isa| -> f64 {
                let packed = Packed::new(isa, depth, columns, |row, c| right[row * columns + c]);
                let product = product(&packed, &left, rows);
                let errors = product.iter().enumerate().map(|(i, &value)| {
                    let (row, column) = (i / columns, i % columns);
                    let terms = left[row * depth..][..depth].iter().enumerate();
                    let exact: f64 = terms
                        .map(|(d, &l)| f64::from(l) * f64::from(right[d * columns + column]))
                        .sum();
                    (f64::from(value) - exact).powi(2)
                });
                errors.sum::<f64>().sqrt()
            };
            let errors = [unit, unit.vectors_only()].map(error);
            assert!(errors[0] <= errors[1], "depth {depth}: {errors:?}");
        }
    }

    #[test]
    fn values_that_are_split_early_give_the_same_bits() {
        let isa = Isa::detect().with_matrix_unit();
        if !isa.has_matrix_unit() {
            return; // no AVX-512
        }
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let slab = Slab::default();
        for case in 0..60 {
            let [rows, columns, depth] = [90, 120, 900].map(|most| rng.random_range(1..most));
            let left = random(&mut rng, rows * depth);
            // `[columns, depth]`
            let matrix = random(&mut rng, columns * depth);
            let turned: Vec<f32> = (0..depth * columns)
                .map(|i| matrix[i % columns * depth + i / columns])
                .collect();
            let late = Packed::new(isa, depth, columns, |row, c| matrix[c * depth + row]);
            let expected = product(&late, &left, rows);

            let stored = Packed::unfilled(isa, [1, depth], columns);
            stored.store(&slab, &matrix, [depth, 1], &vec![1.0; columns]);
            assert!(product(&stored, &left, rows) == expected, "case {case}");

            let lent = Packed::borrowing_runs(isa, [1, depth], columns);
            for way in 0..3 {
                let mut values = vec![f32::NAN; lent.values_len()];
                lent.lend(values.as_mut_ptr());
                // SAFETY: memory of so many values.
                unsafe {
                    match way {
                        0 => lent.set_lent_matrix(0..lent.panel_count(), &matrix, true),
                        1 => lent.set_lent_matrix(0..lent.panel_count(), &turned, false),
                        _ => {
                            for panel in 0..lent.panel_count() {
                                let (mut whole, mut places) = (Vec::new(), Vec::new());
                                let of = lent.lent_rows(panel, &mut whole, &mut places);
                                for (row, &place) in places.iter().enumerate() {
                                    let from = turned[row * columns..][of.clone()].as_ptr();
                                    place.copy_from_nonoverlapping(from, of.len());
                                }
                                lent.set_lent_panel(panel, &whole);
                            }
                        }
                    }
                }
                assert!(
                    product(&lent, &left, rows) == expected,
                    "case {case}, {way}"
                );
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn nothing_is_touched_behind_rows_outputs_and_tiles() {
        use crate::kernels::amx::guarded::Guarded;

        let isa = Isa::detect().with_matrix_unit();
        if !isa.has_matrix_unit() {
            return; // no AVX-512
        }
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for case in 0..100 {
            let [rows, columns, depth] = [80, 100, 500].map(|most| rng.random_range(1..most));
            let matrix = random(&mut rng, columns * depth);
            let lent = Packed::borrowing_runs(isa, [1, depth], columns);
            let tiles = Guarded::new(&vec![f32::NAN; lent.values_len()]);
            lent.lend(tiles.pointer());
            let mut weights = Guarded::new(&matrix);
            for transposed in [false, true] {
                let panels = 0..lent.panel_count();
                // SAFETY: memory of so many values.
                unsafe { lent.set_lent_matrix(panels, weights.values(), transposed) };
            }
            let left = random(&mut rng, rows * depth);
            let expected = product(&lent, &left, rows);
            let left = Guarded::new(&left);
            let residual = Guarded::new(&vec![0.0; rows * columns]);
            let mut out = Guarded::new(&vec![f32::NAN; rows * columns]);
            let mut of = Rows::new();
            for row in 0..rows {
                let at = row * columns;
                let residual = residual.pointer().wrapping_add(at).cast_const();
                let left = left.pointer().wrapping_add(row * depth);
                of.push(left, out.pointer().wrapping_add(at), Some(residual));
            }
            let mut bias = Guarded::new(&vec![0.0; columns]);
            let nothing = Epilogue {
                bias: bias.values(),
                activation: None,
            };
            // SAFETY: rows of so many values.
            unsafe { gemm(&lent, 0..lent.panel_count(), &of, &[0], nothing) };
            assert!(out.values() == expected, "case {case}");
        }
    }
}
