//! EfficientNet-Lite0: EfficientNet (Tan & Le 2019, <https://arxiv.org/abs/1905.11946>) without
//! squeeze-and-excitation, with ReLU6, as TensorFlow's authors published it for mobile devices.
//! Parameters carry timm's names.

use serde::{Deserialize, Serialize};

use super::layers::Layers;
use crate::graph::{Builder, Conv2d, Graph, InitScheme, Op};

/// Lite0 is the one variant so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {}

/// Inverted residuals: kernel, expand ratio, channels, blocks, stride of the first.
pub(crate) const STAGES: [(usize, usize, usize, usize, usize); 7] = [
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
];

/// Builds the network.
pub fn graph(Config {}: &Config, num_classes: usize) -> Graph {
    let mut b = Builder::new(InitScheme::KaimingFanOut);
    let layers = Layers::TENSORFLOW;
    let image = b.input();
    let stem = Conv2d::new(3, 32, 3).stride(2);
    let mut x = layers.conv_norm_relu6(&mut b, "", ["conv_stem", "bn1", "act1"], stem, image);
    let mut channels = 32;
    for (stage, (kernel, expand_ratio, out_channels, blocks, first_stride)) in
        STAGES.into_iter().enumerate()
    {
        for block in 0..blocks {
            let stride = if block == 0 { first_stride } else { 1 };
            let name = format!("blocks.{stage}.{block}.");
            let hidden = channels * expand_ratio;
            let depthwise = Conv2d::new(hidden, hidden, kernel)
                .stride(stride)
                .groups(hidden);
            let projection = Conv2d::new(hidden, out_channels, 1);
            let y = if expand_ratio == 1 {
                let y =
                    layers.conv_norm_relu6(&mut b, &name, ["conv_dw", "bn1", "act1"], depthwise, x);
                layers.conv_norm(&mut b, &name, ["conv_pw", "bn2"], projection, y)
            } else {
                let expansion = Conv2d::new(channels, hidden, 1);
                let y =
                    layers.conv_norm_relu6(&mut b, &name, ["conv_pw", "bn1", "act1"], expansion, x);
                let y =
                    layers.conv_norm_relu6(&mut b, &name, ["conv_dw", "bn2", "act2"], depthwise, y);
                layers.conv_norm(&mut b, &name, ["conv_pwl", "bn3"], projection, y)
            };
            x = if stride == 1 && channels == out_channels {
                b.add(format!("{name}add"), Op::Add, &[y, x])
            } else {
                y
            };
            channels = out_channels;
        }
    }
    let head = Conv2d::new(channels, 1280, 1);
    let x = layers.conv_norm_relu6(&mut b, "", ["conv_head", "bn2", "act2"], head, x);
    let x = b.add("global_pool", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    let x = b.add("dropout", Op::Dropout { p: 0.2 }, &[x]);
    b.linear("classifier", 1280, num_classes, x);
    b.finish()
}
