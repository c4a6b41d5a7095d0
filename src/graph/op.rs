//! The operators that the networks are made of.

/// A two-dimensional convolution (cross-correlation, as every framework means by the word).
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2d {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// The same in both directions.
    pub stride: usize,
    pub padding: Padding,
    /// 1: dense; `in_channels`: depthwise; between: grouped.
    pub groups: usize,
    pub bias: bool,
}

impl Conv2d {
    /// Dense `kernel` x `kernel` convolution without bias, padded to keep the size at stride 1.
    pub fn new(in_channels: usize, out_channels: usize, kernel: usize) -> Self {
        Self {
            in_channels,
            out_channels,
            kernel: [kernel; 2],
            stride: 1,
            padding: Padding::Symmetric((kernel - 1) / 2),
            groups: 1,
            bias: false,
        }
    }

    pub fn stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    pub fn groups(self, groups: usize) -> Self {
        Self { groups, ..self }
    }

    pub fn padding(self, padding: Padding) -> Self {
        Self { padding, ..self }
    }

    pub fn bias(self) -> Self {
        Self { bias: true, ..self }
    }

    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.out_channels * self.in_channels / self.groups * self.kernel[0] * self.kernel[1]
    }

    /// One filter for each channel.
    pub fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.groups == self.in_channels && self.groups == self.out_channels
    }
}

/// How the border is filled with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// So many rows and columns on every side.
    Symmetric(usize),
    /// TensorFlow's SAME: the output has ceil(input / stride) rows; where the total is odd, the
    /// extra row or column is at the bottom or right.
    Same,
}

impl Padding {
    /// Whether an odd kernel at stride 1 keeps the image's size.
    pub fn is_same_size(self, kernel: usize) -> bool {
        self == Padding::Same || self == Padding::Symmetric((kernel - 1) / 2)
    }

    /// Rows (or columns) added before and after an axis of length `size`.
    pub fn amounts(self, size: usize, kernel: usize, stride: usize) -> (usize, usize) {
        match self {
            Padding::Symmetric(p) => (p, p),
            Padding::Same => {
                let total = ((size.div_ceil(stride) - 1) * stride + kernel).saturating_sub(size);
                (total / 2, total - total / 2)
            }
        }
    }
}

/// A pooling window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool2d {
    pub kernel: usize,
    pub stride: usize,
    /// On every side: minus infinity for max-pooling, zeros that count for average pooling.
    pub padding: usize,
}

/// Elementwise non-linearities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// min(max(x, 0), 6)
    Relu6,
    /// relu6(x + 3) / 6
    HardSigmoid,
    /// x · relu6(x + 3) / 6
    HardSwish,
    /// x · Φ(x), with the exact error function
    Gelu,
}

/// How learned positions follow an image whose size is not that of the training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PositionInterpolation {
    /// Bicubic (a = -0.75) with aligned corners: torchvision.
    BicubicAlignCorners,
    /// Antialiased bicubic (a = -0.5): timm.
    BicubicAntialias,
}

