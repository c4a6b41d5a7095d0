//! Depthwise convolutions: channels are lanes, and seven output columns are computed at a time,
//! so that each weight is read once for seven products.
//!
//! The kernel computes one line of output pixels from the lines of its windows, each given by its
//! own pointer, so that they may lie anywhere: in an image, or in a ring of lines that are made as
//! they are needed (see `bottleneck`). For the usual kernels (3 and 5 columns wide, stride
//! 1 and 2) each input pixel of a tile is loaded once and serves all windows that it is part of.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::gemm::Epilogue;
use super::isa::{Isa, load, prefetch, prefetch_far, store};
use super::{Source, Target, Window, elementwise};

/// Columns of a tile.
const COLUMNS: usize = 7;
/// Kernels may have so many rows.
pub(super) const MOST_ROWS: usize = 16;

/// A depthwise convolution.
pub struct Depthwise {
    pub isa: Isa,
    pub window: Window,
    /// `[kernel height, kernel width, C]`
    pub weights: Vec<f32>,
}

/// A line of output pixels, and where it comes from.
#[derive(Clone, Copy)]
pub(super) struct Line<'a> {
    /// For each kernel row the first value of the first pixel's window.
    pub inputs: &'a [*const f32],
    pub output: *mut f32,
    pub residual: Option<*const f32>,
    /// Pixels.
    pub width: usize,
    /// Values to the line below the windows, where that is likely to be far from the core: it is
    /// asked for, since the next line of output will read it.
    pub below: Option<usize>,
}

impl Depthwise {
    /// Output rows `rows` of one image.
    ///
    /// # Safety
    /// The batches have that image and those rows, the input enough border for the window, and
    /// nobody else touches the rows.
    pub unsafe fn rows(
        &self,
        input: &Source,
        output: &Target,
        residual: Option<&Source>,
        epilogue: Epilogue,
        image: usize,
        rows: Range<usize>,
    ) {
        let kernel_rows = self.window.kernel[0];
        for y in rows {
            // SAFETY: the contract of this function.
            unsafe {
                let at = self.window.offset(&input.layout, y, 0);
                let first = input.image(image).add(at);
                let mut inputs = [first; MOST_ROWS];
                for (ky, input_row) in inputs[..kernel_rows].iter_mut().enumerate() {
                    *input_row = first.add(ky * input.layout.row_stride());
                }
                let line = Line {
                    inputs: &inputs[..kernel_rows],
                    output: output.image(image).add(output.layout.offset(y, 0)),
                    residual: residual.map(|r| r.image(image).add(r.layout.offset(y, 0))),
                    width: output.layout.dims.w,
                    below: None,
                };
                self.line(line, epilogue);
            }
        }
    }

    /// One line of output.
    ///
    /// # Safety
    /// Behind the line's inputs lie its windows, and nobody else touches its output.
    pub(super) unsafe fn line(&self, line: Line, epilogue: Epilogue) {
        assert_eq!(line.inputs.len(), self.window.kernel[0]);
        self.isa.dispatch(Work {
            conv: self,
            channels: epilogue.bias.len(),
            line,
            epilogue,
        });
    }
}

struct Work<'a> {
    conv: &'a Depthwise,
    channels: usize,
    line: Line<'a>,
    epilogue: Epilogue<'a>,
}

impl WithSimd for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Window { kernel, stride, .. } = self.conv.window;
        // SAFETY: the contract of `Depthwise::line`.
        unsafe {
            match (kernel[1], stride) {
                (3, 1) => self.tiles::<S, 3, 1>(simd),
                (3, 2) => self.tiles::<S, 3, 2>(simd),
                (5, 1) => self.tiles::<S, 5, 1>(simd),
                (5, 2) => self.tiles::<S, 5, 2>(simd),
                _ => self.tiles::<S, 0, 0>(simd),
            }
        }
    }
}

