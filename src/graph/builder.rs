use std::collections::HashSet;

use super::{Activation, Conv2d, Graph, Init, Node, NodeId, Op, Parameter};

/// How a family starts its convolutions and linear layers, as its reference does.
#[derive(Clone, Copy, Debug)]
pub enum InitScheme {
    /// Kaiming normal over the fan-out for convolutions; PyTorch's own default for linear layers
    /// (weight and bias uniform in ±1/√fan_in). torchvision's ResNet.
    KaimingFanOut,
    /// Kaiming normal over the fan-out, linear layers normal with this deviation and no bias.
    /// torchvision's MobileNets.
    KaimingFanOutLinear { std: f64 },
    /// PyTorch's defaults everywhere: uniform in ±1/√fan_in. torchvision's ShuffleNetV2.
    FanIn,
    /// Linear layers Xavier uniform, patches normal with deviation 1/√fan_in, the head zero.
    /// torchvision's Vision Transformer.
    Transformer,
}

/// Settings of a batch norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    pub eps: f64,
    /// Weight of the new batch in the running statistics (PyTorch's meaning).
    pub momentum: f64,
}

impl Norm {
    /// PyTorch's defaults.
    pub const PYTORCH: Self = Self {
        eps: 1e-5,
        momentum: 0.1,
    };
    /// What TensorFlow's mobile networks are trained with.
    pub const TENSORFLOW: Self = Self {
        eps: 1e-3,
        momentum: 0.01,
    };
}

/// Puts a [`Graph`] together, node by node.
pub struct Builder {
    nodes: Vec<Node>,
    scheme: InitScheme,
}

impl Builder {
    /// A graph that holds its input `x` and nothing else.
    pub fn new(scheme: InitScheme) -> Self {
        let input = Node {
            name: "x".into(),
            op: Op::Input,
            inputs: Vec::new(),
            parameters: Vec::new(),
        };
        Self {
            nodes: vec![input],
            scheme,
        }
    }

    /// The image.
    pub fn input(&self) -> NodeId {
        NodeId(0)
    }

    /// Appends a node that reads `inputs`.
    pub fn add(&mut self, name: impl Into<String>, op: Op, inputs: &[NodeId]) -> NodeId {
        let name = name.into();
        let parameters = self.parameters(&name, &op);
        self.nodes.push(Node {
            name,
            op,
            inputs: inputs.to_vec(),
            parameters,
        });
        NodeId(self.nodes.len() - 1)
    }

    pub fn conv(&mut self, name: impl Into<String>, conv: Conv2d, input: NodeId) -> NodeId {
        self.add(name, Op::Conv2d(conv), &[input])
    }

    /// A convolution and the batch norm that follows it.
    pub fn conv_norm(
        &mut self,
        conv_name: impl Into<String>,
        norm_name: impl Into<String>,
        conv: Conv2d,
        Norm { eps, momentum }: Norm,
        input: NodeId,
    ) -> NodeId {
        let channels = conv.out_channels;
        let x = self.conv(conv_name, conv, input);
        let norm = Op::BatchNorm {
            channels,
            eps,
            momentum,
        };
        self.add(norm_name, norm, &[x])
    }

    pub fn activation(
        &mut self,
        name: impl Into<String>,
        activation: Activation,
        input: NodeId,
    ) -> NodeId {
        self.add(name, Op::Activation(activation), &[input])
    }

    /// A linear layer with bias.
    pub fn linear(
        &mut self,
        name: impl Into<String>,
        in_features: usize,
        out_features: usize,
        input: NodeId,
    ) -> NodeId {
        let op = Op::Linear {
            in_features,
            out_features,
            bias: true,
        };
        self.add(name, op, &[input])
    }

    /// The finished graph; its output is the node added last.
    ///
    /// # Panics
    /// Where a family's code gives two nodes one name: a mistake in the program, which the tests
    /// of that family meet at once.
    pub fn finish(self) -> Graph {
        let mut seen = HashSet::new();
        for node in &self.nodes {
            assert!(seen.insert(&node.name), "two nodes named {}", node.name);
        }
        Graph { nodes: self.nodes }
    }

