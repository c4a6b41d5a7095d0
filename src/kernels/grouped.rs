//! Convolutions with four or eight channels a group, as the first stages of ResNeXt have them: too
//! few to fill a vector of a product's columns, so groups share one.
//!
//! A vector holds eight or sixteen channels of a pixel, two or four groups. Output channel o of a
//! group is the sum over its inputs i of `in[i] · w[o][i]`: each input is spread over its group's
//! part of a vector, and one multiplication serves all groups. On x86 only, four channels with AVX2
//! and eight with AVX-512; elsewhere groups are strips or products.

use std::ops::Range;

use super::gemm::Epilogue;
use super::isa::Isa;
use super::{Source, Target, Window};

/// A convolution with groups of as many inputs as outputs.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub struct Grouped {
    isa: Isa,
    window: Window,
    /// Channels of a group: four or eight.
    width: usize,
    /// `[C / lanes, kernel height, kernel width, input of a group, lanes outputs]`
    weights: Vec<f32>,
}

impl Grouped {
    /// Whether this machine and these channels are served.
    pub fn fits(isa: Isa, channels: usize, groups: usize) -> bool {
        let width = channels / groups;
        let isa = Self::isa(isa, channels);
        let served = match isa.lanes() {
            8 => width == 4,
            16 => width == 4 || width == 8,
            _ => false,
        };
        isa.has_avx2()
            && served
            && channels == groups * width
            && channels.is_multiple_of(isa.lanes())
    }

    /// Vectors that the channels fill.
    fn isa(isa: Isa, channels: usize) -> Isa {
        if channels.is_multiple_of(isa.lanes()) {
            isa
        } else {
            isa.narrower()
        }
    }

    /// Packs weights; `weight(output, input of its group, tap)`.
    pub fn new(
        isa: Isa,
        window: Window,
        [channels, groups]: [usize; 2],
        weight: impl Fn(usize, usize, usize) -> f32,
    ) -> Self {
        assert!(Self::fits(isa, channels, groups));
        let isa = Self::isa(isa, channels);
        let (width, lanes) = (channels / groups, isa.lanes());
        let taps = window.kernel[0] * window.kernel[1];
        let mut weights = Vec::with_capacity(channels * width * taps);
        for first in (0..channels).step_by(lanes) {
            for tap in 0..taps {
                for i in 0..width {
                    weights.extend((first..first + lanes).map(|o| weight(o, i, tap)));
                }
            }
        }
        Self {
            isa,
            window,
            width,
            weights,
        }
    }

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
        assert_eq!(epilogue.bias.len(), output.layout.dims.c);
        #[cfg(target_arch = "x86_64")]
        {
            let rows = x86::Rows {
                conv: self,
                input,
                output,
                residual,
                epilogue,
                image,
                rows: rows.clone(),
            };
            if let Some(simd) = self.isa.avx512() {
                return pulp::Simd::vectorize(simd, x86::Work { simd, rows });
            }
            if let Some(simd) = self.isa.avx2() {
                return pulp::Simd::vectorize(simd, x86::Work { simd, rows });
            }
        }
        let _ = (input, residual, image, rows);
        unreachable!("`Grouped::fits` was asked before");
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::ops::Range;

    use pulp::x86::{V3, V4};
    use pulp::{NullaryFnOnce, Simd, cast};

    use super::Grouped;
    use crate::kernels::gemm::Epilogue;
    use crate::kernels::isa::{load, store};
    use crate::kernels::{Source, Target, elementwise};

    /// Columns of a tile.
    const COLUMNS: usize = 7;

