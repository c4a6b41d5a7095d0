//! Winograd's convolutions (Lavin & Gray 2015, <https://arxiv.org/abs/1509.09308>): 3x3, stride 1.
//!
//! A tile of T x T input pixels (T = 6 or 4) gives (T - 2) x (T - 2) output pixels with T² instead
//! of 9·(T - 2)² products a channel pair. Input tiles are transformed, multiplied with transformed
//! weights in T² independent matrix products (one a frequency), and transformed back. The digits
//! differ from a direct sum's: relative to the largest output by about 3e-6 for T = 6, 1e-6 for 4.

#![allow(clippy::needless_range_loop)] // small matrices, walked by rows and by columns

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::gemm::{Epilogue, Packed, Rows, gemm};
use super::isa::{Isa, load, store};
use super::memory::{Block, Slab};
use super::{Border, Dims, Source, Target, elementwise};

/// A convolution with transformed weights.
pub struct Winograd {
    isa: Isa,
    /// Input tile's rows and columns: 6 or 4.
    tile: usize,
    inputs: usize,
    outputs: usize,
    /// For each frequency `[inputs, outputs]`.
    weights: Vec<Packed>,
}

/// Values of a line of the cache. Frequencies lie one line more apart than they take: at powers of two
/// all would be in the same set of the cache, which does not hold so many.
pub const LINE: usize = 16;

/// Values from a frequency of so many tiles to the next.
pub fn apart(tiles: usize, channels: usize) -> usize {
    tiles * channels + LINE
}

/// Scratch for a chunk of tiles: transformed inputs `[T², tiles, inputs]`, products
/// `[T², tiles, outputs]`, each frequency [`LINE`] values after the last.
pub struct Scratch {
    pub transformed: *mut f32,
    pub products: *mut f32,
    /// Tiles that there is room for.
    pub tiles: usize,
}

// SAFETY: addresses; each phase writes disjoint parts.
unsafe impl Send for Scratch {}
unsafe impl Sync for Scratch {}

impl Winograd {
    /// A convolution whose weights [`Winograd::store`] brings later.
    ///
    /// # Panics
    /// Where channels do not fill whole vectors; see [`Winograd::fits`].
    pub fn unfilled(isa: Isa, tile: usize, [outputs, inputs]: [usize; 2]) -> Self {
        assert!(Self::fits(isa, inputs, outputs));
        // Splitting tiles and products for a matrix unit takes longer than it saves.
        let isa = isa.vectors_only();
        let frequencies = 0..tile * tile;
        Self {
            isa,
            tile,
            inputs,
            outputs,
            weights: frequencies
                .map(|_| Packed::unfilled(isa, [1, inputs], outputs))
                .collect(),
        }
    }

    /// The same convolution again: weights stored in one of them are there in the other too.
    pub fn share(&self) -> Self {
        Self {
            weights: self.weights.iter().map(Packed::share).collect(),
            ..*self
        }
    }

    /// Transforms weights `[outputs, inputs, 3, 3]`, each output channel times its `scale`, into
    /// memory of the slab.
    ///
    /// # Panics
    /// Where the weights are those of another convolution, or are there already.
    pub fn store(&self, slab: &Slab, weight: &[f32], scale: &[f64]) {
        assert_eq!(scale.len(), self.outputs);
        assert_eq!(weight.len(), self.outputs * self.inputs * 9);
        // SAFETY: channels fill whole vectors, so that panels have no padding and all is written.
        let blocks = self
            .weights
            .iter()
            .map(|w| unsafe { slab.reserve(w.values_len()) });
        let blocks: Vec<Block> = blocks.collect();
        let to: Vec<*mut f32> = blocks.iter().map(Block::pointer).collect();
        let g = kernel_transform(self.tile);
        self.isa.compiled(
            #[inline(always)]
            || {
                for [start, width, offset] in self.weights[0].panels() {
                    for input in 0..self.inputs {
                        for first in (0..width).step_by(OUTPUTS) {
                            let outputs = start + first..start + width.min(first + OUTPUTS);
                            let at = offset + input * width + first;
                            // SAFETY: a part of that panel.
                            unsafe {
                                transform_kernels(
                                    &g,
                                    weight,
                                    [input, self.inputs],
                                    outputs,
                                    scale,
                                    &to,
                                    at,
                                );
                            }
                        }
                    }
                }
            },
        );
        for (weights, block) in self.weights.iter().zip(blocks) {
            weights.adopt(block);
        }
    }

    /// Whether channels fill whole vectors.
    pub fn fits(isa: Isa, inputs: usize, outputs: usize) -> bool {
        inputs.is_multiple_of(isa.lanes()) && outputs.is_multiple_of(isa.lanes())
    }

