//! What training does to rows of pixels between its convolutions: batch norm and activation
//! applied, their gradients, and the sums over pixels that batch norm needs.
//!
//! All work on `[pixels, C]` with vectors of C values: `z` is a convolution's output, u = z · scale
//! + shift what batch norm makes of it, y = activation(u).

use std::ops::Range;

use pulp::{Scalar, Simd, WithSimd};

use super::Isa;
use super::elementwise::{activate_value, derivative, derivative_vector};
use super::isa::{load, store};
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
pub fn apply(isa: Isa, z: &[f32], affine: Affine, activation: Option<Activation>, y: &mut [f32]) {
    let Affine { scale, shift } = affine;
    let c = scale.len();
    if c > 0
        && matches!(
            activation,
            None | Some(Activation::Relu | Activation::Relu6)
        )
    {
        assert!(z.len() == y.len() && shift.len() == c && z.len().is_multiple_of(c));
        return isa.dispatch(ByColumns(Apply {
            z,
            affine,
            activation,
            y: y.as_mut_ptr(),
        }));
    }
    macro_rules! run {
        ($activation:expr) => {
            isa.compiled(
                #[inline(always)]
                || {
                    if c == 0 {
                        for (y, &z) in y.iter_mut().zip(z) {
                            *y = activate_value($activation, z);
                        }
                        return;
                    }
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

/// [`apply`], where the activation is none or clips.
struct Apply<'a> {
    z: &'a [f32],
    affine: Affine<'a>,
    activation: Option<Activation>,
    y: *mut f32,
}

impl Columns for Apply<'_> {
    fn shape(&self) -> [usize; 2] {
        let c = self.affine.scale.len();
        [c, self.z.len() / c]
    }

    #[inline(always)]
    unsafe fn block<S: Simd, const NV: usize>(&self, simd: S, column: usize, rows: Range<usize>) {
        let c = self.affine.scale.len();
        let high = self.activation.map(upper_bound);
        // SAFETY: columns and rows of the shape.
        unsafe {
            let scale = load_all::<S, NV>(simd, self.affine.scale.as_ptr().add(column));
            let shift = load_all::<S, NV>(simd, self.affine.shift.as_ptr().add(column));
            for row in rows {
                let at = row * c + column;
                let mut y = load_all::<S, NV>(simd, self.z.as_ptr().add(at));
                for v in 0..NV {
                    y[v] = simd.add_f32s(simd.mul_f32s(y[v], scale[v]), shift[v]);
                    if let Some(high) = high {
                        y[v] = simd.max_f32s(y[v], simd.splat_f32s(0.0));
                        y[v] = simd.min_f32s(y[v], simd.splat_f32s(high));
                    }
                }
                store_all::<S, NV>(y, self.y.add(at));
            }
        }
    }
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

/// What is computed of rows of C values, with what belongs to their columns in registers.
trait Columns {
    /// C, and rows.
    fn shape(&self) -> [usize; 2];

    /// The columns of NV vectors from `column` on, of some rows.
    ///
    /// # Safety
    /// They are columns and rows of the shape.
    unsafe fn block<S: Simd, const NV: usize>(&self, simd: S, column: usize, rows: Range<usize>);
}

struct ByColumns<T>(T);

impl<T: Columns> WithSimd for ByColumns<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Rows that columns are loaded for; few, so that memory is read nearly from end to end.
        const ROWS: usize = 8;
        const VECTORS: usize = 4;
        let [columns, rows] = self.0.shape();
        let lanes = S::F32_LANES;
        for first in (0..rows).step_by(ROWS) {
            let rows = first..rows.min(first + ROWS);
            let mut column = 0;
            // SAFETY: columns and rows of the shape.
            unsafe {
                while column + VECTORS * lanes <= columns {
                    self.0.block::<S, VECTORS>(simd, column, rows.clone());
                    column += VECTORS * lanes;
                }
                while column + lanes <= columns {
                    self.0.block::<S, 1>(simd, column, rows.clone());
                    column += lanes;
                }
                for column in column..columns {
                    self.0.block::<Scalar, 1>(Scalar, column, rows.clone());
                }
            }
        }
    }
}

/// NV vectors of a row or of columns.
///
/// # Safety
/// Behind the pointer lie so many values.
#[inline(always)]
unsafe fn load_all<S: Simd, const NV: usize>(simd: S, from: *const f32) -> [S::f32s; NV] {
    let mut vectors = [simd.splat_f32s(0.0); NV];
    for (v, vector) in vectors.iter_mut().enumerate() {
        // SAFETY: as the caller promises.
        *vector = unsafe { load::<S>(from.add(v * S::F32_LANES)) };
    }
    vectors
}

/// # Safety
/// As [`load_all`], for the caller alone.
#[inline(always)]
unsafe fn store_all<S: Simd, const NV: usize>(vectors: [S::f32s; NV], to: *mut f32) {
    for (v, vector) in vectors.into_iter().enumerate() {
        // SAFETY: as the caller promises.
        unsafe { store::<S>(to.add(v * S::F32_LANES), vector) };
    }
}

/// `g = from · activation'(z · scale + shift)`, and on the way `sum += Σ g` and
/// `products += Σ g · (z - mean)`, over rows.
#[allow(clippy::too_many_arguments)] // three matrices, and what belongs to their columns
pub fn mask_and_sum(
    isa: Isa,
    from: &[f32],
    z: &[f32],
    affine: Affine,
    activation: Option<Activation>,
    g: &mut [f32],
    mean: &[f32],
    [sum, products]: [&mut [f32]; 2],
) {
    let c = sum.len();
    assert!(
        [
            products.len(),
            mean.len(),
            affine.scale.len(),
            affine.shift.len()
        ] == [c; 4]
    );
    assert!(from.len() == z.len() && g.len() == z.len() && z.len().is_multiple_of(c));
    // What has no vectors is multiplied first.
    let (from, activation) = if activation == Some(Activation::Gelu) {
        g.copy_from_slice(from);
        mask(isa, z, affine, activation, g);
        (g.as_ptr(), None)
    } else {
        (from.as_ptr(), activation)
    };
    isa.dispatch(ByColumns(MaskAndSum {
        from,
        z,
        affine,
        activation,
        g: g.as_mut_ptr(),
        mean,
        sum: sum.as_mut_ptr(),
        products: products.as_mut_ptr(),
    }));
}

/// `sum += Σ g` and `products += Σ g · (z - mean)`, over rows.
pub fn gradient_sums(
    isa: Isa,
    g: &[f32],
    z: &[f32],
    mean: &[f32],
    [sum, products]: [&mut [f32]; 2],
) {
    let c = sum.len();
    assert!([products.len(), mean.len()] == [c; 2]);
    assert!(g.len() == z.len() && z.len().is_multiple_of(c));
    isa.dispatch(ByColumns(MaskAndSum {
        from: g.as_ptr(),
        z,
        // Not looked at.
        affine: Affine {
            scale: mean,
            shift: mean,
        },
        activation: None,
        g: std::ptr::null_mut(),
        mean,
        sum: sum.as_mut_ptr(),
        products: products.as_mut_ptr(),
    }));
}

struct MaskAndSum<'a> {
    from: *const f32,
    z: &'a [f32],
    affine: Affine<'a>,
    activation: Option<Activation>,
    /// Null where only the sums are wanted.
    g: *mut f32,
    mean: &'a [f32],
    sum: *mut f32,
    products: *mut f32,
}

impl Columns for MaskAndSum<'_> {
    fn shape(&self) -> [usize; 2] {
        let c = self.mean.len();
        [c, self.z.len() / c]
    }

    #[inline(always)]
    unsafe fn block<S: Simd, const NV: usize>(&self, simd: S, column: usize, rows: Range<usize>) {
        // SAFETY: as the caller promises.
        unsafe {
            match self.activation {
                None => self.masked::<S, NV>(simd, None, column, rows),
                Some(Activation::Relu) => {
                    self.masked::<S, NV>(simd, Some(Activation::Relu), column, rows);
                }
                other => self.masked::<S, NV>(simd, other, column, rows),
            }
        }
    }
}

