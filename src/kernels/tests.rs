//! Kernels against plain loops in float64, over random shapes, with vectors and without.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::bottleneck::{Bottleneck, Expansion, Worker};
use super::depthwise::Depthwise;
use super::gemm::{Epilogue, Packed, Rows, Store, gemm};
use super::grouped::Grouped;
use super::grouped_strip::GroupedStrip;
use super::matrix::Matrix;
use super::memory::Slab;
use super::pool::{Reduction, average, global_average, pool};
use super::winograd::{Scratch, Winograd};
use super::{Border, Dims, Isa, Layout, Source, Target, Window, attention, elementwise, norm};
use crate::graph::Activation;

pub(super) const ACTIVATIONS: [Option<Activation>; 6] = [
    None,
    Some(Activation::Relu),
    Some(Activation::Relu6),
    Some(Activation::HardSigmoid),
    Some(Activation::HardSwish),
    Some(Activation::Gelu),
];

/// All that this machine has.
fn isas() -> [Isa; 4] {
    let best = Isa::detect().with_matrix_unit();
    let vectors = best.vectors_only();
    [best, vectors, vectors.narrower(), Isa::portable()]
}

/// Each for some cases in a row, since what else a case's number says is often its remainder by two or three.
fn isa(number: usize) -> Isa {
    isas()[number / 5 % isas().len()]
}

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(*a) - e).abs();
        let bound = tolerance * (1.0 + e.abs());
        assert!(error <= bound, "{what}: [{i}] {a} is not {e}");
    }
}

