//! MobileNetV3 (Howard et al. 2019, <https://arxiv.org/abs/1905.02244>), under torchvision's
//! names.

use serde::{Deserialize, Serialize};

use super::{check_width, make_divisible};
use crate::graph::{Activation, Builder, Conv2d, Graph, InitScheme, NodeId, Norm, Op, Padding};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    pub size: Size,
    /// Width multiplier.
    pub width: f64,
    pub origin: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Size {
    Small,
    Large,
}

/// Whose implementation is followed where they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// BatchNorm epsilon 1e-3, momentum 0.01; the width multiplier scales expanded channels and
    /// the head.
    Torchvision,
    /// Epsilon 1e-5, momentum 0.1; expanded channels are a multiple of a block's (rounded) input,
    /// the head keeps its width, and so does the stem under width 0.75.
    Timm,
    /// timm's ports of TensorFlow's weights: as timm, with epsilon 1e-3 and SAME padding.
    TensorFlow,
}

impl Config {
    pub const fn torchvision(size: Size) -> Self {
        Self {
            size,
            width: 1.0,
            origin: Origin::Torchvision,
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        check_width(self.width)
    }

    fn scaled(&self, channels: usize) -> usize {
        make_divisible(channels as f64 * self.width, 8)
    }

    fn padding(&self, kernel: usize) -> Padding {
        match self.origin {
            Origin::TensorFlow => Padding::Same,
            Origin::Torchvision | Origin::Timm => Padding::Symmetric((kernel - 1) / 2),
        }
    }

    fn norm(&self) -> Norm {
        match self.origin {
            Origin::Torchvision => Norm::TENSORFLOW,
            Origin::Timm => Norm::PYTORCH,
            Origin::TensorFlow => Norm {
                momentum: 0.1,
                ..Norm::TENSORFLOW
            },
        }
    }
}

/// A row of the paper's tables, at width 1.
struct Row {
    kernel: usize,
    input: usize,
    expanded: usize,
    output: usize,
    squeeze_excite: bool,
    activation: Activation,
    stride: usize,
}

const RE: Activation = Activation::Relu;
const HS: Activation = Activation::HardSwish;

const fn row(
    kernel: usize,
    [input, expanded, output]: [usize; 3],
    squeeze_excite: bool,
    activation: Activation,
    stride: usize,
) -> Row {
    Row {
        kernel,
        input,
        expanded,
        output,
        squeeze_excite,
        activation,
        stride,
    }
}

const LARGE: [Row; 15] = [
    row(3, [16, 16, 16], false, RE, 1),
    row(3, [16, 64, 24], false, RE, 2),
    row(3, [24, 72, 24], false, RE, 1),
    row(5, [24, 72, 40], true, RE, 2),
    row(5, [40, 120, 40], true, RE, 1),
    row(5, [40, 120, 40], true, RE, 1),
    row(3, [40, 240, 80], false, HS, 2),
    row(3, [80, 200, 80], false, HS, 1),
    row(3, [80, 184, 80], false, HS, 1),
    row(3, [80, 184, 80], false, HS, 1),
    row(3, [80, 480, 112], true, HS, 1),
    row(3, [112, 672, 112], true, HS, 1),
    row(5, [112, 672, 160], true, HS, 2),
    row(5, [160, 960, 160], true, HS, 1),
    row(5, [160, 960, 160], true, HS, 1),
];

const SMALL: [Row; 11] = [
    row(3, [16, 16, 16], true, RE, 2),
    row(3, [16, 72, 24], false, RE, 2),
    row(3, [24, 88, 24], false, RE, 1),
    row(5, [24, 96, 40], true, HS, 2),
    row(5, [40, 240, 40], true, HS, 1),
    row(5, [40, 240, 40], true, HS, 1),
    row(5, [40, 120, 48], true, HS, 1),
    row(5, [48, 144, 48], true, HS, 1),
    row(5, [48, 288, 96], true, HS, 2),
    row(5, [96, 576, 96], true, HS, 1),
    row(5, [96, 576, 96], true, HS, 1),
];

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let (rows, head): (&[Row], usize) = match config.size {
        Size::Large => (&LARGE, 1280),
        Size::Small => (&SMALL, 1024),
    };
    let head = match config.origin {
        Origin::Torchvision => config.scaled(head),
        Origin::Timm | Origin::TensorFlow => head,
    };
    let fixed_stem = config.origin != Origin::Torchvision && config.width < 0.75;
    let mut channels = if fixed_stem { 16 } else { config.scaled(16) };
    let mut b = Builder::new(InitScheme::KaimingFanOutLinear { std: 0.01 });
    let image = b.input();
    let stem = Conv2d::new(3, channels, 3).stride(2);
    let mut x = layer(&mut b, config, "features.0", stem, Some(HS), image);
    for (index, row) in rows.iter().enumerate() {
        let name = format!("features.{}", index + 1);
        (x, channels) = inverted_residual(&mut b, config, row, &name, x, channels);
    }
    let last = 6 * channels;
    let name = format!("features.{}", rows.len() + 1);
    let conv = Conv2d::new(channels, last, 1);
    let x = layer(&mut b, config, &name, conv, Some(HS), x);
    let x = b.add("avgpool", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    let x = b.linear("classifier.0", last, head, x);
    let x = b.activation("classifier.1", HS, x);
    let x = b.add("classifier.2", Op::Dropout { p: 0.2 }, &[x]);
    b.linear("classifier.3", head, num_classes, x);
    b.finish()
}

/// Expansion (left out where there is nothing to expand), depthwise convolution,
/// squeeze-and-excitation, linear projection.
fn inverted_residual(
    b: &mut Builder,
    config: &Config,
    row: &Row,
    name: &str,
    input: NodeId,
    channels: usize,
) -> (NodeId, usize) {
    let expanded = match config.origin {
        Origin::Torchvision => config.scaled(row.expanded),
        Origin::Timm | Origin::TensorFlow => {
            let ratio = row.expanded as f64 / row.input as f64;
            make_divisible(channels as f64 * ratio, 8)
        }
    };
    let out_channels = config.scaled(row.output);
    let activation = Some(row.activation);
    let mut parts = (0..).map(|i| format!("{name}.block.{i}"));
    let mut part = || parts.next().unwrap_or_default();
    let mut x = input;
    if expanded != channels {
        let expansion = Conv2d::new(channels, expanded, 1);
        x = layer(b, config, &part(), expansion, activation, x);
    }
    let depthwise = Conv2d::new(expanded, expanded, row.kernel)
        .stride(row.stride)
        .groups(expanded);
    x = layer(b, config, &part(), depthwise, activation, x);
    if row.squeeze_excite {
        x = squeeze_excite(b, &part(), expanded, x);
    }
    let projection = Conv2d::new(expanded, out_channels, 1);
    x = layer(b, config, &part(), projection, None, x);
    if row.stride == 1 && channels == out_channels {
        x = b.add(format!("{name}.add"), Op::Add, &[x, input]);
    }
    (x, out_channels)
}

/// Each channel times a gate that is computed from all channels' means.
fn squeeze_excite(b: &mut Builder, name: &str, channels: usize, x: NodeId) -> NodeId {
    let squeezed = make_divisible(channels as f64 / 4.0, 8);
    let gate = b.add(format!("{name}.avgpool"), Op::GlobalAvgPool, &[x]);
    let reduce = Conv2d::new(channels, squeezed, 1).bias();
    let gate = b.conv(format!("{name}.fc1"), reduce, gate);
    let gate = b.activation(format!("{name}.activation"), Activation::Relu, gate);
    let expand = Conv2d::new(squeezed, channels, 1).bias();
    let gate = b.conv(format!("{name}.fc2"), expand, gate);
    let gate = b.activation(
        format!("{name}.scale_activation"),
        Activation::HardSigmoid,
        gate,
    );
    b.add(format!("{name}.mul"), Op::Multiply, &[x, gate])
}

fn layer(
    b: &mut Builder,
    config: &Config,
    name: &str,
    conv: Conv2d,
    activation: Option<Activation>,
    x: NodeId,
) -> NodeId {
    let padding = config.padding(conv.kernel[0]);
    let [conv_name, norm_name] = [0, 1].map(|i| format!("{name}.{i}"));
    let x = b.conv_norm(
        conv_name,
        norm_name,
        conv.padding(padding),
        config.norm(),
        x,
    );
    match activation {
        Some(activation) => b.activation(format!("{name}.2"), activation, x),
        None => x,
    }
}
