use std::ops::Range;

use super::resize::{Axis, resize};
use super::{Rgb, View};
use crate::models::Preprocessing;

/// What is read of a picture is at least so many times the size that it is resized to. Of photos of 1600 x
/// 1200 pixels at a half, 2.34 times that size, 4 labels in 100 differ from those of the whole; of 4000 x
/// 3000 at a quarter, 2.93 times, 2 (benches/README.md).
const MARGIN: f64 = 2.5;

/// The resized and cropped picture before it is normalised, 8-bit `[crop, crop, 3]`.
pub fn crop_pixels(image: &Rgb, preprocessing: &Preprocessing) -> Vec<u8> {
    let axes = axes([image.width, image.height], 1, preprocessing);
    resize(image, [0, 0], &axes, preprocessing.interpolation)
}

/// The same of what was read of a picture for it.
pub fn crop_view(view: &View, preprocessing: &Preprocessing) -> Vec<u8> {
    let axes = axes([view.width, view.height], view.by, preprocessing);
    resize(&view.image, view.origin, &axes, preprocessing.interpolation)
}

/// The columns and rows that are needed of a picture of that size, read at one part in `by` of it.
pub(super) fn window(
    size: [usize; 2],
    by: usize,
    preprocessing: &Preprocessing,
) -> [Range<usize>; 2] {
    axes(size, by, preprocessing).map(|axis| axis.reach(preprocessing.interpolation))
}

/// What becomes of a picture's width and height.
fn axes(size: [usize; 2], by: usize, preprocessing: &Preprocessing) -> [Axis; 2] {
    let to = resized(size, preprocessing);
    [0, 1].map(|axis| Axis {
        from: size[axis] as f64 / by as f64,
        to: to[axis],
        wanted: centre(to[axis], preprocessing.crop),
    })
}

/// Width and height after resizing.
fn resized([width, height]: [usize; 2], preprocessing: &Preprocessing) -> [usize; 2] {
    let short = preprocessing.resize;
    // As torchvision's Resize: the long side is cut to a whole number of pixels.
    let scaled = |long: usize, by: usize| ((short * long) as f64 / by as f64) as usize;
    if preprocessing.squash {
        [short, short]
    } else if width <= height {
        [short, scaled(height, width)]
    } else {
        [scaled(width, height), short]
    }
}

/// By how much a picture of that width and height may be made smaller before it is resized: 8, 4, 2,
/// or 1 for not at all.
pub(super) fn reduction(size: [usize; 2], preprocessing: &Preprocessing) -> usize {
    let small = resized(size, preprocessing);
    let enough = |by: usize| {
        let mut sides = size.iter().zip(small);
        sides.all(|(&side, small)| side as f64 >= MARGIN * (small * by) as f64)
    };
    [8, 4, 2].into_iter().find(|&by| enough(by)).unwrap_or(1)
}

/// A network's input `[crop, crop, 3]`.
pub fn prepare(image: &Rgb, preprocessing: &Preprocessing) -> Vec<f32> {
    normalize(&crop_pixels(image, preprocessing), preprocessing)
}

/// 8-bit pixels `[.., 3]` scaled to [0, 1] and normalised.
pub fn normalize(pixels: &[u8], preprocessing: &Preprocessing) -> Vec<f32> {
    let Preprocessing { mean, std, .. } = preprocessing;
    let normalized =
        |(i, &value): (usize, &u8)| (f32::from(value) / 255.0 - mean[i % 3]) / std[i % 3];
    pixels.iter().enumerate().map(normalized).collect()
}

/// A prepared image `[H, W, 3]` seen in a mirror.
pub fn mirror(pixels: &[f32], width: usize) -> Vec<f32> {
    let (pixels, _) = pixels.as_chunks::<3>();
    let rows = pixels.chunks_exact(width);
    rows.flat_map(|row| row.iter().rev())
        .flatten()
        .copied()
        .collect()
}

/// The middle `crop` of `size` positions; halves round to even, as Python's round does.
fn centre(size: usize, crop: usize) -> Range<usize> {
    let spare = size - crop;
    let half = spare / 2;
    let start = if spare % 2 == 1 {
        half + half % 2
    } else {
        half
    };
    start..start + crop
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_centre_rounds_halves_to_even() {
        let starts: Vec<usize> = (224..=231).map(|size| centre(size, 224).start).collect();
        assert_eq!(starts, [0, 0, 1, 2, 2, 2, 3, 4]);
    }

    #[test]
    fn a_mirror_reverses_columns() {
        let row: Vec<f32> = (0..12).map(|v| v as f32).collect();
        let expected = [3., 4., 5., 0., 1., 2., 9., 10., 11., 6., 7., 8.];
        assert_eq!(mirror(&row, 2), expected);
    }
}
