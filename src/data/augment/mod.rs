//! Random changes to training images, as torchvision defines them and puts them one after the
//! other in its reference training: a part of the picture, its mirror image, an automatic policy or
//! colour jitter on 8-bit values; then, on normalised values, random erasing; and mixup or cutmix of
//! a batch.

mod mix;
mod ops;
mod policy;

use std::ops::Range;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Rgb;
use super::preprocess::{crop_pixels, normalize};
use super::resize::{Axis, resize};
use crate::models::{Interpolation, Preprocessing};

pub use mix::Mix;
pub use ops::Operation;
pub use policy::{color_jitter, erased_part, rand_augment, trivial_augment};

/// `--augment`: how training images vary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Augment {
    /// Not at all: prepared as for classification.
    None,
    /// A random part of the image ([`random_part`]), mirrored half of the time.
    Light,
    /// The same, then one operation of any strength: TrivialAugmentWide.
    Trivial,
    /// The same, then two operations of medium strength: RandAugment.
    Rand,
}

/// All that varies training images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Augmentation {
    pub augment: Augment,
    /// Brightness, contrast and saturation are each multiplied with 1 plus or minus up to this.
    pub color_jitter: f64,
    /// The hue turns by up to this part of the circle, at most 0.5.
    pub hue_jitter: f64,
    /// How probable it is that a rectangle is erased.
    pub random_erasing: f64,
    /// Alpha of [`Mix`]'s means; 0: none.
    pub mixup: f64,
    /// Alpha of [`Mix`]'s patches; 0: none.
    pub cutmix: f64,
}

impl Augmentation {
    /// Images as for classification.
    pub const NONE: Self = Self {
        augment: Augment::None,
        color_jitter: 0.0,
        hue_jitter: 0.0,
        random_erasing: 0.0,
        mixup: 0.0,
        cutmix: 0.0,
    };

    /// A training image `[crop, crop, 3]`.
    pub fn prepare(
        &self,
        image: &Rgb,
        preprocessing: &Preprocessing,
        rng: &mut ChaCha8Rng,
    ) -> Vec<f32> {
        let pixels = match self.augment {
            Augment::None => crop_pixels(image, preprocessing),
            _ => light(image, preprocessing, rng),
        };
        self.finish(pixels, preprocessing, rng)
    }

    /// What comes after the crop, 8-bit `[crop, crop, 3]`.
    pub(super) fn finish(
        &self,
        mut pixels: Vec<u8>,
        preprocessing: &Preprocessing,
        rng: &mut ChaCha8Rng,
    ) -> Vec<f32> {
        let size = preprocessing.crop;
        let mut operations = Vec::new();
        match self.augment {
            Augment::None | Augment::Light => {}
            Augment::Trivial => operations.push(trivial_augment(rng)),
            Augment::Rand => operations.extend(rand_augment([size; 2], rng)),
        }
        operations.extend(color_jitter(self.color_jitter, self.hue_jitter, rng));
        if !operations.is_empty() {
            let mut image = Rgb {
                width: size,
                height: size,
                pixels,
            };
            operations.iter().for_each(|o| o.apply(&mut image));
            pixels = image.pixels;
        }
        let mut values = normalize(&pixels, preprocessing);
        if self.random_erasing > 0.0
            && rng.random_bool(self.random_erasing.min(1.0))
            && let Some([columns, rows]) = erased_part([size; 2], rng)
        {
            for y in rows {
                let row = y * size * 3;
                values[row + columns.start * 3..row + columns.end * 3].fill(0.0);
            }
        }
        values
    }
}

/// A random part of the image, mirrored half of the time.
fn light(image: &Rgb, preprocessing: &Preprocessing, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let size = preprocessing.crop;
    let [columns, rows] = random_part(image.width, image.height, rng);
    let mut pixels = resized_part(image, columns, rows, size, preprocessing.interpolation);
    if rng.random::<bool>() {
        for row in pixels.chunks_exact_mut(size * 3) {
            mirror_row(row);
        }
    }
    pixels
}