/// What a node computes. Shapes are those of one image; every operator works on any batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// The image, `[3, H, W]`.
    Input,
    Conv2d(Conv2d),
    /// Per-channel normalisation. Parameters: weight, bias, running_mean, running_var.
    BatchNorm {
        channels: usize,
        eps: f64,
        /// Weight of the new batch in the running statistics (PyTorch's meaning).
        momentum: f64,
    },
    Activation(Activation),
    /// Sum of two inputs of one shape.
    Add,
    /// First input times the second; the second may be `[C, 1, 1]` (squeeze-and-excitation).
    Multiply,
    /// Inputs one after the other along the channels.
    Concat,
    /// Channels `start..start + length`.
    Slice {
        start: usize,
        length: usize,
    },
    /// `[g, C/g]` channels transposed to `[C/g, g]` (ShuffleNet).
    ChannelShuffle {
        groups: usize,
    },
    MaxPool(Pool2d),
    /// Average over the window, padding counted.
    AvgPool(Pool2d),
    /// Mean over height and width: `[C, 1, 1]`.
    GlobalAvgPool,
    /// `[C, 1, 1]` to `[C]`.
    Flatten,
    /// Random zeros in training, nothing in evaluation.
    Dropout {
        p: f64,
    },
    /// Parameters: weight `[out, in]`, bias `[out]` where there is one.
    Linear {
        in_features: usize,
        out_features: usize,
        bias: bool,
    },
    /// `[C, H, W]` to the sequence `[H·W, C]`.
    Tokens,
    /// A learned token put before the sequence. Parameter: `[1, 1, dim]`.
    ClassToken {
        dim: usize,
    },
    /// Learned positions added to the sequence, interpolated where the image's grid is another.
    /// Parameter: `[1, prefix + grid², dim]`.
    PositionEmbedding {
        dim: usize,
        /// Rows and columns of patches that the parameter holds.
        grid: usize,
        /// Tokens before the patches (the class token).
        prefix: usize,
        patch: usize,
        interpolation: PositionInterpolation,
    },
    /// Over the features of each token. Parameters: weight, bias.
    LayerNorm {
        dim: usize,
        eps: f64,
    },
    /// Self-attention with its projections. Parameters: in_proj_weight `[3·dim, dim]` (query, key,
    /// value), in_proj_bias, out_proj.weight, out_proj.bias.
    SelfAttention {
        dim: usize,
        heads: usize,
    },
    /// One token of the sequence: `[T, D]` to `[D]`.
    SelectToken {
        index: usize,
    },
}

impl Op {
    /// A short name for tables and drawings.
    pub fn label(&self) -> String {
        match self {
            Op::Input => "input".into(),
            Op::Conv2d(c) => {
                let kind = match c.groups {
                    1 => "conv".to_string(),
                    _ if c.is_depthwise() => "depthwise conv".to_string(),
                    g => format!("conv ({g} groups)"),
                };
                let [kh, kw] = c.kernel;
                let stride = match c.stride {
                    1 => String::new(),
                    s => format!(" /{s}"),
                };
                format!("{kind} {kh}x{kw}{stride}")
            }
            Op::BatchNorm { .. } => "batch norm".into(),
            Op::Activation(a) => match a {
                Activation::Relu => "relu",
                Activation::Relu6 => "relu6",
                Activation::HardSigmoid => "hard sigmoid",
                Activation::HardSwish => "hard swish",
                Activation::Gelu => "gelu",
            }
            .into(),
            Op::Add => "add".into(),
            Op::Multiply => "multiply".into(),
            Op::Concat => "concat".into(),
            Op::Slice { start, length } => format!("channels {start}..{}", start + length),
            Op::ChannelShuffle { groups } => format!("channel shuffle ({groups} groups)"),
            Op::MaxPool(p) => format!("max pool {0}x{0} /{1}", p.kernel, p.stride),
            Op::AvgPool(p) => format!("average pool {0}x{0} /{1}", p.kernel, p.stride),
            Op::GlobalAvgPool => "global average pool".into(),
            Op::Flatten => "flatten".into(),
            Op::Dropout { p } => format!("dropout {p}"),
            Op::Linear { .. } => "linear".into(),
            Op::Tokens => "to tokens".into(),
            Op::ClassToken { .. } => "class token".into(),
            Op::PositionEmbedding { .. } => "position embedding".into(),
            Op::LayerNorm { .. } => "layer norm".into(),
            Op::SelfAttention { heads, .. } => format!("self-attention ({heads} heads)"),
            Op::SelectToken { index } => format!("token {index}"),
        }
    }
}

/// How a parameter starts when no weights are given for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Constant(f64),
    /// Normal with mean 0.
    Normal {
        std: f64,
    },
    /// Uniform in ±bound.
    Uniform {
        bound: f64,
    },
}

/// A learned tensor, or a buffer that training updates without a gradient.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// torchvision's name.
    pub name: String,
    /// PyTorch's layout: convolutions `[out, in / groups, kh, kw]`, linear layers `[out, in]`.
    pub shape: Vec<usize>,
    pub init: Init,
    /// Running statistics: saved with the weights, not counted as parameters.
    pub buffer: bool,
}

impl Parameter {
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}
