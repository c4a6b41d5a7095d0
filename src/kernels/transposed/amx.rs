//! [`product`](super::product) on matrix units, see [`crate::kernels::amx`].
//!
//! Of a chunk of rows the left side is split for some columns at once, turned on the way; then two panels of the
//! right side at a time. Each chunk has sums of its own, which are added up.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{PANEL, Panels, Product};
use crate::kernels::amx::{
    SIDE, SUMS, SUMS_WIDTH, Soon, TILE, Tiles, Unit, split, turned, with_memory,
};

/// Rows of a step.
const STEP: usize = 2 * SIDE;
/// Rows of a chunk.
const CHUNK: usize = 16 * STEP;
/// Panels of the left side that are split at once: 768 KiB with so many rows.
const PANELS: usize = 16;

impl Product {
    /// Whether a matrix unit is worth feeding: what is split has to be used often.
    pub(super) fn suits_matrix_unit(&self) -> bool {
        self.rows >= STEP && self.k.len() >= 8 * SIDE && self.n.len() >= 8 * SIDE
    }

    /// The product on this thread's matrix unit.
    ///
    /// # Safety
    /// The contract of [`super::product`], and there is a unit.
    pub(super) unsafe fn on_matrix_unit(&self) {
        assert!(self.k.start.is_multiple_of(PANEL));
        let unit = Unit::new(SIDE);
        let chunks = self.rows.div_ceil(CHUNK);
        let steps = self.rows.div_ceil(chunks).div_ceil(STEP);
        with_memory((PANELS + 2) * steps * TILE + SUMS, |scratch| {
            for start in self.k.clone().step_by(PANELS * PANEL) {
                let k = start..self.k.end.min(start + PANELS * PANEL);
                for chunk in 0..chunks {
                    let rows = chunk * self.rows / chunks..(chunk + 1) * self.rows / chunks;
                    let add = self.add || chunk > 0;
                    // SAFETY: as the caller promises.
                    unsafe { self.chunk(&unit, rows, k.clone(), add, scratch) };
                }
            }
        });
    }

    /// # Safety
    /// As [`Product::on_matrix_unit`]; behind the scratch lies what the chunk needs.
    unsafe fn chunk(
        &self,
        unit: &Unit,
        rows: Range<usize>,
        k: Range<usize>,
        add: bool,
        scratch: *mut f32,
    ) {
        let steps = rows.len().div_ceil(STEP);
        let apart = steps * TILE;
        let (left_panels, right_panels) = (k.len().div_ceil(PANEL), self.n.len().div_ceil(PANEL));
        let panel = |side: Panels, index: usize| {
            let start = index * side.stride + rows.start * PANEL;
            side.pointer.wrapping_add(start)
        };
        // SAFETY: parts of the scratch; the rest is the contract of `product`.
        unsafe {
            let left = scratch.cast::<u32>();
            let right = left.add(left_panels * apart);
            let sums = right.add(2 * apart).cast::<f32>();
            for index in 0..left_panels {
                let from = panel(self.a, k.start / PANEL + index);
                split_turned(from, rows.len(), left.add(index * apart));
            }
            for pair in (0..right_panels).step_by(2) {
                let count = (right_panels - pair).min(2);
                for index in 0..count {
                    let from = panel(self.z, self.n.start / PANEL + pair + index);
                    split_panel(from, rows.len(), right.add(index * apart));
                }
                let blocks = left_panels.div_ceil(2);
                let next = panel(self.z, self.n.start / PANEL + pair + count);
                for block in 0..blocks {
                    let left = Tiles {
                        count: (left_panels - 2 * block).min(2),
                        first: left.add(2 * block * apart),
                        apart,
                    };
                    let right = Tiles {
                        count,
                        first: right,
                        apart,
                    };
                    // One of the two panels that come next; the processor foresees the other.
                    let lines = STEP.div_ceil(blocks);
                    let soon = Soon {
                        at: next.wrapping_add(block * steps * lines * SIDE),
                        lines,
                    };
                    unit.multiply(left, right, steps, sums, false, soon);
                    let first = k.start + 2 * block * PANEL;
                    let out = first..k.end.min(first + left.count * PANEL);
                    self.store(sums, out, self.n.start + pair * PANEL, count, add);
                }
            }
        }
    }

