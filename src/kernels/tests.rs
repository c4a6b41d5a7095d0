//! Kernels against plain loops in float64, over random shapes.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::conv::{Conv, Depthwise};
use super::pool::{Pool, global_average};
use super::{Dims, Window, attention, elementwise, norm};

fn random(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn assert_close(actual: &[f32], expected: &[f64], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(*a) - e).abs();
        assert!(
            error <= 2e-5 * (1.0 + e.abs()),
            "{what}: [{i}] {a} is not {e}"
        );
    }
}

/// A window, an input it fits, and the output's height and width.
fn random_window(rng: &mut ChaCha8Rng) -> (Window, [usize; 2], [usize; 2]) {
    let kernel: [usize; 2] = [rng.random_range(1..=5), rng.random_range(1..=5)];
    let stride = rng.random_range(1..=3);
    let before = kernel.map(|k| rng.random_range(0..k));
    let after = kernel.map(|k| rng.random_range(0..k));
    let input = [0, 1].map(|i: usize| {
        let least = kernel[i].saturating_sub(before[i] + after[i]).max(1);
        rng.random_range(least..least + 12)
    });
    let output = [0, 1].map(|i: usize| (input[i] + before[i] + after[i] - kernel[i]) / stride + 1);
    let window = Window {
        kernel,
        stride,
        before,
    };
    (window, input, output)
}

/// Weighted sum over a window, with PyTorch's weight layout.
fn plain_conv(conv: &Conv, input: &[f32], weight: &[f32], scale: &[f64]) -> Vec<f64> {
    let [kh, kw] = conv.window.kernel;
    let (ins, outs) = (conv.input.c / conv.groups, conv.output.c / conv.groups);
    let mut result = Vec::new();
    for y in 0..conv.output.h {
        for x in 0..conv.output.w {
            for o in 0..conv.output.c {
                let mut sum = 0.0;
                for ky in 0..kh {
                    for kx in 0..kw {
                        let iy = (y * conv.window.stride + ky) as isize;
                        let ix = (x * conv.window.stride + kx) as isize;
                        let [top, left] = conv.window.before.map(|b| b as isize);
                        let Some(pixel) = conv.input.pixel(input, iy - top, ix - left) else {
                            continue;
                        };
                        for i in 0..ins {
                            let value = pixel[o / outs * ins + i];
                            let weight = weight[((o * ins + i) * kh + ky) * kw + kx];
                            sum += f64::from(value) * f64::from(weight) * scale[o];
                        }
                    }
                }
                result.push(sum);
            }
        }
    }
    result
}

#[test]
fn convolutions_equal_a_plain_loop_whichever_rows_are_asked_for() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut columns = Vec::new();
    for case in 0..300 {
        let (window, [ih, iw], [oh, ow]) = random_window(&mut rng);
        let groups = rng.random_range(1..=4);
        let ins = rng.random_range(1..=9);
        let outs = rng.random_range(1..=20);
        let depthwise = case % 3 == 0;
        let (groups, ins, outs) = if depthwise {
            (groups * ins, 1, 1)
        } else {
            (groups, ins, outs)
        };
        let conv = Conv {
            input: Dims::new(ih, iw, groups * ins),
            output: Dims::new(oh, ow, groups * outs),
            window,
            groups,
        };
        let input = random(&mut rng, conv.input.len());
        let weight = random(
            &mut rng,
            conv.output.c * ins * window.kernel[0] * window.kernel[1],
        );
        let scale: Vec<f64> = (0..conv.output.c)
            .map(|_| rng.random_range(0.5..1.5))
            .collect();
        let expected = plain_conv(&conv, &input, &weight, &scale);
        let mut out = vec![f32::NAN; conv.output.len()];
        let split = rng.random_range(0..oh);
        let (upper, lower) = out.split_at_mut(split * conv.output.row());
        for (rows, out) in [(0..split, upper), (split..oh, lower)] {
            if rows.is_empty() {
                continue;
            }
            if depthwise {
                let Conv {
                    input: i,
                    output,
                    window,
                    ..
                } = conv;
                let kernel = Depthwise {
                    input: i,
                    output,
                    window,
                };
                kernel.rows(&input, &kernel.pack(&weight, &scale), rows, out);
            } else {
                let packed = conv.pack(&weight, &scale);
                conv.rows(&input, &packed, rows, &mut columns, out);
            }
        }
        assert_close(&out, &expected, &format!("case {case}: {conv:?}"));
    }
}

