//! ShuffleNetV2 (Ma et al. 2018, <https://arxiv.org/abs/1807.11164>), as torchvision has it.

use serde::{Deserialize, Serialize};

use crate::graph::{Activation, Builder, Conv2d, Graph, InitScheme, NodeId, Norm, Op, Pool2d};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Channels of the three stages, even; the stem has 24.
    pub stages: [usize; 3],
    /// Channels of the last convolution.
    pub last: usize,
}

impl Config {
    pub(super) fn check(&self) -> Result<(), String> {
        let even = |n: &usize| n.is_multiple_of(2) && (2..=1 << 14).contains(n);
        if self.stages.iter().all(even) && (1..=1 << 16).contains(&self.last) {
            Ok(())
        } else {
            Err("ShuffleNetV2: stages must be even numbers within 2 to 16384".into())
        }
    }
}

/// Blocks of the three stages.
const BLOCKS: [usize; 3] = [4, 8, 4];

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let mut b = Builder::new(InitScheme::FanIn);
    let image = b.input();
    let mut channels = 24;
    let x = conv_norm(
        &mut b,
        "conv1",
        0,
        Conv2d::new(3, channels, 3).stride(2),
        image,
    );
    let x = b.activation("conv1.2", Activation::Relu, x);
    let pool = Pool2d {
        kernel: 3,
        stride: 2,
        padding: 1,
    };
    let mut x = b.add("maxpool", Op::MaxPool(pool), &[x]);
    for (stage, (&width, blocks)) in config.stages.iter().zip(BLOCKS).enumerate() {
        for block in 0..blocks {
            let name = format!("stage{}.{block}", stage + 2);
            x = unit(&mut b, &name, x, [channels, width / 2], block == 0);
            channels = width;
        }
    }
    let x = conv_norm(&mut b, "conv5", 0, Conv2d::new(channels, config.last, 1), x);
    let x = b.activation("conv5.2", Activation::Relu, x);
    let x = b.add("mean", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    b.linear("fc", config.last, num_classes, x);
    b.finish()
}

/// At full size, half of the channels pass as they are; where the map is halved, both branches
/// compute. `half` is what each branch gives.
fn unit(
    b: &mut Builder,
    name: &str,
    input: NodeId,
    [channels, half]: [usize; 2],
    halve: bool,
) -> NodeId {
    let relu = |b: &mut Builder, sequence: &str, at: usize, x| {
        b.activation(format!("{sequence}.{at}"), Activation::Relu, x)
    };
    let branch2 = format!("{name}.branch2");
    let (kept, computed, stride) = if halve {
        let branch1 = format!("{name}.branch1");
        let depthwise = Conv2d::new(channels, channels, 3)
            .stride(2)
            .groups(channels);
        let x = conv_norm(b, &branch1, 0, depthwise, input);
        let x = conv_norm(b, &branch1, 2, Conv2d::new(channels, half, 1), x);
        (relu(b, &branch1, 4, x), input, 2)
    } else {
        let slice = |start| Op::Slice {
            start,
            length: half,
        };
        let kept = b.add(format!("{name}.chunk"), slice(0), &[input]);
        let computed = b.add(format!("{name}.chunk_1"), slice(half), &[input]);
        (kept, computed, 1)
    };
    let inputs = if halve { channels } else { half };
    let x = conv_norm(b, &branch2, 0, Conv2d::new(inputs, half, 1), computed);
    let x = relu(b, &branch2, 2, x);
    let depthwise = Conv2d::new(half, half, 3).stride(stride).groups(half);
    let x = conv_norm(b, &branch2, 3, depthwise, x);
    let x = conv_norm(b, &branch2, 5, Conv2d::new(half, half, 1), x);
    let x = relu(b, &branch2, 7, x);
    let both = b.add(format!("{name}.cat"), Op::Concat, &[kept, x]);
    b.add(
        format!("{name}.channel_shuffle"),
        Op::ChannelShuffle { groups: 2 },
        &[both],
    )
}

/// A convolution and its batch norm as consecutive members of a sequence.
fn conv_norm(b: &mut Builder, sequence: &str, at: usize, conv: Conv2d, x: NodeId) -> NodeId {
    let [conv_name, norm_name] = [at, at + 1].map(|i| format!("{sequence}.{i}"));
    b.conv_norm(conv_name, norm_name, conv, Norm::PYTORCH, x)
}
