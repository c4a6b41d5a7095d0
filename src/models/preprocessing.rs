use serde::{Deserialize, Serialize};

/// How an image becomes a network's input: resize the short side, crop the centre, scale to
/// [0, 1], subtract the mean, divide by the standard deviation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocessing {
    /// Length of the short side after resizing, in pixels.
    pub resize: usize,
    /// Height and width of the centre crop, in pixels; at most `resize`.
    pub crop: usize,
    /// The picture is squeezed to `resize` x `resize`, whatever its shape.
    #[serde(default)]
    pub squash: bool,
    pub interpolation: Interpolation,
    /// Per channel, of values in [0, 1].
    pub mean: [f32; 3],
    pub std: [f32; 3],
}

/// Resampling filter; both widen with the reduction, as Pillow's do (antialiasing).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    Bilinear,
    /// Cubic convolution with a = -0.5.
    Bicubic,
}

/// Statistics of ImageNet's training images.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

impl Preprocessing {
    /// A row of torchvision: bilinear, ImageNet's statistics.
    pub const fn torchvision(resize: usize, crop: usize) -> Self {
        Self {
            resize,
            crop,
            squash: false,
            interpolation: Interpolation::Bilinear,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        }
    }

    /// A row of timm: the short side becomes ⌊crop / crop_pct⌋.
    pub const fn timm(crop: usize, crop_pct: f64, interpolation: Interpolation) -> Self {
        Self {
            resize: (crop as f64 / crop_pct) as usize,
            crop,
            squash: false,
            interpolation,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
        }
    }

    /// The same with inputs scaled to [-1, 1].
    pub const fn half(self) -> Self {
        self.normalized([0.5; 3], [0.5; 3])
    }

    /// The same with another mean and standard deviation.
    pub const fn normalized(self, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { mean, std, ..self }
    }

    /// What is wrong with these settings, for those that come from a file.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.crop == 0 || self.crop > self.resize || self.resize > 1 << 14 {
            return Err("crop must be at least 1 and at most resize, resize at most 16384");
        }
        if self.mean.iter().any(|m| !m.is_finite())
            || self.std.iter().any(|s| !s.is_finite() || *s <= 0.0)
        {
            return Err("mean and std must be finite, and std above 0");
        }
        Ok(())
    }
}
