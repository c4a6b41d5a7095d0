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
    isa.compiled(|| {
        for (input, out) in input.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
            let mean = sum(input, |v| v) / dim as f32;
            let variance = sum(input, |v| (v - mean) * (v - mean)) / dim as f32;
            let scale = (1.0 / (f64::from(variance) + eps).sqrt()) as f32;
            for (((out, value), weight), bias) in out.iter_mut().zip(input).zip(weight).zip(bias) {
                *out = (value - mean) * scale * weight + bias;
            }
        }
    });
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
