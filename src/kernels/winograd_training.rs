//! Winograd's convolutions in training: the tiles of [`super::winograd`], with transformed values
//! in panels, which serve a product's left side and a transposed product alike.
//!
//! With Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A for weights g and input tile d, the weights' gradient is the
//! adjoint, Gᵀ[Σ (A dY Aᵀ) ⊙ (Bᵀ d B)]G, summed over tiles; the input's gradient is a convolution
//! of dY with the kernel turned round.

#![allow(clippy::needless_range_loop)] // small matrices, walked by rows and by columns

use pulp::{Simd, WithSimd};

use super::gemm::{Epilogue, Packed, Rows, gemm};
use super::isa::{Isa, load, store};
use super::transposed::PANEL;
use super::winograd::{A, AA, B, BB, input_transform, kernel_transform, output_transform};
use super::{Source, Target};

/// Tiles of T rows and columns, 6 or 4.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    pub tile: usize,
    /// Tiles down and across an image, or a strip of one.
    pub rows: usize,
    pub columns: usize,
}

impl Tiles {
    /// Tiles over outputs of so many rows and columns.
    pub fn over(tile: usize, height: usize, width: usize) -> Self {
        Self {
            tile,
            rows: height.div_ceil(tile - 2),
            columns: width.div_ceil(tile - 2),
        }
    }

    /// Number of tiles.
    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// Number of independent products.
    pub fn frequencies(&self) -> usize {
        self.tile * self.tile
    }

    /// Rows of a strip that the tiles read: one above, and as far as the last tile reaches.
    pub fn strip_rows(&self) -> usize {
        self.rows * (self.tile - 2) + 2
    }

    /// Columns of zeros that a strip of `width` needs right of it; it has one left of it.
    pub fn right(&self, width: usize) -> usize {
        self.columns * (self.tile - 2) + 1 - width
    }
}

/// Transformed tiles in panels: `[frequency][channels / 16][tiles][16]`.
#[derive(Clone, Copy)]
pub struct TilePanels {
    pub pointer: *mut f32,
    /// From a frequency to the next, and from a panel to the next.
    pub frequency: usize,
    pub panel: usize,
}

/// What a tile is transformed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Bᵀ d B of T x T pixels: an input, or a gradient on its way to the input.
    Input,
    /// A dY Aᵀ of the (T - 2) x (T - 2) pixels in the middle: a gradient on its way to the
    /// weights.
    Gradient,
}

/// Transforms the tiles of one image's strip, which begins one row above and one column left of
/// the first output pixel. The first becomes row `first` of the panels.
///
/// # Safety
/// The strip reaches as far as the tiles, its channels fill whole panels, and the panels have
/// those rows, for the caller alone.
pub unsafe fn transform(
    isa: Isa,
    side: Side,
    tiles: Tiles,
    strip: &Source,
    image: usize,
    to: TilePanels,
    first: usize,
) {
    isa.dispatch(Transform {
        side,
        tiles,
        strip,
        image,
        to,
        first,
    });
}

struct Transform<'a> {
    side: Side,
    tiles: Tiles,
    strip: &'a Source,
    image: usize,
    to: TilePanels,
    first: usize,
}

impl WithSimd for Transform<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: the contract of `transform`.
        unsafe {
            match (self.tiles.tile, self.side) {
                (6, Side::Input) => self.tiles::<S, 6, true>(simd),
                (6, Side::Gradient) => self.tiles::<S, 6, false>(simd),
                (_, Side::Input) => self.tiles::<S, 4, true>(simd),
                (_, Side::Gradient) => self.tiles::<S, 4, false>(simd),
            }
        }
    }
}

