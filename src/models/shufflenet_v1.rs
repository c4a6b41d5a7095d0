//! ShuffleNet (Zhang et al. 2017, <https://arxiv.org/abs/1707.01083>), under the names of its
//! authors' released code.

use serde::{Deserialize, Serialize};

use crate::graph::{Activation, Builder, Conv2d, Graph, InitScheme, NodeId, Norm, Op, Pool2d};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Groups of the pointwise convolutions.
    pub groups: usize,
    /// Channels of the first convolution.
    pub stem: usize,
    /// Channels of the three stages.
    pub stages: [usize; 3],
    pub origin: Origin,
}

/// Whose reading of the paper is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The paper's figure: channels are shuffled after the first pointwise convolution; pooled
    /// channels follow the computed ones (pytorchcv).
    Paper,
    /// The authors' code: channels are shuffled (the other way round) after the depthwise
    /// convolution, pooled channels come first, and the head has no bias.
    Released,
}

impl Config {
    pub(super) fn check(&self) -> Result<(), String> {
        let sizes = [
            self.groups,
            self.stem,
            self.stages[0],
            self.stages[1],
            self.stages[2],
        ];
        if sizes.iter().any(|n| !(1..=1 << 14).contains(n)) {
            return Err("ShuffleNet: groups, stem or stages are out of range".into());
        }
        let mut channels = self.stem;
        for (stage, &width) in self.stages.iter().enumerate() {
            let hidden = width / 4;
            let first = width.saturating_sub(channels);
            let grouped = if stage == 0 {
                vec![hidden, first, width]
            } else {
                vec![channels, hidden, first, width]
            };
            if grouped
                .iter()
                .any(|&n| n == 0 || !n.is_multiple_of(self.groups))
            {
                return Err(format!(
                    "ShuffleNet: stages of {:?} channels do not divide into {} groups",
                    self.stages, self.groups
                ));
            }
            channels = width;
        }
        Ok(())
    }
}

/// Blocks of the three stages.
pub(crate) const BLOCKS: [usize; 3] = [4, 8, 4];

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let mut b = Builder::new(InitScheme::KaimingFanOut);
    let image = b.input();
    let mut channels = config.stem;
    let stem = Conv2d::new(3, channels, 3).stride(2);
    let x = conv_norm(&mut b, "first_conv", 0, stem, image);
    let x = b.activation("first_conv.2", Activation::Relu, x);
    let pool = Op::MaxPool(HALVING_POOL);
    let mut x = b.add("maxpool", pool, &[x]);
    let mut index = 0;
    for (&width, blocks) in config.stages.iter().zip(BLOCKS) {
        for block in 0..blocks {
            let name = format!("features.{index}");
            let halve = block == 0;
            // The few channels of the stem are not divided.
            let groups = if index == 0 { 1 } else { config.groups };
            x = unit(&mut b, config, &name, x, [channels, width], groups, halve);
            channels = width;
            index += 1;
        }
    }
    let x = b.add("globalpool", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    let head = Op::Linear {
        in_features: channels,
        out_features: num_classes,
        bias: config.origin == Origin::Paper,
    };
    b.add("classifier.0", head, &[x]);
    b.finish()
}

const HALVING_POOL: Pool2d = Pool2d {
    kernel: 3,
    stride: 2,
    padding: 1,
};

fn unit(
    b: &mut Builder,
    config: &Config,
    name: &str,
    input: NodeId,
    [channels, width]: [usize; 2],
    first_groups: usize,
    halve: bool,
) -> NodeId {
    let hidden = width / 4;
    let outputs = if halve { width - channels } else { width };
    let main = format!("{name}.branch_main_1");
    let reduce = Conv2d::new(channels, hidden, 1).groups(first_groups);
    let stride = if halve { 2 } else { 1 };
    let depthwise = Conv2d::new(hidden, hidden, 3).stride(stride).groups(hidden);
    let expand = Conv2d::new(hidden, outputs, 1).groups(config.groups);
    let shuffle = |b: &mut Builder, x: NodeId, groups: usize| {
        if config.groups == 1 {
            return x;
        }
        b.add(
            format!("{name}.channel_shuffle"),
            Op::ChannelShuffle { groups },
            &[x],
        )
    };

    let x = conv_norm(b, &main, 0, reduce, input);
    let mut x = b.activation(format!("{main}.2"), Activation::Relu, x);
    if config.origin == Origin::Paper {
        x = shuffle(b, x, config.groups);
    }
    let mut x = conv_norm(b, &main, 3, depthwise, x);
    if config.origin == Origin::Released {
        x = shuffle(b, x, hidden / config.groups);
    }
    let x = conv_norm(b, &format!("{name}.branch_main_2"), 0, expand, x);
    let relu = |b: &mut Builder, x| b.activation(format!("{name}.relu"), Activation::Relu, x);
    if !halve {
        let sum = b.add(format!("{name}.add"), Op::Add, &[x, input]);
        return relu(b, sum);
    }
    // The pooled input is not negative, so that it needs no activation.
    let x = relu(b, x);
    let pooled = b.add(
        format!("{name}.branch_proj"),
        Op::AvgPool(HALVING_POOL),
        &[input],
    );
    let both = match config.origin {
        Origin::Paper => [x, pooled],
        Origin::Released => [pooled, x],
    };
    b.add(format!("{name}.cat"), Op::Concat, &both)
}

/// A convolution and its batch norm as consecutive members of a sequence.
fn conv_norm(b: &mut Builder, sequence: &str, at: usize, conv: Conv2d, x: NodeId) -> NodeId {
    let [conv_name, norm_name] = [at, at + 1].map(|i| format!("{sequence}.{i}"));
    b.conv_norm(conv_name, norm_name, conv, Norm::PYTORCH, x)
}
