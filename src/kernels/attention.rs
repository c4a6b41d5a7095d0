//! Multi-head self-attention, between its projections.

use super::gemm::{Matrix, gemm};

/// One head of one image: softmax(q·kᵀ / √width)·v.
///
/// `qkv` is `[T, 3·dim]`, each row query, key and value one after the other; the head's columns
/// of each are `head·width..`. `scores` becomes the weights `[T, T]`, `out` the result
/// `[T, width]`.
pub fn head(
    qkv: &[f32],
    (tokens, dim, heads): (usize, usize, usize),
    head: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let width = dim / heads;
    let part = |index: usize| {
        let start = index * dim + head * width;
        Matrix::new(&qkv[start..], tokens, width, 3 * dim)
    };
    scores.resize(tokens * tokens, 0.0);
    let scale = 1.0 / (width as f32).sqrt();
    gemm(scores, tokens, scale, part(0), part(1).transposed());
    scores.chunks_exact_mut(tokens).for_each(softmax);
    let weights = Matrix::new(scores, tokens, tokens, tokens);
    gemm(out, width, 1.0, weights, part(2));
}

/// Softmax of one row in place.
pub fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for value in row.iter_mut() {
        *value = (*value - max).exp();
        sum += *value;
    }
    row.iter_mut().for_each(|v| *v /= sum);
}