fn activate(activation: Option<Activation>, x: f64) -> f64 {
    match activation {
        None => x,
        Some(Activation::Relu) => x.max(0.0),
        Some(Activation::Relu6) => x.clamp(0.0, 6.0),
        Some(Activation::HardSigmoid) => (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Some(Activation::HardSwish) => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
        // The series of the error function loses its digits where the function is 1 or -1.
        Some(Activation::Gelu) if x.abs() > 6.0 => x.max(0.0),
        Some(Activation::Gelu) => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
    }
}

/// The error function by its Maclaurin series.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// A batch in a layout, with a border of zeros, or of what must not be read.
struct Batch {
    values: Vec<f32>,
    layout: Layout,
    count: usize,
}

impl Batch {
    fn new(images: &[f32], dims: Dims, border: Border, count: usize) -> Self {
        let layout = Layout { dims, border };
        let mut batch = Self {
            values: vec![f32::NAN; layout.len() * count],
            layout,
            count,
        };
        let target = batch.target();
        for (index, row) in images.chunks_exact(dims.w * dims.c).enumerate() {
            // SAFETY: the batch is this function's own.
            unsafe {
                if index % dims.h == 0 {
                    target.clear_border(index / dims.h, 0..dims.h);
                }
                target
                    .row(index / dims.h, index % dims.h)
                    .copy_from_slice(row);
            }
        }
        batch
    }

    /// Values that a kernel has to fill.
    fn empty(dims: Dims, border: Border, count: usize) -> Self {
        Self::new(&vec![f32::NAN; dims.len() * count], dims, border, count)
    }

    fn source(&self) -> Source {
        Source::new(&self.values, self.layout, self.count)
    }

    fn target(&mut self) -> Target {
        Target::new(&mut self.values, self.layout, self.count)
    }

    /// The images without border, which must still be zero.
    fn images(&self) -> Vec<f32> {
        let source = self.source();
        let rows = (0..self.count).flat_map(|i| (0..self.layout.dims.h).map(move |y| (i, y)));
        // SAFETY: nobody writes the batch.
        let images: Vec<f32> = rows
            .flat_map(|(i, y)| unsafe { source.row(i, y) }.to_vec())
            .collect();
        let inside = images.iter().filter(|v| **v != 0.0).count();
        let all = self.values.iter().filter(|v| **v != 0.0).count();
        assert_eq!(inside, all, "a kernel wrote to the border");
        images
    }
}

fn random_border(rng: &mut ChaCha8Rng) -> Border {
    Border {
        top: rng.random_range(0..3),
        left: rng.random_range(0..3),
        bottom: rng.random_range(0..3),
        right: rng.random_range(0..3),
    }
}

/// A convolution of random shape, and what a plain loop makes of it.
struct Case {
    window: Window,
    groups: usize,
    input: Dims,
    output: Dims,
    count: usize,
    images: Vec<f32>,
    /// PyTorch's `[out, in / groups, kh, kw]`.
    weight: Vec<f32>,
    bias: Vec<f32>,
    residual: Option<Vec<f32>>,
    activation: Option<Activation>,
    expected: Vec<f64>,
}

impl Case {
    fn random(rng: &mut ChaCha8Rng, number: usize) -> Self {
        let kernel: [usize; 2] = [rng.random_range(1..=5), rng.random_range(1..=5)];
        let stride = rng.random_range(1..=3);
        let before = kernel.map(|k| rng.random_range(0..k));
        let after = kernel.map(|k| rng.random_range(0..k));
        let size = [0, 1].map(|i: usize| {
            let least = kernel[i].saturating_sub(before[i] + after[i]).max(1);
            rng.random_range(least..least + 12)
        });
        let groups = rng.random_range(1..=4);
        // Some products are deeper than what passes at once.
        let most = if number.is_multiple_of(8) { 100 } else { 9 };
        let (ins, outs) = (rng.random_range(1..=most), rng.random_range(1..=40));
        let window = Window {
            kernel,
            stride,
            before,
        };
        Self::new(rng, number, window, size, after, [groups, ins, outs])
    }

    fn new(
        rng: &mut ChaCha8Rng,
        number: usize,
        window: Window,
        [h, w]: [usize; 2],
        after: [usize; 2],
        [groups, ins, outs]: [usize; 3],
    ) -> Self {
        let out = |size: usize, axis: usize| {
            (size + window.before[axis] + after[axis] - window.kernel[axis]) / window.stride + 1
        };
        let input = Dims::new(h, w, groups * ins);
        let output = Dims::new(out(h, 0), out(w, 1), groups * outs);
        let count = rng.random_range(1..=3);
        let area = window.kernel[0] * window.kernel[1];
        let has_residual = rng.random_range(0..2) == 0;
        let mut case = Self {
            window,
            groups,
            input,
            output,
            count,
            images: random(rng, input.len() * count),
            weight: random(rng, output.c * ins * area),
            bias: random(rng, output.c),
            residual: has_residual.then(|| random(rng, output.len() * count)),
            activation: ACTIVATIONS[number % ACTIVATIONS.len()],
            expected: Vec::new(),
        };
        case.expected = case.plain_loop();
        case
    }

    fn plain_loop(&self) -> Vec<f64> {
        let [kh, kw] = self.window.kernel;
        let (ins, outs) = (self.input.c / self.groups, self.output.c / self.groups);
        let mut result = Vec::new();
        for image in self.images.chunks_exact(self.input.len()) {
            for y in 0..self.output.h {
                for x in 0..self.output.w {
                    for o in 0..self.output.c {
                        let mut sum = f64::from(self.bias[o]);
                        for tap in 0..kh * kw {
                            let (ky, kx) = (tap / kw, tap % kw);
                            let iy =
                                (y * self.window.stride + ky).wrapping_sub(self.window.before[0]);
                            let ix =
                                (x * self.window.stride + kx).wrapping_sub(self.window.before[1]);
                            if iy >= self.input.h || ix >= self.input.w {
                                continue;
                            }
                            for i in 0..ins {
                                let channel = o / outs * ins + i;
                                let value =
                                    image[(iy * self.input.w + ix) * self.input.c + channel];
                                let weight = self.weight[(o * ins + i) * kh * kw + tap];
                                sum += f64::from(value) * f64::from(weight);
                            }
                        }
                        let residual = self
                            .residual
                            .as_ref()
                            .map_or(0.0, |r| f64::from(r[result.len()]));
                        result.push(activate(self.activation, sum + residual));
                    }
                }
            }
        }
        result
    }

    fn epilogue(&self) -> Epilogue<'_> {
        Epilogue {
            bias: &self.bias,
            activation: self.activation,
        }
    }

    /// Input, output and residual in layouts with at least the border that is needed.
    fn batches(&self, rng: &mut ChaCha8Rng, needed: Border) -> (Batch, Batch, Option<Batch>) {
        let border = needed.union(random_border(rng));
        let input = Batch::new(&self.images, self.input, border, self.count);
        let output = Batch::empty(self.output, random_border(rng), self.count);
        let residual = self
            .residual
            .as_ref()
            .map(|values| Batch::new(values, self.output, random_border(rng), self.count));
        (input, output, residual)
    }

    /// Runs a kernel that computes rows in two parts, and checks what it wrote.
    fn check_rows(
        &self,
        rng: &mut ChaCha8Rng,
        number: usize,
        mut rows: impl FnMut(&Source, &Target, Option<&Source>, usize, std::ops::Range<usize>),
    ) {
        let needed = self.window.border(self.input, self.output);
        let (input, mut output, residual) = self.batches(rng, needed);
        let cut = rng.random_range(0..=self.output.h);
        let target = output.target();
        let residual = residual.as_ref().map(Batch::source);
        for image in 0..self.count {
            for part in [0..cut, cut..self.output.h] {
                rows(&input.source(), &target, residual.as_ref(), image, part);
            }
        }
        self.check(&output, 1e-5, &format!("case {number}"));
    }

    fn check(&self, output: &Batch, tolerance: f64, what: &str) {
        let what = format!(
            "{what}: {:?} {:?} to {:?}, {} groups, {:?}",
            self.window, self.input, self.output, self.groups, self.activation
        );
        assert_close(&output.images(), &self.expected, tolerance, &what);
    }
}