fn mirror_row(row: &mut [u8]) {
    row.reverse();
    // Colours back into their order.
    for pixel in row.chunks_exact_mut(3) {
        pixel.reverse();
    }
}

/// Columns and rows of torchvision's RandomResizedCrop: 8 to 100 % of the area, with sides in a
/// ratio between 3 : 4 and 4 : 3.
pub fn random_part(width: usize, height: usize, rng: &mut ChaCha8Rng) -> [Range<usize>; 2] {
    const SCALE: Range<f64> = 0.08..1.0;
    const RATIO: [f64; 2] = [3.0 / 4.0, 4.0 / 3.0];
    let area = (width * height) as f64;
    let logarithms = RATIO[0].ln()..RATIO[1].ln();
    for _ in 0..10 {
        let target = area * rng.random_range(SCALE);
        let ratio = rng.random_range(logarithms.clone()).exp();
        let w = (target * ratio).sqrt().round_ties_even() as usize;
        let h = (target / ratio).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&w) && (1..=height).contains(&h) {
            let top = rng.random_range(0..=height - h);
            let left = rng.random_range(0..=width - w);
            return [left..left + w, top..top + h];
        }
    }
    // The centre, as near to the image's own ratio as is allowed.
    let ratio = width as f64 / height as f64;
    let (w, h) = if ratio < RATIO[0] {
        (width, (width as f64 / RATIO[0]).round_ties_even() as usize)
    } else if ratio > RATIO[1] {
        (
            (height as f64 * RATIO[1]).round_ties_even() as usize,
            height,
        )
    } else {
        (width, height)
    };
    let (w, h) = (w.clamp(1, width), h.clamp(1, height));
    let (left, top) = ((width - w) / 2, (height - h) / 2);
    [left..left + w, top..top + h]
}

/// A part of the image cut out and resized: 8-bit `[size, size, 3]`.
pub fn resized_part(
    image: &Rgb,
    columns: Range<usize>,
    rows: Range<usize>,
    size: usize,
    interpolation: Interpolation,
) -> Vec<u8> {
    let (width, height) = (columns.len(), rows.len());
    let mut pixels = Vec::with_capacity(width * height * 3);
    for y in rows {
        let start = (y * image.width + columns.start) * 3;
        pixels.extend_from_slice(&image.pixels[start..start + width * 3]);
    }
    let part = Rgb {
        width,
        height,
        pixels,
    };
    let axes = [width, height].map(|side| Axis {
        from: side as f64,
        to: size,
        wanted: 0..size,
    });
    resize(&part, [0, 0], &axes, interpolation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::random::{Purpose, generator};

    #[test]
    fn parts_are_within_the_image_and_of_every_allowed_size() {
        let mut rng = generator(3, Purpose::Augment, 0, 0);
        let (mut least, mut most) = (f64::INFINITY, 0f64);
        let mut ratios = Vec::new();
        for _ in 0..2000 {
            let [columns, rows] = random_part(400, 400, &mut rng);
            assert!(columns.end <= 400 && rows.end <= 400);
            let share = (columns.len() * rows.len()) as f64 / 160_000.0;
            (least, most) = (least.min(share), most.max(share));
            ratios.push((columns.len() as f64 / rows.len() as f64).ln());
        }
        assert!((0.079..0.09).contains(&least), "{least}");
        assert!((0.9..1.01).contains(&most), "{most}");
        let bound = (4f64 / 3.0).ln() + 0.02;
        assert!(ratios.iter().all(|r| r.abs() < bound));
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        assert!(mean.abs() < 0.03, "{mean}");
    }

    #[test]
    fn a_sliver_gives_its_centre() {
        let mut rng = generator(3, Purpose::Augment, 0, 0);
        assert_eq!(random_part(1000, 3, &mut rng), [498..502, 0..3]);
        assert_eq!(random_part(1, 1, &mut rng), [0..1, 0..1]);
    }

    #[test]
    fn mirrored_rows_keep_their_colours() {
        let mut row = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        mirror_row(&mut row);
        assert_eq!(row, [7, 8, 9, 4, 5, 6, 1, 2, 3]);
    }
}