    /// Stores sums in so many panels of the output, or adds them.
    ///
    /// # Safety
    /// The output has them, for the caller alone.
    #[target_feature(enable = "avx512f")]
    unsafe fn store(&self, sums: *const f32, k: Range<usize>, n: usize, panels: usize, add: bool) {
        for (row, k) in k.enumerate() {
            for panel in 0..panels {
                // SAFETY: as the caller promises.
                unsafe {
                    let out = self.out.add(k * self.leading + n + panel * PANEL);
                    let mut sum = _mm512_loadu_ps(sums.add(row * SUMS_WIDTH + panel * SIDE));
                    if add {
                        sum = _mm512_add_ps(_mm512_loadu_ps(out), sum);
                    }
                    _mm512_storeu_ps(out, sum);
                }
            }
        }
    }
}

/// Sixteen rows of a panel from `start` on, zeros behind the last of `rows`.
///
/// # Safety
/// The panel has so many rows.
#[target_feature(enable = "avx512f")]
unsafe fn load_rows(from: *const f32, start: usize, rows: usize) -> [__m512; SIDE] {
    let mut vectors = [_mm512_setzero_ps(); SIDE];
    for (row, vector) in vectors.iter_mut().enumerate() {
        if start + row < rows {
            // SAFETY: a row of the panel.
            *vector = unsafe { _mm512_loadu_ps(from.add((start + row) * PANEL)) };
        }
    }
    vectors
}

/// Splits rows of a panel to steps of a right tile.
///
/// # Safety
/// The panel has so many rows, and behind `to` lie steps for them, for the caller alone.
#[target_feature(enable = "avx512f")]
unsafe fn split_panel(from: *const f32, rows: usize, to: *mut u32) {
    for (step, start) in (0..rows).step_by(STEP).enumerate() {
        // SAFETY: as the caller promises.
        unsafe {
            let first = load_rows(from, start, rows);
            let second = load_rows(from, start + SIDE, rows);
            for row in 0..SIDE {
                split(first[row], second[row], to.add(step * TILE + row * SIDE));
            }
        }
    }
}

/// Splits rows of a panel to steps of a left tile, whose rows are the panel's columns.
///
/// # Safety
/// As [`split_panel`].
#[target_feature(enable = "avx512f")]
unsafe fn split_turned(from: *const f32, rows: usize, to: *mut u32) {
    for (step, start) in (0..rows).step_by(STEP).enumerate() {
        // SAFETY: as the caller promises.
        unsafe {
            let first = turned(load_rows(from, start, rows));
            let second = turned(load_rows(from, start + SIDE, rows));
            for column in 0..SIDE {
                split(
                    first[column],
                    second[column],
                    to.add(step * TILE + column * SIDE),
                );
            }
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::product;
    use super::*;
    use crate::kernels::Isa;
    use crate::kernels::amx::guarded::Guarded;

    #[test]
    fn products_are_those_of_vectors_and_nothing_is_touched_behind_them() {
        let isa = Isa::detect().with_matrix_unit();
        if !isa.has_matrix_unit() {
            return; // no AVX-512
        }
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for case in 0..40 {
            let rows = rng.random_range(STEP..1200);
            let [k, n] = [0; 2].map(|_| rng.random_range(8 * SIDE..24 * SIDE));
            let mut panels = |columns: usize| {
                let count = columns.div_ceil(PANEL) * PANEL * rows;
                let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
                Guarded::new(&values)
            };
            let (a, z) = (panels(k), panels(n));
            let side = |of: &Guarded| Panels {
                pointer: of.pointer(),
                stride: rows * PANEL,
            };
            let leading = n.next_multiple_of(PANEL);
            let results = [isa, isa.vectors_only()].map(|isa| {
                let mut out = Guarded::new(&vec![1.0; k * leading]);
                let (a, z, add) = (side(&a), side(&z), case % 2 == 0);
                let to = out.pointer();
                // SAFETY: panels of so many rows and columns, and an output for them.
                unsafe { product(isa, a, z, rows, 0..k, 0..n, to, leading, add) };
                out.values().to_vec()
            });
            // Each sum is rounded for every product at most.
            let tolerance = rows as f32 * f32::EPSILON;
            for (unit, vectors) in results[0].iter().zip(&results[1]) {
                assert!(
                    (unit - vectors).abs() <= tolerance,
                    "case {case}: {unit}, {vectors}"
                );
            }
        }
    }
}
