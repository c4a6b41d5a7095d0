//! Depthwise convolutions: channels are lanes, and seven output columns are computed at a time,
//! so that each weight is read once for seven products.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::gemm::Epilogue;
use super::isa::{Isa, load, store};
use super::{Source, Target, Window, elementwise};

/// Columns of a tile.
const COLUMNS: usize = 7;

/// A depthwise convolution.
pub struct Depthwise {
    pub isa: Isa,
    pub window: Window,
    /// `[kernel height, kernel width, C]`
    pub weights: Vec<f32>,
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
        assert_eq!(epilogue.bias.len(), output.layout.dims.c);
        self.isa.dispatch(Rows {
            conv: self,
            input,
            output,
            residual,
            epilogue,
            image,
            rows,
        });
    }
}

struct Rows<'a> {
    conv: &'a Depthwise,
    input: &'a Source,
    output: &'a Target,
    residual: Option<&'a Source>,
    epilogue: Epilogue<'a>,
    image: usize,
    rows: Range<usize>,
}

/// Pointers at the first channel of a tile.
#[derive(Clone, Copy)]
struct Place {
    input: *const f32,
    output: *mut f32,
    residual: Option<*const f32>,
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.output.layout.dims.w;
        for y in self.rows.clone() {
            let mut x = 0;
            while x < width {
                // SAFETY: the contract of `Depthwise::rows`; a tile ends with the row.
                unsafe {
                    let place = Place {
                        input: self.input.image(self.image).add(self.conv.window.offset(
                            &self.input.layout,
                            y,
                            x,
                        )),
                        output: self
                            .output
                            .image(self.image)
                            .add(self.output.layout.offset(y, x)),
                        residual: self
                            .residual
                            .map(|r| r.image(self.image).add(r.layout.offset(y, x))),
                    };
                    if x + COLUMNS <= width {
                        self.tile::<S, COLUMNS>(simd, place);
                        x += COLUMNS;
                    } else {
                        self.tile::<S, 1>(simd, place);
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
    unsafe fn tile<S: Simd, const N: usize>(&self, simd: S, place: Place) {
        let channels = self.output.layout.dims.c;
        let lanes = S::F32_LANES;
        let mut c = 0;
        // SAFETY: channels `c..c + lanes` exist; fewer are computed one by one.
        unsafe {
            while c + lanes <= channels {
                self.vector::<S, N>(simd, place, c);
                c += lanes;
            }
            if c < channels && channels >= lanes {
                // The last vector overlaps the one before: the same values are stored again. Not
                // so where the residual is read from what is written, which a plan never does.
                self.vector::<S, N>(simd, place, channels - lanes);
            } else {
                while c < channels {
                    self.vector::<pulp::Scalar, N>(pulp::Scalar, place, c);
                    c += 1;
                }
            }
        }
    }

    /// `N` output pixels, one vector of channels.
    #[inline(always)]
    unsafe fn vector<S: Simd, const N: usize>(&self, simd: S, place: Place, c: usize) {
        let [kh, kw] = self.conv.window.kernel;
        let channels = self.output.layout.dims.c;
        let row = self.input.layout.row_stride();
        let step = self.conv.window.stride * channels;
        let mut sums = [simd.splat_f32s(0.0); N];
        // SAFETY: the windows of the tile's pixels lie in the input with its border.
        unsafe {
            let mut weight = self.conv.weights.as_ptr().add(c);
            for ky in 0..kh {
                let mut input = place.input.add(ky * row + c);
                for _ in 0..kw {
                    let w = load::<S>(weight);
                    for (n, sum) in sums.iter_mut().enumerate() {
                        *sum = simd.mul_add_e_f32s(load::<S>(input.add(n * step)), w, *sum);
                    }
                    weight = weight.add(channels);
                    input = input.add(channels);
                }
            }
            let bias = load::<S>(self.epilogue.bias.as_ptr().add(c));
            for (n, sum) in sums.into_iter().enumerate() {
                let at = n * channels + c;
                let mut value = simd.add_f32s(sum, bias);
                if let Some(residual) = place.residual {
                    value = simd.add_f32s(value, load::<S>(residual.add(at)));
                }
                if let Some(activation) = self.epilogue.activation {
                    value = elementwise::activate_vector(simd, activation, value);
                }
                store::<S>(place.output.add(at), value);
            }
        }
    }
}