#[test]
fn convolutions_equal_a_plain_loop_whatever_part_is_asked_for() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for number in 0..400 {
        let case = Case::random(&mut rng, number);
        let isa = isa(number);
        let needed = case.window.border(case.input, case.output);
        let (input, mut output, residual) = case.batches(&mut rng, needed);
        let [kh, kw] = case.window.kernel;
        let (ins, outs) = (case.input.c / case.groups, case.output.c / case.groups);
        let row = input.layout.row_stride();
        let taps: Vec<usize> = if case.groups == 1 {
            (0..kh).map(|ky| ky * row).collect()
        } else {
            (0..kh * kw)
                .map(|tap| tap / kw * row + tap % kw * case.input.c)
                .collect()
        };
        let pixels = case.count * case.output.pixels();
        let cut = rng.random_range(0..=pixels);
        let target = output.target();
        for group in 0..case.groups {
            let packed = Packed::new(isa, kh * kw * ins, outs, |depth, column| {
                let (tap, i) = (depth / ins, depth % ins);
                let weight = case.weight[((group * outs + column) * ins + i) * kh * kw + tap];
                if kh * kw == 1 { 2.0 * weight } else { weight }
            });
            let panels = packed.panel_count();
            let panel = rng.random_range(0..=panels);
            let epilogue = Epilogue {
                bias: &case.bias[group * outs..(group + 1) * outs],
                activation: case.activation,
            };
            for pixels in [0..cut, cut..pixels] {
                for panels in [0..panel, panel..panels] {
                    let mut rows = Rows::new();
                    let mut weighed = Vec::new();
                    // SAFETY: the batches hold what the case says, and are this test's own.
                    unsafe {
                        rows.set_pixels(
                            pixels.clone(),
                            &case.window,
                            &input.source(),
                            &target,
                            residual.as_ref().map(Batch::source).as_ref(),
                            [group * ins, group * outs],
                        );
                        if kh * kw == 1 {
                            // Halved, and doubled again below: no bit changes.
                            let half = vec![0.5; ins];
                            rows.weigh(isa, ins, &mut weighed, |_| &half);
                        }
                        gemm(&packed, panels, &rows, &taps, epilogue);
                    }
                }
            }
        }
        case.check(&output, 3e-5, &format!("case {number}"));
    }
}

#[test]
fn depthwise_convolutions_equal_a_plain_loop() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for number in 0..400 {
        let mut case = Case::random(&mut rng, number);
        let channels = rng.random_range(1..=40);
        let after = [0, 1].map(|i| rng.random_range(0..case.window.kernel[i]));
        let size = [0, 1].map(|i: usize| case.window.kernel[i] + rng.random_range(0..16));
        case = Case::new(&mut rng, number, case.window, size, after, [channels, 1, 1]);
        let area = case.window.kernel[0] * case.window.kernel[1];
        let conv = Depthwise {
            isa: isa(number),
            window: case.window,
            weights: (0..area * channels)
                .map(|i| case.weight[i % channels * area + i / channels])
                .collect(),
        };
        case.check_rows(&mut rng, number, |input, output, residual, image, rows| {
            // SAFETY: the batches hold what the case says, and are this test's own.
            unsafe { conv.rows(input, output, residual, case.epilogue(), image, rows) };
        });
    }
}

