//! Convolutions of output rows.

use std::ops::Range;

use super::gemm::{Matrix, gemm};
use super::{Dims, Window};

/// A dense or grouped convolution's geometry.
#[derive(Clone, Copy, Debug)]
pub struct Conv {
    pub input: Dims,
    pub output: Dims,
    pub window: Window,
    pub groups: usize,
}

impl Conv {
    /// Rows of the weight matrix of one group: kernel height x kernel width x input channels.
    fn depth(&self) -> usize {
        self.window.kernel[0] * self.window.kernel[1] * (self.input.c / self.groups)
    }

    /// Whether the input's pixels are the product's rows as they stand.
    fn is_pointwise(&self) -> bool {
        self.window.kernel == [1, 1]
            && self.window.stride == 1
            && self.window.before == [0, 0]
            && self.groups == 1
            && (self.input.h, self.input.w) == (self.output.h, self.output.w)
    }

    /// Brings weights from PyTorch's `[out, in / groups, kh, kw]` to `[groups, kh, kw,
    /// in / groups, out / groups]`, each output channel times its `scale`.
    pub fn pack(&self, weight: &[f32], scale: &[f64]) -> Vec<f32> {
        let [kh, kw] = self.window.kernel;
        let (ins, outs) = (self.input.c / self.groups, self.output.c / self.groups);
        let mut packed = Vec::with_capacity(weight.len());
        for group in 0..self.groups {
            for tap in 0..kh * kw {
                for i in 0..ins {
                    for o in group * outs..(group + 1) * outs {
                        let value = weight[(o * ins + i) * kh * kw + tap];
                        packed.push((f64::from(value) * scale[o]) as f32);
                    }
                }
            }
        }
        packed
    }

    /// Output rows `rows` of one image into `out`, without bias. `columns` is scratch.
    pub fn rows(
        &self,
        input: &[f32],
        packed: &[f32],
        rows: Range<usize>,
        columns: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let pixels = rows.len() * self.output.w;
        let depth = self.depth();
        let outs = self.output.c / self.groups;
        if self.is_pointwise() {
            let input = &input[rows.start * self.input.row()..rows.end * self.input.row()];
            let a = Matrix::new(input, pixels, depth, depth);
            gemm(out, outs, 1.0, a, Matrix::new(packed, depth, outs, outs));
            return;
        }
        for (group, weights) in packed.chunks_exact(depth * outs).enumerate() {
            self.unfold(input, rows.clone(), group, columns);
            let a = Matrix::new(columns, pixels, depth, depth);
            let b = Matrix::new(weights, depth, outs, outs);
            gemm(&mut out[group * outs..], self.output.c, 1.0, a, b);
        }
    }

    /// The windows of a group's channels, one row of `columns` for each output pixel (im2col).
    fn unfold(&self, input: &[f32], rows: Range<usize>, group: usize, columns: &mut Vec<f32>) {
        let ins = self.input.c / self.groups;
        let channels = group * ins..(group + 1) * ins;
        columns.clear();
        columns.reserve(rows.len() * self.output.w * self.depth());
        for y in rows {
            for x in 0..self.output.w {
                let [top, left] = self.window.origin(y, x);
                for ky in 0..self.window.kernel[0] as isize {
                    for kx in 0..self.window.kernel[1] as isize {
                        match self.input.pixel(input, top + ky, left + kx) {
                            Some(pixel) => columns.extend_from_slice(&pixel[channels.clone()]),
                            None => columns.resize(columns.len() + ins, 0.0),
                        }
                    }
                }
            }
        }
    }
}

/// A depthwise convolution's geometry: input and output have the same channels.
#[derive(Clone, Copy, Debug)]
pub struct Depthwise {
    pub input: Dims,
    pub output: Dims,
    pub window: Window,
}

impl Depthwise {
    /// Brings weights from PyTorch's `[C, 1, kh, kw]` to `[kh, kw, C]`, each channel times its
    /// `scale`.
    pub fn pack(&self, weight: &[f32], scale: &[f64]) -> Vec<f32> {
        let area = self.window.kernel[0] * self.window.kernel[1];
        let channels = self.output.c;
        (0..area * channels)
            .map(|i| {
                let (tap, c) = (i / channels, i % channels);
                (f64::from(weight[c * area + tap]) * scale[c]) as f32
            })
            .collect()
    }

    /// Output rows `rows` of one image into `out`, without bias.
    pub fn rows(&self, input: &[f32], packed: &[f32], rows: Range<usize>, out: &mut [f32]) {
        let [kh, kw] = self.window.kernel;
        let channels = self.output.c;
        let mut pixels = out.chunks_exact_mut(channels);
        for y in rows {
            for (x, sum) in (0..self.output.w).zip(&mut pixels) {
                let [top, left] = self.window.origin(y, x);
                sum.fill(0.0);
                for ky in 0..kh {
                    for kx in 0..kw {
                        let (iy, ix) = (top + ky as isize, left + kx as isize);
                        let Some(pixel) = self.input.pixel(input, iy, ix) else {
                            continue;
                        };
                        let tap = &packed[(ky * kw + kx) * channels..][..channels];
                        for ((sum, value), weight) in sum.iter_mut().zip(pixel).zip(tap) {
                            *sum += value * weight;
                        }
                    }
                }
            }
        }
    }
}
