//! What is drawn: which operation, how strong, which part.

use std::ops::Range;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::Operation;
use crate::data::dataset::shuffle;

/// Steps of strength, of both policies.
const STEPS: usize = 31;
/// Operations of both policies.
const OPERATIONS: usize = 14;
/// RandAugment's operations one after the other, and their step of strength.
const RAND_OPERATIONS: usize = 2;
const RAND_STEP: usize = 9;

/// The strongest of each operation's steps.
struct Strengths {
    shear: f32,
    /// Pixels, of columns and of rows.
    translate: [f32; 2],
    degrees: f32,
    /// Of brightness, colour, contrast and sharpness, from 1 up or down.
    factor: f32,
    /// Bits that posterising takes.
    bits: f32,
}

impl Strengths {
    /// An operation at one of its steps, in one of its two directions.
    fn operation(&self, index: usize, step: usize, negative: bool) -> Operation {
        let towards = |most: f32| {
            let value = f64::from(linspace(0.0, most, step));
            if negative { -value } else { value }
        };
        let factor = || 1.0 + towards(self.factor);
        match index {
            0 => Operation::Identity,
            1 => Operation::ShearX(towards(self.shear)),
            2 => Operation::ShearY(towards(self.shear)),
            3 => Operation::TranslateX(towards(self.translate[0]) as i64),
            4 => Operation::TranslateY(towards(self.translate[1]) as i64),
            5 => Operation::Rotate(towards(self.degrees)),
            6 => Operation::Brightness(factor()),
            7 => Operation::Color(factor()),
            8 => Operation::Contrast(factor()),
            9 => Operation::Sharpness(factor()),
            10 => {
                let taken = step as f32 / ((STEPS - 1) as f32 / self.bits);
                Operation::Posterize(8 - taken.round_ties_even() as u32)
            }
            11 => Operation::Solarize(f64::from(linspace(255.0, 0.0, step))),
            12 => Operation::AutoContrast,
            _ => Operation::Equalize,
        }
    }
}

/// torch.linspace, which counts from the nearer end and rounds once.
fn linspace(start: f32, end: f32, index: usize) -> f32 {
    let step = (end - start) / (STEPS - 1) as f32;
    if index < STEPS / 2 {
        step.mul_add(index as f32, start)
    } else {
        (-step).mul_add((STEPS - 1 - index) as f32, end)
    }
}

/// One operation of any strength: TrivialAugmentWide (Müller and Hutter, 2021).
pub fn trivial_augment(rng: &mut ChaCha8Rng) -> Operation {
    const WIDE: Strengths = Strengths {
        shear: 0.99,
        translate: [32.0; 2],
        degrees: 135.0,
        factor: 0.99,
        bits: 6.0,
    };
    let (index, step) = (rng.random_range(0..OPERATIONS), rng.random_range(0..STEPS));
    WIDE.operation(index, step, rng.random())
}

/// Two operations of medium strength, for images of so many columns and rows: RandAugment (Cubuk
/// and others, 2020) with torchvision's defaults.
pub fn rand_augment(
    [width, height]: [usize; 2],
    rng: &mut ChaCha8Rng,
) -> [Operation; RAND_OPERATIONS] {
    let strengths = Strengths {
        shear: 0.3,
        translate: [width, height].map(|size| (150.0 / 331.0 * size as f64) as f32),
        degrees: 30.0,
        factor: 0.9,
        bits: 4.0,
    };
    std::array::from_fn(|_| {
        let index = rng.random_range(0..OPERATIONS);
        strengths.operation(index, RAND_STEP, rng.random())
    })
}

/// Brightness, contrast and saturation by factors of 1 plus or minus up to `strength`, never under
/// 0, and the hue by up to `hue` of the circle either way, in random order: ColorJitter.
pub fn color_jitter(strength: f64, hue: f64, rng: &mut ChaCha8Rng) -> Vec<Operation> {
    let mut operations = Vec::new();
    if strength > 0.0 {
        let mut factor = || rng.random_range((1.0 - strength).max(0.0)..=1.0 + strength);
        operations.push(Operation::Brightness(factor()));
        operations.push(Operation::Contrast(factor()));
        operations.push(Operation::Color(factor()));
    }
    if hue > 0.0 {
        operations.push(Operation::Hue(rng.random_range(-hue..=hue)));
    }
    shuffle(&mut operations, rng);
    operations
}

/// Columns and rows that RandomErasing erases of an image of so many: 2 to 33 % of its area, with
/// sides in a ratio between 0.3 and 3.3; None where ten tries gave none that fits.
pub fn erased_part([width, height]: [usize; 2], rng: &mut ChaCha8Rng) -> Option<[Range<usize>; 2]> {
    let area = (width * height) as f64;
    for _ in 0..10 {
        let target = area * rng.random_range(0.02..0.33);
        let ratio = rng.random_range(0.3f64.ln()..3.3f64.ln()).exp();
        let h = (target * ratio).sqrt().round_ties_even() as usize;
        let w = (target / ratio).sqrt().round_ties_even() as usize;
        if w < width && h < height {
            let top = rng.random_range(0..=height - h);
            let left = rng.random_range(0..=width - w);
            return Some([left..left + w, top..top + h]);
        }
    }
    None
}
