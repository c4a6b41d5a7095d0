use std::ops::Range;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Beta, Distribution};

/// How each image of a batch is mixed with the one before it (the first with the last): the batch
/// is in random order, so that any two can meet. As torchvision's MixUp and CutMix.
#[derive(Clone, Debug, PartialEq)]
pub enum Mix {
    /// Mixup: a weighted mean; this is the image's own weight.
    Blend(f64),
    /// Cutmix: a rectangle is the other image's.
    Patch {
        columns: Range<usize>,
        rows: Range<usize>,
        /// The share of the area that stays the image's own.
        own: f64,
    },
}

impl Mix {
    /// Draws how to mix a batch of images of so many columns and rows; None where both
    /// `mixup` and `cutmix` (each the alpha of a beta distribution) are 0. With both above 0, each
    /// has its turn half of the time.
    pub fn draw(
        mixup: f64,
        cutmix: f64,
        [width, height]: [usize; 2],
        rng: &mut ChaCha8Rng,
    ) -> Option<Self> {
        let patch = match (mixup > 0.0, cutmix > 0.0) {
            (false, false) => return None,
            (true, true) => rng.random::<bool>(),
            (_, cutmix) => cutmix,
        };
        let alpha = if patch { cutmix } else { mixup };
        let own = Beta::new(alpha, alpha).ok()?.sample(rng);
        if !patch {
            return Some(Mix::Blend(own));
        }
        let half = 0.5 * (1.0 - own).sqrt();
        let mut span = |size: usize| {
            let centre = rng.random_range(0..size);
            let reach = (half * size as f64) as usize;
            centre.saturating_sub(reach)..(centre + reach).min(size)
        };
        let (columns, rows) = (span(width), span(height));
        let share = (columns.len() * rows.len()) as f64 / (width * height) as f64;
        Some(Mix::Patch {
            columns,
            rows,
            own: 1.0 - share,
        })
    }

    /// How much of each image, and of its class, is its own.
    pub fn own(&self) -> f64 {
        match self {
            Mix::Blend(own) | Mix::Patch { own, .. } => *own,
        }
    }

    /// Mixes a batch of images `[.., width, 3]` that have `size` values each.
    pub fn apply(&self, pixels: &mut [f32], size: usize, width: usize) {
        let Some(last) = pixels.chunks_exact(size).next_back() else {
            return;
        };
        // Backwards, so that what comes before is still as it was.
        let last = last.to_vec();
        for start in (0..pixels.len() / size).rev().map(|index| index * size) {
            let (before, image) = pixels[..start + size].split_at_mut(start);
            let other = if start == 0 {
                &last
            } else {
                &before[start - size..]
            };
            match self {
                Mix::Blend(own) => {
                    let (own, rest) = (*own as f32, (1.0 - own) as f32);
                    for (value, other) in image.iter_mut().zip(other) {
                        *value = other * rest + *value * own;
                    }
                }
                Mix::Patch { columns, rows, .. } => {
                    for y in rows.clone() {
                        let row = y * width * 3;
                        let part = row + columns.start * 3..row + columns.end * 3;
                        image[part.clone()].copy_from_slice(&other[part]);
                    }
                }
            }
        }
    }
}