    /// Rows and columns of tiles over an output.
    fn grid(&self, output: Dims) -> [usize; 2] {
        [output.h, output.w].map(|size| size.div_ceil(self.tile - 2))
    }

    /// Tiles of an image.
    pub fn tiles(&self, output: Dims) -> usize {
        let [rows, columns] = self.grid(output);
        rows * columns
    }

    /// The border that the input needs: tiles may reach beyond the padding.
    pub fn border(&self, output: Dims) -> Border {
        let [rows, columns] = self.grid(output);
        let step = self.tile - 2;
        Border {
            top: 1,
            left: 1,
            bottom: rows * step + 1 - output.h,
            right: columns * step + 1 - output.w,
        }
    }

    /// Number of independent products.
    pub fn frequencies(&self) -> usize {
        self.tile * self.tile
    }

    /// Values of scratch for so many tiles: transformed and products.
    pub fn scratch(&self, tiles: usize) -> [usize; 2] {
        [self.inputs, self.outputs].map(|channels| self.frequencies() * apart(tiles, channels))
    }

    /// Tiles for which so many values of scratch suffice.
    pub fn tiles_within(&self, values: usize) -> usize {
        let lines = 2 * LINE;
        (values / self.frequencies()).saturating_sub(lines) / (self.inputs + self.outputs)
    }

    /// First phase: transforms input tiles, counted through all images, `chunk` being the tiles
    /// of the chunk and `tiles` the part of them to do.
    ///
    /// # Safety
    /// The input has those tiles and the border for them; the scratch has room for the chunk, and
    /// nobody else touches the part.
    pub unsafe fn transform(
        &self,
        input: &Source,
        scratch: &Scratch,
        chunk: usize,
        tiles: Range<usize>,
    ) {
        let phase = Transform {
            conv: self,
            input,
            scratch,
            chunk,
            tiles,
        };
        self.isa.dispatch(phase);
    }

    /// Second phase: the product of one frequency for `count` tiles of the chunk.
    ///
    /// # Safety
    /// The tiles have been transformed, and nobody else touches the frequency's products.
    pub unsafe fn multiply(
        &self,
        scratch: &Scratch,
        frequency: usize,
        count: usize,
        rows: &mut Rows,
    ) {
        rows.clear();
        // SAFETY: the scratch's frequency holds `scratch.tiles` rows.
        unsafe {
            let input = apart(scratch.tiles, self.inputs) * frequency;
            let input = scratch.transformed.add(input);
            let output = apart(scratch.tiles, self.outputs) * frequency;
            let output = scratch.products.add(output);
            for tile in 0..count {
                let (from, to) = (tile * self.inputs, tile * self.outputs);
                rows.push(input.add(from), output.add(to), None);
            }
            let packed = &self.weights[frequency];
            let nothing = Epilogue {
                bias: &[],
                activation: None,
            };
            gemm(packed, 0..packed.panel_count(), rows, &[0], nothing);
        }
    }

    /// Third phase: transforms products back and stores outputs; tiles as in the first.
    ///
    /// # Safety
    /// All frequencies have been multiplied; the output has those tiles, and nobody else touches
    /// them.
    #[allow(clippy::too_many_arguments)] // what the first phase takes, and the output's side
    pub unsafe fn finish(
        &self,
        output: &Target,
        residual: Option<&Source>,
        epilogue: Epilogue,
        scratch: &Scratch,
        chunk: usize,
        tiles: Range<usize>,
    ) {
        assert_eq!(epilogue.bias.len(), self.outputs);
        let phase = Finish {
            conv: self,
            output,
            residual,
            epilogue,
            scratch,
            chunk,
            tiles,
        };
        self.isa.dispatch(phase);
    }
}

/// Where a tile lies: image, and row and column of its first output pixel.
fn place(conv: &Winograd, output: Dims, tile: usize) -> [usize; 3] {
    let [rows, columns] = conv.grid(output);
    let step = conv.tile - 2;
    let (image, rest) = (tile / (rows * columns), tile % (rows * columns));
    [image, rest / columns * step, rest % columns * step]
}

/// Tiles of six evaluate polynomials at 0, ±A, ±B and infinity. The textbook's ±1 and ±2 lose more
/// than twice as many digits: 3.1e-6 of the outputs' norm for 256 channels, against 1.4e-6. These
/// and their products are exact in float32.
pub(super) const A: f32 = 0.625;
pub(super) const B: f32 = 1.5;
pub(super) const AA: f32 = A * A;
pub(super) const BB: f32 = B * B;

