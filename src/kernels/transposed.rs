//! Products with a transposed left side, `out[k][n] = Σ_m a[m][k] · z[m][n]`: the gradient of a
//! layer's weights, where m runs over pixels, k over what a window holds and n over outputs.
//!
//! Both sides are packed into panels of sixteen columns, all rows of a panel one after the other:
//! however far apart the rows were in memory, the product walks through both panels line by line.
//! A tile of six by sixteen outputs (eight by forty-eight, with vectors of sixteen) stays in registers
//! while the rows of a chunk pass; chunks are such that a panel of the right side, or three, stay in the
//! first-level cache. Each output is a sum over
//! chunks of chains of fused multiply-adds, in the order of the rows. On a matrix unit, where it is worth
//! feeding, the same panels become other tiles: `transposed/amx.rs`.

#[cfg(target_arch = "x86_64")]
mod amx;

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::isa::{Isa, load, prefetch, prefetch_far, store};

/// Columns of a panel.
pub const PANEL: usize = 16;

/// Rows of a chunk: a panel of so many is 12 kB.
const CHUNK: usize = 192;

/// Rows that are asked for before they are written.
const ROWS_AHEAD: usize = 6;

/// Columns when padded to whole panels.
pub const fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PANEL)
}

/// Panels of a matrix with so many columns and rows: panel by panel, `stride` values apart.
#[derive(Clone, Copy)]
pub struct Panels {
    pub pointer: *const f32,
    pub stride: usize,
}

// SAFETY: an address; who follows it promises what the functions' contracts say.
unsafe impl Send for Panels {}
unsafe impl Sync for Panels {}

/// Writes a row of a matrix into its panels; the last panel is filled up with zeros.
///
/// # Safety
/// Behind `to` lie as many panels as the row needs, `stride` values apart, each with that row, and
/// nobody else touches it.
#[inline(always)]
pub unsafe fn pack_row(values: &[f32], to: *mut f32, stride: usize, row: usize) {
    // SAFETY: places of the panels, as the caller promises.
    unsafe {
        let mut to = to.add(row * PANEL);
        let (whole, rest) = values.as_chunks::<PANEL>();
        for chunk in whole {
            // Panels lie far apart, and their lines are not in a cache: those of the rows that follow.
            prefetch(to.wrapping_add(ROWS_AHEAD * PANEL), 1);
            to.cast::<[f32; PANEL]>().write_unaligned(*chunk);
            to = to.add(stride);
        }
        if !rest.is_empty() {
            let mut last = [0.0; PANEL];
            last[..rest.len()].copy_from_slice(rest);
            to.cast::<[f32; PANEL]>().write_unaligned(last);
        }
    }
}

/// The product over `rows` rows for the outputs `k` x `n`, written to `out` or added to it. `out`
/// is `[k, leading]` and whole panels of it are written, so that `leading` is a multiple of
/// [`PANEL`]; `n` begins at one.
///
/// # Safety
/// The panels hold those columns and rows, and `out` those rows of outputs, for the caller alone.
#[allow(clippy::too_many_arguments)] // two matrices, a part of a third
pub unsafe fn product(
    isa: Isa,
    a: Panels,
    z: Panels,
    rows: usize,
    k: Range<usize>,
    n: Range<usize>,
    out: *mut f32,
    leading: usize,
    add: bool,
) {
    debug_assert!(n.start.is_multiple_of(PANEL) && leading.is_multiple_of(PANEL));
    let product = Product {
        a,
        z,
        rows,
        k,
        n,
        out,
        leading,
        add,
    };
    #[cfg(target_arch = "x86_64")]
    if isa.has_matrix_unit() && product.suits_matrix_unit() {
        // SAFETY: as the caller promises.
        return unsafe { product.on_matrix_unit() };
    }
    isa.dispatch(product);
}

struct Product {
    a: Panels,
    z: Panels,
    rows: usize,
    k: Range<usize>,
    n: Range<usize>,
    out: *mut f32,
    leading: usize,
    add: bool,
}