impl MaskAndSum<'_> {
    #[inline(always)]
    unsafe fn masked<S: Simd, const NV: usize>(
        &self,
        simd: S,
        activation: Option<Activation>,
        column: usize,
        rows: Range<usize>,
    ) {
        let columns = |values: &[f32]| {
            // SAFETY: columns of the shape.
            unsafe { load_all::<S, NV>(simd, values.as_ptr().add(column)) }
        };
        let [scale, shift] = [self.affine.scale, self.affine.shift].map(columns);
        let mean = columns(self.mean);
        let c = self.mean.len();
        // SAFETY: columns and rows of the shape.
        unsafe {
            let mut sum = load_all::<S, NV>(simd, self.sum.add(column));
            let mut products = load_all::<S, NV>(simd, self.products.add(column));
            for row in rows {
                let at = row * c + column;
                let mut g = load_all::<S, NV>(simd, self.from.add(at));
                let z = load_all::<S, NV>(simd, self.z.as_ptr().add(at));
                for v in 0..NV {
                    if activation.is_some() {
                        // Rounded as it was forward, so that a value is on the same side of a corner.
                        let u = simd.add_f32s(simd.mul_f32s(z[v], scale[v]), shift[v]);
                        g[v] = simd.mul_f32s(g[v], derivative_vector(simd, activation, u));
                    }
                    sum[v] = simd.add_f32s(sum[v], g[v]);
                    let distance = simd.sub_f32s(z[v], mean[v]);
                    products[v] = simd.add_f32s(products[v], simd.mul_f32s(g[v], distance));
                }
                if !self.g.is_null() {
                    store_all::<S, NV>(g, self.g.add(at));
                }
            }
            store_all::<S, NV>(sum, self.sum.add(column));
            store_all::<S, NV>(products, self.products.add(column));
        }
    }
}