/// `K` columns of the kernel and the stride, where they are known when this is compiled, else 0.
impl Work<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const K: usize, const STRIDE: usize>(&self, simd: S) {
        let width = self.line.width;
        let mut x = 0;
        // SAFETY: tiles end with the line.
        unsafe {
            while x + COLUMNS <= width {
                self.tile::<S, COLUMNS, K, STRIDE>(simd, x);
                x += COLUMNS;
            }
            if x + 4 <= width {
                self.tile::<S, 4, K, STRIDE>(simd, x);
                x += 4;
            }
            while x < width {
                self.tile::<S, 1, K, STRIDE>(simd, x);
                x += 1;
            }
        }
    }

    /// `N` output pixels from `x` on, all channels.
    #[inline(always)]
    unsafe fn tile<S: Simd, const N: usize, const K: usize, const STRIDE: usize>(
        &self,
        simd: S,
        x: usize,
    ) {
        let channels = self.channels;
        let lanes = S::F32_LANES;
        let mut c = 0;
        // SAFETY: channels `c..c + lanes` exist; fewer are computed one by one.
        unsafe {
            while c + lanes <= channels {
                self.vector::<S, N, K, STRIDE>(simd, x, c);
                c += lanes;
            }
            if c < channels && channels >= lanes {
                // The last vector overlaps the one before: the same values are stored again. Not
                // so where the residual is read from what is written, which a plan never does.
                self.vector::<S, N, K, STRIDE>(simd, x, channels - lanes);
            } else {
                while c < channels {
                    self.vector::<pulp::Scalar, N, 0, 0>(pulp::Scalar, x, c);
                    c += 1;
                }
            }
        }
    }

    /// `N` output pixels, one vector of channels. Every output is the same chain of multiply-adds
    /// whatever the tile: bias first, then the window row by row.
    #[inline(always)]
    unsafe fn vector<S: Simd, const N: usize, const K: usize, const STRIDE: usize>(
        &self,
        simd: S,
        x: usize,
        c: usize,
    ) {
        let channels = self.channels;
        let Window { kernel, stride, .. } = self.conv.window;
        let step = stride * channels;
        // SAFETY: the windows of the tile's pixels lie behind the line's inputs.
        unsafe {
            if let (Some(below), Some(last)) = (self.line.below, self.line.inputs.last()) {
                // A vector is a line of the cache or half of one, columns are far apart: the
                // processor does not foresee so many streams.
                for row in 1..=stride {
                    let row = last.wrapping_add(row * below + x * step + c);
                    for column in 0..N * stride {
                        prefetch_far(row.wrapping_add(column * channels));
                    }
                }
                for n in 0..N {
                    prefetch(self.line.output.wrapping_add((x + n) * channels + c), 1);
                }
            }
            let bias = load::<S>(self.epilogue.bias.as_ptr().add(c));
            let mut sums = [bias; N];
            let mut weight = self.conv.weights.as_ptr().add(c);
            for input in self.line.inputs {
                let mut input = input.add(x * step + c);
                if K > 0 && STRIDE == 1 {
                    let mut weights = [bias; K];
                    for w in &mut weights {
                        *w = load::<S>(weight);
                        weight = weight.add(channels);
                    }
                    // Each column serves all windows that it is part of.
                    for column in 0..N + K - 1 {
                        let value = load::<S>(input);
                        input = input.add(channels);
                        for (kx, w) in weights.into_iter().enumerate() {
                            if column >= kx && column - kx < N {
                                let sum = &mut sums[column - kx];
                                *sum = simd.mul_add_e_f32s(value, w, *sum);
                            }
                        }
                    }
                } else if K > 0 {
                    for _ in 0..K {
                        let w = load::<S>(weight);
                        for (n, sum) in sums.iter_mut().enumerate() {
                            let value = load::<S>(input.add(n * STRIDE * channels));
                            *sum = simd.mul_add_e_f32s(value, w, *sum);
                        }
                        weight = weight.add(channels);
                        input = input.add(channels);
                    }
                } else {
                    for _ in 0..kernel[1] {
                        let w = load::<S>(weight);
                        for (n, sum) in sums.iter_mut().enumerate() {
                            *sum = simd.mul_add_e_f32s(load::<S>(input.add(n * step)), w, *sum);
                        }
                        weight = weight.add(channels);
                        input = input.add(channels);
                    }
                }
            }
            for (n, mut value) in sums.into_iter().enumerate() {
                let at = (x + n) * channels + c;
                if let Some(residual) = self.line.residual {
                    value = simd.add_f32s(value, load::<S>(residual.add(at)));
                }
                if let Some(activation) = self.epilogue.activation {
                    value = elementwise::activate_vector(simd, activation, value);
                }
                store::<S>(self.line.output.add(at), value);
            }
        }
    }
}