impl WithSimd for Product {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Even chunks: a short last one would cost as much as a whole one.
        let chunks = self.rows.div_ceil(CHUNK).max(1);
        let mut start = self.n.start;
        while start < self.n.end {
            // Columns that are computed together: three panels, where vectors fill one. A single one behind
            // three would be all loads.
            let panels = match (S::F32_LANES, (self.n.end - start).div_ceil(PANEL)) {
                (PANEL, 4) => 2,
                (PANEL, left) => left.min(3),
                _ => 1,
            };
            let columns = (self.n.end - start).min(PANEL);
            // Chunk by chunk, so that what they are added to stays in the cache.
            for chunk in 0..chunks {
                let rows = chunk * self.rows / chunks..(chunk + 1) * self.rows / chunks;
                let part = self.part(rows, chunk > 0);
                // SAFETY: the contract of `product`; as many vectors as a panel has, or fewer, or as
                // many panels as there are.
                unsafe {
                    match (S::F32_LANES, columns.div_ceil(S::F32_LANES)) {
                        (16, _) if panels == 3 => part.panel::<S, 3>(simd, start),
                        (16, _) if panels == 2 => part.panel::<S, 2>(simd, start),
                        (16, _) | (8, 1) | (4, 1) => part.panel::<S, 1>(simd, start),
                        (8, _) | (4, 2) => part.panel::<S, 2>(simd, start),
                        (4, 3) => part.panel::<S, 3>(simd, start),
                        (4, _) => part.panel::<S, 4>(simd, start),
                        (lanes, _) => {
                            assert_eq!(lanes, 1, "vectors of one, four, eight or sixteen values");
                            part.panel::<S, PANEL>(simd, start);
                        }
                    }
                }
            }
            start += panels * PANEL;
        }
    }
}

impl Product {
    /// The product of some of the rows.
    fn part(&self, rows: Range<usize>, add: bool) -> Self {
        let from = |panels: Panels| Panels {
            pointer: panels.pointer.wrapping_add(rows.start * PANEL),
            ..panels
        };
        Self {
            a: from(self.a),
            z: from(self.z),
            rows: rows.len(),
            k: self.k.clone(),
            n: self.n.clone(),
            add: self.add || add,
            ..*self
        }
    }

    #[inline(always)]
    unsafe fn panel<S: Simd, const NV: usize>(&self, simd: S, n: usize) {
        let mut k = self.k.start;
        // SAFETY: the contract of `product`; a tile's rows lie in one panel.
        unsafe {
            while k < self.k.end {
                let left = (self.k.end - k).min(PANEL - k % PANEL);
                k += match left {
                    // Two tiles for the sixteen columns of a panel, where registers allow it.
                    8.. if S::F32_LANES == PANEL => self.tile::<S, 8, NV>(simd, k, n),
                    6.. if NV < 3 => self.tile::<S, 6, NV>(simd, k, n),
                    4.. => self.tile::<S, 4, NV>(simd, k, n),
                    2.. => self.tile::<S, 2, NV>(simd, k, n),
                    _ => self.tile::<S, 1, NV>(simd, k, n),
                };
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(
        &self,
        simd: S,
        k: usize,
        n: usize,
    ) -> usize {
        let lanes = S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); NV]; MR];
        // SAFETY: the contract of `product`.
        unsafe {
            if self.add {
                for r in 0..MR {
                    let out = self.out.add((k + r) * self.leading + n);
                    prefetch(out, NV * lanes);
                }
            }
            // The next panel of the left side, half of it in each of the two tiles of this one: it lies in
            // a cache that is far, and a processor does not look ahead from a panel to the next.
            let half = k % PANEL / 8 * (self.rows / 2) * PANEL;
            let next = (k / PANEL + 1) * self.a.stride + half;
            let mut next = self.a.pointer.wrapping_add(next);
            let mut a = self.a.pointer.add(k / PANEL * self.a.stride + k % PANEL);
            let mut z = self.z.pointer.add(n / PANEL * self.z.stride);
            for _ in 0..self.rows {
                let mut columns = [simd.splat_f32s(0.0); NV];
                for (v, column) in columns.iter_mut().enumerate() {
                    let (panel, column_there) = (v * lanes / PANEL, v * lanes % PANEL);
                    *column = load::<S>(z.add(panel * self.z.stride + column_there));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let value = simd.splat_f32s(*a.add(r));
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = simd.mul_add_e_f32s(value, column, *sum);
                    }
                }
                if lanes == PANEL {
                    prefetch_far(next);
                    next = next.wrapping_add(PANEL / 2);
                }
                a = a.add(PANEL);
                z = z.add(PANEL);
            }
            for (r, sums) in sums.into_iter().enumerate() {
                let out = self.out.add((k + r) * self.leading + n);
                for (v, mut sum) in sums.into_iter().enumerate() {
                    let out = out.add(v * lanes);
                    if self.add {
                        sum = simd.add_f32s(load::<S>(out), sum);
                    }
                    store::<S>(out, sum);
                }
            }
        }
        MR
    }
}
