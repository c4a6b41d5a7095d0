use serde::{Deserialize, Serialize};

use super::optimizer::Rule;
use super::schedule::{Schedule, Shape};
use crate::data::{Augment, Augmentation};
use crate::exec::Precision;

/// Everything that a run follows from, but for the machine: what config.toml holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// As [`crate::data::Dataset::open`] takes it.
    pub data: String,
    /// A registry name or a model file.
    pub model: String,
    /// Another file of weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<String>,
    /// No weights at all.
    pub from_scratch: bool,
    /// A fresh head even where the weights have one of the right size.
    pub reset_head: bool,
    /// `auto` and `none` (nothing), `backbone`, or the last of the stages that stay as they are.
    pub freeze: String,
    #[serde(default)]
    pub head: HeadStart,
    #[serde(default)]
    pub norms: Norms,
    /// With several processes: batch norms go by the statistics of all images of a batch.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sync_bn: bool,
    /// Height and width of the images; None until the network is known, then at first its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    pub augment: Augment,
    /// Brightness, contrast and saturation vary by factors of 1 plus or minus up to this.
    pub color_jitter: f64,
    /// The hue turns by up to this part of the circle.
    pub hue_jitter: f64,
    /// How probable it is that a rectangle of an image is erased.
    pub random_erasing: f64,
    /// Alpha of the beta distribution that images of a batch are averaged by; 0: they are not.
    pub mixup: f64,
    /// The same for a rectangle of another image put in place.
    pub cutmix: f64,
    /// Share of every class to validate on, where the data do not say.
    pub val_split: f64,
    /// Images of more pixels are not read.
    pub max_pixels: u64,
    /// Passes over the training images after the head was fitted, if it is.
    pub epochs: u64,
    pub batch_size: usize,
    /// Batches whose gradients make one step.
    pub accumulate: usize,
    /// Seconds that the whole run may take: epochs and steps are planned to fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<f64>,
    /// Steps that the time allows, once they are planned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// The step at which the time was up, where that was before the planned end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_step: Option<u64>,
    pub optimizer: OptimizerKind,
    pub learning_rate: LearningRate,
    /// Of SGD.
    pub momentum: f64,
    /// Of SGD.
    pub nesterov: bool,
    /// Not applied to norms and biases.
    pub weight_decay: f64,
    /// Each stage's rate is the next one's times this.
    pub layer_decay: f64,
    pub schedule: Shape,
    /// Epochs over which the rate rises.
    pub warmup: f64,
    /// Gradients whose norm is greater are scaled down to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    pub label_smoothing: f64,
    pub class_weights: ClassWeights,
    /// Decay of the weights' moving average, which is then what is judged and kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Epochs without improvement after which the run ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u64>,
    pub metric: Metric,
    /// No shortcut that changes digits.
    pub exact: bool,
    /// What a CUDA device computes with.
    #[serde(default)]
    pub precision: Precision,
    pub seed: u64,
}

/// The highest learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LearningRate {
    Is(f64),
    /// To be found before the first step.
    Found(Auto),
}

/// `auto`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Auto {
    Auto,
}

impl LearningRate {
    pub const AUTO: Self = Self::Found(Auto::Auto);

    /// 0 where it has not been found.
    pub fn value(self) -> f64 {
        match self {
            Self::Is(rate) => rate,
            Self::Found(_) => 0.0,
        }
    }
}

/// What the head is before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadStart {
    /// The one that suits the features of the frozen network best.
    Fit,
    /// That of the weights, or a random one.
    #[default]
    Train,
}

/// What batch norms go by in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norms {
    /// The batch's statistics.
    #[default]
    Batch,
    /// Those that they came with; they are not trained.
    Stored,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    Sgd,
    #[serde(rename = "adamw")]
    AdamW,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassWeights {
    None,
    /// In inverse proportion to the number of images, 1 on average over the images.
    Auto,
}

/// What the best epoch is best in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    Accuracy,
    MacroF1,
}

impl Settings {
    /// As config.toml has it.
    pub fn to_toml(&self) -> String {
        // Tables of numbers and words cannot fail to be written.
        toml::to_string(self).unwrap_or_default()
    }

