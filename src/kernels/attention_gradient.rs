//! The gradient of multi-head self-attention, between its projections.

use super::Isa;
use super::attention::softmax;
use super::gemm::{Epilogue, Packed, Rows, gemm};
use super::transposed::{PANEL, Panels, pack_row, padded, product};

/// Scratch of one head.
#[derive(Default)]
pub struct Scratch {
    weights: Vec<f32>,
    gradients: Vec<f32>,
    left: Vec<f32>,
    right: Vec<f32>,
    sums: Vec<f32>,
    rows: Rows,
}

// SAFETY: the pointers in `rows` are set anew at each use.
unsafe impl Send for Scratch {}

/// The gradient of one head of one image for its queries, keys and values.
///
/// `qkv` is `[T, 3·dim]` as [`super::attention::head`] reads it, `gradient` `[T, dim]` that of its
/// output; the result goes to the head's columns of `out`, `[T, 3·dim]`. The weights are computed
/// again rather than kept.
///
/// # Safety
/// `out` has those values, and nobody else touches them.
pub unsafe fn head(
    isa: Isa,
    qkv: &[f32],
    gradient: &[f32],
    (tokens, dim, heads): (usize, usize, usize),
    head: usize,
    scratch: &mut Scratch,
    out: *mut f32,
) {
    let width = dim / heads;
    let at = |token: usize, part: usize| token * 3 * dim + part * dim + head * width;
    assert!(qkv.len() >= tokens * 3 * dim && gradient.len() >= tokens * dim);
    let scale = 1.0 / (width as f32).sqrt();
    let Scratch {
        weights,
        gradients,
        left,
        right,
        sums,
        rows,
    } = scratch;
    weights.resize(tokens * tokens, 0.0);
    gradients.resize(tokens * tokens, 0.0);
    left.resize(padded(tokens) * tokens, 0.0);
    right.resize(padded(width) * tokens, 0.0);
    sums.resize(padded(width) * tokens, 0.0);
    let nothing = Epilogue {
        bias: &[],
        activation: None,
    };
    let stride = tokens * PANEL;
    // Σ over rows of `a[row][t] · b(row)`, added into columns of a part of `out`.
    let mut transposed_product = |a: &[f32], b: &dyn Fn(usize) -> *const f32, part: usize| {
        for row in 0..tokens {
            // SAFETY: rows of the panels; `b` gives rows of `width` values.
            unsafe {
                pack_row(&a[row * tokens..][..tokens], left.as_mut_ptr(), stride, row);
                let b = std::slice::from_raw_parts(b(row), width);
                pack_row(b, right.as_mut_ptr(), stride, row);
            }
        }
        let panels = |values: &[f32]| Panels {
            pointer: values.as_ptr(),
            stride,
        };
        let leading = padded(width);
        // SAFETY: panels and sums of these sizes; columns of `out` as the caller promises.
        unsafe {
            let (a, b) = (panels(left), panels(right));
            let (k, n) = (0..tokens, 0..width);
            product(isa, a, b, tokens, k, n, sums.as_mut_ptr(), leading, false);
            for token in 0..tokens {
                let from = sums.as_ptr().add(token * leading);
                std::ptr::copy_nonoverlapping(from, out.add(at(token, part)), width);
            }
        }
    };
    // SAFETY: rows of `qkv`, `gradient` and the scratch, which are long enough.
    unsafe {
        let keys = Packed::of_columns(isa, width, tokens, scale, |token| &qkv[at(token, 1)..]);
        rows.clear();
        for token in 0..tokens {
            let query = qkv.as_ptr().add(at(token, 0));
            rows.push(query, weights.as_mut_ptr().add(token * tokens), None);
        }
        gemm(&keys, 0..keys.panel_count(), rows, &[0], nothing);
        isa.compiled(
            #[inline(always)]
            || {
                for row in weights.chunks_exact_mut(tokens) {
                    softmax(row);
                }
            },
        );
        let of_head = |token: usize| gradient.as_ptr().add(token * dim + head * width);
        transposed_product(weights, &of_head, 2);
        // The gradient of the weights, then of the scores.
        let values = Packed::of_columns(isa, width, tokens, 1.0, |token| &qkv[at(token, 2)..]);
        rows.clear();
        for token in 0..tokens {
            let to = gradients.as_mut_ptr().add(token * tokens);
            rows.push(of_head(token), to, None);
        }
        gemm(&values, 0..values.panel_count(), rows, &[0], nothing);
        isa.compiled(
            #[inline(always)]
            || {
                let pairs = gradients.chunks_exact_mut(tokens);
                for (gradients, weights) in pairs.zip(weights.chunks_exact(tokens)) {
                    let mean = dot(gradients, weights);
                    for (g, &w) in gradients.iter_mut().zip(weights) {
                        *g = w * (*g - mean) * scale;
                    }
                }
            },
        );
        let query = |token: usize| qkv.as_ptr().add(at(token, 0));
        transposed_product(gradients, &query, 1);
        let keys = Packed::of_rows(isa, tokens, width, |token| &qkv[at(token, 1)..]);
        rows.clear();
        for token in 0..tokens {
            let from = gradients.as_ptr().add(token * tokens);
            rows.push(from, out.add(at(token, 0)), None);
        }
        gemm(&keys, 0..keys.panel_count(), rows, &[0], nothing);
    }
}

/// Σ a·b, in as many chains as fill vectors.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0_f32; LANES];
    let ((a, rest_of_a), (b, rest_of_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest = rest_of_a.iter().zip(rest_of_b).map(|(a, b)| a * b);
    sums.into_iter().chain(rest).sum()
}
