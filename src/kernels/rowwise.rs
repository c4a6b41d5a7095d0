//! What training does to rows of pixels between its convolutions: batch norm and activation
//! applied, their gradients, and the sums over pixels that batch norm needs.
//!
//! All work on `[pixels, C]` with vectors of C values: `z` is a convolution's output, u = z · scale
//! + shift what batch norm makes of it, y = activation(u).

use super::Isa;
use super::elementwise::{activate_value, derivative};
use crate::graph::Activation;

/// Calls a generic loop with the activation as a constant, so that each is compiled for itself.
macro_rules! for_activation {
    ($activation:expr, $f:ident) => {
        match $activation {
            None => $f!(None),
            Some(Activation::Relu) => $f!(Some(Activation::Relu)),
            Some(Activation::Relu6) => $f!(Some(Activation::Relu6)),
            Some(Activation::HardSigmoid) => $f!(Some(Activation::HardSigmoid)),
            Some(Activation::HardSwish) => $f!(Some(Activation::HardSwish)),
            Some(Activation::Gelu) => $f!(Some(Activation::Gelu)),
        }
    };
}

/// Batch norm as a scale and a shift for each channel; empty where there is none.
#[derive(Clone, Copy)]
pub struct Affine<'a> {
    pub scale: &'a [f32],
    pub shift: &'a [f32],
}

/// `y = activation(z · scale + shift)`.
pub fn apply(
    isa: Isa,
    z: &[f32],
    Affine { scale, shift }: Affine,
    activation: Option<Activation>,
    y: &mut [f32],
) {
    macro_rules! run {
        ($activation:expr) => {
            isa.compiled(
                #[inline(always)]
                || {
                    if scale.is_empty() {
                        for (y, &z) in y.iter_mut().zip(z) {
                            *y = activate_value($activation, z);
                        }
                        return;
                    }
                    let c = scale.len();
                    for (y, z) in y.chunks_exact_mut(c).zip(z.chunks_exact(c)) {
                        for (((y, &z), &scale), &shift) in y.iter_mut().zip(z).zip(scale).zip(shift)
                        {
                            *y = activate_value($activation, z * scale + shift);
                        }
                    }
                },
            )
        };
    }
    for_activation!(activation, run);
}

/// `y = activation(y + z · scale + shift)`.
pub fn apply_to_sum(
    isa: Isa,
    z: &[f32],
    Affine { scale, shift }: Affine,
    activation: Option<Activation>,
    y: &mut [f32],
) {
    macro_rules! run {
        ($activation:expr) => {
            isa.compiled(
                #[inline(always)]
                || {
                    if scale.is_empty() {
                        for (y, &z) in y.iter_mut().zip(z) {
                            *y = activate_value($activation, *y + z);
                        }
                        return;
                    }
                    let c = scale.len();
                    for (y, z) in y.chunks_exact_mut(c).zip(z.chunks_exact(c)) {
                        for (((y, &z), &scale), &shift) in y.iter_mut().zip(z).zip(scale).zip(shift)
                        {
                            *y = activate_value($activation, *y + (z * scale + shift));
                        }
                    }
                },
            )
        };
    }
    for_activation!(activation, run);
}

/// `g = g · activation'(z · scale + shift)`.
pub fn mask(
    isa: Isa,
    z: &[f32],
    Affine { scale, shift }: Affine,
    activation: Option<Activation>,
    g: &mut [f32],
) {
    macro_rules! run {
        ($activation:expr) => {
            isa.compiled(
                #[inline(always)]
                || {
                    if scale.is_empty() {
                        for (g, &z) in g.iter_mut().zip(z) {
                            *g *= derivative($activation, z);
                        }
                        return;
                    }
                    let c = scale.len();
                    for (g, z) in g.chunks_exact_mut(c).zip(z.chunks_exact(c)) {
                        for (((g, &z), &scale), &shift) in g.iter_mut().zip(z).zip(scale).zip(shift)
                        {
                            *g *= derivative($activation, z * scale + shift);
                        }
                    }
                },
            )
        };
    }
    for_activation!(activation, run);
}