    /// # Errors
    /// What is wrong with the text.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| e.message().to_string())
    }

    pub fn rule(&self) -> Rule {
        match self.optimizer {
            OptimizerKind::Sgd => Rule::Sgd {
                momentum: self.momentum,
                nesterov: self.nesterov,
            },
            OptimizerKind::AdamW => Rule::AdamW {
                betas: (0.9, 0.999),
                eps: 1e-8,
            },
        }
    }

    /// All that varies training images.
    pub fn augmentation(&self) -> Augmentation {
        Augmentation {
            augment: self.augment,
            color_jitter: self.color_jitter,
            hue_jitter: self.hue_jitter,
            random_erasing: self.random_erasing,
            mixup: self.mixup,
            cutmix: self.cutmix,
        }
    }

    /// The rate over a run whose epochs have so many steps.
    pub fn schedule(&self, steps_per_epoch: u64) -> Schedule {
        Schedule {
            shape: self.schedule,
            rate: self.learning_rate.value(),
            warmup: (self.warmup * steps_per_epoch as f64).round() as u64,
            total: self.steps.unwrap_or(self.epochs * steps_per_epoch),
        }
    }

    /// What is out of range, for settings that come from a file or a person: the name, and what
    /// was expected.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        let share = |v: f64| (0.0..1.0).contains(&v);
        let positive = |v: f64| v > 0.0 && v.is_finite();
        let least_0 = |v: f64| v >= 0.0 && v.is_finite();
        let checks = [
            (
                self.epochs > 0 || self.head == HeadStart::Fit,
                "epochs",
                "at least 1, or 0 with --head fit",
            ),
            (self.batch_size > 0, "batch-size", "at least 1"),
            (self.accumulate > 0, "accumulate", "at least 1"),
            (
                self.image_size.is_none_or(|s| (1..=4096).contains(&s)),
                "image-size",
                "1 to 4096",
            ),
            (
                self.learning_rate == LearningRate::AUTO || positive(self.learning_rate.value()),
                "lr",
                "a number above 0, or auto",
            ),
            (
                self.time.is_none_or(positive),
                "time",
                "a time like 90s, 5m or 1h30m",
            ),
            (share(self.momentum), "momentum", "0 to 1, 1 excluded"),
            (
                !self.nesterov || self.momentum > 0.0 || self.optimizer == OptimizerKind::AdamW,
                "nesterov",
                "a momentum above 0 with it",
            ),
            (
                share(self.weight_decay),
                "weight-decay",
                "0 to 1, 1 excluded",
            ),
            (
                self.layer_decay > 0.0 && self.layer_decay <= 1.0,
                "layer-decay",
                "above 0, at most 1",
            ),
            (
                self.warmup >= 0.0 && self.warmup <= 1e6,
                "warmup",
                "a number of epochs, 0 or more",
            ),
            (
                self.clip_norm.is_none_or(positive),
                "clip-norm",
                "a number above 0",
            ),
            (
                share(self.label_smoothing),
                "label-smoothing",
                "0 to 1, 1 excluded",
            ),
            (
                self.ema.is_none_or(|d| d > 0.0 && share(d)),
                "ema",
                "above 0, below 1",
            ),
            (
                least_0(self.color_jitter),
                "color-jitter",
                "a number, 0 or more",
            ),
            (
                (0.0..=0.5).contains(&self.hue_jitter),
                "hue-jitter",
                "0 to 0.5",
            ),
            (
                (0.0..=1.0).contains(&self.random_erasing),
                "random-erasing",
                "0 to 1",
            ),
            (least_0(self.mixup), "mixup", "a number, 0 or more"),
            (least_0(self.cutmix), "cutmix", "a number, 0 or more"),
            (
                self.val_split > 0.0 && share(self.val_split),
                "val-split",
                "above 0, below 1",
            ),
        ];
        match checks.into_iter().find(|(good, ..)| !good) {
            Some((_, name, expected)) => Err((name, expected)),
            None => Ok(()),
        }
    }
}
