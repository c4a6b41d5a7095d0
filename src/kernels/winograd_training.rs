//! Winograd's convolutions in training: the tiles of [`super::winograd`], with transformed values
//! in panels, which serve a product's left side and a transposed product alike.
//!
//! With Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A for weights g and input tile d, the weights' gradient is the
//! adjoint, Gᵀ[Σ (A dY Aᵀ) ⊙ (Bᵀ d B)]G, summed over tiles; the input's gradient is a convolution
//! of dY with the kernel turned round.

#![allow(clippy::needless_range_loop)] // small matrices, walked by rows and by columns

use pulp::{Simd, WithSimd};

use super::gemm::{Epilogue, Packed, Rows, gemm};
use super::isa::{Isa, load, prefetch, prefetch_far, store};
use super::transposed::PANEL;
use super::winograd::{
    A, AA, B, BB, LINE, apart, input_transform, kernel_transform, output_transform,
};
use super::{Source, Target};

/// Rows and columns of a tile.
const T: usize = 6;
/// Rows and columns of outputs that a tile gives.
const STEP: usize = T - 2;
/// Number of independent products.
pub const FREQUENCIES: usize = T * T;

/// Tiles down and across an image, or a strip of one.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    pub rows: usize,
    pub columns: usize,
}

impl Tiles {
    /// Tiles over outputs of so many rows and columns.
    pub fn over(height: usize, width: usize) -> Self {
        Self {
            rows: height.div_ceil(STEP),
            columns: width.div_ceil(STEP),
        }
    }

    /// Number of tiles.
    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether tiles over such a map take at most half as many products as its windows do: those that reach
    /// beyond it compute outputs that nobody wants.
    pub fn pay_off(height: usize, width: usize) -> bool {
        const WINDOW: usize = 3 * 3;
        2 * T * T * Self::over(height, width).count() <= WINDOW * height * width
    }

    /// Rows of a strip that the tiles read: one above, and as far as the last tile reaches.
    pub fn strip_rows(&self) -> usize {
        self.rows * STEP + 2
    }

    /// Columns of zeros that a strip of `width` needs right of it; it has one left of it.
    pub fn right(&self, width: usize) -> usize {
        self.columns * STEP + 1 - width
    }
}

/// Values of the products of so many tiles with weights for so many outputs.
pub fn products_len(count: usize, outputs: usize) -> usize {
    FREQUENCIES * apart(count, outputs)
}

/// Transformed tiles in panels: `[frequency][channels / 16][tiles][16]`.
#[derive(Clone, Copy)]
pub struct TilePanels {
    pub pointer: *mut f32,
    /// From a frequency to the next, and from a panel to the next.
    pub frequency: usize,
    pub panel: usize,
}

// SAFETY: an address; who follows it promises what the functions' contracts say.
unsafe impl Send for TilePanels {}
unsafe impl Sync for TilePanels {}

impl TilePanels {
    /// Values that panels of so many channels and tiles take.
    pub fn len(channels: usize, tiles: usize) -> usize {
        FREQUENCIES * apart(tiles, channels)
    }

    /// Panels of so many channels and tiles, [`TilePanels::len`] values.
    pub fn new(pointer: *mut f32, channels: usize, tiles: usize) -> Self {
        Self {
            pointer,
            frequency: apart(tiles, channels),
            panel: tiles * PANEL,
        }
    }

    /// Those from a tile and a channel on, which begins a panel.
    pub fn part(self, tile: usize, channel: usize) -> Self {
        let at = channel / PANEL * self.panel + tile * PANEL;
        Self {
            pointer: self.pointer.wrapping_add(at),
            ..self
        }
    }
}

/// What a tile is transformed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Bᵀ d B of 6 x 6 pixels: an input, or a gradient on its way to the input.
    Input,
    /// A dY Aᵀ of the 4 x 4 pixels in the middle: a gradient on its way to the
    /// weights.
    Gradient,
}

/// Transforms the tiles of some images' strips, which begin one row above and one column left of the first
/// output pixel. The first tile becomes row `first` of the panels.
///
/// # Safety
/// The strips reach as far as the tiles, their channels fill whole panels, and the panels have
/// those rows, for the caller alone.
pub unsafe fn transform(
    isa: Isa,
    side: Side,
    tiles: Tiles,
    (strips, images): (&Source, usize),
    to: TilePanels,
    first: usize,
) {
    for image in 0..images {
        isa.dispatch(Transform {
            side,
            tiles,
            strip: strips,
            image,
            to,
            first: first + image * tiles.count(),
        });
    }
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
            match self.side {
                Side::Input => self.tiles::<S, true>(simd),
                Side::Gradient => self.tiles::<S, false>(simd),
            }
        }
    }
}