/// A clipping activation in place.
pub fn clip(isa: Isa, activation: Activation, values: &mut [f32]) {
    let high = upper_bound(activation);
    isa.compiled(
        #[inline(always)]
        || {
            for value in values {
                *value = value.max(0.0).min(high);
            }
        },
    );
}

/// Where a clipping activation ends.
fn upper_bound(activation: Activation) -> f32 {
    debug_assert!(matches!(activation, Activation::Relu | Activation::Relu6));
    match activation {
        Activation::Relu6 => 6.0,
        _ => f32::INFINITY,
    }
}

/// `g = g · activation'(..)` where only the activation's output `y` is known, which tells the
/// derivative for those that clip.
pub fn mask_by_output(isa: Isa, y: &[f32], activation: Activation, g: &mut [f32]) {
    let high = upper_bound(activation);
    isa.compiled(
        #[inline(always)]
        || {
            for (g, &y) in g.iter_mut().zip(y) {
                // One condition, not two branches: this becomes vectors.
                *g = if (y > 0.0) & (y < high) { *g } else { 0.0 };
            }
        },
    );
}

/// `sum += Σ row`.
pub fn sum_rows(isa: Isa, rows: &[f32], sum: &mut [f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            for row in rows.chunks_exact(sum.len()) {
                sum.iter_mut()
                    .zip(row)
                    .for_each(|(sum, value)| *sum += value);
            }
        },
    );
}

/// `sum += Σ g` and `products += Σ g · (z - mean)`, over rows.
pub fn gradient_sums(
    isa: Isa,
    g: &[f32],
    z: &[f32],
    mean: &[f32],
    sum: &mut [f32],
    products: &mut [f32],
) {
    let c = sum.len();
    isa.compiled(
        #[inline(always)]
        || {
            for (g, z) in g.chunks_exact(c).zip(z.chunks_exact(c)) {
                let rows = g.iter().zip(z).zip(mean);
                for ((sum, product), ((&g, &z), &mean)) in
                    sum.iter_mut().zip(products.iter_mut()).zip(rows)
                {
                    *sum += g;
                    *product += g * (z - mean);
                }
            }
        },
    );
}

/// Mean of rows, and the sum of squared distances from it.
pub fn moments(isa: Isa, z: &[f32], mean: &mut [f32], squares: &mut [f32]) {
    let c = mean.len();
    let scale = 1.0 / (z.len() / c) as f32;
    mean.fill(0.0);
    squares.fill(0.0);
    isa.compiled(
        #[inline(always)]
        || {
            for z in z.chunks_exact(c) {
                mean.iter_mut().zip(z).for_each(|(m, z)| *m += z);
            }
            mean.iter_mut().for_each(|m| *m *= scale);
            for z in z.chunks_exact(c) {
                for ((s, &z), &m) in squares.iter_mut().zip(z).zip(mean.iter()) {
                    *s += (z - m) * (z - m);
                }
            }
        },
    );
}

/// The gradient of batch norm for its input: `a · g + b · (z - mean) + c`.
#[derive(Clone, Copy)]
pub struct NormGradient<'a> {
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub c: &'a [f32],
    pub mean: &'a [f32],
}

/// `dz = a · g + b · (z - mean) + c`.
pub fn norm_gradient(isa: Isa, g: &[f32], z: &[f32], norm: NormGradient, dz: &mut [f32]) {
    let channels = norm.a.len();
    isa.compiled(
        #[inline(always)]
        || {
            let rows = g.chunks_exact(channels).zip(z.chunks_exact(channels));
            for (dz, (g, z)) in dz.chunks_exact_mut(channels).zip(rows) {
                let values = norm.a.iter().zip(norm.b).zip(norm.c).zip(norm.mean);
                for (((dz, &g), &z), (((&a, &b), &c), &mean)) in
                    dz.iter_mut().zip(g).zip(z).zip(values)
                {
                    *dz = a * g + (b * (z - mean) + c);
                }
            }
        },
    );
}

/// `out += values`.
pub fn accumulate(isa: Isa, values: &[f32], out: &mut [f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            out.iter_mut().zip(values).for_each(|(out, v)| *out += v);
        },
    );
}
