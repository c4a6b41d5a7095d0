//! Activations, sums and products.

use pulp::Simd;

use super::Isa;
use crate::graph::Activation;

/// An activation of a vector.
#[inline(always)]
pub(super) fn activate_vector<S: Simd>(simd: S, activation: Activation, x: S::f32s) -> S::f32s {
    let splat = |value| simd.splat_f32s(value);
    let clamp = |x, low, high| simd.min_f32s(simd.max_f32s(x, splat(low)), splat(high));
    match activation {
        Activation::Relu => simd.max_f32s(x, splat(0.0)),
        Activation::Relu6 => clamp(x, 0.0, 6.0),
        Activation::HardSigmoid => {
            let gate = clamp(simd.add_f32s(x, splat(3.0)), 0.0, 6.0);
            simd.mul_f32s(gate, splat(1.0 / 6.0))
        }
        Activation::HardSwish => {
            let gate = clamp(simd.add_f32s(x, splat(3.0)), 0.0, 6.0);
            simd.mul_f32s(simd.mul_f32s(x, gate), splat(1.0 / 6.0))
        }
        Activation::Gelu => {
            let half = simd.mul_f32s(x, splat(0.5));
            let erf = erf(
                simd,
                simd.mul_f32s(x, splat(std::f32::consts::FRAC_1_SQRT_2)),
            );
            simd.mul_add_e_f32s(half, erf, half)
        }
    }
}

/// The error function, as the rational minimax approximation x·P(x²)/Q(x²) on ±4 that Eigen made
/// common; off by at most a few units in the last place.
#[inline(always)]
fn erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    const P: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const Q: [f32; 5] = [
        -1.456_607_2e-5,
        -2.133_740_6e-4,
        -1.682_827e-3,
        -7.373_329_2e-3,
        -1.426_473_9e-2,
    ];
    let splat = |value| simd.splat_f32s(value);
    let x = simd.min_f32s(simd.max_f32s(x, splat(-4.0)), splat(4.0));
    let square = simd.mul_f32s(x, x);
    let mut p = splat(P[0]);
    for coefficient in &P[1..] {
        p = simd.mul_add_e_f32s(p, square, splat(*coefficient));
    }
    let mut q = splat(Q[0]);
    for coefficient in &Q[1..] {
        q = simd.mul_add_e_f32s(q, square, splat(*coefficient));
    }
    simd.div_f32s(simd.mul_f32s(x, p), q)
}

/// An activation of a value.
#[inline(always)]
pub(super) fn activate_value(activation: Option<Activation>, x: f32) -> f32 {
    match activation {
        None => x,
        Some(activation) => activate_vector(pulp::Scalar, activation, x),
    }
}

/// The derivative of an activation at `x`; at the corners what PyTorch takes.
#[inline(always)]
pub(super) fn derivative(activation: Option<Activation>, x: f32) -> f32 {
    let inside = |low, high, value| if (x > low) & (x < high) { value } else { 0.0 };
    match activation {
        None => 1.0,
        Some(Activation::Relu) => {
            if x > 0.0 {
                1.0
            } else {
                0.0
            }
        }
        Some(Activation::Relu6) => inside(0.0, 6.0, 1.0),
        Some(Activation::HardSigmoid) => inside(-3.0, 3.0, 1.0 / 6.0),
        Some(Activation::HardSwish) => {
            let slope = if x < 3.0 { x * (1.0 / 3.0) + 0.5 } else { 1.0 };
            if x > -3.0 { slope } else { 0.0 }
        }
        Some(Activation::Gelu) => {
            let cumulative = 0.5 * erf(pulp::Scalar, x * std::f32::consts::FRAC_1_SQRT_2) + 0.5;
            // 1 / sqrt(2 pi)
            let density = 0.398_942_3 * exp(-0.5 * x * x);
            x * density + cumulative
        }
    }
}

