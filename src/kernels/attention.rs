//! Multi-head self-attention, between its projections.

use super::Isa;
use super::elementwise::exp;
use super::gemm::{Epilogue, Packed, Rows, gemm};

/// Scratch of one head.
#[derive(Default)]
pub struct Scratch {
    scores: Vec<f32>,
    rows: Rows,
}

// SAFETY: the pointers in `rows` are set anew at each use.
unsafe impl Send for Scratch {}

/// One head of one image: softmax(q·kᵀ / √width)·v.
///
/// `qkv` is `[T, 3·dim]`, each row query, key and value one after the other; the head's columns
/// of each are `head·width..`. The result goes to the same columns of `out`, `[T, dim]`.
///
/// # Safety
/// `out` has those values, and nobody else touches them.
pub unsafe fn head(
    isa: Isa,
    qkv: &[f32],
    (tokens, dim, heads): (usize, usize, usize),
    head: usize,
    scratch: &mut Scratch,
    out: *mut f32,
) {
    let width = dim / heads;
    let at = |token: usize, part: usize| token * 3 * dim + part * dim + head * width;
    assert!(qkv.len() >= tokens * 3 * dim);
    let Scratch { scores, rows } = scratch;
    scores.resize(tokens * tokens, 0.0);
    let nothing = Epilogue {
        bias: &[],
        activation: None,
    };
    let scale = 1.0 / (width as f32).sqrt();
    let keys = Packed::of_columns(isa, width, tokens, scale, |token| &qkv[at(token, 1)..]);
    let values = Packed::of_rows(isa, tokens, width, |token| &qkv[at(token, 2)..]);
    // SAFETY: rows of `qkv` and of `scores`, which are long enough; columns of `out`, as the
    // caller promises.
    unsafe {
        *rows = Rows::new();
        for token in 0..tokens {
            let query = qkv.as_ptr().add(at(token, 0));
            rows.push(query, scores.as_mut_ptr().add(token * tokens), None);
        }
        gemm(&keys, 0..keys.panel_count(), rows, &[0], nothing);
        isa.compiled(
            #[inline(always)]
            || {
                for row in scores.chunks_exact_mut(tokens) {
                    softmax(row);
                }
            },
        );
        *rows = Rows::new();
        for token in 0..tokens {
            let weights = scores.as_ptr().add(token * tokens);
            rows.push(weights, out.add(token * dim + head * width), None);
        }
        gemm(&values, 0..values.panel_count(), rows, &[0], nothing);
    }
}

/// Softmax of one row in place.
#[inline(always)]
pub(super) fn softmax(row: &mut [f32]) {
    const LANES: usize = 16;
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let mut sums = [0.0; LANES];
    let larger = |a: f32, b: f32| if a >= b { a } else { b };
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks.iter() {
        for (max, &value) in maxima.iter_mut().zip(chunk) {
            *max = larger(*max, value);
        }
    }
    let max = maxima
        .into_iter()
        .chain(rest.iter().copied())
        .fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (value, sum) in chunk.iter_mut().zip(&mut sums) {
            *value = exp(*value - max);
            *sum += *value;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for value in rest {
        *value = exp(*value - max);
        sum += *value;
    }
    let scale = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= scale);
}
