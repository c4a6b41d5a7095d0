//! Convolutions with eight or sixteen channels a group, as the middle stages of ResNeXt have them:
//! a vector or two of outputs, and so few inputs that a product would spend its time on finding
//! each pixel's window.
//!
//! Sixteen channels, a cache line of each pixel, are copied out of some input rows into strips, one
//! for each of their groups, `[rows, columns, width]`, which stay in the first-level cache: all
//! distances in them are known when this is compiled. Then a tile of output pixels is held in
//! registers while the window passes.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::gemm::{Epilogue, tiles};
use super::isa::{Isa, load, store};
use super::{Source, Target, Window, elementwise};

/// Channels that are copied at once.
const LINE: usize = 16;
/// Values of the strips: half of the first-level cache.
const STRIP_VALUES: usize = 4096;
/// Values of the input rows behind them, all channels: they stay in the second-level cache until
/// the last group has been copied.
const INPUT_VALUES: usize = 48 << 10;

/// A convolution with groups of as many outputs as inputs.
pub struct GroupedStrip {
    isa: Isa,
    window: Window,
    /// Channels of a group.
    width: usize,
    /// `[groups, kernel height, kernel width, inputs, outputs]`
    weights: Vec<f32>,
}

impl GroupedStrip {
    /// Whether this machine's vectors and these channels are served.
    pub fn fits(isa: Isa, window: &Window, channels: usize, groups: usize) -> bool {
        let width = channels / groups;
        let lanes = Self::isa(isa, width).lanes();
        matches!(width, 8 | 16)
            && channels == groups * width
            && (1..=2).contains(&window.stride)
            && lanes > 1
            && (width == lanes || width == 2 * lanes)
    }

    /// Vectors that a group fills.
    fn isa(isa: Isa, width: usize) -> Isa {
        if isa.lanes() > width {
            isa.narrower()
        } else {
            isa
        }
    }

    /// Packs weights; `weight(output, input of its group, tap)`.
    pub fn new(
        isa: Isa,
        window: Window,
        [channels, groups]: [usize; 2],
        weight: impl Fn(usize, usize, usize) -> f32,
    ) -> Self {
        assert!(Self::fits(isa, &window, channels, groups));
        let width = channels / groups;
        let taps = window.kernel[0] * window.kernel[1];
        let mut weights = Vec::with_capacity(channels * width * taps);
        for group in 0..groups {
            for tap in 0..taps {
                for i in 0..width {
                    let outputs = group * width..(group + 1) * width;
                    weights.extend(outputs.map(|o| weight(o, i, tap)));
                }
            }
        }
        Self {
            isa: Self::isa(isa, width),
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
    #[allow(clippy::too_many_arguments)] // as the other convolutions, and a scratch
    pub unsafe fn rows(
        &self,
        input: &Source,
        output: &Target,
        residual: Option<&Source>,
        epilogue: Epilogue,
        image: usize,
        rows: Range<usize>,
        scratch: &mut Vec<f32>,
    ) {
        assert_eq!(epilogue.bias.len(), output.layout.dims.c);
        let [kh, kw] = self.window.kernel;
        let stride = self.window.stride;
        let columns = (output.layout.dims.w - 1) * stride + kw;
        // As many rows as the caches hold, and at least one.
        let channels = input.layout.dims.c;
        let held = (STRIP_VALUES / LINE).min(INPUT_VALUES / channels) / columns;
        let at_once = (held.saturating_sub(kh) / stride + 1).min(rows.len().max(1));
        let strip = ((at_once - 1) * stride + kh) * columns * self.width;
        scratch.resize(strip * (LINE / self.width), f32::NAN);
        self.isa.dispatch(Work {
            conv: self,
            input,
            output,
            residual,
            epilogue,
            image,
            rows,
            columns,
            at_once,
            strip_len: strip,
            strips: scratch.as_mut_ptr(),
        });
    }
}

struct Work<'a> {
    conv: &'a GroupedStrip,
    input: &'a Source,
    output: &'a Target,
    residual: Option<&'a Source>,
    epilogue: Epilogue<'a>,
    image: usize,
    rows: Range<usize>,
    /// Of a strip.
    columns: usize,
    /// Output rows of a strip.
    at_once: usize,
    /// Values from a group's strip to the next one's.
    strip_len: usize,
    strips: *mut f32,
}

impl WithSimd for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: the contract of `GroupedStrip::rows`.
        unsafe {
            match (S::F32_LANES, self.conv.width, self.conv.window.stride) {
                (8, 8, 1) => self.run::<S, 8, 1, 1>(simd),
                (8, 8, _) => self.run::<S, 8, 1, 2>(simd),
                (8, 16, 1) => self.run::<S, 16, 2, 1>(simd),
                (8, 16, _) => self.run::<S, 16, 2, 2>(simd),
                (16, 16, 1) => self.run::<S, 16, 1, 1>(simd),
                (16, 16, _) => self.run::<S, 16, 1, 2>(simd),
                (4, 8, 1) => self.run::<S, 8, 2, 1>(simd),
                (4, 8, _) => self.run::<S, 8, 2, 2>(simd),
                _ => unreachable!("`GroupedStrip::fits` was asked before"),
            }
        }
    }
}