#[test]
fn small_groups_equal_a_plain_loop() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let isa = Isa::detect();
    for number in 0..200 {
        let shape = Case::random(&mut rng, number);
        let isa = [isa, isa.narrower()][number % 2];
        let (groups, width) = (2 * rng.random_range(1..=5), [4, 8][number / 2 % 2]);
        if !Grouped::fits(isa, groups * width, groups) {
            continue; // another machine than x86 with AVX2, or with AVX-512
        }
        let after = [0, 1].map(|i| rng.random_range(0..shape.window.kernel[i]));
        let size = [0, 1].map(|i: usize| shape.window.kernel[i] + rng.random_range(0..16));
        let channels = [groups, width, width];
        let case = Case::new(&mut rng, number, shape.window, size, after, channels);
        let area = case.window.kernel[0] * case.window.kernel[1];
        let channels = [groups * width, groups];
        let conv = Grouped::new(isa, case.window, channels, |o, i, tap| {
            case.weight[(o * width + i) * area + tap]
        });
        case.check_rows(&mut rng, number, |input, output, residual, image, rows| {
            // SAFETY: the batches hold what the case says, and are this test's own.
            unsafe { conv.rows(input, output, residual, case.epilogue(), image, rows) };
        });
    }
}

#[test]
fn wider_groups_equal_a_plain_loop() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let isa = Isa::detect();
    for number in 0..200 {
        let mut window = Case::random(&mut rng, number).window;
        window.stride = rng.random_range(1..=2);
        let (groups, width) = (rng.random_range(1..=4), [8, 16][number % 2]);
        if !GroupedStrip::fits(isa, &window, groups * width, groups) {
            continue; // vectors of another length
        }
        let after = [0, 1].map(|i| rng.random_range(0..window.kernel[i]));
        let size = [0, 1].map(|i: usize| window.kernel[i] + rng.random_range(0..40));
        let case = Case::new(
            &mut rng,
            number,
            window,
            size,
            after,
            [groups, width, width],
        );
        let area = window.kernel[0] * window.kernel[1];
        let channels = [groups * width, groups];
        let conv = GroupedStrip::new(isa, case.window, channels, |o, i, tap| {
            case.weight[(o * width + i) * area + tap]
        });
        let mut scratch = Vec::new();
        case.check_rows(&mut rng, number, |input, output, residual, image, rows| {
            let (epilogue, scratch) = (case.epilogue(), &mut scratch);
            // SAFETY: the batches hold what the case says, and are this test's own.
            unsafe { conv.rows(input, output, residual, epilogue, image, rows, scratch) };
        });
    }
}

#[test]
fn winograd_equals_a_plain_loop() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for number in 0..120 {
        let window = Window {
            kernel: [3, 3],
            stride: 1,
            before: [1, 1],
        };
        let isa = isa(number);
        let channels = [0; 2].map(|_| isa.lanes() * rng.random_range(1..=3));
        let size = [0; 2].map(|_| rng.random_range(1..=13));
        let shape = [1, channels[0], channels[1]];
        let case = Case::new(&mut rng, number, window, size, [1, 1], shape);
        for tile in [4, 6] {
            let scale = vec![1.0; case.output.c];
            let weights = [case.output.c, case.input.c];
            let conv = Winograd::unfilled(isa, tile, weights);
            conv.share().store(&Slab::default(), &case.weight, &scale);
            let (input, mut output, residual) = case.batches(&mut rng, conv.border(case.output));
            let tiles = case.count * conv.tiles(case.output);
            let chunk = rng.random_range(1..=tiles);
            let [transformed, products] = conv.scratch(chunk);
            let mut transformed = vec![f32::NAN; transformed];
            let mut products = vec![f32::NAN; products];
            let scratch = Scratch {
                transformed: transformed.as_mut_ptr(),
                products: products.as_mut_ptr(),
                tiles: chunk,
            };
            let target = output.target();
            for start in (0..tiles).step_by(chunk) {
                let end = (start + chunk).min(tiles);
                let cut = rng.random_range(start..=end);
                // SAFETY: the batches hold what the case says, and are this test's own.
                unsafe {
                    conv.transform(&input.source(), &scratch, start, start..cut);
                    conv.transform(&input.source(), &scratch, start, cut..end);
                    for frequency in 0..conv.frequencies() {
                        conv.multiply(&scratch, frequency, end - start, &mut Rows::new());
                    }
                    let residual = residual.as_ref().map(Batch::source);
                    for part in [start..cut, cut..end] {
                        let residual = residual.as_ref();
                        conv.finish(&target, residual, case.epilogue(), &scratch, start, part);
                    }
                }
            }
            case.check(&output, 1e-4, &format!("case {number}, tiles of {tile}"));
        }
    }
}

