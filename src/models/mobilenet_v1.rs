//! MobileNetV1 (Howard et al. 2017, <https://arxiv.org/abs/1704.04861>). Parameters carry timm's
//! names; torchvision does not have the network.
//!
//! The paper's resolution multiplier is the size of the image: the network takes any.

use serde::{Deserialize, Serialize};

use super::layers::Layers;
use super::{check_width, make_divisible};
use crate::graph::{Builder, Conv2d, Graph, InitScheme, Op};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The paper's alpha: scales the channels of every layer.
    pub width: f64,
    /// TensorFlow's SAME padding and BatchNorm epsilon 1e-3, for weights that were trained there;
    /// else symmetric padding and 1e-5.
    pub tensorflow: bool,
}

impl Config {
    pub(super) fn check(&self) -> Result<(), String> {
        check_width(self.width)
    }
}

/// Depthwise separable convolutions, stage by stage: channels, blocks, stride of the first.
pub(crate) const STAGES: [(usize, usize, usize); 5] = [
    (64, 1, 1),
    (128, 2, 2),
    (256, 2, 2),
    (512, 6, 2),
    (1024, 2, 2),
];

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let scaled = |channels: usize| make_divisible(channels as f64 * config.width, 8);
    let mut b = Builder::new(InitScheme::KaimingFanOut);
    let layers = Layers::new(config.tensorflow);
    let mut channels = scaled(32);
    let image = b.input();
    let stem = Conv2d::new(3, channels, 3).stride(2);
    let mut x = layers.conv_norm_relu6(&mut b, "", ["conv_stem", "bn1", "act1"], stem, image);
    for (stage, (stage_channels, blocks, first_stride)) in STAGES.into_iter().enumerate() {
        for block in 0..blocks {
            let stride = if block == 0 { first_stride } else { 1 };
            let out_channels = scaled(stage_channels);
            let name = format!("blocks.{stage}.{block}.");
            let depthwise = Conv2d::new(channels, channels, 3)
                .stride(stride)
                .groups(channels);
            x = layers.conv_norm_relu6(&mut b, &name, ["conv_dw", "bn1", "act1"], depthwise, x);
            let pointwise = Conv2d::new(channels, out_channels, 1);
            x = layers.conv_norm_relu6(&mut b, &name, ["conv_pw", "bn2", "act2"], pointwise, x);
            channels = out_channels;
        }
    }
    let x = b.add("global_pool", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    b.linear("classifier", channels, num_classes, x);
    b.finish()
}