impl Transform<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const T: usize, const INPUT: bool>(&self, simd: S) {
        let layout = &self.strip.layout;
        let channels = layout.dims.c;
        let row = layout.row_stride();
        // Pixels that are read: all of the tile, or its middle.
        let (begin, size) = if INPUT { (0, T) } else { (1, T - 2) };
        for ty in 0..self.tiles.rows {
            for tx in 0..self.tiles.columns {
                let at = (ty * (T - 2) + begin) * row + (tx * (T - 2) + begin) * channels;
                let index = self.first + ty * self.tiles.columns + tx;
                // SAFETY: the contract of `transform`.
                unsafe {
                    let from = self.strip.image(self.image).add(at);
                    let to = self.to.pointer.add(index * PANEL);
                    for c in (0..channels).step_by(S::F32_LANES) {
                        let to = to.add(c / PANEL * self.to.panel + c % PANEL);
                        let mut half = [[simd.splat_f32s(0.0); T]; T];
                        for j in 0..size {
                            let mut column = [simd.splat_f32s(0.0); T];
                            for i in 0..size {
                                column[i] = load::<S>(from.add(i * row + j * channels + c));
                            }
                            let column = one_axis::<S, T, INPUT>(simd, column);
                            for i in 0..T {
                                half[i][j] = column[i];
                            }
                        }
                        for (i, line) in half.into_iter().enumerate() {
                            let line = one_axis::<S, T, INPUT>(simd, line);
                            for (j, value) in line.into_iter().enumerate() {
                                store::<S>(to.add((i * T + j) * self.to.frequency), value);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn one_axis<S: Simd, const T: usize, const INPUT: bool>(
    simd: S,
    values: [S::f32s; T],
) -> [S::f32s; T] {
    if INPUT {
        input_transform::<S, T>(simd, values)
    } else {
        gradient_transform::<S, T>(simd, values)
    }
}

/// One axis of A: the outputs' transform turned round. The first T - 2 values count.
#[inline(always)]
fn gradient_transform<S: Simd, const T: usize>(simd: S, y: [S::f32s; T]) -> [S::f32s; T] {
    let add = |a, b| simd.add_f32s(a, b);
    let sub = |a, b| simd.sub_f32s(a, b);
    let times = |a, scale: f32| simd.mul_f32s(a, simd.splat_f32s(scale));
    let fma = |a, scale: f32, b| simd.mul_add_e_f32s(a, simd.splat_f32s(scale), b);
    let mut out = y;
    if T == 6 {
        // Rows of A: powers 0 to 3 of each point, and the last alone.
        let even_a = fma(y[2], AA, y[0]);
        let odd_a = fma(y[3], A * AA, times(y[1], A));
        let even_b = fma(y[2], BB, y[0]);
        let odd_b = fma(y[3], B * BB, times(y[1], B));
        out[0] = y[0];
        out[1] = add(even_a, odd_a);
        out[2] = sub(even_a, odd_a);
        out[3] = add(even_b, odd_b);
        out[4] = sub(even_b, odd_b);
        out[5] = y[3];
    } else {
        // 1 0; 1 1; 1 -1; 0 -1.
        out[0] = y[0];
        out[1] = add(y[0], y[1]);
        out[2] = sub(y[0], y[1]);
        out[3] = times(y[1], -1.0);
    }
    out
}

/// The products of `count` tiles in panels with the weights of every frequency, to
/// `[frequency, tiles, outputs]`.
///
/// # Safety
/// The panels hold those tiles, and `products` has the room, for the caller alone.
pub unsafe fn multiply(
    weights: &[Packed],
    from: TilePanels,
    count: usize,
    products: *mut f32,
    outputs: usize,
    rows: &mut Rows,
) {
    let panels = weights[0].depth() / PANEL;
    let taps: Vec<usize> = (0..panels).map(|panel| panel * from.panel).collect();
    let nothing = Epilogue {
        bias: &[],
        activation: None,
    };
    for (frequency, packed) in weights.iter().enumerate() {
        rows.clear();
        // SAFETY: as the caller promises.
        unsafe {
            let input = from.pointer.add(frequency * from.frequency);
            let output = products.add(frequency * count * outputs);
            for tile in 0..count {
                rows.push(input.add(tile * PANEL), output.add(tile * outputs), None);
            }
            gemm(packed, 0..packed.panel_count(), rows, &taps, nothing);
        }
    }
}

/// Transforms the products of one image's tiles back, adds the bias and stores the pixels.
/// The image's first tile is row `first` of `count`.
///
/// # Safety
/// The products are there; the image's pixels are the caller's own.
#[allow(clippy::too_many_arguments)] // products, and an image
pub unsafe fn finish(
    isa: Isa,
    tiles: Tiles,
    products: *const f32,
    (first, count): (usize, usize),
    bias: &[f32],
    output: &Target,
    image: usize,
) {
    assert_eq!(bias.len(), output.layout.dims.c);
    isa.dispatch(Finish {
        tiles,
        products,
        first,
        count,
        bias,
        output,
        image,
    });
}

struct Finish<'a> {
    tiles: Tiles,
    products: *const f32,
    first: usize,
    count: usize,
    bias: &'a [f32],
    output: &'a Target,
    image: usize,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: the contract of `finish`.
        unsafe {
            if self.tiles.tile == 6 {
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
        let layout = &self.output.layout;
        let channels = layout.dims.c;
        let frequency = self.count * channels;
        for index in 0..self.tiles.count() {
            let y = index / self.tiles.columns * (T - 2);
            let x = index % self.tiles.columns * (T - 2);
            let rows = (T - 2).min(layout.dims.h - y);
            let columns = (T - 2).min(layout.dims.w - x);
            // SAFETY: the contract of `finish`; only pixels of the image are stored.
            unsafe {
                let from = self.products.add((self.first + index) * channels);
                for c in (0..channels).step_by(S::F32_LANES) {
                    let mut half = [[simd.splat_f32s(0.0); T]; T];
                    for j in 0..T {
                        let mut column = [simd.splat_f32s(0.0); T];
                        for i in 0..T {
                            column[i] = load::<S>(from.add((i * T + j) * frequency + c));
                        }
                        let column = output_transform::<S, T>(simd, column);
                        for i in 0..T - 2 {
                            half[i][j] = column[i];
                        }
                    }
                    let bias = load::<S>(self.bias.as_ptr().add(c));
                    for (i, line) in half.into_iter().enumerate().take(rows) {
                        let line = output_transform::<S, T>(simd, line);
                        for (j, value) in line.into_iter().enumerate().take(columns) {
                            let at = layout.offset(y + i, x + j) + c;
                            let to = self.output.image(self.image).add(at);
                            store::<S>(to, simd.add_f32s(value, bias));
                        }
                    }
                }
            }
        }
    }
}

/// Columns and rows of weights that are transformed at a time.
const LINE: usize = 16;
const ROWS: usize = 8;

/// Transforms weights `[outputs, inputs, 3, 3]` into the products of every frequency. With `turned`
/// the kernel is turned round, and what was an output is what goes in.
pub fn load_weights(isa: Isa, weight: &[f32], turned: bool, weights: &mut [Packed]) {
    match weights.len() {
        36 => load_tiles::<6>(isa, weight, turned, weights),
        _ => load_tiles::<4>(isa, weight, turned, weights),
    }
}

fn load_tiles<const T: usize>(isa: Isa, weight: &[f32], turned: bool, weights: &mut [Packed]) {
    let mut g = [[0.0_f32; 3]; T];
    for (to, row) in g.iter_mut().zip(kernel_transform(T)) {
        *to = row.map(|v| v as f32);
    }
    let depth = weights[0].depth();
    let columns = weight.len() / 9 / depth;
    let inputs = if turned { columns } else { depth };
    // The products of all frequencies begin in the same set of the cache: a few rows of each are written
    // one after the other.
    let mut transformed = [[[[0.0_f32; LINE]; ROWS]; T]; T];
    // In the order in which weights lie there.
    let (lines, blocks) = (columns.div_ceil(LINE), depth.div_ceil(ROWS));
    for index in 0..lines * blocks {
        let (line, block) = match turned {
            false => (index / blocks, index % blocks),
            true => (index % lines, index / lines),
        };
        let (start, first) = (line * LINE, block * ROWS);
        let (width, rows) = (LINE.min(columns - start), ROWS.min(depth - first));
        isa.compiled(
            #[inline(always)]
            || {
                for row in 0..rows {
                    let mut taps = [[0.0_f32; LINE]; 9];
                    let (at, step) = match turned {
                        false => (start * inputs + first + row, inputs),
                        true => ((first + row) * inputs + start, 1),
                    };
                    let kernels = weight[at * 9..].chunks(step * 9).take(width);
                    for (column, kernel) in kernels.enumerate() {
                        for tap in 0..9 {
                            taps[tap][column] = kernel[tap];
                        }
                    }
                    if turned {
                        taps.reverse();
                    }
                    for (gy, lines) in g.iter().zip(&mut transformed) {
                        let mut half = [[0.0_f32; LINE]; 3];
                        for kx in 0..3 {
                            for l in 0..LINE {
                                half[kx][l] = gy[0] * taps[kx][l]
                                    + gy[1] * taps[3 + kx][l]
                                    + gy[2] * taps[6 + kx][l];
                            }
                        }
                        for (gx, lines) in g.iter().zip(lines) {
                            let line = &mut lines[row];
                            for l in 0..LINE {
                                line[l] =
                                    gx[0] * half[0][l] + gx[1] * half[1][l] + gx[2] * half[2][l];
                            }
                        }
                    }
                }
            },
        );
        for (packed, values) in weights.iter_mut().zip(transformed.as_flattened()) {
            packed.set_rows(first, start, &values[..rows], width);
        }
    }
}

/// The weights' gradient, Gᵀ U G, of sixteen outputs and some inputs, to `[16, inputs, 9]` with `stride`
/// values from an output to the next; `sum(frequency, input)` gives the sums U.
///
/// # Safety
/// There is so much room, and it is the caller's alone.
pub unsafe fn gradient_of_weights(
    isa: Isa,
    tile: usize,
    inputs: usize,
    sum: impl Fn(usize, usize) -> [f32; PANEL],
    to: *mut f32,
    stride: usize,
) {
    let g: Vec<[f32; 3]> = kernel_transform(tile)
        .into_iter()
        .map(|row| row.map(|v| v as f32))
        .collect();
    isa.compiled(
        #[inline(always)]
        || {
            for first in (0..inputs).step_by(INPUTS) {
                let inputs = INPUTS.min(inputs - first);
                let mut taps = [[[0.0_f32; PANEL]; 9]; INPUTS];
                for (input, out) in taps[..inputs].iter_mut().enumerate() {
                    for (fy, gy) in g.iter().enumerate() {
                        let mut half = [[0.0_f32; PANEL]; 3];
                        for (fx, gx) in g.iter().enumerate() {
                            let values = sum(fy * tile + fx, first + input);
                            for kx in 0..3 {
                                for l in 0..PANEL {
                                    half[kx][l] += gx[kx] * values[l];
                                }
                            }
                        }
                        for ky in 0..3 {
                            for kx in 0..3 {
                                for l in 0..PANEL {
                                    out[ky * 3 + kx][l] += gy[ky] * half[kx][l];
                                }
                            }
                        }
                    }
                }
                let taps = taps[..inputs].as_flattened();
                for o in 0..PANEL {
                    // SAFETY: as the caller promises.
                    let to = unsafe {
                        let to = to.add(o * stride + first * 9);
                        std::slice::from_raw_parts_mut(to, taps.len())
                    };
                    for (to, tap) in to.iter_mut().zip(taps) {
                        *to = tap[o];
                    }
                }
            }
        },
    );
}

/// Inputs whose gradients are handed out together: whole lines of memory.
const INPUTS: usize = 16;