/// The weights' transform G, T x 3.
pub(super) fn kernel_transform(tile: usize) -> Vec<[f64; 3]> {
    if tile == 6 {
        let (a, b) = (f64::from(A), f64::from(B));
        let row = |point: f64, other: f64| {
            let scale = 1.0 / (2.0 * point * point * (point * point - other * other));
            [scale, point * scale, point * point * scale]
        };
        vec![
            [1.0 / (a * a * b * b), 0.0, 0.0],
            row(a, b),
            row(-a, b),
            row(b, a),
            row(-b, a),
            [0.0, 0.0, 1.0],
        ]
    } else {
        assert_eq!(tile, 4, "tiles are of 4 or 6 rows");
        vec![
            [1.0, 0.0, 0.0],
            [0.5, 0.5, 0.5],
            [0.5, -0.5, 0.5],
            [0.0, 0.0, 1.0],
        ]
    }
}

/// Kernels that are transformed together.
const OUTPUTS: usize = 8;

/// Transforms the kernels of up to eight outputs for one input, in float64, and puts each frequency
/// behind its pointer.
///
/// # Safety
/// Behind each pointer lie as many values from `at` on as there are outputs.
#[inline(always)]
unsafe fn transform_kernels(
    g: &[[f64; 3]],
    weight: &[f32],
    [input, inputs]: [usize; 2],
    outputs: Range<usize>,
    scale: &[f64],
    to: &[*mut f32],
    at: usize,
) {
    let count = outputs.len();
    let mut taps = [[0.0; OUTPUTS]; 9];
    for (column, output) in outputs.enumerate() {
        let kernel = &weight[(output * inputs + input) * 9..][..9];
        for (tap, &value) in taps.iter_mut().zip(kernel) {
            tap[column] = f64::from(value) * scale[output];
        }
    }
    for (rows, to) in g.iter().zip(to.chunks_exact(g.len())) {
        let mut half = [[0.0; OUTPUTS]; 3];
        for kx in 0..3 {
            for c in 0..OUTPUTS {
                half[kx][c] =
                    rows[0] * taps[kx][c] + rows[1] * taps[3 + kx][c] + rows[2] * taps[6 + kx][c];
            }
        }
        for (columns, to) in g.iter().zip(to) {
            let mut values = [0.0_f32; OUTPUTS];
            for c in 0..OUTPUTS {
                let sum =
                    columns[0] * half[0][c] + columns[1] * half[1][c] + columns[2] * half[2][c];
                values[c] = sum as f32;
            }
            // SAFETY: as the caller promises.
            unsafe {
                to.add(at).copy_from_nonoverlapping(values.as_ptr(), count);
            }
        }
    }
}

struct Transform<'a> {
    conv: &'a Winograd,
    input: &'a Source,
    scratch: &'a Scratch,
    chunk: usize,
    tiles: Range<usize>,
}

impl WithSimd for Transform<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: the contract of `Winograd::transform`.
        unsafe {
            if self.conv.tile == 6 {
                self.tiles::<S, 6>(simd);
            } else {
                self.tiles::<S, 4>(simd);
            }
        }
    }
}

impl Transform<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const T: usize>(&self, simd: S) {
        let inputs = self.conv.inputs;
        let layout = &self.input.layout;
        let row = layout.row_stride();
        let frequency = apart(self.scratch.tiles, inputs);
        for tile in self.tiles.clone() {
            let [image, y, x] = place(self.conv, layout.dims, tile);
            // SAFETY: the tile begins a row above and a column before its first output pixel.
            unsafe {
                let at = (y + layout.border.top - 1) * row + (x + layout.border.left - 1) * inputs;
                let from = self.input.image(image).add(at);
                let to = self.scratch.transformed.add((tile - self.chunk) * inputs);
                for c in (0..inputs).step_by(S::F32_LANES) {
                    let mut half = [[simd.splat_f32s(0.0); T]; T];
                    for j in 0..T {
                        let mut column = [simd.splat_f32s(0.0); T];
                        for (i, value) in column.iter_mut().enumerate() {
                            *value = load::<S>(from.add(i * row + j * inputs + c));
                        }
                        let column = input_transform::<S, T>(simd, column);
                        for i in 0..T {
                            half[i][j] = column[i];
                        }
                    }
                    for (i, line) in half.into_iter().enumerate() {
                        let line = input_transform::<S, T>(simd, line);
                        for (j, value) in line.into_iter().enumerate() {
                            store::<S>(to.add((i * T + j) * frequency + c), value);
                        }
                    }
                }
            }
        }
    }
}