#[test]
fn pooling_equals_a_plain_loop() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for number in 0..300 {
        let Case {
            window,
            input,
            output,
            count,
            images,
            ..
        } = Case::random(&mut rng, number);
        let output = Dims::new(output.h, output.w, input.c);
        // PyTorch asks for at least half of the window; here one pixel must be inside.
        let reaches = |out: usize, axis: usize| (out - 1) * window.stride >= window.before[axis];
        let inside = (output.h - 1) * window.stride < input.h + window.before[0]
            && (output.w - 1) * window.stride < input.w + window.before[1];
        if !inside || (output.h > 1 && !reaches(output.h, 0)) {
            continue;
        }
        let batch = Batch::new(&images, input, random_border(&mut rng), count);
        for reduction in [Reduction::Max, Reduction::Average] {
            let mut expected = Vec::new();
            for image in images.chunks_exact(input.len()) {
                for (y, x) in (0..output.h).flat_map(|y| (0..output.w).map(move |x| (y, x))) {
                    for c in 0..input.c {
                        let mut values = Vec::new();
                        for tap in 0..window.kernel[0] * window.kernel[1] {
                            let (ky, kx) = (tap / window.kernel[1], tap % window.kernel[1]);
                            let iy = (y * window.stride + ky).wrapping_sub(window.before[0]);
                            let ix = (x * window.stride + kx).wrapping_sub(window.before[1]);
                            if iy < input.h && ix < input.w {
                                values.push(f64::from(image[(iy * input.w + ix) * input.c + c]));
                            }
                        }
                        let area = (window.kernel[0] * window.kernel[1]) as f64;
                        expected.push(match reduction {
                            Reduction::Max => values.into_iter().fold(f64::NEG_INFINITY, f64::max),
                            Reduction::Average => values.iter().sum::<f64>() / area,
                        });
                    }
                }
            }
            let mut out = Batch::empty(output, random_border(&mut rng), count);
            let target = out.target();
            for image in 0..count {
                let isa = isa(number);
                // SAFETY: the batches hold what the case says, and are this test's own.
                unsafe {
                    let rows = 0..output.h;
                    pool(
                        isa,
                        reduction,
                        &window,
                        &batch.source(),
                        &target,
                        image,
                        rows,
                    );
                }
            }
            let what = format!("{reduction:?}, case {number}: {window:?} {input:?}");
            assert_close(&out.images(), &expected, 1e-6, &what);
        }
    }
}

#[test]
fn a_global_average_is_the_mean() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for number in 0..50 {
        let [h, w, c] = [30, 30, 20].map(|most| rng.random_range(1..most));
        let dims = Dims::new(h, w, c);
        let images = random(&mut rng, dims.len());
        let batch = Batch::new(&images, dims, random_border(&mut rng), 1);
        let cut = rng.random_range(0..=c);
        let mut out = vec![f32::NAN; c];
        for part in [0..cut, cut..c] {
            let out = &mut out[part.clone()];
            // SAFETY: nobody writes the batch.
            unsafe { global_average(isa(number), &batch.source(), 0, part, out) };
        }
        let mut expected = vec![0.0; c];
        for (i, value) in images.iter().enumerate() {
            expected[i % c] += f64::from(*value) / (h * w) as f64;
        }
        assert_close(&out, &expected, 1e-6, "global average");

        // From the sums of lines, the same bits.
        let isa = isa(number);
        let mut sums = vec![f32::NAN; h * c];
        for (line, sums) in images.chunks_exact(w * c).zip(sums.chunks_exact_mut(c)) {
            elementwise::sum_pixels(isa, line, sums);
        }
        let sums = Batch::new(&sums, Dims::new(h, 1, c), random_border(&mut rng), 1);
        let mut of_sums = vec![f32::NAN; c];
        // SAFETY: nobody writes the batch.
        unsafe { average(isa, &sums.source(), 0, 0..c, h * w, &mut of_sums) };
        assert_eq!(of_sums, out);
    }
}

