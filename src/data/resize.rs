//! Antialiased resizing, bit for bit as Pillow does it: a filter as wide as the reduction, fixed
//! point weights of 22 bits, a horizontal pass rounded to 8 bits, then a vertical one.

use std::ops::Range;

use super::Rgb;
use crate::kernels::Isa;
use crate::kernels::resample::cubic;
use crate::models::Interpolation;

/// Fraction bits of the weights: 8 bits are the sample's, 2 are kept for overshoot.
const PRECISION: u32 = 32 - 8 - 2;
const CHANNELS: usize = 3;
/// Bytes that are read at a time.
const READ: usize = 8;

/// An axis of a picture that is resized, and the part of the result that is wanted.
#[derive(Clone)]
pub(super) struct Axis {
    /// Its size; the last pixel may be part of one.
    pub from: f64,
    /// Its size when it is resized.
    pub to: usize,
    pub wanted: Range<usize>,
}

impl Axis {
    /// The pixels that the wanted part is made of.
    pub fn reach(&self, interpolation: Interpolation) -> Range<usize> {
        let last = self.wanted.end.saturating_sub(1);
        let (first, _) = self.span(interpolation, self.wanted.start);
        let (last, _) = self.span(interpolation, last);
        first.start..last.end
    }

    /// The pixels that a position of the result is made of, and where its middle lies.
    fn span(&self, interpolation: Interpolation, position: usize) -> (Range<usize>, f64) {
        let scale = self.from / self.to as f64;
        let support = support(interpolation) * scale.max(1.0);
        let centre = (position as f64 + 0.5) * scale;
        // Casts truncate, as C's do.
        let start = ((centre - support + 0.5) as i64).max(0);
        let end = ((centre + support + 0.5) as i64).min(self.from.ceil() as i64);
        (start as usize..end as usize, centre)
    }
}

/// How far a filter reaches on either side, in pixels of the larger of the two pictures.
fn support(interpolation: Interpolation) -> f64 {
    match interpolation {
        Interpolation::Bilinear => 1.0,
        Interpolation::Bicubic => 2.0,
    }
}

/// The wanted part of a picture resized: pixels `[rows, columns, 3]`. What lies outside that part is not
/// computed. `image` has at least all the pixels that it is made of; it begins at `origin`.
pub(super) fn resize(
    image: &Rgb,
    origin: [usize; 2],
    [across, down]: &[Axis; 2],
    interpolation: Interpolation,
) -> Vec<u8> {
    let horizontal = Taps::new(across, origin[0], interpolation);
    let vertical = Taps::new(down, origin[1], interpolation);
    let isa = Isa::detect();
    isa.compiled(
        #[inline(always)]
        || passes(image, &horizontal, &vertical, isa.has_avx2()),
    )
}