/// The derivatives of activations at vectors of values; not of GELU, which has no vector of it.
#[inline(always)]
pub(super) fn derivative_vector<S: Simd>(
    simd: S,
    activation: Option<Activation>,
    x: S::f32s,
) -> S::f32s {
    let constant = |value: f32| simd.splat_f32s(value);
    let (zero, one) = (constant(0.0), constant(1.0));
    let above = |low: f32| simd.greater_than_f32s(x, constant(low));
    let below = |high: f32| simd.less_than_f32s(x, constant(high));
    let inside = |low: f32, high: f32, value: f32| {
        let slope = simd.select_f32s(below(high), constant(value), zero);
        simd.select_f32s(above(low), slope, zero)
    };
    match activation {
        None => one,
        Some(Activation::Relu) => simd.select_f32s(above(0.0), one, zero),
        Some(Activation::Relu6) => inside(0.0, 6.0, 1.0),
        Some(Activation::HardSigmoid) => inside(-3.0, 3.0, 1.0 / 6.0),
        Some(Activation::HardSwish) => {
            let slope = simd.add_f32s(simd.mul_f32s(x, constant(1.0 / 3.0)), constant(0.5));
            let slope = simd.select_f32s(below(3.0), slope, one);
            simd.select_f32s(above(-3.0), slope, zero)
        }
        Some(Activation::Gelu) => unreachable!("a derivative that is computed value by value"),
    }
}

/// e^x for x up to 88, without a branch: 2^n·e^r with |r| at most ln 2 / 2, e^r by a polynomial.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding it leaves an integer in the last bits.
    const SHIFT: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > -87.0 { x } else { -87.0 };
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_66,
        0.5,
    ] {
        p = p * r + coefficient;
    }
    let p = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    p * power
}

/// `out = activation(input)`.
pub fn activate(isa: Isa, activation: Activation, input: &[f32], out: &mut [f32]) {
    struct Activate<'a>(Activation, &'a [f32], &'a mut [f32]);
    impl pulp::WithSimd for Activate<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (input, input_rest) = S::as_simd_f32s(self.1);
            let (out, out_rest) = S::as_mut_simd_f32s(self.2);
            for (out, &x) in out.iter_mut().zip(input) {
                *out = activate_vector(simd, self.0, x);
            }
            for (out, &x) in out_rest.iter_mut().zip(input_rest) {
                *out = activate_vector(pulp::Scalar, self.0, x);
            }
        }
    }
    isa.dispatch(Activate(activation, input, out));
}

/// `out = a + b`.
pub fn add(isa: Isa, a: &[f32], b: &[f32], out: &mut [f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = a + b;
            }
        },
    );
}

/// `out = a · b`, where `b` is repeated as long as there is an `a`.
pub fn multiply(isa: Isa, a: &[f32], b: &[f32], out: &mut [f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            for (out, a) in out.chunks_exact_mut(b.len()).zip(a.chunks_exact(b.len())) {
                for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                    *out = a * b;
                }
            }
        },
    );
}

/// `out` = the sum of all pixels, each of as many channels as `out` has.
pub fn sum_pixels(isa: Isa, input: &[f32], out: &mut [f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            out.fill(0.0);
            for pixel in input.chunks_exact(out.len()) {
                out.iter_mut().zip(pixel).for_each(|(sum, v)| *sum += v);
            }
        },
    );
}

/// `out = input · scale + shift` on every pixel.
pub fn scale_shift(isa: Isa, input: &[f32], scale: &[f32], shift: &[f32], out: &mut [f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            let pixels = input.chunks_exact(scale.len());
            for (out, input) in out.chunks_exact_mut(scale.len()).zip(pixels) {
                for (((out, value), scale), shift) in
                    out.iter_mut().zip(input).zip(scale).zip(shift)
                {
                    *out = value * scale + shift;
                }
            }
        },
    );
}

/// On every pixel of `channels` values, `[g, C/g]` becomes `[C/g, g]`.
pub fn channel_shuffle(input: &[f32], channels: usize, groups: usize, out: &mut [f32]) {
    let per_group = channels / groups;
    let pixels = input.chunks_exact(channels);
    for (input, out) in pixels.zip(out.chunks_exact_mut(channels)) {
        if groups == 2 {
            let (first, second) = input.split_at(per_group);
            let pairs = out.as_chunks_mut().0.iter_mut();
            for ((out, &a), &b) in pairs.zip(first).zip(second) {
                *out = [a, b];
            }
        } else {
            for (j, out) in out.chunks_exact_mut(groups).enumerate() {
                for (g, out) in out.iter_mut().enumerate() {
                    *out = input[g * per_group + j];
                }
            }
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
