//! Matrix units in software, so that what is computed on them can be tested where there are none.
//!
//! Sums are added up as the instruction does it (`TDPBF16PS` in Intel's Software Developer's Manual): in each
//! step of the depth first and second values of the pairs have a chain of fused multiply-adds each, and
//! what both come to is added to the sum. A unit takes subnormal values for zeros, this does not.

use std::arch::x86_64::*;

use super::{PART, SIDE, SUMS_WIDTH, TILE, Tiles};

/// Parts of the left and of the right side that are multiplied, in the order of the kernels.
const ORDER: [[usize; 2]; 6] = [[2, 0], [1, 0], [1, 1], [0, 1], [0, 2], [0, 0]];

/// As [`Unit::multiply`](super::Unit::multiply), for left tiles of so many rows.
///
/// # Safety
/// As there; the machine has AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn multiply(
    rows: usize,
    left: Tiles,
    right: Tiles,
    steps: usize,
    sums: *mut f32,
    add: bool,
) {
    // SAFETY: as the caller promises.
    unsafe {
        for (i, j) in (0..left.count).flat_map(|i| (0..right.count).map(move |j| (i, j))) {
            let left = left.first.add(i * left.apart);
            let right = right.first.add(j * right.apart);
            for row in 0..rows {
                let at = sums.add((i * SIDE + row) * SUMS_WIDTH + j * SIDE);
                let mut sum = match add {
                    true => _mm512_loadu_ps(at),
                    false => _mm512_setzero_ps(),
                };
                for step in 0..steps {
                    for [l, r] in ORDER {
                        let words = left.add(step * TILE + l * PART + row * SIDE);
                        let pairs = right.add(step * TILE + r * PART);
                        sum = _mm512_add_ps(sum, row_by_tile(words, pairs));
                    }
                }
                _mm512_storeu_ps(at, sum);
            }
        }
    }
}

/// A row's words times a part of a tile.
///
/// # Safety
/// Behind the pointers lie those; the machine has AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn row_by_tile(words: *const u32, pairs: *const u32) -> __m512 {
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let mut chains = [_mm512_setzero_ps(); 2];
    for depth in 0..SIDE {
        // SAFETY: as the caller promises.
        let (word, pair) = unsafe {
            (
                _mm512_set1_epi32((*words.add(depth)).cast_signed()),
                _mm512_loadu_si512(pairs.add(depth * SIDE).cast()),
            )
        };
        let first = [word, pair].map(|v| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)));
        let second = [word, pair].map(|v| _mm512_castsi512_ps(_mm512_and_si512(v, high)));
        chains[0] = _mm512_fmadd_ps(first[0], first[1], chains[0]);
        chains[1] = _mm512_fmadd_ps(second[0], second[1], chains[1]);
    }
    _mm512_add_ps(chains[0], chains[1])
}
