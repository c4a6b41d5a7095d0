//! ResNet (He et al. 2015, <https://arxiv.org/abs/1512.03385>), ResNeXt (Xie et al. 2016,
//! <https://arxiv.org/abs/1611.05431>) and Wide ResNet, as torchvision has them: the stride of a
//! bottleneck sits in its 3x3 convolution ("v1.5").

use serde::{Deserialize, Serialize};

use crate::graph::{Activation, Builder, Conv2d, Graph, InitScheme, NodeId, Norm, Op, Pool2d};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub block: Block,
    /// Residual blocks in each of the four stages.
    pub layers: [usize; 4],
    /// Cardinality: groups of each 3x3 convolution.
    pub groups: usize,
    /// Channels of a group in the first stage, doubled from stage to stage.
    pub width_per_group: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// Two 3x3 convolutions.
    Basic,
    /// 1x1, 3x3, 1x1; the last four times as wide as the stage.
    Bottleneck,
}

impl Config {
    pub const fn new(block: Block, layers: [usize; 4]) -> Self {
        Self {
            block,
            layers,
            groups: 1,
            width_per_group: 64,
        }
    }

    /// Bottlenecks of another cardinality and width.
    pub const fn groups(self, groups: usize, width_per_group: usize) -> Self {
        Self {
            groups,
            width_per_group,
            ..self
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let sizes = [self.groups, self.width_per_group];
        if self.layers.iter().any(|n| !(1..=200).contains(n))
            || sizes.iter().any(|n| !(1..=4096).contains(n))
            || self.groups * self.width_per_group > 1 << 14
        {
            return Err("ResNet: layers, groups or width_per_group are out of range".into());
        }
        if self.block == Block::Basic && (self.groups, self.width_per_group) != (1, 64) {
            return Err("ResNet: basic blocks have one group of 64 channels".into());
        }
        Ok(())
    }
}

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let mut b = Builder::new(InitScheme::KaimingFanOut);
    let stem = Conv2d::new(3, 64, 7).stride(2);
    let image = b.input();
    let x = b.conv_norm("conv1", "bn1", stem, Norm::PYTORCH, image);
    let x = b.activation("relu", Activation::Relu, x);
    let pool = Pool2d {
        kernel: 3,
        stride: 2,
        padding: 1,
    };
    let mut x = b.add("maxpool", Op::MaxPool(pool), &[x]);
    let mut channels = 64;
    for (stage, &blocks) in config.layers.iter().enumerate() {
        let planes = 64 << stage;
        for index in 0..blocks {
            let stride = if stage > 0 && index == 0 { 2 } else { 1 };
            let name = format!("layer{}.{index}", stage + 1);
            (x, channels) = block(&mut b, config, &name, x, channels, planes, stride);
        }
    }
    let x = b.add("avgpool", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    b.linear("fc", channels, num_classes, x);
    b.finish()
}

/// One residual block; gives its output and how many channels that has.
fn block(
    b: &mut Builder,
    config: &Config,
    name: &str,
    input: NodeId,
    channels: usize,
    planes: usize,
    stride: usize,
) -> (NodeId, usize) {
    let relu = |b: &mut Builder, suffix: &str, x| {
        b.activation(format!("{name}.relu{suffix}"), Activation::Relu, x)
    };
    let layer = |b: &mut Builder, index: usize, conv, x| {
        let names = [format!("{name}.conv{index}"), format!("{name}.bn{index}")];
        let [conv_name, norm_name] = names;
        b.conv_norm(conv_name, norm_name, conv, Norm::PYTORCH, x)
    };
    let (x, out_channels, last_relu) = match config.block {
        Block::Basic => {
            let x = layer(b, 1, Conv2d::new(channels, planes, 3).stride(stride), input);
            let x = relu(b, "", x);
            let x = layer(b, 2, Conv2d::new(planes, planes, 3), x);
            (x, planes, "_1")
        }
        Block::Bottleneck => {
            let width = planes * config.width_per_group / 64 * config.groups;
            let spatial = Conv2d::new(width, width, 3)
                .stride(stride)
                .groups(config.groups);
            let x = layer(b, 1, Conv2d::new(channels, width, 1), input);
            let x = relu(b, "", x);
            let x = layer(b, 2, spatial, x);
            let x = relu(b, "_1", x);
            let x = layer(b, 3, Conv2d::new(width, planes * 4, 1), x);
            (x, planes * 4, "_2")
        }
    };
    let shortcut = if stride != 1 || channels != out_channels {
        let projection = Conv2d::new(channels, out_channels, 1).stride(stride);
        let [conv_name, norm_name] = [0, 1].map(|i| format!("{name}.downsample.{i}"));
        b.conv_norm(conv_name, norm_name, projection, Norm::PYTORCH, input)
    } else {
        input
    };
    let sum = b.add(format!("{name}.add"), Op::Add, &[x, shortcut]);
    (relu(b, last_relu, sum), out_channels)
}
