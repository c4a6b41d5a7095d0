use std::fmt;

use super::{Graph, GraphError, Node, Op, Padding, Pool2d};

/// Shape of one image's value at a node, without the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Feature map.
    Map {
        channels: usize,
        height: usize,
        width: usize,
    },
    /// Sequence of tokens.
    Tokens {
        length: usize,
        dim: usize,
    },
    Vector {
        features: usize,
    },
}

impl Shape {
    pub fn num_elements(self) -> usize {
        match self {
            Shape::Map {
                channels,
                height,
                width,
            } => channels * height * width,
            Shape::Tokens { length, dim } => length * dim,
            Shape::Vector { features } => features,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shape::Map {
                channels,
                height,
                width,
            } => write!(f, "{channels} x {height} x {width}"),
            Shape::Tokens { length, dim } => write!(f, "{length} x {dim}"),
            Shape::Vector { features } => write!(f, "{features}"),
        }
    }
}

impl Graph {
    /// The shape of every node's output for RGB images of `height` x `width`.
    ///
    /// # Errors
    /// Where a window does not fit into what is left of the image, or where shapes disagree.
    pub fn shapes(&self, height: usize, width: usize) -> Result<Vec<Shape>, GraphError> {
        let mut shapes: Vec<Shape> = Vec::with_capacity(self.nodes().len());
        for node in self.nodes() {
            let inputs: Vec<Shape> = node.inputs.iter().map(|i| shapes[i.index()]).collect();
            let shape = match node.op {
                Op::Input => Shape::Map {
                    channels: 3,
                    height,
                    width,
                },
                _ => infer(node, &inputs, [height, width])?,
            };
            shapes.push(shape);
        }
        Ok(shapes)
    }
}

fn infer(node: &Node, inputs: &[Shape], image: [usize; 2]) -> Result<Shape, GraphError> {
    let first = inputs[0];
    let mismatch = |expected: String| GraphError::Mismatch {
        node: node.name.clone(),
        expected,
        actual: first,
    };
    let map = || match first {
        Shape::Map {
            channels,
            height,
            width,
        } => Ok((channels, height, width)),
        _ => Err(mismatch("a feature map".into())),
    };
    let tokens = || match first {
        Shape::Tokens { length, dim } => Ok((length, dim)),
        _ => Err(mismatch("a sequence of tokens".into())),
    };
    let channels_are = |actual: usize, expected: usize| {
        if actual == expected {
            Ok(())
        } else {
            Err(mismatch(format!("{expected} channels")))
        }
    };
    Ok(match node.op {
        Op::Input => unreachable!("the input's shape is given"),
        Op::Conv2d(ref c) => {
            let (channels, height, width) = map()?;
            channels_are(channels, c.in_channels)?;
            let (height, width) = windows(node, [height, width], c.kernel, c.stride, c.padding)?;
            Shape::Map {
                channels: c.out_channels,
                height,
                width,
            }
        }
        Op::MaxPool(p) | Op::AvgPool(p) => {
            let Pool2d {
                kernel,
                stride,
                padding,
            } = p;
            let (channels, height, width) = map()?;
            let padding = Padding::Symmetric(padding);
            let (height, width) = windows(node, [height, width], [kernel; 2], stride, padding)?;
            Shape::Map {
                channels,
                height,
                width,
            }
        }
        Op::BatchNorm { channels, .. } => {
            channels_are(map()?.0, channels)?;
            first
        }
        Op::Activation(_) | Op::Dropout { .. } => first,
        Op::Add => {
            if inputs[1] != first {
                return Err(mismatch(format!("two inputs of {}", inputs[1])));
            }
            first
        }
        Op::Multiply => {
            let (channels, ..) = map()?;
            let gate = Shape::Map {
                channels,
                height: 1,
                width: 1,
            };
            if inputs[1] != first && inputs[1] != gate {
                return Err(mismatch(format!("a factor of its shape or {gate}")));
            }
            first
        }
        Op::Concat => {
            let (mut total, height, width) = map()?;
            for other in &inputs[1..] {
                match *other {
                    Shape::Map {
                        channels,
                        height: h,
                        width: w,
                    } if (h, w) == (height, width) => total += channels,
                    other => return Err(mismatch(format!("maps as large as {other}"))),
                }
            }
            Shape::Map {
                channels: total,
                height,
                width,
            }
        }
        Op::Slice { start, length } => {
            let (channels, height, width) = map()?;
            if start + length > channels {
                return Err(mismatch(format!("at least {} channels", start + length)));
            }
            Shape::Map {
                channels: length,
                height,
                width,
            }
        }
        Op::ChannelShuffle { groups } => {
            let (channels, ..) = map()?;
            if channels % groups != 0 {
                return Err(mismatch(format!("a multiple of {groups} channels")));
            }
            first
        }
        Op::GlobalAvgPool => Shape::Map {
            channels: map()?.0,
            height: 1,
            width: 1,
        },
        Op::Flatten => match map()? {
            (features, 1, 1) => Shape::Vector { features },
            _ => return Err(mismatch("a map of one pixel".into())),
        },
        Op::Linear {
            in_features,
            out_features,
            ..
        } => match first {
            Shape::Vector { features } if features == in_features => Shape::Vector {
                features: out_features,
            },
            Shape::Tokens { length, dim } if dim == in_features => Shape::Tokens {
                length,
                dim: out_features,
            },
            _ => return Err(mismatch(format!("{in_features} features"))),
        },
        Op::Tokens => {
            let (dim, height, width) = map()?;
            Shape::Tokens {
                length: height * width,
                dim,
            }
        }
        Op::ClassToken { dim } => {
            let (length, actual) = tokens()?;
            channels_are(actual, dim)?;
            Shape::Tokens {
                length: length + 1,
                dim,
            }
        }
        Op::PositionEmbedding {
            dim, prefix, patch, ..
        } => {
            let (length, actual) = tokens()?;
            channels_are(actual, dim)?;
            if length != prefix + (image[0] / patch) * (image[1] / patch) {
                return Err(mismatch("a token for each patch".into()));
            }
            first
        }
        Op::LayerNorm { dim, .. } | Op::SelfAttention { dim, .. } => {
            channels_are(tokens()?.1, dim)?;
            first
        }
        Op::SelectToken { index } => {
            let (length, dim) = tokens()?;
            if index >= length {
                return Err(mismatch(format!("more than {index} tokens")));
            }
            Shape::Vector { features: dim }
        }
    })
}

/// Output height and width of a sliding window.
fn windows(
    node: &Node,
    [height, width]: [usize; 2],
    kernel: [usize; 2],
    stride: usize,
    padding: Padding,
) -> Result<(usize, usize), GraphError> {
    let along = |size: usize, kernel: usize| {
        if size == 0 {
            return None;
        }
        let (before, after) = padding.amounts(size, kernel, stride);
        Some((size + before + after).checked_sub(kernel)? / stride + 1)
    };
    match (along(height, kernel[0]), along(width, kernel[1])) {
        (Some(h), Some(w)) => Ok((h, w)),
        _ => Err(GraphError::InputTooSmall {
            node: node.name.clone(),
            height,
            width,
        }),
    }
}