impl Work<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, const WIDTH: usize, const NV: usize, const STRIDE: usize>(
        &self,
        simd: S,
    ) {
        let groups = self.conv.weights.len() / self.weights_of_group();
        for start in self.rows.clone().step_by(self.at_once) {
            let rows = start..(start + self.at_once).min(self.rows.end);
            let together = LINE / WIDTH;
            for first in (0..groups).step_by(together) {
                let count = together.min(groups - first);
                // SAFETY: the contract of `GroupedStrip::rows`; a strip for each of the groups.
                unsafe {
                    self.fill::<WIDTH>(&rows, first, count);
                    for index in 0..count {
                        let strip = self.strips.add(index * self.strip_len);
                        for y in rows.clone() {
                            let line = strip.add((y - start) * STRIDE * self.columns * WIDTH);
                            self.line::<S, WIDTH, NV, STRIDE>(simd, y, line, first + index);
                            self.finish::<S, WIDTH>(simd, y, first + index);
                        }
                    }
                }
            }
        }
    }

    fn weights_of_group(&self) -> usize {
        let [kh, kw] = self.conv.window.kernel;
        kh * kw * self.conv.width * self.conv.width
    }

    /// Copies what the windows of some output rows read of some groups.
    #[inline(always)]
    unsafe fn fill<const WIDTH: usize>(&self, rows: &Range<usize>, group: usize, count: usize) {
        let Window { kernel, stride, .. } = self.conv.window;
        let layout = &self.input.layout;
        let mut to = self.strips.cast::<[f32; WIDTH]>();
        // SAFETY: windows of output pixels; the strips have room for them.
        unsafe {
            let at = self.conv.window.offset(layout, rows.start, 0) + group * WIDTH;
            let first = self.input.image(self.image).add(at);
            for y in 0..(rows.len() - 1) * stride + kernel[0] {
                let mut from = first.add(y * layout.row_stride());
                for _ in 0..self.columns {
                    for index in 0..count {
                        let values = from.cast::<[f32; WIDTH]>().add(index).read_unaligned();
                        to.add(index * (self.strip_len / WIDTH))
                            .write_unaligned(values);
                    }
                    to = to.add(1);
                    from = from.add(layout.dims.c);
                }
            }
        }
    }

    /// A group's sums of a row; the first row of its windows begins at `line`.
    #[inline(always)]
    unsafe fn line<S: Simd, const WIDTH: usize, const NV: usize, const STRIDE: usize>(
        &self,
        simd: S,
        y: usize,
        line: *const f32,
        group: usize,
    ) {
        // As many chains of multiply-adds as registers hold beside a value and its weights.
        let most = if NV == 1 { 12 } else { 6 };
        let mut x = 0;
        macro_rules! in_tiles {
            ($($columns:literal)*) => {
                for (size, times) in tiles(self.output.layout.dims.w, most) {
                    match size {
                        $($columns if $columns <= 6 || NV == 1 => for _ in 0..times {
                            // SAFETY: tiles cover the row.
                            unsafe {
                                self.tile::<S, WIDTH, NV, STRIDE, $columns>(simd, [y, x], line, group);
                            }
                            x += $columns;
                        },)*
                        _ => {}
                    }
                }
            };
        }
        in_tiles!(1 2 3 4 5 6 7 8 9 10 11 12);
    }

    /// `N` pixels of a row from `x` on. Every output is the same chain of multiply-adds whatever
    /// the tile: bias first, then the window row by row.
    #[inline(always)]
    unsafe fn tile<
        S: Simd,
        const WIDTH: usize,
        const NV: usize,
        const STRIDE: usize,
        const N: usize,
    >(
        &self,
        simd: S,
        [y, x]: [usize; 2],
        line: *const f32,
        group: usize,
    ) {
        let lanes = S::F32_LANES;
        let [kh, kw] = self.conv.window.kernel;
        let layout = self.output.layout;
        // SAFETY: pixels of the row and of the strip, and a group's weights and channels.
        unsafe {
            let bias = self.epilogue.bias.as_ptr().add(group * WIDTH);
            let mut first = [simd.splat_f32s(0.0); NV];
            for (v, bias_vector) in first.iter_mut().enumerate() {
                *bias_vector = load::<S>(bias.add(v * lanes));
            }
            let mut sums = [first; N];
            let weights = self.conv.weights.as_ptr();
            let mut weight = weights.add(group * self.weights_of_group());
            for ky in 0..kh {
                let mut pixel = line.add((ky * self.columns + x * STRIDE) * WIDTH);
                for _ in 0..kw {
                    for i in 0..WIDTH {
                        let mut columns = [simd.splat_f32s(0.0); NV];
                        for (v, column) in columns.iter_mut().enumerate() {
                            *column = load::<S>(weight.add(v * lanes));
                        }
                        weight = weight.add(WIDTH);
                        for (n, sums) in sums.iter_mut().enumerate() {
                            let value = simd.splat_f32s(*pixel.add(n * STRIDE * WIDTH + i));
                            for (sum, column) in sums.iter_mut().zip(columns) {
                                *sum = simd.mul_add_e_f32s(value, column, *sum);
                            }
                        }
                    }
                    pixel = pixel.add(WIDTH);
                }
            }
            let output = self.output.image(self.image);
            let output = output.add(layout.offset(y, x) + group * WIDTH);
            for (n, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    store::<S>(output.add(n * layout.dims.c + v * lanes), sum);
                }
            }
        }
    }

    /// Residual and activation of a group's outputs of a row.
    #[inline(always)]
    unsafe fn finish<S: Simd, const WIDTH: usize>(&self, simd: S, y: usize, group: usize) {
        if self.residual.is_none() && self.epilogue.activation.is_none() {
            return;
        }
        let layout = self.output.layout;
        // SAFETY: a group's channels of the row.
        unsafe {
            let at = layout.offset(y, 0) + group * WIDTH;
            let mut output = self.output.image(self.image).add(at);
            let mut residual = self.residual.map(|residual| {
                let at = residual.layout.offset(y, 0) + group * WIDTH;
                residual.image(self.image).add(at)
            });
            for _ in 0..layout.dims.w {
                for c in (0..WIDTH).step_by(S::F32_LANES) {
                    let mut value = load::<S>(output.add(c));
                    if let Some(residual) = residual {
                        value = simd.add_f32s(value, load::<S>(residual.add(c)));
                    }
                    if let Some(activation) = self.epilogue.activation {
                        value = elementwise::activate_vector(simd, activation, value);
                    }
                    store::<S>(output.add(c), value);
                }
                output = output.add(layout.dims.c);
                residual = residual.map(|residual| residual.add(layout.dims.c));
            }
        }
    }
}
