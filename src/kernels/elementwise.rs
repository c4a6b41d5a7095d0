//! Activations, sums and products.

use crate::graph::Activation;

/// Applies the activation in place.
pub fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Relu => values.iter_mut().for_each(|v| *v = v.max(0.0)),
        Activation::Relu6 => values.iter_mut().for_each(|v| *v = v.clamp(0.0, 6.0)),
        Activation::HardSigmoid => values
            .iter_mut()
            .for_each(|v| *v = (*v + 3.0).clamp(0.0, 6.0) / 6.0),
        Activation::HardSwish => values
            .iter_mut()
            .for_each(|v| *v = *v * (*v + 3.0).clamp(0.0, 6.0) / 6.0),
        Activation::Gelu => values.iter_mut().for_each(|v| {
            *v = 0.5 * *v * (1.0 + libm::erff(*v * std::f32::consts::FRAC_1_SQRT_2));
        }),
    }
}

/// What follows a convolution or linear layer on each of its output pixels: bias, residual,
/// activation, in this order.
pub fn epilogue(
    out: &mut [f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    activation: Option<Activation>,
) {
    for pixel in out.chunks_exact_mut(bias.len()) {
        add(pixel, bias);
    }
    if let Some(residual) = residual {
        add(out, residual);
    }
    if let Some(activation) = activation {
        activate(activation, out);
    }
}

/// `values += other`.
pub fn add(values: &mut [f32], other: &[f32]) {
    for (value, other) in values.iter_mut().zip(other) {
        *value += other;
    }
}

/// `values *= other`.
pub fn multiply(values: &mut [f32], other: &[f32]) {
    for (value, other) in values.iter_mut().zip(other) {
        *value *= other;
    }
}

/// `out = input · scale + shift` on every pixel.
pub fn scale_shift(input: &[f32], scale: &[f32], shift: &[f32], out: &mut [f32]) {
    let pixels = input.chunks_exact(scale.len());
    for (out, input) in out.chunks_exact_mut(scale.len()).zip(pixels) {
        for (((out, value), scale), shift) in out.iter_mut().zip(input).zip(scale).zip(shift) {
            *out = value * scale + shift;
        }
    }
}

/// On every pixel of `channels` values, `[g, C/g]` becomes `[C/g, g]`.
pub fn channel_shuffle(input: &[f32], channels: usize, groups: usize, out: &mut [f32]) {
    let per_group = channels / groups;
    for (input, out) in input
        .chunks_exact(channels)
        .zip(out.chunks_exact_mut(channels))
    {
        for (i, out) in out.iter_mut().enumerate() {
            *out = input[i % groups * per_group + i / groups];
        }
    }
}

/// On every pixel, copies `length` values at `from` to `to`.
pub fn copy_channels(
    input: &[f32],
    (in_channels, from): (usize, usize),
    out: &mut [f32],
    (out_channels, to): (usize, usize),
    length: usize,
) {
    let pixels = input.chunks_exact(in_channels);
    for (out, input) in out.chunks_exact_mut(out_channels).zip(pixels) {
        out[to..to + length].copy_from_slice(&input[from..from + length]);
    }
}