#[test]
fn pooling_equals_a_plain_loop() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for case in 0..200 {
        let (window, [ih, iw], [oh, ow]) = random_window(&mut rng);
        let c = rng.random_range(1..=9);
        let pool = Pool {
            input: Dims::new(ih, iw, c),
            output: Dims::new(oh, ow, c),
            window,
        };
        let input = random(&mut rng, pool.input.len());
        let mut max = Vec::new();
        let mut average = Vec::new();
        for y in 0..oh {
            for x in 0..ow {
                for channel in 0..c {
                    let [top, left] = window.origin(y, x);
                    let inside: Vec<f64> = (0..window.kernel[0] as isize)
                        .flat_map(|ky| (0..window.kernel[1] as isize).map(move |kx| (ky, kx)))
                        .filter_map(|(ky, kx)| pool.input.pixel(&input, top + ky, left + kx))
                        .map(|pixel| f64::from(pixel[channel]))
                        .collect();
                    max.push(inside.iter().copied().fold(f64::NEG_INFINITY, f64::max));
                    let area = window.kernel[0] * window.kernel[1];
                    average.push(inside.iter().sum::<f64>() / area as f64);
                }
            }
        }
        let mut out = vec![f32::NAN; pool.output.len()];
        pool.average_rows(&input, 0..oh, &mut out);
        assert_close(&out, &average, &format!("average, case {case}: {pool:?}"));
        pool.max_rows(&input, 0..oh, &mut out);
        let out: Vec<f64> = out.iter().map(|&v| f64::from(v)).collect();
        assert_eq!(out, max, "max, case {case}: {pool:?}");
    }
}

#[test]
fn a_global_average_is_the_mean() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..50 {
        let dims = Dims::new(
            rng.random_range(1..30),
            rng.random_range(1..30),
            rng.random_range(1..20),
        );
        let input = random(&mut rng, dims.len());
        let mut out = vec![0.0; dims.c];
        global_average(dims, &input, &mut out);
        let mut expected = vec![0.0; dims.c];
        for (i, value) in input.iter().enumerate() {
            expected[i % dims.c] += f64::from(*value) / (dims.h * dims.w) as f64;
        }
        assert_close(&out, &expected, "global average");
    }
}

#[test]
fn attention_equals_its_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for _ in 0..30 {
        let (tokens, heads, width) = (
            rng.random_range(1..20),
            rng.random_range(1..4),
            rng.random_range(1..10),
        );
        let dim = heads * width;
        let qkv = random(&mut rng, tokens * 3 * dim);
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
        let mut scores = Vec::new();
        let mut part = vec![f32::NAN; tokens * width];
        for h in 0..heads {
            attention::head(&qkv, (tokens, dim, heads), h, &mut scores, &mut part);
            elementwise::copy_channels(&part, (width, 0), &mut out, (dim, h * width), width);
        }
        assert_close(&out, &expected, "attention");
    }
}

#[test]
fn layer_norm_equals_its_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..50 {
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
        norm::layer_norm(&input, &weight, &bias, 1e-6, &mut out);
        assert_close(&out, &expected, "layer norm");
    }
}

#[test]
fn a_channel_shuffle_transposes_groups() {
    let input: Vec<f32> = (0..12).map(|v| v as f32).collect();
    let mut out = vec![0.0; 12];
    elementwise::channel_shuffle(&input, 6, 2, &mut out);
    let expected = [0., 3., 1., 4., 2., 5., 6., 9., 7., 10., 8., 11.];
    assert_eq!(out, expected);
}
