//! Interpolation of learned positions to another grid.

use crate::graph::PositionInterpolation;

/// The matrix `[to, from]` that resamples one axis of a grid, as `torch.nn.functional.interpolate`
/// does it: each output is a weighted sum of the inputs, the border repeated.
pub fn position_weights(method: PositionInterpolation, from: usize, to: usize) -> Vec<f32> {
    let mut weights = vec![0.0; from * to];
    for (index, row) in weights.chunks_exact_mut(from).enumerate() {
        match method {
            PositionInterpolation::BicubicAlignCorners => aligned_corners(index, to, row),
            PositionInterpolation::BicubicAntialias => antialiased(index, to, row),
        }
    }
    weights
}

/// Four taps, a = -0.75, first and last points of both grids on each other.
fn aligned_corners(index: usize, to: usize, row: &mut [f32]) {
    let from = row.len();
    let step = if to > 1 {
        (from - 1) as f64 / (to - 1) as f64
    } else {
        0.0
    };
    let position = index as f64 * step;
    let base = position.floor();
    for tap in -1..=2 {
        let weight = cubic(position - (base + f64::from(tap)), -0.75);
        let source = (base as isize + tap as isize).clamp(0, from as isize - 1);
        row[source as usize] += weight as f32;
    }
}

/// Pillow's way: a = -0.5, the filter as wide as the reduction, taps outside left out.
fn antialiased(index: usize, to: usize, row: &mut [f32]) {
    let from = row.len();
    let scale = from as f64 / to as f64;
    let width = scale.max(1.0);
    let centre = (index as f64 + 0.5) * scale;
    let start = ((centre - 2.0 * width + 0.5) as isize).max(0) as usize;
    let end = ((centre + 2.0 * width + 0.5) as usize).min(from);
    let taps: Vec<f64> = (start..end)
        .map(|i| cubic((i as f64 - centre + 0.5) / width, -0.5))
        .collect();
    let sum: f64 = taps.iter().sum();
    for (value, tap) in row[start..end].iter_mut().zip(taps) {
        *value = (tap / sum) as f32;
    }
}

/// Keys' cubic convolution kernel.
pub fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}