/// One axis of the inputs' transform, Bᵀ.
#[inline(always)]
pub(super) fn input_transform<S: Simd, const T: usize>(simd: S, d: [S::f32s; T]) -> [S::f32s; T] {
    let add = |a, b| simd.add_f32s(a, b);
    let sub = |a, b| simd.sub_f32s(a, b);
    // a · scale + b
    let fma = |a, scale: f32, b| simd.mul_add_e_f32s(a, simd.splat_f32s(scale), b);
    let mut out = d;
    if T == 6 {
        let (even_a, odd_a) = (fma(d[2], -BB, d[4]), fma(d[1], -BB, d[3]));
        let (even_b, odd_b) = (fma(d[2], -AA, d[4]), fma(d[1], -AA, d[3]));
        out[0] = fma(d[0], AA * BB, fma(d[2], -(AA + BB), d[4]));
        out[1] = fma(odd_a, A, even_a);
        out[2] = fma(odd_a, -A, even_a);
        out[3] = fma(odd_b, B, even_b);
        out[4] = fma(odd_b, -B, even_b);
        out[5] = fma(d[1], AA * BB, fma(d[3], -(AA + BB), d[5]));
    } else {
        out[0] = sub(d[0], d[2]);
        out[1] = add(d[1], d[2]);
        out[2] = sub(d[2], d[1]);
        out[3] = sub(d[1], d[3]);
    }
    out
}

struct Finish<'a> {
    conv: &'a Winograd,
    output: &'a Target,
    residual: Option<&'a Source>,
    epilogue: Epilogue<'a>,
    scratch: &'a Scratch,
    chunk: usize,
    tiles: Range<usize>,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: the contract of `Winograd::finish`.
        unsafe {
            if self.conv.tile == 6 {
                self.tiles::<S, 6>(simd);
            } else {
                self.tiles::<S, 4>(simd);
            }
        }
    }
}

impl Finish<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const T: usize>(&self, simd: S) {
        let outputs = self.conv.outputs;
        let layout = &self.output.layout;
        let Dims { h, w, .. } = layout.dims;
        let frequency = apart(self.scratch.tiles, outputs);
        for tile in self.tiles.clone() {
            let [image, y, x] = place(self.conv, layout.dims, tile);
            let rows = (T - 2).min(h - y);
            let columns = (T - 2).min(w - x);
            // SAFETY: the tile's products lie in the scratch; only pixels of the image are stored.
            unsafe {
                let from = self.scratch.products.add((tile - self.chunk) * outputs);
                for c in (0..outputs).step_by(S::F32_LANES) {
                    let mut half = [[simd.splat_f32s(0.0); T]; T];
                    for j in 0..T {
                        let mut column = [simd.splat_f32s(0.0); T];
                        for (i, value) in column.iter_mut().enumerate() {
                            *value = load::<S>(from.add((i * T + j) * frequency + c));
                        }
                        let column = output_transform::<S, T>(simd, column);
                        for i in 0..T - 2 {
                            half[i][j] = column[i];
                        }
                    }
                    let bias = load::<S>(self.epilogue.bias.as_ptr().add(c));
                    for (i, line) in half.into_iter().enumerate().take(rows) {
                        let line = output_transform::<S, T>(simd, line);
                        for (j, value) in line.into_iter().enumerate().take(columns) {
                            let mut value = simd.add_f32s(value, bias);
                            if let Some(residual) = self.residual {
                                let at = residual.layout.offset(y + i, x + j) + c;
                                let other = load::<S>(residual.image(image).add(at));
                                value = simd.add_f32s(value, other);
                            }
                            if let Some(activation) = self.epilogue.activation {
                                value = elementwise::activate_vector(simd, activation, value);
                            }
                            let at = layout.offset(y + i, x + j) + c;
                            store::<S>(self.output.image(image).add(at), value);
                        }
                    }
                }
            }
        }
    }
}

/// One axis of the outputs' transform, Aᵀ; the first T - 2 values count.
#[inline(always)]
pub(super) fn output_transform<S: Simd, const T: usize>(simd: S, m: [S::f32s; T]) -> [S::f32s; T] {
    let add = |a, b| simd.add_f32s(a, b);
    let sub = |a, b| simd.sub_f32s(a, b);
    let fma = |a, scale: f32, b| simd.mul_add_e_f32s(a, simd.splat_f32s(scale), b);
    let mut out = m;
    let (sum, difference) = (add(m[1], m[2]), sub(m[1], m[2]));
    if T == 6 {
        let (far_sum, far_difference) = (add(m[3], m[4]), sub(m[3], m[4]));
        let mul = |a, scale: f32| simd.mul_f32s(a, simd.splat_f32s(scale));
        out[0] = add(add(m[0], sum), far_sum);
        out[1] = fma(far_difference, B, mul(difference, A));
        out[2] = fma(far_sum, BB, mul(sum, AA));
        out[3] = add(fma(far_difference, B * BB, mul(difference, A * AA)), m[5]);
    } else {
        out[0] = add(m[0], sum);
        out[1] = sub(difference, m[3]);
    }
    out
}
