use std::ops::Range;

use super::Rgb;
use super::resize::resize;
use crate::models::Preprocessing;

/// The resized and cropped picture before it is normalised, 8-bit `[crop, crop, 3]`.
pub fn crop_pixels(image: &Rgb, preprocessing: &Preprocessing) -> Vec<u8> {
    let Preprocessing {
        resize: short,
        crop,
        ..
    } = *preprocessing;
    // As torchvision's Resize: the long side is cut to a whole number of pixels.
    let scaled = |long: usize, by: usize| ((short * long) as f64 / by as f64) as usize;
    let (width, height) = if preprocessing.squash {
        (short, short)
    } else if image.width <= image.height {
        (short, scaled(image.height, image.width))
    } else {
        (scaled(image.width, image.height), short)
    };
    let columns = centre(width, crop);
    let rows = centre(height, crop);
    resize(
        image,
        [width, height],
        preprocessing.interpolation,
        columns,
        rows,
    )
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
