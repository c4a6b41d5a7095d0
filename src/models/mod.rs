//! The networks: one file a family, and the registry of published weights.
//!
//! A family is a configuration (what its papers vary) and a function that turns the configuration
//! into a [`Graph`]. A variant is a row of [`registry`].

pub mod efficientnet_lite;
mod layers;
pub mod mobilenet_v1;
pub mod mobilenet_v2;
pub mod mobilenet_v3;
mod preprocessing;
pub mod registry;
pub mod resnet;
pub mod shufflenet_v1;
pub mod shufflenet_v2;
pub mod vision_transformer;

use serde::{Deserialize, Serialize};

pub use preprocessing::{IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocessing};
pub use registry::{Choice, ModelRow, Pretrained, Source};

use crate::graph::Graph;

/// A family and its configuration: all that is needed to build the network again.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "family", rename_all = "snake_case")]
pub enum Architecture {
    #[serde(rename = "resnet")]
    ResNet(resnet::Config),
    #[serde(rename = "mobilenet_v1")]
    MobileNetV1(mobilenet_v1::Config),
    #[serde(rename = "mobilenet_v2")]
    MobileNetV2(mobilenet_v2::Config),
    #[serde(rename = "mobilenet_v3")]
    MobileNetV3(mobilenet_v3::Config),
    #[serde(rename = "shufflenet_v1")]
    ShuffleNetV1(shufflenet_v1::Config),
    #[serde(rename = "shufflenet_v2")]
    ShuffleNetV2(shufflenet_v2::Config),
    VisionTransformer(vision_transformer::Config),
    EfficientNetLite(efficientnet_lite::Config),
}

impl Architecture {
    /// The network with a head for so many classes.
    pub fn graph(&self, num_classes: usize) -> Graph {
        match self {
            Architecture::ResNet(c) => resnet::graph(c, num_classes),
            Architecture::MobileNetV1(c) => mobilenet_v1::graph(c, num_classes),
            Architecture::MobileNetV2(c) => mobilenet_v2::graph(c, num_classes),
            Architecture::MobileNetV3(c) => mobilenet_v3::graph(c, num_classes),
            Architecture::ShuffleNetV1(c) => shufflenet_v1::graph(c, num_classes),
            Architecture::ShuffleNetV2(c) => shufflenet_v2::graph(c, num_classes),
            Architecture::VisionTransformer(c) => vision_transformer::graph(c, num_classes),
            Architecture::EfficientNetLite(c) => efficientnet_lite::graph(c, num_classes),
        }
    }

    /// The family's name, as its paper writes it.
    pub fn family(&self) -> &'static str {
        match self {
            Architecture::ResNet(c) if c.groups > 1 => "ResNeXt",
            Architecture::ResNet(_) => "ResNet",
            Architecture::MobileNetV1(_) => "MobileNetV1",
            Architecture::MobileNetV2(_) => "MobileNetV2",
            Architecture::MobileNetV3(_) => "MobileNetV3",
            Architecture::ShuffleNetV1(_) => "ShuffleNetV1",
            Architecture::ShuffleNetV2(_) => "ShuffleNetV2",
            Architecture::VisionTransformer(_) => "Vision Transformer",
            Architecture::EfficientNetLite(_) => "EfficientNet-Lite",
        }
    }

    /// What is wrong with the configuration, for one that comes from a file.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Architecture::ResNet(c) => c.check(),
            Architecture::MobileNetV1(c) => c.check(),
            Architecture::MobileNetV2(c) => c.check(),
            Architecture::MobileNetV3(c) => c.check(),
            Architecture::ShuffleNetV1(c) => c.check(),
            Architecture::ShuffleNetV2(c) => c.check(),
            Architecture::VisionTransformer(c) => c.check(),
            Architecture::EfficientNetLite(_) => Ok(()),
        }
    }
}

/// The nearest multiple of `divisor`, but not under nine tenths of `value` nor under `divisor`:
/// the rounding that the MobileNet papers' code applies to scaled widths.
pub(crate) fn make_divisible(value: f64, divisor: usize) -> usize {
    let rounded = (value + divisor as f64 / 2.0) as usize / divisor * divisor;
    let rounded = rounded.max(divisor);
    if (rounded as f64) < 0.9 * value {
        rounded + divisor
    } else {
        rounded
    }
}

/// Checks a width multiplier that comes from a file.
pub(crate) fn check_width(width: f64) -> Result<(), String> {
    if width.is_finite() && (0.05..=16.0).contains(&width) {
        Ok(())
    } else {
        Err(format!("width multiplier {width} is not within 0.05 to 16"))
    }
}