    fn parameters(&self, node: &str, op: &Op) -> Vec<Parameter> {
        let parameter = |suffix: &str, shape: &[usize], init: Init, buffer: bool| Parameter {
            name: if suffix.is_empty() {
                node.to_string()
            } else {
                format!("{node}.{suffix}")
            },
            shape: shape.to_vec(),
            init,
            buffer,
        };
        let learned =
            |suffix: &str, shape: &[usize], init: Init| parameter(suffix, shape, init, false);
        let zeros = Init::Constant(0.0);
        let ones = Init::Constant(1.0);
        match *op {
            Op::Conv2d(ref c) => {
                let area = c.kernel[0] * c.kernel[1];
                let fan_in = c.in_channels / c.groups * area;
                // PyTorch counts the fan-out over all groups' outputs.
                let fan_out = c.out_channels * area;
                let shape = [
                    c.out_channels,
                    c.in_channels / c.groups,
                    c.kernel[0],
                    c.kernel[1],
                ];
                let (weight, bias) = self.scheme.convolution(fan_in, fan_out);
                let mut all = vec![learned("weight", &shape, weight)];
                if c.bias {
                    all.push(learned("bias", &[c.out_channels], bias));
                }
                all
            }
            Op::Linear {
                in_features,
                out_features,
                bias,
            } => {
                let (weight_init, bias_init) = self.scheme.linear(node, in_features, out_features);
                let mut all = vec![learned("weight", &[out_features, in_features], weight_init)];
                if bias {
                    all.push(learned("bias", &[out_features], bias_init));
                }
                all
            }
            Op::BatchNorm { channels, .. } => vec![
                learned("weight", &[channels], ones),
                learned("bias", &[channels], zeros),
                parameter("running_mean", &[channels], zeros, true),
                parameter("running_var", &[channels], ones, true),
            ],
            Op::LayerNorm { dim, .. } => {
                vec![
                    learned("weight", &[dim], ones),
                    learned("bias", &[dim], zeros),
                ]
            }
            Op::ClassToken { dim } => vec![learned("", &[1, 1, dim], zeros)],
            Op::PositionEmbedding {
                dim, grid, prefix, ..
            } => {
                let init = Init::Normal { std: 0.02 };
                vec![learned("", &[1, prefix + grid * grid, dim], init)]
            }
            Op::SelfAttention { dim, .. } => {
                let in_proj = xavier_uniform(dim, 3 * dim);
                let out_proj = fan_in_uniform(dim);
                vec![
                    learned("in_proj_weight", &[3 * dim, dim], in_proj),
                    learned("in_proj_bias", &[3 * dim], zeros),
                    learned("out_proj.weight", &[dim, dim], out_proj),
                    learned("out_proj.bias", &[dim], zeros),
                ]
            }
            Op::Input
            | Op::Activation(_)
            | Op::Add
            | Op::Multiply
            | Op::Concat
            | Op::Slice { .. }
            | Op::ChannelShuffle { .. }
            | Op::MaxPool(_)
            | Op::AvgPool(_)
            | Op::GlobalAvgPool
            | Op::Flatten
            | Op::Dropout { .. }
            | Op::Tokens
            | Op::SelectToken { .. } => Vec::new(),
        }
    }
}

impl InitScheme {
    /// Weight and bias of a convolution.
    fn convolution(self, fan_in: usize, fan_out: usize) -> (Init, Init) {
        let zeros = Init::Constant(0.0);
        match self {
            InitScheme::KaimingFanOut | InitScheme::KaimingFanOutLinear { .. } => {
                let std = (2.0 / fan_out as f64).sqrt();
                (Init::Normal { std }, zeros)
            }
            InitScheme::FanIn => (fan_in_uniform(fan_in), fan_in_uniform(fan_in)),
            InitScheme::Transformer => {
                let std = (1.0 / fan_in as f64).sqrt();
                (Init::Normal { std }, zeros)
            }
        }
    }

    /// Weight and bias of a linear layer.
    fn linear(self, node: &str, fan_in: usize, fan_out: usize) -> (Init, Init) {
        match self {
            InitScheme::KaimingFanOut | InitScheme::FanIn => {
                (fan_in_uniform(fan_in), fan_in_uniform(fan_in))
            }
            InitScheme::KaimingFanOutLinear { std } => (Init::Normal { std }, Init::Constant(0.0)),
            InitScheme::Transformer if node.starts_with("heads") => {
                (Init::Constant(0.0), Init::Constant(0.0))
            }
            InitScheme::Transformer => {
                (xavier_uniform(fan_in, fan_out), Init::Normal { std: 1e-6 })
            }
        }
    }
}

/// PyTorch's default for convolutions and linear layers: uniform in ±1/√fan_in.
fn fan_in_uniform(fan_in: usize) -> Init {
    Init::Uniform {
        bound: 1.0 / (fan_in as f64).sqrt(),
    }
}

fn xavier_uniform(fan_in: usize, fan_out: usize) -> Init {
    Init::Uniform {
        bound: (6.0 / (fan_in + fan_out) as f64).sqrt(),
    }
}
