//! Convolutions with four channels a group, as the first stage of ResNeXt has them: too few to
//! fill a vector of a product's columns, so two groups share one.
//!
//! A vector holds eight channels of a pixel, two groups. Output channel o of a group is the sum
//! over its four inputs i of `in[i] · w[o][i]`: each input is spread over its group's half of a
//! vector, and one multiplication serves both groups. On x86 only; elsewhere groups are products.

use std::ops::Range;

use super::gemm::Epilogue;
use super::isa::Isa;
use super::{Source, Target, Window};

/// Channels of a group.
pub const GROUP: usize = 4;
/// Values of a vector.
const LANES: usize = 8;

/// A convolution with groups of four inputs and outputs.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub struct Grouped {
    isa: Isa,
    window: Window,
    /// `[C / 8, kernel height, kernel width, input of a group, 8 outputs]`
    weights: Vec<f32>,
}

impl Grouped {
    /// Whether this machine and these channels are served.
    pub fn fits(isa: Isa, channels: usize, groups: usize) -> bool {
        isa.has_avx2() && channels == groups * GROUP && channels.is_multiple_of(LANES)
    }

    /// Packs weights; `weight(output, input of its group, tap)`.
    pub fn new(
        isa: Isa,
        window: Window,
        channels: usize,
        weight: impl Fn(usize, usize, usize) -> f32,
    ) -> Self {
        assert!(Self::fits(isa, channels, channels / GROUP));
        let taps = window.kernel[0] * window.kernel[1];
        let mut weights = Vec::with_capacity(channels * GROUP * taps);
        for first in (0..channels).step_by(LANES) {
            for tap in 0..taps {
                for i in 0..GROUP {
                    weights.extend((first..first + LANES).map(|o| weight(o, i, tap)));
                }
            }
        }
        Self {
            isa,
            window,
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
        if let Some(simd) = self.isa.avx2() {
            let rows = x86::Rows {
                simd,
                conv: self,
                input,
                output,
                residual,
                epilogue,
                image,
                rows,
            };
            pulp::Simd::vectorize(simd, rows);
            return;
        }
        let _ = (input, residual, image, rows);
        unreachable!("`Grouped::fits` was asked before");
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::__m256;
    use std::ops::Range;

    use pulp::{NullaryFnOnce, cast, x86::V3};

    use super::{GROUP, Grouped, LANES};
    use crate::kernels::gemm::Epilogue;
    use crate::kernels::{Source, Target, elementwise};

    /// Columns of a tile.
    const COLUMNS: usize = 7;

    pub(super) struct Rows<'a> {
        pub simd: V3,
        pub conv: &'a Grouped,
        pub input: &'a Source,
        pub output: &'a Target,
        pub residual: Option<&'a Source>,
        pub epilogue: Epilogue<'a>,
        pub image: usize,
        pub rows: Range<usize>,
    }

    impl NullaryFnOnce for Rows<'_> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            let width = self.output.layout.dims.w;
            for y in self.rows.clone() {
                let mut x = 0;
                while x < width {
                    // SAFETY: the contract of `Grouped::rows`; a tile ends with the row.
                    unsafe {
                        if x + COLUMNS <= width {
                            self.tile::<COLUMNS>(y, x);
                            x += COLUMNS;
                        } else {
                            self.tile::<1>(y, x);
                            x += 1;
                        }
                    }
                }
            }
        }
    }

    impl Rows<'_> {
        /// `N` output pixels of a row, all channels.
        #[inline(always)]
        unsafe fn tile<const N: usize>(&self, y: usize, x: usize) {
            let avx = self.simd.avx;
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
                for c in (0..channels).step_by(LANES) {
                    let mut sums = [avx._mm256_setzero_ps(); N];
                    for ky in 0..kh {
                        for kx in 0..kw {
                            let pixel = input.add(ky * row + kx * channels + c);
                            let w0 = avx._mm256_loadu_ps(weight);
                            let w1 = avx._mm256_loadu_ps(weight.add(LANES));
                            let w2 = avx._mm256_loadu_ps(weight.add(2 * LANES));
                            let w3 = avx._mm256_loadu_ps(weight.add(3 * LANES));
                            weight = weight.add(GROUP * LANES);
                            for (n, sum) in sums.iter_mut().enumerate() {
                                let v = avx._mm256_loadu_ps(pixel.add(n * step));
                                *sum = self.add_product(avx._mm256_permute_ps::<0x00>(v), w0, *sum);
                                *sum = self.add_product(avx._mm256_permute_ps::<0x55>(v), w1, *sum);
                                *sum = self.add_product(avx._mm256_permute_ps::<0xaa>(v), w2, *sum);
                                *sum = self.add_product(avx._mm256_permute_ps::<0xff>(v), w3, *sum);
                            }
                        }
                    }
                    let bias = avx._mm256_loadu_ps(self.epilogue.bias.as_ptr().add(c));
                    for (n, sum) in sums.into_iter().enumerate() {
                        let at = n * channels + c;
                        let mut value = avx._mm256_add_ps(sum, bias);
                        if let Some(residual) = residual {
                            let other = avx._mm256_loadu_ps(residual.add(at));
                            value = avx._mm256_add_ps(value, other);
                        }
                        if let Some(activation) = self.epilogue.activation {
                            let vector = cast(value);
                            let vector =
                                elementwise::activate_vector(self.simd, activation, vector);
                            value = cast(vector);
                        }
                        avx._mm256_storeu_ps(output.add(at), value);
                    }
                }
            }
        }

        #[inline(always)]
        fn add_product(&self, a: __m256, b: __m256, sum: __m256) -> __m256 {
            self.simd.fma._mm256_fmadd_ps(a, b, sum)
        }
    }
}