    pub(super) struct Rows<'a> {
        pub conv: &'a Grouped,
        pub input: &'a Source,
        pub output: &'a Target,
        pub residual: Option<&'a Source>,
        pub epilogue: Epilogue<'a>,
        pub image: usize,
        pub rows: Range<usize>,
    }

    pub(super) struct Work<'a, S> {
        pub simd: S,
        pub rows: Rows<'a>,
    }

    /// Vectors that hold several groups.
    pub(super) trait Groups: Simd {
        /// In each group of `WIDTH` values its `input`th one in all places.
        fn spread<const WIDTH: usize>(self, values: Self::f32s, input: usize) -> Self::f32s;
    }

    impl Groups for V3 {
        #[inline(always)]
        fn spread<const WIDTH: usize>(self, values: Self::f32s, input: usize) -> Self::f32s {
            let v = cast(values);
            cast(match input {
                0 => self.avx._mm256_permute_ps::<0x00>(v),
                1 => self.avx._mm256_permute_ps::<0x55>(v),
                2 => self.avx._mm256_permute_ps::<0xaa>(v),
                _ => self.avx._mm256_permute_ps::<0xff>(v),
            })
        }
    }

    impl Groups for V4 {
        #[inline(always)]
        fn spread<const WIDTH: usize>(self, values: Self::f32s, input: usize) -> Self::f32s {
            let mut places = [0_i32; 16];
            for (place, from) in places.iter_mut().enumerate() {
                *from = (place / WIDTH * WIDTH + input) as i32;
            }
            let places = cast(places);
            cast(self.avx512f._mm512_permutexvar_ps(places, cast(values)))
        }
    }

    impl<S: Groups> NullaryFnOnce for Work<'_, S> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            // SAFETY: the contract of `Grouped::rows`.
            unsafe {
                match (self.rows.conv.width, S::F32_LANES) {
                    (4, _) => self.rows.run::<S, 4>(self.simd),
                    (8, 16) => self.rows.run::<S, 8>(self.simd),
                    _ => unreachable!("`Grouped::fits` was asked before"),
                }
            }
        }
    }

    impl Rows<'_> {
        #[inline(always)]
        unsafe fn run<S: Groups, const WIDTH: usize>(&self, simd: S) {
            let width = self.output.layout.dims.w;
            for y in self.rows.clone() {
                let mut x = 0;
                while x < width {
                    // SAFETY: the contract of `Grouped::rows`; a tile ends with the row.
                    unsafe {
                        if x + COLUMNS <= width {
                            self.tile::<S, WIDTH, COLUMNS>(simd, y, x);
                            x += COLUMNS;
                        } else {
                            self.tile::<S, WIDTH, 1>(simd, y, x);
                            x += 1;
                        }
                    }
                }
            }
        }

        /// `N` output pixels of a row, all channels.
        #[inline(always)]
        unsafe fn tile<S: Groups, const WIDTH: usize, const N: usize>(
            &self,
            simd: S,
            y: usize,
            x: usize,
        ) {
            let lanes = S::F32_LANES;
            let [kh, kw] = self.conv.window.kernel;
            let channels = self.output.layout.dims.c;
            let row = self.input.layout.row_stride();
            let step = self.conv.window.stride * channels;
            // SAFETY: the windows of the tile's pixels lie in the input with its border, and
            // channels come in whole vectors.
            unsafe {
                let at = self.conv.window.offset(&self.input.layout, y, x);
                let input = self.input.image(self.image).add(at);
                let at = self.output.layout.offset(y, x);
                let output = self.output.image(self.image).add(at);
                let residual = self
                    .residual
                    .map(|r| r.image(self.image).add(r.layout.offset(y, x)));
                let mut weight = self.conv.weights.as_ptr();
                for c in (0..channels).step_by(lanes) {
                    let mut sums = [simd.splat_f32s(0.0); N];
                    for ky in 0..kh {
                        for kx in 0..kw {
                            let pixel = input.add(ky * row + kx * channels + c);
                            let mut weights = [simd.splat_f32s(0.0); WIDTH];
                            for w in &mut weights {
                                *w = load::<S>(weight);
                                weight = weight.add(lanes);
                            }
                            for (n, sum) in sums.iter_mut().enumerate() {
                                let v = load::<S>(pixel.add(n * step));
                                for (i, w) in weights.into_iter().enumerate() {
                                    let spread = simd.spread::<WIDTH>(v, i);
                                    *sum = simd.mul_add_e_f32s(spread, w, *sum);
                                }
                            }
                        }
                    }
                    let bias = load::<S>(self.epilogue.bias.as_ptr().add(c));
                    for (n, sum) in sums.into_iter().enumerate() {
                        let at = n * channels + c;
                        let mut value = simd.add_f32s(sum, bias);
                        if let Some(residual) = residual {
                            value = simd.add_f32s(value, load::<S>(residual.add(at)));
                        }
                        if let Some(activation) = self.epilogue.activation {
                            value = elementwise::activate_vector(simd, activation, value);
                        }
                        store::<S>(output.add(at), value);
                    }
                }
            }
        }
    }
}