#[test]
fn attention_equals_its_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for number in 0..60 {
        let [tokens, heads, width] = [50, 4, 24].map(|most| rng.random_range(1..most));
        let dim = heads * width;
        let sharpness = rng.random_range(0.1..4.0);
        let mut qkv = random(&mut rng, tokens * 3 * dim);
        qkv.iter_mut().for_each(|v| *v *= sharpness);
        let value = |t: usize, part: usize, c: usize| f64::from(qkv[t * 3 * dim + part * dim + c]);
        let mut expected = vec![0.0; tokens * dim];
        for h in 0..heads {
            let columns = h * width..(h + 1) * width;
            for t in 0..tokens {
                let scores: Vec<f64> = (0..tokens)
                    .map(|u| {
                        let dot: f64 = columns
                            .clone()
                            .map(|c| value(t, 0, c) * value(u, 1, c))
                            .sum();
                        (dot / (width as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for c in columns.clone() {
                    expected[t * dim + c] =
                        (0..tokens).map(|u| scores[u] / sum * value(u, 2, c)).sum();
                }
            }
        }
        let mut out = vec![f32::NAN; tokens * dim];
        let mut scratch = attention::Scratch::default();
        for h in 0..heads {
            let isa = isa(number);
            let shape = (tokens, dim, heads);
            // SAFETY: `out` is this test's own and holds all tokens.
            unsafe { attention::head(isa, &qkv, shape, h, &mut scratch, out.as_mut_ptr()) };
        }
        assert_close(&out, &expected, 3e-5, "attention");
    }
}

#[test]
fn layer_norm_equals_its_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for number in 0..50 {
        let (rows, dim) = (rng.random_range(1..6), rng.random_range(2..200));
        let input = random(&mut rng, rows * dim);
        let (weight, bias) = (random(&mut rng, dim), random(&mut rng, dim));
        let mut expected = Vec::new();
        for row in input.chunks(dim) {
            let n = dim as f64;
            let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let variance = row
                .iter()
                .map(|&v| (f64::from(v) - mean).powi(2))
                .sum::<f64>()
                / n;
            for (i, &v) in row.iter().enumerate() {
                let unit = (f64::from(v) - mean) / (variance + 1e-6).sqrt();
                expected.push(unit * f64::from(weight[i]) + f64::from(bias[i]));
            }
        }
        let mut out = vec![0.0; input.len()];
        norm::layer_norm(isa(number), &input, &weight, &bias, 1e-6, &mut out);
        assert_close(&out, &expected, 1e-5, "layer norm");
    }
}

#[test]
fn activations_equal_their_definitions() {
    let input: Vec<f32> = (-900..=900).map(|i| i as f32 / 100.0).collect();
    for isa in isas() {
        for activation in ACTIVATIONS.into_iter().flatten() {
            let mut out = vec![f32::NAN; input.len()];
            elementwise::activate(isa, activation, &input, &mut out);
            for (x, y) in input.iter().zip(out) {
                let x = f64::from(*x);
                let expected = activate(Some(activation), x);
                let error = (f64::from(y) - expected).abs();
                assert!(error < 2e-7 * (1.0 + x.abs()), "{activation:?}({x}): {y}");
            }
        }
    }
}

#[test]
fn a_channel_shuffle_transposes_groups() {
    let input: Vec<f32> = (0..12).map(|v| v as f32).collect();
    let mut out = vec![0.0; 12];
    elementwise::channel_shuffle(&input, 6, 2, &mut out);
    assert_eq!(out, [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.]);
    elementwise::channel_shuffle(&input, 6, 3, &mut out);
    assert_eq!(out, [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.]);
}

/// A store of random bias.
fn random_store(rng: &mut ChaCha8Rng, channels: usize) -> Store {
    Store {
        bias: random(rng, channels),
        activation: ACTIVATIONS[rng.random_range(0..ACTIVATIONS.len())],
    }
}

#[test]
fn a_bottleneck_has_the_bits_of_its_convolutions() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for number in 0..300 {
        let isa = isa(number);
        let (expands, projects) = (number % 3 != 0, number % 5 != 0);
        let count = rng.random_range(1..=3);
        // The first convolution: a network's first one, or pointwise.
        let stem = expands && number % 4 == 0;
        let first = Window {
            kernel: if stem { [3, 3] } else { [1, 1] },
            stride: if stem { 2 } else { 1 },
            before: if stem { [1, 1] } else { [0, 0] },
        };
        let kernel = [1, 3, 5][rng.random_range(0..3)];
        let window = Window {
            kernel: [kernel, kernel],
            stride: rng.random_range(1..=2),
            before: [rng.random_range(0..kernel), rng.random_range(0..kernel)],
        };
        let after = rng.random_range(0..kernel);
        let size = [0, 1].map(|i: usize| {
            rng.random_range(kernel.saturating_sub(window.before[i] + after).max(1)..30)
        });
        let [ins, wide, outs] = [20, 40, 30].map(|most| rng.random_range(1..=most));
        let middle = [0, 1]
            .map(|i: usize| (size[i] + window.before[i] + after - kernel) / window.stride + 1);
        let hidden = Dims::new(size[0], size[1], wide);
        let middle = Dims::new(middle[0], middle[1], wide);
        let channels = if projects { outs } else { wide };
        let output = Dims {
            c: channels,
            ..middle
        };
        let ins = if expands { ins } else { wide };
        let input = match (expands, stem) {
            (true, true) => Dims::new(2 * size[0], 2 * size[1], ins),
            _ => Dims { c: ins, ..hidden },
        };
        let area = first.kernel[0] * first.kernel[1];
        let weights = random(&mut rng, area * ins * wide);
        let packed = || Packed::new(isa, area * ins, wide, |row, o| weights[row * wide + o]);
        let projection = random(&mut rng, wide * outs);
        let project = || Packed::new(isa, wide, outs, |row, o| projection[row * outs + o]);
        let depthwise_weights = random(&mut rng, kernel * kernel * wide);
        let depthwise = || Depthwise {
            isa,
            window,
            weights: depthwise_weights.clone(),
        };
        let stores = [wide, wide, outs].map(|c| random_store(&mut rng, c));
        let images = random(&mut rng, input.len() * count);
        let others = random(&mut rng, output.len() * count);
        let residual = (projects && number % 2 == 0).then_some(others);

        // One convolution after the other.
        let border = if expands {
            first.border(input, hidden)
        } else {
            window.border(hidden, middle)
        };
        let border = border.union(random_border(&mut rng));
        let batch = Batch::new(&images, input, border, count);
        let residual =
            residual.map(|values| Batch::new(&values, output, random_border(&mut rng), count));
        let residual = residual.as_ref().map(Batch::source);
        let mut map = Batch::empty(hidden, window.border(hidden, middle), count);
        let mut rows = Rows::new();
        let taps = |row: usize| (0..first.kernel[0]).map(|ky| ky * row).collect::<Vec<_>>();
        // SAFETY: the batches hold what their dims say, and are this test's own.
        let expected = unsafe {
            let target = map.target();
            if expands {
                let pixels = 0..count * hidden.pixels();
                let source = batch.source();
                rows.set_pixels(pixels, &first, &source, &target, None, [0, 0]);
                let packed = packed();
                let taps = taps(source.layout.row_stride());
                let panels = 0..packed.panel_count();
                gemm(&packed, panels, &rows, &taps, stores[0].epilogue());
            }
            let map = if expands { &map } else { &batch };
            let mut second = Batch::empty(middle, Border::default(), count);
            for image in 0..count {
                let (source, target) = (map.source(), second.target());
                let epilogue = stores[1].epilogue();
                depthwise().rows(&source, &target, None, epilogue, image, 0..middle.h);
            }
            if projects {
                let mut third = Batch::empty(output, Border::default(), count);
                let pixels = 0..count * output.pixels();
                let one = Window {
                    kernel: [1, 1],
                    stride: 1,
                    before: [0, 0],
                };
                let (source, target) = (second.source(), third.target());
                rows.set_pixels(pixels, &one, &source, &target, residual.as_ref(), [0, 0]);
                let packed = project();
                let panels = 0..packed.panel_count();
                gemm(&packed, panels, &rows, &[0], stores[2].epilogue());
                third.images()
            } else {
                second.images()
            }
        };

        let [a, b, c] = stores;
        let expansion = expands.then(|| Expansion {
            window: first,
            start: 0,
            weights: packed(),
            store: a,
        });
        let block = Bottleneck::new(
            expansion,
            (depthwise(), b),
            projects.then(|| (project(), c)),
            hidden,
            [output.h, output.w],
        );
        let mut result = Batch::empty(output, random_border(&mut rng), count);
        let target = result.target();
        let mut scratch = vec![f32::NAN; block.scratch_len()];
        // Blocks of lines in order, then again from anywhere, as after a theft.
        let mut blocks = Vec::new();
        for image in 0..count {
            let mut start = 0;
            while start < output.h {
                let end = (start + rng.random_range(1..=block.lines())).min(output.h);
                blocks.push((image, start..end));
                start = end;
            }
        }
        for _ in 0..3 {
            blocks.push(blocks[rng.random_range(0..blocks.len())].clone());
        }
        // SAFETY: as above.
        unsafe {
            let mut worker = Worker::new(&block, scratch.as_mut_ptr());
            for (image, lines) in blocks {
                let source = batch.source();
                let other = residual.as_ref();
                worker.compute(&source, &target, other, image, lines, &mut rows);
            }
        }
        assert!(
            result.images() == expected,
            "case {number}: {window:?} {input:?} {output:?}"
        );
    }
}

#[test]
fn a_matrix_is_multiplied_from_both_sides() {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    for case in 0..60 {
        // Some that a matrix unit takes, too.
        let [rows, columns, others] = match case % 6 {
            5 => [1100, 200, 300],
            _ => [300, 90, 50],
        };
        let [rows, columns, others] = [rows, columns, others].map(|most| match case % 6 {
            5 => rng.random_range(most / 2..most),
            _ => rng.random_range(1..most),
        });
        for isa in isas() {
            let values = random(&mut rng, rows * columns);
            let right = random(&mut rng, columns * others);
            let left = random(&mut rng, rows * others);
            let mut matrix = Matrix::zeros(isa, rows, columns);
            let mut other = Matrix::zeros(isa, rows, others);
            for row in 0..rows {
                matrix.set_row(row, &values[row * columns..][..columns]);
                other.set_row(row, &left[row * others..][..others]);
            }
            let depth = matrix.padded_columns();
            let packed = Packed::new(isa, depth, others, |row, column| match row < columns {
                true => right[row * others + column],
                false => 0.0,
            });
            let mut product = vec![f32::NAN; rows * others];
            matrix.times(&packed, &mut product);
            let sum = |terms: &mut dyn Iterator<Item = (f32, f32)>| -> f64 {
                terms.map(|(a, b)| f64::from(a) * f64::from(b)).sum()
            };
            let expected: Vec<f64> = (0..rows * others)
                .map(|i| {
                    let (row, other) = (i / others, i % others);
                    let pair = |c| (values[row * columns + c], right[c * others + other]);
                    sum(&mut (0..columns).map(pair))
                })
                .collect();
            let what = format!("case {case}, {rows} x {columns} x {others}, {isa:?}");
            // A long sum rounds more often.
            let tolerance = 1e-5 * (rows as f64 / 100.0).max(1.0).sqrt();
            assert_close(&product, &expected, 1e-5, &what);
            let mut product = vec![f32::NAN; others * depth];
            matrix.transposed_times(&other, &mut product);
            let expected: Vec<f64> = (0..others * depth)
                .map(|i| {
                    let (other, column) = (i / depth, i % depth);
                    if column >= columns {
                        return 0.0;
                    }
                    let pair = |row| (left[row * others + other], values[row * columns + column]);
                    sum(&mut (0..rows).map(pair))
                })
                .collect();
            assert_close(&product, &expected, tolerance, &what);
        }
    }
}
