//! Updates of parameters, as PyTorch computes them, on parts of tensors.

use super::Isa;

/// One step of stochastic gradient descent.
#[derive(Clone, Copy, Debug)]
pub struct Sgd {
    pub rate: f32,
    pub momentum: f32,
    pub nesterov: bool,
    pub weight_decay: f32,
    /// What gradients are multiplied with first (clipping).
    pub gradient_scale: f32,
}

impl Sgd {
    /// Without momentum.
    pub fn plain(&self, isa: Isa, parameter: &mut [f32], gradient: &[f32]) {
        let Self {
            rate,
            weight_decay,
            gradient_scale,
            ..
        } = *self;
        isa.compiled(
            #[inline(always)]
            || {
                for (p, g) in parameter.iter_mut().zip(gradient) {
                    *p -= rate * (g * gradient_scale + weight_decay * *p);
                }
            },
        );
    }

    /// With momentum; `velocity` begins with zeros.
    pub fn with_velocity(
        &self,
        isa: Isa,
        parameter: &mut [f32],
        gradient: &[f32],
        velocity: &mut [f32],
    ) {
        let Self {
            rate,
            momentum,
            nesterov,
            weight_decay,
            gradient_scale,
        } = *self;
        let values = parameter.iter_mut().zip(gradient).zip(velocity);
        isa.compiled(
            #[inline(always)]
            || {
                for ((p, g), v) in values {
                    let step = g * gradient_scale + weight_decay * *p;
                    *v = momentum * *v + step;
                    let step = if nesterov { step + momentum * *v } else { *v };
                    *p -= rate * step;
                }
            },
        );
    }
}

/// One step of AdamW (Loshchilov and Hutter, 2019).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// What the parameter is multiplied with first: 1 - rate · decay.
    pub shrink: f32,
    /// 1 - beta1
    pub towards_mean: f32,
    pub beta2: f32,
    /// 1 - beta2, which float32 would not have exactly enough as a difference.
    pub towards_square: f32,
    /// rate / (1 - beta1ᵗ) at step t.
    pub step_size: f32,
    /// √(1 - beta2ᵗ)
    pub correction: f32,
    pub eps: f32,
    /// What gradients are multiplied with first (clipping).
    pub gradient_scale: f32,
}

impl AdamW {
    /// `mean` and `square` are the running averages of the gradient and its square; both begin
    /// with zeros.
    pub fn update(
        &self,
        isa: Isa,
        parameter: &mut [f32],
        gradient: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
    ) {
        let Self {
            shrink,
            towards_mean,
            beta2,
            towards_square,
            step_size,
            correction,
            eps,
            gradient_scale,
        } = *self;
        let values = parameter.iter_mut().zip(gradient).zip(mean).zip(square);
        isa.compiled(
            #[inline(always)]
            || {
                for (((p, g), m), v) in values {
                    let g = g * gradient_scale;
                    *m += (g - *m) * towards_mean;
                    *v = *v * beta2 + towards_square * g * g;
                    let denominator = v.sqrt() / correction + eps;
                    *p = *p * shrink - step_size * *m / denominator;
                }
            },
        );
    }
}

/// `sum += values`
pub fn add(isa: Isa, sum: &mut [f32], values: &[f32]) {
    isa.compiled(
        #[inline(always)]
        || {
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value;
            }
        },
    );
}

/// `average += (values - average) · towards`
pub fn blend(isa: Isa, average: &mut [f32], values: &[f32], towards: f32) {
    isa.compiled(
        #[inline(always)]
        || {
            for (average, value) in average.iter_mut().zip(values) {
                *average += (value - *average) * towards;
            }
        },
    );
}

/// The sum of the squares, in float64.
pub fn sum_of_squares(isa: Isa, values: &[f32]) -> f64 {
    const LANES: usize = 16;
    isa.compiled(
        #[inline(always)]
        || {
            let mut sums = [0.0; LANES];
            let (chunks, rest) = values.as_chunks::<LANES>();
            for chunk in chunks {
                for (sum, &value) in sums.iter_mut().zip(chunk) {
                    *sum += f64::from(value) * f64::from(value);
                }
            }
            let rest: f64 = rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            sums.iter().sum::<f64>() + rest
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_squares_lose_nothing() {
        for count in [0, 1, 15, 16, 17, 1000] {
            let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
            let expected: f64 = (0..count).map(|i| f64::from(i) * f64::from(i)).sum();
            for isa in [Isa::detect(), Isa::detect().narrower(), Isa::portable()] {
                assert_eq!(sum_of_squares(isa, &values), expected);
            }
        }
    }
}
