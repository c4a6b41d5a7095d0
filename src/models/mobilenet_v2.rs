//! MobileNetV2 (Sandler et al. 2018, <https://arxiv.org/abs/1801.04381>), under torchvision's names.

use serde::{Deserialize, Serialize};

use super::layers::Layers;
use super::{check_width, make_divisible};
use crate::graph::{Builder, Conv2d, Graph, InitScheme, NodeId, Op};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Width multiplier: scales the channels of every layer (the last one only upwards).
    pub width: f64,
    /// TensorFlow's SAME padding and BatchNorm epsilon 1e-3, for weights that were trained there;
    /// else as torchvision has it.
    #[serde(default)]
    pub tensorflow: bool,
}

impl Config {
    pub(super) fn check(&self) -> Result<(), String> {
        check_width(self.width)
    }
}

/// Inverted residuals: expand ratio, channels, blocks, stride of the first.
pub(crate) const STAGES: [(usize, usize, usize, usize); 7] = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
];

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let scaled = |channels: usize| make_divisible(channels as f64 * config.width, 8);
    let mut b = Builder::new(InitScheme::KaimingFanOutLinear { std: 0.01 });
    let mut channels = scaled(32);
    let stem = Conv2d::new(3, channels, 3).stride(2);
    let image = b.input();
    let layers = Layers::new(config.tensorflow);
    let mut x = conv_norm_relu(&mut b, layers, "features.0", stem, image);
    let mut index = 1;
    for (expand_ratio, stage_channels, blocks, first_stride) in STAGES {
        let out_channels = scaled(stage_channels);
        for block in 0..blocks {
            let stride = if block == 0 { first_stride } else { 1 };
            let name = format!("features.{index}");
            let hidden = channels * expand_ratio;
            x = inverted_residual(
                &mut b,
                layers,
                &name,
                x,
                [channels, hidden, out_channels],
                stride,
            );
            channels = out_channels;
            index += 1;
        }
    }
    let last = make_divisible(1280.0 * config.width.max(1.0), 8);
    let x = conv_norm_relu(
        &mut b,
        layers,
        &format!("features.{index}"),
        Conv2d::new(channels, last, 1),
        x,
    );
    let x = b.add("adaptive_avg_pool2d", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    let x = b.add("classifier.0", Op::Dropout { p: 0.2 }, &[x]);
    b.linear("classifier.1", last, num_classes, x);
    b.finish()
}

/// 1x1 expansion (left out at ratio 1), 3x3 depthwise, linear 1x1 projection.
fn inverted_residual(
    b: &mut Builder,
    layers: Layers,
    name: &str,
    input: NodeId,
    [channels, hidden, out_channels]: [usize; 3],
    stride: usize,
) -> NodeId {
    let mut x = input;
    let mut index = 0;
    if hidden != channels {
        let expansion = Conv2d::new(channels, hidden, 1);
        x = conv_norm_relu(b, layers, &format!("{name}.conv.{index}"), expansion, x);
        index += 1;
    }
    let depthwise = Conv2d::new(hidden, hidden, 3).stride(stride).groups(hidden);
    let x = conv_norm_relu(b, layers, &format!("{name}.conv.{index}"), depthwise, x);
    let projection = Conv2d::new(hidden, out_channels, 1);
    let names = [1, 2].map(|i| (index + i).to_string());
    let names = names.each_ref().map(String::as_str);
    let x = layers.conv_norm(b, &format!("{name}.conv."), names, projection, x);
    if stride == 1 && channels == out_channels {
        b.add(format!("{name}.add"), Op::Add, &[input, x])
    } else {
        x
    }
}

fn conv_norm_relu(b: &mut Builder, layers: Layers, name: &str, conv: Conv2d, x: NodeId) -> NodeId {
    layers.conv_norm_relu6(b, &format!("{name}."), ["0", "1", "2"], conv, x)
}