/// Mean of rows, and the sum of squared distances from it.
pub fn moments(isa: Isa, z: &[f32], mean: &mut [f32], squares: &mut [f32]) {
    let scale = 1.0 / (z.len() / mean.len()) as f32;
    assert!(mean.len() == squares.len() && z.len().is_multiple_of(mean.len()));
    mean.fill(0.0);
    squares.fill(0.0);
    let sums = |mean, sum: &mut [f32]| {
        let (columns, sum) = (sum.len(), sum.as_mut_ptr());
        isa.dispatch(ByColumns(Sums {
            z,
            mean,
            sum,
            columns,
        }));
    };
    sums(None, mean);
    mean.iter_mut().for_each(|m| *m *= scale);
    sums(Some(mean), squares);
}

/// Sums of rows, or of their squared distances from a mean.
struct Sums<'a> {
    z: &'a [f32],
    mean: Option<&'a [f32]>,
    sum: *mut f32,
    columns: usize,
}

impl Columns for Sums<'_> {
    fn shape(&self) -> [usize; 2] {
        [self.columns, self.z.len() / self.columns]
    }

    #[inline(always)]
    unsafe fn block<S: Simd, const NV: usize>(&self, simd: S, column: usize, rows: Range<usize>) {
        let c = self.columns;
        // SAFETY: columns and rows of the shape.
        unsafe {
            let place = self.sum.add(column);
            let mut sum = load_all::<S, NV>(simd, place);
            let mean = self
                .mean
                .map(|mean| load_all::<S, NV>(simd, mean.as_ptr().add(column)));
            for row in rows {
                let z = load_all::<S, NV>(simd, self.z.as_ptr().add(row * c + column));
                for v in 0..NV {
                    sum[v] = match mean {
                        None => simd.add_f32s(sum[v], z[v]),
                        Some(mean) => {
                            let distance = simd.sub_f32s(z[v], mean[v]);
                            simd.add_f32s(sum[v], simd.mul_f32s(distance, distance))
                        }
                    };
                }
            }
            store_all::<S, NV>(sum, place);
        }
    }
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
    let c = norm.a.len();
    assert!([norm.b.len(), norm.c.len(), norm.mean.len()] == [c; 3]);
    assert!(g.len() == z.len() && dz.len() == z.len() && z.len().is_multiple_of(c));
    isa.dispatch(ByColumns(GradientOfNorm {
        g,
        z,
        norm,
        dz: dz.as_mut_ptr(),
    }));
}

struct GradientOfNorm<'a> {
    g: &'a [f32],
    z: &'a [f32],
    norm: NormGradient<'a>,
    dz: *mut f32,
}

