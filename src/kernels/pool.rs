//! Pooling of output rows.

use std::ops::Range;

use super::{Dims, Window, elementwise};

/// A pooling layer's geometry: input and output have the same channels.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    pub input: Dims,
    pub output: Dims,
    pub window: Window,
}

impl Pool {
    /// Output rows `rows`: the largest value of each window, padding left out.
    pub fn max_rows(&self, input: &[f32], rows: Range<usize>, out: &mut [f32]) {
        self.fold(input, rows, out, f32::NEG_INFINITY, |max, pixel| {
            for (max, value) in max.iter_mut().zip(pixel) {
                // As PyTorch does, let NaN through.
                if *value > *max || value.is_nan() {
                    *max = *value;
                }
            }
        });
    }

    /// Output rows `rows`: the mean of each window, padding counted as zeros.
    pub fn average_rows(&self, input: &[f32], rows: Range<usize>, out: &mut [f32]) {
        self.fold(input, rows, out, 0.0, elementwise::add);
        let area = (self.window.kernel[0] * self.window.kernel[1]) as f32;
        out.iter_mut().for_each(|v| *v /= area);
    }

    fn fold(
        &self,
        input: &[f32],
        rows: Range<usize>,
        out: &mut [f32],
        start: f32,
        step: impl Fn(&mut [f32], &[f32]),
    ) {
        let mut pixels = out.chunks_exact_mut(self.output.c);
        for y in rows {
            for (x, state) in (0..self.output.w).zip(&mut pixels) {
                let [top, left] = self.window.origin(y, x);
                state.fill(start);
                for ky in 0..self.window.kernel[0] as isize {
                    for kx in 0..self.window.kernel[1] as isize {
                        if let Some(pixel) = self.input.pixel(input, top + ky, left + kx) {
                            step(state, pixel);
                        }
                    }
                }
            }
        }
    }
}

/// Mean over all pixels of an image, `[C]`; summed row by row to keep rounding small.
pub fn global_average(dims: Dims, input: &[f32], out: &mut [f32]) {
    let mut row_sum = vec![0.0; dims.c];
    out.fill(0.0);
    for row in input.chunks_exact(dims.row()) {
        row_sum.fill(0.0);
        for pixel in row.chunks_exact(dims.c) {
            elementwise::add(&mut row_sum, pixel);
        }
        elementwise::add(out, &row_sum);
    }
    let count = (dims.h * dims.w) as f32;
    out.iter_mut().for_each(|v| *v /= count);
}
