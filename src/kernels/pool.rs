//! Pooling of output rows.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::isa::{load, store};
use super::{Dims, Isa, Source, Target, Window};

/// What is made of the pixels of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// The largest value, padding left out.
    Max,
    /// The mean, padding counted as zeros.
    Average,
}

/// Output rows `rows` of one image.
///
/// # Safety
/// The batches have that image and those rows, and nobody else touches the rows.
pub unsafe fn pool(
    isa: Isa,
    reduction: Reduction,
    window: &Window,
    input: &Source,
    output: &Target,
    image: usize,
    rows: Range<usize>,
) {
    let Dims { h, w, c } = input.layout.dims;
    let [kh, kw] = window.kernel;
    let scale = 1.0 / (kh * kw) as f32;
    // The part of a window that lies inside the image.
    let inside = |at: usize, before: usize, kernel: usize, size: usize| {
        let start = at * window.stride;
        start.saturating_sub(before)..(start + kernel).saturating_sub(before).min(size)
    };
    for y in rows {
        // SAFETY: the contract of this function.
        let out = unsafe { output.row(image, y) };
        isa.compiled(
            #[inline(always)]
            || {
                for (x, out) in out.chunks_exact_mut(c).enumerate() {
                    out.fill(match reduction {
                        Reduction::Max => f32::NEG_INFINITY,
                        Reduction::Average => 0.0,
                    });
                    let columns = inside(x, window.before[1], kw, w);
                    for iy in inside(y, window.before[0], kh, h) {
                        // SAFETY: a row of the image, by the contract of this function.
                        let row = unsafe { input.row(image, iy) };
                        for pixel in row[columns.start * c..columns.end * c].chunks_exact(c) {
                            match reduction {
                                Reduction::Max => {
                                    for (out, &value) in out.iter_mut().zip(pixel) {
                                        // As PyTorch does, let NaN through.
                                        *out = if *out >= value { *out } else { value };
                                    }
                                }
                                Reduction::Average => {
                                    for (out, value) in out.iter_mut().zip(pixel) {
                                        *out += value;
                                    }
                                }
                            }
                        }
                    }
                    if reduction == Reduction::Average {
                        out.iter_mut().for_each(|v| *v *= scale);
                    }
                }
            },
        );
    }
}

/// A row of max-pooling that remembers where each maximum came from.
///
/// `rows` holds the input rows that the windows of the output row meet, those of taps
/// `down.start..`, each of `width` pixels. `out` is the row of outputs, `[W, C]`; `places` gets the
/// tap of each, as a number. Of equals the first wins, as in PyTorch.
#[allow(clippy::too_many_arguments)] // rows, a window, and two results
pub fn max_row(
    isa: Isa,
    window: &Window,
    rows: &[f32],
    down: Range<usize>,
    width: usize,
    channels: usize,
    out: &mut [f32],
    places: &mut [f32],
) {
    assert!(rows.len() >= down.len() * width * channels && out.len() == places.len());
    isa.dispatch(MaxRow {
        window,
        rows,
        down,
        width,
        channels,
        out,
        places,
    });
}

struct MaxRow<'a> {
    window: &'a Window,
    rows: &'a [f32],
    down: Range<usize>,
    width: usize,
    channels: usize,
    out: &'a mut [f32],
    places: &'a mut [f32],
}

impl WithSimd for MaxRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for x in 0..self.out.len() / self.channels {
            let mut c = 0;
            while c + S::F32_LANES <= self.channels {
                self.pixel::<S>(simd, x, c);
                c += S::F32_LANES;
            }
            while c < self.channels {
                self.pixel::<pulp::Scalar>(pulp::Scalar, x, c);
                c += 1;
            }
        }
    }
}

impl MaxRow<'_> {
    /// One vector of channels of an output pixel.
    #[inline(always)]
    fn pixel<S: Simd>(&mut self, simd: S, x: usize, c: usize) {
        let start = (x * self.window.stride) as isize - self.window.before[1] as isize;
        let mut largest = simd.splat_f32s(f32::NEG_INFINITY);
        let mut place = simd.splat_f32s(-1.0);
        for (row, ky) in self.down.clone().enumerate() {
            for kx in 0..self.window.kernel[1] {
                let Ok(column) = usize::try_from(start + kx as isize) else {
                    continue;
                };
                if column >= self.width {
                    break;
                }
                let at = (row * self.width + column) * self.channels + c;
                // SAFETY: a pixel of the rows, and channels that exist.
                let value = unsafe { load::<S>(self.rows.as_ptr().add(at)) };
                let tap = simd.splat_f32s((ky * self.window.kernel[1] + kx) as f32);
                // The second is false where nothing was seen yet.
                let keep = simd.and_m32s(
                    simd.greater_than_or_equal_f32s(largest, value),
                    simd.greater_than_or_equal_f32s(place, simd.splat_f32s(0.0)),
                );
                largest = simd.select_f32s(keep, largest, value);
                place = simd.select_f32s(keep, place, tap);
            }
        }
        let at = x * self.channels + c;
        // SAFETY: channels of an output pixel.
        unsafe {
            store::<S>(self.out.as_mut_ptr().add(at), largest);
            store::<S>(self.places.as_mut_ptr().add(at), place);
        }
    }
}

/// Mean over all pixels of some channels of an image; summed row by row to keep rounding small.
///
/// # Safety
/// The batch has that image, and nobody writes it.
pub unsafe fn global_average(
    isa: Isa,
    input: &Source,
    image: usize,
    channels: Range<usize>,
    out: &mut [f32],
) {
    let pixels = input.layout.dims.pixels();
    // SAFETY: the contract of this function.
    unsafe { average(isa, input, image, channels, pixels, out) };
}

/// The sum over all pixels of some channels of an image, over a number of `pixels`: another than
/// the image's where its pixels are sums already.
///
/// # Safety
/// As [`global_average`].
pub unsafe fn average(
    isa: Isa,
    input: &Source,
    image: usize,
    channels: Range<usize>,
    pixels: usize,
    out: &mut [f32],
) {
    let Dims { h, c, .. } = input.layout.dims;
    let mut row_sum = vec![0.0; channels.len()];
    out.fill(0.0);
    isa.compiled(
        #[inline(always)]
        || {
            let add = |sum: &mut [f32], values: &[f32]| {
                sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
            };
            for y in 0..h {
                row_sum.fill(0.0);
                // SAFETY: the contract of this function.
                for pixel in unsafe { input.row(image, y) }.chunks_exact(c) {
                    add(&mut row_sum, &pixel[channels.clone()]);
                }
                add(out, &row_sum);
            }
            let count = pixels as f32;
            out.iter_mut().for_each(|v| *v /= count);
        },
    );
}