#[inline(always)]
fn passes(
    image: &Rgb,
    horizontal: &Taps,
    vertical: &Taps,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] avx2: bool,
) -> Vec<u8> {
    // The image rows that the vertical pass reads.
    let needed = vertical.reach();
    let line = horizontal.spans.len() * CHANNELS;
    let mut narrow = vec![0; needed.len() * line];
    let stride = image.width * CHANNELS;
    let mut last = vec![0; stride + READ];
    for (y, out) in needed.clone().zip(narrow.chunks_exact_mut(line)) {
        // With some bytes behind the last pixel, to be read with it.
        let row = y * stride..(y + 1) * stride;
        let source = image
            .pixels
            .get(row.start..row.end + READ)
            .unwrap_or_else(|| {
                last[..stride].copy_from_slice(&image.pixels[row]);
                &last
            });
        #[cfg(target_arch = "x86_64")]
        if avx2 {
            // SAFETY: the machine has it.
            unsafe { narrow_avx2(source, horizontal, out) };
            continue;
        }
        narrow_portable(source, horizontal, out);
    }
    let mut result = vec![0; vertical.spans.len() * line];
    let mut sums = vec![0; line];
    for (span, out) in vertical.spans.iter().zip(result.chunks_exact_mut(line)) {
        sums.fill(1 << (PRECISION - 1));
        let sources = narrow[(span.start - needed.start) * line..].chunks_exact(line);
        for (weight, source) in vertical.weights(span).iter().zip(sources) {
            for (sum, &value) in sums.iter_mut().zip(source) {
                *sum += weight * i32::from(value);
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = clip(sum);
        }
    }
    result
}

/// A line of `source` (with [`READ`] bytes behind it) made narrower.
fn narrow_portable(source: &[u8], taps: &Taps, out: &mut [u8]) {
    for (span, out) in taps.spans.iter().zip(out.chunks_exact_mut(CHANNELS)) {
        let mut sums = [1 << (PRECISION - 1); CHANNELS];
        let pixels = source[span.start * CHANNELS..].chunks_exact(CHANNELS);
        for (weight, pixel) in taps.weights(span).iter().zip(pixels) {
            for (sum, &value) in sums.iter_mut().zip(pixel) {
                *sum += weight * i32::from(value);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = clip(sum);
        }
    }
}

/// The same sums, two pixels at a time in the lanes of a vector: compilers make a plain loop over
/// three channels no faster.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn narrow_avx2(source: &[u8], taps: &Taps, out: &mut [u8]) {
    use std::arch::x86_64::*;
    // The three channels of a pixel and a zero, twice.
    let spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    let halves = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    for (span, out) in taps.spans.iter().zip(out.chunks_exact_mut(CHANNELS)) {
        let weights = taps.weights(span);
        let bytes = &source[span.start * CHANNELS..][..weights.len() * CHANNELS + READ];
        let mut sums = _mm256_setzero_si256();
        let mut at = 0;
        let (pairs, rest) = weights.as_chunks::<2>();
        let last = rest.first().map(|&weight| [weight, 0]);
        for &[first, second] in pairs.iter().chain(&last) {
            let mut eight = [0; READ];
            eight.copy_from_slice(&bytes[at..at + READ]);
            let pixels = _mm_shuffle_epi8(_mm_cvtsi64_si128(i64::from_le_bytes(eight)), spread);
            let both = i64::from(first as u32) | i64::from(second) << 32;
            let weights = _mm256_castsi128_si256(_mm_cvtsi64_si128(both));
            let weights = _mm256_permutevar8x32_epi32(weights, halves);
            let products = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(pixels), weights);
            sums = _mm256_add_epi32(sums, products);
            at += 2 * CHANNELS;
        }
        let (low, high) = (
            _mm256_castsi256_si128(sums),
            _mm256_extracti128_si256::<1>(sums),
        );
        let sums = _mm_add_epi32(
            _mm_add_epi32(low, high),
            _mm_set1_epi32(1 << (PRECISION - 1)),
        );
        let values = _mm_srai_epi32::<{ PRECISION as i32 }>(sums);
        let values = _mm_packus_epi16(_mm_packs_epi32(values, values), values);
        out.copy_from_slice(&_mm_cvtsi128_si32(values).to_le_bytes()[..CHANNELS]);
    }
}

#[inline(always)]
fn clip(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

/// For each output position, the input positions that it is made of, and their weights.
struct Taps {
    spans: Vec<Span>,
    weights: Vec<i32>,
}

struct Span {
    /// First input position.
    start: usize,
    /// Where its weights lie.
    weights: Range<usize>,
}

impl Taps {
    /// Of the positions wanted of an axis, where the picture begins at `origin`.
    fn new(axis: &Axis, origin: usize, interpolation: Interpolation) -> Self {
        let filter: fn(f64) -> f64 = match interpolation {
            Interpolation::Bilinear => triangle,
            Interpolation::Bicubic => |x| cubic(x, -0.5),
        };
        let widening = (axis.from / axis.to as f64).max(1.0);
        let mut taps = Self {
            spans: Vec::with_capacity(axis.wanted.len()),
            weights: Vec::new(),
        };
        for position in axis.wanted.clone() {
            let (span, centre) = axis.span(interpolation, position);
            let start = span.start - origin;
            let values: Vec<f64> = span
                .map(|i| filter((i as f64 - centre + 0.5) * (1.0 / widening)))
                .collect();
            let total: f64 = values.iter().sum();
            let first = taps.weights.len();
            taps.weights.extend(values.iter().map(|value| {
                let scaled = value / total * f64::from(1 << PRECISION);
                (scaled + 0.5f64.copysign(scaled)) as i32
            }));
            taps.spans.push(Span {
                start,
                weights: first..taps.weights.len(),
            });
        }
        taps
    }

    #[inline(always)]
    fn weights(&self, span: &Span) -> &[i32] {
        &self.weights[span.weights.clone()]
    }

    /// All input positions that are read.
    #[inline(always)]
    fn reach(&self) -> Range<usize> {
        let start = self.spans.iter().map(|s| s.start).min().unwrap_or(0);
        let end = self.spans.iter().map(|s| s.start + s.weights.len()).max();
        start..end.unwrap_or(start)
    }
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}
