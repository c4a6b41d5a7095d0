//! Layer normalisation.

use super::Isa;

const LANES: usize = 16;

/// Normalises each row of `weight.len()` values to mean 0 and variance 1, then scales and shifts.
pub fn layer_norm(
    isa: Isa,
    input: &[f32],
    weight: &[f32],
    bias: &[f32],
    eps: f64,
    out: &mut [f32],
) {
    let dim = weight.len();
    isa.compiled(
        #[inline(always)]
        || {
            for (input, out) in input.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
                let mean = sum(input, |v| v) / dim as f32;
                let variance = sum(input, |v| (v - mean) * (v - mean)) / dim as f32;
                let scale = (1.0 / (f64::from(variance) + eps).sqrt()) as f32;
                for (((out, value), weight), bias) in
                    out.iter_mut().zip(input).zip(weight).zip(bias)
                {
                    *out = (value - mean) * scale * weight + bias;
                }
            }
        },
    );
}

/// The gradient of [`layer_norm`] for its input, from that of its output, `gradient`; those of
/// weight and bias go to `sums`, one after the other.
pub fn layer_norm_gradient(
    isa: Isa,
    input: &[f32],
    gradient: &[f32],
    weight: &[f32],
    eps: f64,
    out: &mut [f32],
    sums: &mut [f32],
) {
    let dim = weight.len();
    let (weight_sum, bias_sum) = sums.split_at_mut(dim);
    weight_sum.fill(0.0);
    bias_sum.fill(0.0);
    isa.compiled(
        #[inline(always)]
        || {
            let rows = input.chunks_exact(dim).zip(gradient.chunks_exact(dim));
            for (out, (input, gradient)) in out.chunks_exact_mut(dim).zip(rows) {
                let mean = sum(input, |v| v) / dim as f32;
                let variance = sum(input, |v| (v - mean) * (v - mean)) / dim as f32;
                let scale = (1.0 / (f64::from(variance) + eps).sqrt()) as f32;
                // `out` holds the gradient of the normalised values for a while.
                let values = input.iter().zip(gradient).zip(weight);
                let sums = weight_sum.iter_mut().zip(bias_sum.iter_mut());
                for ((out, ((x, g), w)), (dw, db)) in out.iter_mut().zip(values).zip(sums) {
                    *dw += g * ((x - mean) * scale);
                    *db += g;
                    *out = g * w;
                }
                let first = sum(out, |v| v) / dim as f32;
                let second = sum_of_pairs(out, input, |g, x| g * ((x - mean) * scale));
                let second = second / dim as f32;
                for (out, x) in out.iter_mut().zip(input) {
                    *out = scale * (*out - first - (x - mean) * scale * second);
                }
            }
        },
    );
}

/// Sum of a function of the values, in lanes: faster and more exact than one running sum.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    let rest: f32 = rest.iter().map(|&v| f(v)).sum();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// As [`sum`], of a function of two rows' values.
#[inline(always)]
fn sum_of_pairs(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, rest_of_a), (b, rest_of_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let rest: f32 = rest_of_a
        .iter()
        .zip(rest_of_b)
        .map(|(&a, &b)| f(a, b))
        .sum();
    for (a, b) in a.iter().zip(b) {
        for (lane, (&a, &b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f(a, b);
        }
    }
    lanes.into_iter().sum::<f32>() + rest
}
