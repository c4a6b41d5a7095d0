//! Gradients of depthwise convolutions, a vector of channels at a time.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::isa::{Isa, load, store};
use super::{Dims, Source, Window};

/// The weights' gradient over some output rows of an image, added to `out`,
/// `[kernel height, kernel width, C]`.
///
/// # Safety
/// The batches have that image and those rows (of `dz`), and the input enough border for the
/// window.
pub unsafe fn weights(
    isa: Isa,
    window: &Window,
    input: &Source,
    dz: &Source,
    image: usize,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let [kh, kw] = window.kernel;
    assert_eq!(out.len(), kh * kw * dz.layout.dims.c);
    isa.dispatch(Weights {
        window,
        input,
        dz,
        image,
        rows,
        out: out.as_mut_ptr(),
    });
}

struct Weights<'a> {
    window: &'a Window,
    input: &'a Source,
    dz: &'a Source,
    image: usize,
    rows: Range<usize>,
    out: *mut f32,
}

impl WithSimd for Weights<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let channels = self.dz.layout.dims.c;
        let mut c = 0;
        // SAFETY: the contract of `weights`; channels below `channels`.
        unsafe {
            while c + S::F32_LANES <= channels {
                self.channels::<S>(simd, c);
                c += S::F32_LANES;
            }
            while c < channels {
                self.channels::<pulp::Scalar>(pulp::Scalar, c);
                c += 1;
            }
        }
    }
}

impl Weights<'_> {
    /// One vector of channels.
    #[inline(always)]
    unsafe fn channels<S: Simd>(&self, simd: S, c: usize) {
        let [kh, kw] = self.window.kernel;
        // SAFETY: taps of the window.
        unsafe {
            if (kh, kw) == (3, 3) {
                self.taps::<S, 3, 3>(simd, c, 0, 0);
                return;
            }
            for ky in 0..kh {
                let mut kx = 0;
                while kx < kw {
                    match kw - kx {
                        5.. => self.taps::<S, 1, 5>(simd, c, ky, kx),
                        3.. => self.taps::<S, 1, 3>(simd, c, ky, kx),
                        _ => self.taps::<S, 1, 1>(simd, c, ky, kx),
                    }
                    kx += match kw - kx {
                        5.. => 5,
                        3.. => 3,
                        _ => 1,
                    };
                }
            }
        }
    }

    /// The taps at `ky.., kx..`, as many as the sums.
    #[inline(always)]
    unsafe fn taps<S: Simd, const TY: usize, const TX: usize>(
        &self,
        simd: S,
        c: usize,
        ky: usize,
        kx: usize,
    ) {
        let Dims { w, c: channels, .. } = self.dz.layout.dims;
        let row = self.input.layout.row_stride();
        let step = self.window.stride * channels;
        let mut sums = [[simd.splat_f32s(0.0); TX]; TY];
        // SAFETY: the contract of `weights`.
        unsafe {
            for y in self.rows.clone() {
                let at = self.window.offset(&self.input.layout, y, 0);
                let at = at + ky * row + kx * channels + c;
                let mut input = self.input.image(self.image).add(at);
                let at = self.dz.layout.offset(y, 0) + c;
                let mut dz = self.dz.image(self.image).add(at);
                for _ in 0..w {
                    let gradient = load::<S>(dz);
                    for (ty, sums) in sums.iter_mut().enumerate() {
                        for (tx, sum) in sums.iter_mut().enumerate() {
                            let value = load::<S>(input.add(ty * row + tx * channels));
                            *sum = simd.mul_add_e_f32s(value, gradient, *sum);
                        }
                    }
                    input = input.add(step);
                    dz = dz.add(channels);
                }
            }
            for (ty, sums) in sums.into_iter().enumerate() {
                for (tx, sum) in sums.into_iter().enumerate() {
                    let tap = (ky + ty) * self.window.kernel[1] + kx + tx;
                    let out = self.out.add(tap * channels + c);
                    store::<S>(out, simd.add_f32s(load::<S>(out), sum));
                }
            }
        }
    }
}

/// The input's gradient at one pixel: the sum over `taps`, each a place behind `dz` and a place
/// behind `weights`, of their products, channel by channel.
///
/// # Safety
/// Behind `dz` and `weights` lie, at each tap, as many values as `out` has.
pub unsafe fn pixel(
    isa: Isa,
    dz: *const f32,
    weights: *const f32,
    taps: &[[usize; 2]],
    out: &mut [f32],
) {
    isa.dispatch(Pixel {
        dz,
        weights,
        taps,
        out,
    });
}

struct Pixel<'a> {
    dz: *const f32,
    weights: *const f32,
    taps: &'a [[usize; 2]],
    out: &'a mut [f32],
}

impl WithSimd for Pixel<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut c = 0;
        // SAFETY: the contract of `pixel`.
        unsafe {
            while c + S::F32_LANES <= self.out.len() {
                let sum = self.sum::<S>(simd, c);
                store::<S>(self.out.as_mut_ptr().add(c), sum);
                c += S::F32_LANES;
            }
            while c < self.out.len() {
                self.out[c] = self.sum::<pulp::Scalar>(pulp::Scalar, c);
                c += 1;
            }
        }
    }
}

impl Pixel<'_> {
    #[inline(always)]
    unsafe fn sum<S: Simd>(&self, simd: S, c: usize) -> S::f32s {
        let mut sum = simd.splat_f32s(0.0);
        for &[dz, weight] in self.taps {
            // SAFETY: the contract of `pixel`.
            unsafe {
                let dz = load::<S>(self.dz.add(dz + c));
                let weight = load::<S>(self.weights.add(weight + c));
                sum = simd.mul_add_e_f32s(dz, weight, sum);
            }
        }
        sum
    }
}
