//! What weights look like: statistics of each tensor, and how two networks differ.

use candle_core::Device;
use serde::Serialize;

use super::ExplainError;
use crate::exec::params::{Params, fetch, with_values};
use crate::weights::Model;

/// Bins of a histogram.
const BINS: usize = 24;

/// A weight tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    pub name: String,
    pub shape: Vec<usize>,
    #[serde(flatten)]
    pub statistics: Statistics,
    #[serde(skip)]
    pub values: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Statistics {
    pub mean: f64,
    /// With n - 1 below; None for a single value.
    pub std: Option<f64>,
    pub min: f32,
    pub max: f32,
    /// The share of zeros.
    pub sparsity: f64,
    pub histogram: Histogram,
}

/// How many values lie in each of equally wide bins from the smallest to the largest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    pub from: f32,
    pub to: f32,
    pub counts: Vec<u64>,
}

impl Statistics {
    /// Of at least one value.
    pub fn of(values: &[f32]) -> Self {
        let count = values.len() as f64;
        let wide = || values.iter().map(|&v| f64::from(v));
        let mean = wide().sum::<f64>() / count;
        let squares = wide().map(|v| (v - mean).powi(2)).sum::<f64>();
        let min = values.iter().copied().fold(f32::INFINITY, f32::min);
        let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        Self {
            mean,
            std: (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt()),
            min,
            max,
            sparsity: values.iter().filter(|&&v| v == 0.0).count() as f64 / count,
            histogram: Histogram::of(values, min, max),
        }
    }
}

impl Histogram {
    fn of(values: &[f32], from: f32, to: f32) -> Self {
        let range = f64::from(to) - f64::from(from);
        let mut counts = vec![0; BINS];
        for &value in values.iter().filter(|v| v.is_finite()) {
            let at = (f64::from(value) - f64::from(from)) / range * BINS as f64;
            // All values equal: they are in the first bin.
            let bin = if at.is_finite() { at as usize } else { 0 };
            counts[bin.min(BINS - 1)] += 1;
        }
        Self { from, to, counts }
    }
}

/// Every weight tensor and buffer of a network, in the network's order.
///
/// # Errors
/// Where the weights cannot be read.
pub fn kernels(model: &Model) -> Result<Vec<Kernel>, ExplainError> {
    let params = Params::new(model.source.clone(), model.seed);
    let vb = params.var_builder(&Device::Cpu);
    model
        .graph
        .parameters()
        .map(|parameter| {
            let values = with_values(&fetch(&vb, parameter)?, <[f32]>::to_vec)?;
            Ok(Kernel {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
                statistics: Statistics::of(&values),
                values,
            })
        })
        .collect()
}

/// How a tensor of one network differs from the other's of that name.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    pub name: String,
    pub shape: Vec<usize>,
    /// Norm of the difference over the norm of the first.
    pub relative: f64,
    /// The largest difference of a value.
    pub largest: f32,
    /// Of the angle between them: 1 where they point the same way.
    pub cosine: f64,
}

/// Tensors that both have in one shape; and the names of those that only one has, or in another shape.
pub fn differences(before: &[Kernel], after: &[Kernel]) -> (Vec<Difference>, Vec<String>) {
    let (mut differences, mut others) = (Vec::new(), Vec::new());
    for kernel in before {
        let other = after
            .iter()
            .find(|k| k.name == kernel.name && k.shape == kernel.shape);
        match other {
            Some(other) => differences.push(difference(kernel, other)),
            None => others.push(kernel.name.clone()),
        }
    }
    let unknown = |k: &&Kernel| !before.iter().any(|b| b.name == k.name);
    others.extend(after.iter().filter(unknown).map(|k| k.name.clone()));
    (differences, others)
}

fn difference(before: &Kernel, after: &Kernel) -> Difference {
    let (mut square, mut distance, mut product, mut other) = (0.0, 0.0, 0.0, 0.0);
    let mut largest = 0.0_f32;
    for (&a, &b) in before.values.iter().zip(&after.values) {
        largest = largest.max((b - a).abs());
        let (a, b) = (f64::from(a), f64::from(b));
        square += a * a;
        other += b * b;
        product += a * b;
        distance += (b - a) * (b - a);
    }
    let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
    Difference {
        name: before.name.clone(),
        shape: before.shape.clone(),
        relative: ratio(distance.sqrt(), square.sqrt()),
        largest,
        cosine: ratio(product, (square * other).sqrt()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_every_value_once() {
        let statistics = Statistics::of(&[-1.0, 0.0, 0.0, 0.5, 1.0]);
        assert_eq!(statistics.histogram.counts.iter().sum::<u64>(), 5);
        assert_eq!(statistics.sparsity, 0.4);
        assert_eq!((statistics.min, statistics.max), (-1.0, 1.0));
        let flat = Statistics::of(&[2.0]);
        assert_eq!(flat.std, None);
        assert_eq!(flat.histogram.counts[0], 1);
    }
}