impl Columns for GradientOfNorm<'_> {
    fn shape(&self) -> [usize; 2] {
        let c = self.norm.a.len();
        [c, self.z.len() / c]
    }

    #[inline(always)]
    unsafe fn block<S: Simd, const NV: usize>(&self, simd: S, column: usize, rows: Range<usize>) {
        let NormGradient { a, b, c, mean } = self.norm;
        let channels = a.len();
        // SAFETY: columns and rows of the shape.
        unsafe {
            let a = load_all::<S, NV>(simd, a.as_ptr().add(column));
            let b = load_all::<S, NV>(simd, b.as_ptr().add(column));
            let c = load_all::<S, NV>(simd, c.as_ptr().add(column));
            let mean = load_all::<S, NV>(simd, mean.as_ptr().add(column));
            for row in rows {
                let at = row * channels + column;
                let g = load_all::<S, NV>(simd, self.g.as_ptr().add(at));
                let mut dz = load_all::<S, NV>(simd, self.z.as_ptr().add(at));
                for v in 0..NV {
                    let distance = simd.sub_f32s(dz[v], mean[v]);
                    let rest = simd.add_f32s(simd.mul_f32s(b[v], distance), c[v]);
                    dz[v] = simd.add_f32s(simd.mul_f32s(a[v], g[v]), rest);
                }
                store_all::<S, NV>(dz, self.dz.add(at));
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::tests::ACTIVATIONS;
    use super::*;

    /// Relative to the largest that is expected.
    fn near(actual: &[f32], expected: &[f64]) {
        let largest = expected.iter().fold(1e-3, |most: f64, v| most.max(v.abs()));
        for (&a, &e) in actual.iter().zip(expected) {
            assert!((f64::from(a) - e).abs() < 1e-5 * largest, "{a}, {e}");
        }
    }

    #[test]
    fn rows_of_random_shapes_are_those_in_float64() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for case in 0..120 {
            let isa = [Isa::detect(), Isa::portable()][case % 2];
            let [c, rows] = [rng.random_range(1..200), rng.random_range(1..40)];
            let mut random = |len: usize| -> Vec<f32> {
                (0..len).map(|_| rng.random_range(-4.0..4.0)).collect()
            };
            let [g, z] = [(); 2].map(|()| random(rows * c));
            let [scale, shift, a, b, mean] = [(); 5].map(|()| random(c));
            let activation = ACTIVATIONS[case / 2 % ACTIVATIONS.len()];
            let affine = Affine {
                scale: &scale,
                shift: &shift,
            };
            let column = |values: &[f32], i: usize| f64::from(values[i % c]);
            let each = |f: &dyn Fn(usize) -> f64| (0..rows * c).map(f).collect::<Vec<f64>>();
            let sum = |values: &[f64]| {
                let of = |column| values.iter().skip(column).step_by(c).sum::<f64>();
                (0..c).map(of).collect::<Vec<f64>>()
            };

            let mut y = vec![0.0; rows * c];
            apply(isa, &z, affine, activation, &mut y);
            let plain = |i: usize| z[i] * scale[i % c] + shift[i % c];
            near(
                &y,
                &each(&|i| f64::from(activate_value(activation, plain(i)))),
            );

            let masked = each(&|i| f64::from(g[i]) * f64::from(derivative(activation, plain(i))));
            let products = |g: &[f64]| {
                let product = |i: usize| g[i] * (f64::from(z[i]) - column(&mean, i));
                sum(&each(&product))
            };
            let mut sums = vec![0.0; 2 * c];
            let (first, second) = sums.split_at_mut(c);
            mask_and_sum(
                isa,
                &g,
                &z,
                affine,
                activation,
                &mut y,
                &mean,
                [first, second],
            );
            near(&y, &masked);
            near(&sums[..c], &sum(&masked));
            near(&sums[c..], &products(&masked));

            sums.fill(0.0);
            let (first, second) = sums.split_at_mut(c);
            gradient_sums(isa, &g, &z, &mean, [first, second]);
            let plain = each(&|i| f64::from(g[i]));
            near(&sums[..c], &sum(&plain));
            near(&sums[c..], &products(&plain));

            let (first, second) = sums.split_at_mut(c);
            moments(isa, &z, first, second);
            let means: Vec<f64> = sum(&each(&|i| f64::from(z[i])));
            let means: Vec<f64> = means.iter().map(|sum| sum / rows as f64).collect();
            near(&sums[..c], &means);
            let squares = each(&|i| (f64::from(z[i]) - means[i % c]).powi(2));
            near(&sums[c..], &sum(&squares));

            let norm = NormGradient {
                a: &a,
                b: &b,
                c: &shift,
                mean: &mean,
            };
            norm_gradient(isa, &g, &z, norm, &mut y);
            let expected = each(&|i| {
                let distance = f64::from(z[i]) - column(&mean, i);
                column(&a, i) * f64::from(g[i]) + column(&b, i) * distance + column(&shift, i)
            });
            near(&y, &expected);
        }
    }
}