impl Transform<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd, const INPUT: bool>(&self, simd: S) {
        let layout = &self.strip.layout;
        let channels = layout.dims.c;
        let row = layout.row_stride();
        // Pixels that are read: all of the tile, or its middle.
        let (begin, size) = if INPUT { (0, T) } else { (1, STEP) };
        for ty in 0..self.tiles.rows {
            for tx in 0..self.tiles.columns {
                let at = (ty * STEP + begin) * row + (tx * STEP + begin) * channels;
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
                            let column = one_axis::<S, INPUT>(simd, column);
                            for i in 0..T {
                                half[i][j] = column[i];
                            }
                        }
                        for (i, line) in half.into_iter().enumerate() {
                            let line = one_axis::<S, INPUT>(simd, line);
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
fn one_axis<S: Simd, const INPUT: bool>(simd: S, values: [S::f32s; T]) -> [S::f32s; T] {
    if INPUT {
        input_transform::<S, T>(simd, values)
    } else {
        gradient_transform(simd, values)
    }
}

/// One axis of A: the outputs' transform turned round. The first four values count.
#[inline(always)]
fn gradient_transform<S: Simd>(simd: S, y: [S::f32s; T]) -> [S::f32s; T] {
    let add = |a, b| simd.add_f32s(a, b);
    let sub = |a, b| simd.sub_f32s(a, b);
    let times = |a, scale: f32| simd.mul_f32s(a, simd.splat_f32s(scale));
    let fma = |a, scale: f32, b| simd.mul_add_e_f32s(a, simd.splat_f32s(scale), b);
    // Rows of A: powers 0 to 3 of each point, and the last alone.
    let even_a = fma(y[2], AA, y[0]);
    let odd_a = fma(y[3], A * AA, times(y[1], A));
    let even_b = fma(y[2], BB, y[0]);
    let odd_b = fma(y[3], B * BB, times(y[1], B));
    [
        y[0],
        add(even_a, odd_a),
        sub(even_a, odd_a),
        add(even_b, odd_b),
        sub(even_b, odd_b),
        y[3],
    ]
}

/// The products of `count` tiles in panels with the weights of every frequency, to
/// `[frequency, tiles, outputs]`, [`products_len`] values; or added to what is there.
///
/// # Safety
/// The panels hold those tiles, and `products` has the room, for the caller alone.
pub unsafe fn multiply(
    weights: &Frequencies,
    from: TilePanels,
    count: usize,
    products: *mut f32,
    rows: &mut Rows,
    add: bool,
) {
    let panels = weights.depth / PANEL;
    let outputs = weights.columns;
    let apart = apart(count, outputs);
    let taps: Vec<usize> = (0..panels).map(|panel| panel * from.panel).collect();
    let nothing = Epilogue {
        bias: &[],
        activation: None,
    };
    for (frequency, packed) in weights.products.iter().enumerate() {
        rows.clear();
        // SAFETY: as the caller promises.
        unsafe {
            let input = from.pointer.add(frequency * from.frequency);
            let output = products.add(frequency * apart);
            rows.push_line(count, (input, PANEL), (output, outputs), None);
            if add {
                rows.add_to_outputs();
            }
            gemm(packed, 0..packed.panel_count(), rows, &taps, nothing);
        }
    }
}

/// Transforms the products of one image's tiles back, adds the bias and stores the pixels, of as many
/// channels as the bias has. The image's first tile is row `first` of `count`.
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
        unsafe { self.tiles(simd) };
    }
}

impl Finish<'_> {
    #[inline(always)]
    unsafe fn tiles<S: Simd>(&self, simd: S) {
        let layout = &self.output.layout;
        let channels = self.bias.len();
        let frequency = apart(self.count, channels);
        for index in 0..self.tiles.count() {
            let y = index / self.tiles.columns * STEP;
            let x = index % self.tiles.columns * STEP;
            let rows = STEP.min(layout.dims.h - y);
            let columns = STEP.min(layout.dims.w - x);
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
                        for i in 0..STEP {
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

/// Columns (one line) and rows of weights that are transformed at a time.
const ROWS: usize = 8;

/// Weights `[outputs, inputs, 3, 3]`. With `turned` the kernel is turned round, and what was an output is
/// what goes in.
#[derive(Clone, Copy)]
pub struct Kernels<'a> {
    pub weight: &'a [f32],
    pub inputs: usize,
    pub turned: bool,
}

/// Transformed weights: a product for each frequency, in memory that is lent.
pub struct Frequencies {
    isa: Isa,
    products: Vec<Packed>,
    depth: usize,
    columns: usize,
}

impl Frequencies {
    /// For so many channels that go in, and so many that come out. With `chains`, sums are those of sums over
    /// panels: of the outputs' norm they lose 4e-7 to 5e-7, where one chain of 64 values loses 7e-7 and one
    /// of 256 values 1.1e-6. A direct sum loses 3e-7 to 6e-7.
    pub fn new(isa: Isa, [depth, columns]: [usize; 2], chains: bool) -> Self {
        // Splitting tiles and products for a matrix unit takes longer than it saves.
        let isa = isa.vectors_only();
        let product = |_| {
            let product = Packed::borrowing(isa, depth, columns);
            if chains { product.in_chains() } else { product }
        };
        Self {
            isa,
            products: (0..FREQUENCIES).map(product).collect(),
            depth,
            columns,
        }
    }

    /// From a product's values to the next one's.
    fn stride(&self) -> usize {
        self.products[0].values_len() + LINE
    }

    /// Values that they take.
    pub fn values_len(&self) -> usize {
        self.products.len() * self.stride()
    }

    /// Where the values are from now on.
    pub fn lend(&self, values: &mut [f32]) {
        for (product, values) in self.products.iter().zip(values.chunks_mut(self.stride())) {
            product.lend(values.as_mut_ptr());
        }
    }

    /// Parts in which weights can be transformed.
    pub fn parts(&self) -> usize {
        self.columns.div_ceil(LINE)
    }

    /// Transforms a part of some kernels: those from a row (what goes in) and a column (what comes out) on.
    ///
    /// # Safety
    /// Memory of so many values is lent, and nobody else touches the part.
    ///
    /// # Panics
    /// Where there are not so many kernels.
    pub unsafe fn load(&self, kernels: Kernels, [row, column]: [usize; 2], part: usize) {
        let Kernels {
            weight,
            inputs,
            turned,
        } = kernels;
        let Self { depth, columns, .. } = *self;
        let start = part * LINE;
        let width = LINE.min(columns - start);
        // By row and tap. Read as they lie there, a few rows before any is used: values that were just
        // written one by one are slow to read as a vector.
        let mut taps = [[[0.0_f32; LINE]; 9]; ROWS];
        let mut transformed = [[[[0.0_f32; LINE]; ROWS]; T]; T];
        for first in (0..depth).step_by(ROWS) {
            let rows = ROWS.min(depth - first);
            self.isa.compiled(
                #[inline(always)]
                || {
                    if turned {
                        for (index, taps) in taps[..rows].iter_mut().enumerate() {
                            let at = (row + first + index) * inputs + column + start;
                            let (from, _) = weight[at * 9..].as_chunks::<9>();
                            ask_for(from.as_ptr().wrapping_add(ROWS * inputs), width);
                            for (column, kernel) in from[..width].iter().enumerate() {
                                for tap in 0..9 {
                                    taps[8 - tap][column] = kernel[tap];
                                }
                            }
                        }
                    } else {
                        for index in 0..width {
                            let at = (column + start + index) * inputs + row + first;
                            let (from, _) = weight[at * 9..].as_chunks::<9>();
                            ask_for(from.as_ptr().wrapping_add(ROWS), ROWS);
                            for (taps, kernel) in taps.iter_mut().zip(&from[..rows]) {
                                for tap in 0..9 {
                                    taps[tap][index] = kernel[tap];
                                }
                            }
                        }
                    }
                },
            );
            self.isa.dispatch(TransformWeights {
                kernels: &taps[..rows],
                transformed: &mut transformed,
            });
            self.isa.compiled(
                #[inline(always)]
                || {
                    for (product, values) in self.products.iter().zip(transformed.as_flattened()) {
                        // SAFETY: rows and columns of the part.
                        unsafe { product.set_lent(first, start, &values[..rows], width) };
                    }
                },
            );
        }
    }
}

/// Asks for kernels that are read next: they lie where the processor does not look by itself.
#[inline(always)]
fn ask_for(kernels: *const [f32; 9], count: usize) {
    for line in (0..count * 9).step_by(LINE) {
        prefetch_far(kernels.cast::<f32>().wrapping_add(line));
    }
}

/// G g Gᵀ of lines of kernels.
struct TransformWeights<'a> {
    kernels: &'a [[[f32; LINE]; 9]],
    transformed: &'a mut [[[[f32; LINE]; ROWS]; T]; T],
}

impl WithSimd for TransformWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let g = kernel_rows();
        for (row, taps) in self.kernels.iter().enumerate() {
            for l in (0..LINE).step_by(S::F32_LANES) {
                // SAFETY: vectors of a line.
                unsafe {
                    let tap = |tap: usize| load::<S>(taps[tap].as_ptr().add(l));
                    for y in 0..T {
                        // A loop: a closure given to `map` is not compiled for the instruction set.
                        let mut half = [simd.splat_f32s(0.0); 3];
                        for (kx, value) in half.iter_mut().enumerate() {
                            *value = row_times(simd, &g[y], [tap(kx), tap(3 + kx), tap(6 + kx)]);
                        }
                        for x in 0..T {
                            let to = self.transformed[y][x][row].as_mut_ptr().add(l);
                            store::<S>(to, row_times(simd, &g[x], half));
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn row_times<S: Simd>(simd: S, row: &[f32; 3], values: [S::f32s; 3]) -> S::f32s {
    let first = simd.mul_f32s(simd.splat_f32s(row[0]), values[0]);
    let second = simd.mul_add_f32s(simd.splat_f32s(row[1]), values[1], first);
    simd.mul_add_f32s(simd.splat_f32s(row[2]), values[2], second)
}

/// G in single precision.
fn kernel_rows() -> [[f32; 3]; T] {
    let mut g = [[0.0; 3]; T];
    for (to, row) in g.iter_mut().zip(kernel_transform(T)) {
        *to = row.map(|v| v as f32);
    }
    g
}

/// Sums U of a weights' gradient, for every frequency of tiles of six `[inputs, leading]`.
#[derive(Clone, Copy)]
pub struct TileSums {
    pub pointer: *const f32,
    /// From a frequency to the next.
    pub frequency: usize,
    pub leading: usize,
    /// How many such sums are to be added, and from one to the next.
    pub lanes: usize,
    pub lane: usize,
}

/// The weights' gradient, Gᵀ U G, of sixteen outputs, to `[16, inputs, 9]` with `stride` values from an
/// output to the next.
///
/// # Safety
/// The sums are there, and so is the room, for the caller alone.
pub unsafe fn gradient_of_weights(
    isa: Isa,
    sums: TileSums,
    inputs: usize,
    to: *mut f32,
    stride: usize,
) {
    let mut taps = [[[0.0_f32; PANEL]; 9]; INPUTS];
    for first in (0..inputs).step_by(INPUTS) {
        let taps = &mut taps[..INPUTS.min(inputs - first)];
        isa.dispatch(Gradients {
            sums,
            first,
            taps: &mut *taps,
        });
        isa.compiled(
            #[inline(always)]
            || {
                let taps = taps.as_flattened();
                for o in 0..PANEL {
                    for (index, tap) in taps.iter().enumerate() {
                        // SAFETY: as the caller promises.
                        unsafe { to.add(o * stride + first * 9 + index).write(tap[o]) };
                    }
                }
            },
        );
    }
}

/// Inputs whose gradients are handed out together: whole lines of memory.
const INPUTS: usize = 16;
/// Inputs that the sums are asked for ahead: frequencies lie far apart, so that the processor does not
/// foresee them.
const AHEAD: usize = 2;

struct Gradients<'a> {
    sums: TileSums,
    first: usize,
    taps: &'a mut [[[f32; PANEL]; 9]],
}

impl WithSimd for Gradients<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let g = kernel_rows();
        let sums = self.sums;
        for (input, taps) in self.taps.iter_mut().enumerate() {
            for l in (0..PANEL).step_by(S::F32_LANES) {
                let mut out = [[simd.splat_f32s(0.0); 3]; 3];
                for y in 0..T {
                    let mut half = [simd.splat_f32s(0.0); 3];
                    for x in 0..T {
                        let at = (y * T + x) * sums.frequency + (self.first + input) * sums.leading;
                        // SAFETY: as the caller of `gradient_of_weights` promises.
                        let mut value = unsafe {
                            let from = sums.pointer.add(at + l);
                            prefetch(from.wrapping_add(AHEAD * sums.leading), S::F32_LANES);
                            load::<S>(from)
                        };
                        for lane in 1..sums.lanes {
                            // SAFETY: as before.
                            let part =
                                unsafe { load::<S>(sums.pointer.add(at + l + lane * sums.lane)) };
                            value = simd.add_f32s(value, part);
                        }
                        for k in 0..3 {
                            half[k] = simd.mul_add_f32s(simd.splat_f32s(g[x][k]), value, half[k]);
                        }
                    }
                    for ky in 0..3 {
                        let factor = simd.splat_f32s(g[y][ky]);
                        for kx in 0..3 {
                            out[ky][kx] = simd.mul_add_f32s(factor, half[kx], out[ky][kx]);
                        }
                    }
                }
                for (tap, value) in out.as_flattened().iter().enumerate() {
                    // SAFETY: vectors of a line.
                    unsafe { store::<S>(taps[tap].as_mut_ptr().add(l), *value) };
                }
            }
        }
    }
}
