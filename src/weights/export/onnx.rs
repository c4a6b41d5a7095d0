//! A network as an ONNX file, node by node from the graph.
//!
//! Nodes and initializers keep their names. Batch norms stay nodes of their own: what is exported
//! is the network, and every runtime folds them as it loads.

use std::collections::HashSet;
use std::io::{self, Write};

use super::{DType, write_values};
use crate::graph::{Activation, Conv2d, Graph, GraphError, Node, NodeId, Op, Parameter, Shape};
use crate::weights::protobuf::Message;

/// The operator set: the first with LayerNormalization.
const OPSET: i64 = 17;
/// The file format's version that goes with it.
const IR_VERSION: i64 = 8;

/// Numbers of the types of values.
const FLOAT: i64 = 1;
const INT64: i64 = 7;
const FLOAT16: i64 = 10;

/// A parameter's values, to be written when their place in the file has come.
pub struct Values {
    parameter: Parameter,
    /// `[in, out]` instead of PyTorch's `[out, in]`.
    transposed: bool,
}

type Proto = Message<Values>;

/// Writes the network for images of `size` `[H, W]` and batches of any size.
///
/// The input is called `images`, `[N, 3, H, W]`, the output `logits`, `[N, classes]`.
/// `metadata` are pairs of key and value; `values` gives a parameter's float32 values.
pub fn write(
    graph: &Graph,
    size: [usize; 2],
    dtype: DType,
    metadata: &[(&str, String)],
    mut values: impl FnMut(&Parameter) -> io::Result<Vec<f32>>,
    out: &mut impl Write,
) -> io::Result<()> {
    let model = model(graph, size, dtype, metadata).map_err(io::Error::other)?;
    // What protocol buffers can hold.
    if model.length() > i32::MAX as u64 {
        return Err(io::Error::other(
            "an ONNX file holds at most 2 GiB (use --dtype f16)",
        ));
    }
    model.write(out, |wanted, out| {
        let mut all = values(&wanted.parameter)?;
        if wanted.transposed {
            all = transpose(&all, &wanted.parameter.shape);
        }
        write_values(&all, dtype, &wanted.parameter, out)
    })
}

fn transpose(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let columns = shape.get(1).copied().unwrap_or(1).max(1);
    let rows = values.len() / columns;
    let mut result = Vec::with_capacity(values.len());
    for column in 0..columns {
        result.extend((0..rows).map(|row| values[row * columns + column]));
    }
    result
}

fn model(
    graph: &Graph,
    [height, width]: [usize; 2],
    dtype: DType,
    metadata: &[(&str, String)],
) -> Result<Proto, GraphError> {
    let shapes = graph.shapes(height, width)?;
    let parameters = graph.parameters().map(|p| p.name.as_str()).collect();
    let mut writer = Writer {
        graph,
        shapes,
        parameters,
        dtype,
        proto: Proto::default(),
        constants: HashSet::new(),
    };
    for id in graph.ids() {
        writer.node(id);
    }
    let classes = graph.num_classes() as i64;
    let logits = writer.value(graph.output());
    let proto = node("Identity", "logits", &[&logits], &["logits"]);
    let image = [height as i64, width as i64];
    let graph_proto = writer
        .proto
        .message(1, proto)
        .text(2, "network")
        .message(11, value_info(IMAGES, &[3, image[0], image[1]]))
        .message(12, value_info("logits", &[classes]));
    let opset = Proto::default().text(1, "").int(2, OPSET);
    let model = Proto::default()
        .int(1, IR_VERSION)
        .text(2, "sconce")
        .text(3, env!("CARGO_PKG_VERSION"))
        .message(7, graph_proto)
        .message(8, opset);
    Ok(metadata.iter().fold(model, |model, (key, value)| {
        model.message(14, Proto::default().text(1, key).text(2, value))
    }))
}

const IMAGES: &str = "images";

/// A float tensor whose first dimension is the batch.
fn value_info(name: &str, sizes: &[i64]) -> Proto {
    let batch = Proto::default().text(2, "N");
    let shape = Proto::default().message(1, batch);
    let shape = sizes.iter().fold(shape, |shape, &size| {
        shape.message(1, Proto::default().int(1, size))
    });
    let tensor = Proto::default().int(1, FLOAT).message(2, shape);
    let kind = Proto::default().message(1, tensor);
    Proto::default().text(1, name).message(2, kind)
}

fn node(operator: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Proto {
    let mut proto = Proto::default();
    for input in inputs {
        proto = proto.text(1, input);
    }
    for output in outputs {
        proto = proto.text(2, output);
    }
    proto.text(3, name).text(4, operator)
}

/// Attributes of a node.
trait Attributes {
    fn attribute(self, name: &str, value: i64) -> Self;
    fn attributes(self, name: &str, values: &[i64]) -> Self;
    fn real(self, name: &str, value: f32) -> Self;
}

impl Attributes for Proto {
    fn attribute(self, name: &str, value: i64) -> Self {
        self.message(5, Proto::default().text(1, name).int(3, value).int(20, 2))
    }

    fn attributes(self, name: &str, values: &[i64]) -> Self {
        let list = Proto::default().text(1, name).ints(8, values);
        self.message(5, list.int(20, 7))
    }

    fn real(self, name: &str, value: f32) -> Self {
        self.message(5, Proto::default().text(1, name).float(2, value).int(20, 1))
    }
}

struct Writer<'a> {
    graph: &'a Graph,
    shapes: Vec<Shape>,
    parameters: HashSet<&'a str>,
    dtype: DType,
    /// The graph as far as it is written.
    proto: Proto,
    /// Names of the small tensors that are written already.
    constants: HashSet<String>,
}

impl Writer<'_> {
    /// What the output of a node is called: as the node, unless a parameter is.
    fn value(&self, id: NodeId) -> String {
        let name = &self.graph.node(id).name;
        if id == self.graph.input() {
            IMAGES.into()
        } else if self.parameters.contains(name.as_str()) {
            format!("{name}.output")
        } else {
            name.clone()
        }
    }

    fn push(&mut self, proto: Proto) {
        self.proto = std::mem::take(&mut self.proto).message(1, proto);
    }

    /// One step of several that make up a node; gives the name of its output.
    fn part(
        &mut self,
        node_name: &str,
        step: &str,
        operator: &str,
        inputs: &[&str],
        attributes: impl FnOnce(Proto) -> Proto,
    ) -> String {
        let output = format!("{node_name}/{step}");
        let proto = node(operator, &output, inputs, &[&output]);
        self.push(attributes(proto));
        output
    }

    fn node(&mut self, id: NodeId) {
        let graph = self.graph;
        let this = graph.node(id);
        let name = this.name.as_str();
        let inputs: Vec<String> = this.inputs.iter().map(|&i| self.value(i)).collect();
        let output = self.value(id);
        let x = inputs.first().map_or("", String::as_str);
        let shape = self.shapes[id.index()];
        let input_shape = this.inputs.first().map(|i| self.shapes[i.index()]);
        let simple = |operator: &str| {
            let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
            node(operator, name, &inputs, &[&output])
        };
        match this.op {
            Op::Input => {}
            Op::Conv2d(ref conv) => self.convolution(this, conv, x, &output, input_shape),
            Op::BatchNorm { eps, .. } => {
                let parameters = self.initializers(this);
                let mut all = vec![x];
                all.extend(parameters.iter().map(String::as_str));
                let proto = node("BatchNormalization", name, &all, &[&output]);
                self.push(proto.real("epsilon", eps as f32));
            }
            Op::Activation(activation) => self.activation(activation, name, x, &output),
            Op::Add => self.push(simple("Add")),
            Op::Multiply => self.push(simple("Mul")),
            Op::Concat => self.push(simple("Concat").attribute("axis", 1)),
            Op::Slice { start, length } => {
                let from = self.integers(&[start as i64]);
                let to = self.integers(&[(start + length) as i64]);
                let axis = self.integers(&[1]);
                self.push(node("Slice", name, &[x, &from, &to, &axis], &[&output]));
            }
            Op::ChannelShuffle { groups } => {
                let Shape::Map {
                    channels,
                    height,
                    width,
                } = shape
                else {
                    return;
                };
                let [c, h, w, g] = [channels, height, width, groups].map(|n| n as i64);
                // 0: as the input has it.
                let apart = self.integers(&[0, g, c / g, h, w]);
                let together = self.integers(&[0, c, h, w]);
                let y = self.part(name, "groups", "Reshape", &[x, &apart], |p| p);
                let y = self.part(name, "transposed", "Transpose", &[&y], |p| {
                    p.attributes("perm", &[0, 2, 1, 3, 4])
                });
                self.push(node("Reshape", name, &[&y, &together], &[&output]));
            }
            Op::MaxPool(pool) | Op::AvgPool(pool) => {
                let [kernel, stride, padding] =
                    [pool.kernel, pool.stride, pool.padding].map(|n| n as i64);
                let average = matches!(this.op, Op::AvgPool(_));
                let proto = simple(if average { "AveragePool" } else { "MaxPool" })
                    .attributes("kernel_shape", &[kernel; 2])
                    .attributes("strides", &[stride; 2])
                    .attributes("pads", &[padding; 4]);
                self.push(if average {
                    proto.attribute("count_include_pad", 1)
                } else {
                    proto
                });
            }
            Op::GlobalAvgPool => self.push(simple("GlobalAveragePool")),
            Op::Flatten => self.push(simple("Flatten").attribute("axis", 1)),
            Op::Dropout { .. } => self.push(simple("Identity")),
            Op::Linear { .. } => match shape {
                Shape::Tokens { .. } => {
                    let [weight, bias] = [0, 1].map(|i| this.parameters.get(i));
                    self.projection(name, x, weight, bias, &output);
                }
                _ => {
                    let parameters = self.initializers(this);
                    let mut all = vec![x];
                    all.extend(parameters.iter().map(String::as_str));
                    let proto = node("Gemm", name, &all, &[&output]);
                    self.push(proto.attribute("transB", 1));
                }
            },
            Op::Tokens => {
                let Shape::Tokens { dim, .. } = shape else {
                    return;
                };
                let flat = self.integers(&[0, dim as i64, -1]);
                let y = self.part(name, "flat", "Reshape", &[x, &flat], |p| p);
                let proto = node("Transpose", name, &[&y], &[&output]);
                self.push(proto.attributes("perm", &[0, 2, 1]));
            }
            Op::ClassToken { .. } => {
                let token = self.initializers(this).swap_remove(0);
                // The token for every image of the batch: [N, 1, dim].
                let sizes = self.part(name, "sizes", "Shape", &[x], |p| p.attribute("end", 1));
                let ones = self.integers(&[1, 1]);
                let sizes = self.part(name, "batch", "Concat", &[&sizes, &ones], |p| {
                    p.attribute("axis", 0)
                });
                let tokens = self.part(name, "tokens", "Expand", &[&token, &sizes], |p| p);
                let proto = node("Concat", name, &[&tokens, x], &[&output]);
                self.push(proto.attribute("axis", 1));
            }
            Op::PositionEmbedding { .. } => {
                let positions = self.initializers(this).swap_remove(0);
                self.push(node("Add", name, &[x, &positions], &[&output]));
            }
            Op::LayerNorm { eps, .. } => {
                let parameters = self.initializers(this);
                let all = [x, &parameters[0], &parameters[1]];
                let proto = node("LayerNormalization", name, &all, &[&output]);
                self.push(proto.attribute("axis", -1).real("epsilon", eps as f32));
            }
            Op::SelfAttention { dim, heads } => self.attention(this, dim, heads, x, &output),
            Op::SelectToken { index } => {
                let index = self.scalar(index as i64);
                let proto = node("Gather", name, &[x, &index], &[&output]);
                self.push(proto.attribute("axis", 1));
            }
        }
    }

    fn convolution(
        &mut self,
        this: &Node,
        conv: &Conv2d,
        x: &str,
        output: &str,
        input: Option<Shape>,
    ) {
        let Some(Shape::Map { height, width, .. }) = input else {
            return;
        };
        let parameters = self.initializers(this);
        let mut all = vec![x];
        all.extend(parameters.iter().map(String::as_str));
        let along = |size, kernel| conv.padding.amounts(size, kernel, conv.stride);
        let (top, bottom) = along(height, conv.kernel[0]);
        let (left, right) = along(width, conv.kernel[1]);
        let pads = [top, left, bottom, right].map(|n| n as i64);
        let proto = node("Conv", &this.name, &all, &[output])
            .attributes("kernel_shape", &conv.kernel.map(|n| n as i64))
            .attributes("strides", &[conv.stride as i64; 2])
            .attributes("pads", &pads)
            .attribute("group", conv.groups as i64);
        self.push(proto);
    }

    fn activation(&mut self, activation: Activation, name: &str, x: &str, output: &str) {
        match activation {
            Activation::Relu => self.push(node("Relu", name, &[x], &[output])),
            Activation::Relu6 => {
                let [low, high] = [0.0, 6.0].map(|v| self.real(v));
                self.push(node("Clip", name, &[x, &low, &high], &[output]));
            }
            Activation::HardSigmoid => {
                let proto = node("HardSigmoid", name, &[x], &[output]);
                self.push(proto.real("alpha", 1.0 / 6.0).real("beta", 0.5));
            }
            Activation::HardSwish => self.push(node("HardSwish", name, &[x], &[output])),
            // An operator of its own from set 20 on; runtimes know these five for what they are.
            Activation::Gelu => {
                let [root, one, half] = [std::f32::consts::SQRT_2, 1.0, 0.5].map(|v| self.real(v));
                let y = self.part(name, "scaled", "Div", &[x, &root], |p| p);
                let y = self.part(name, "erf", "Erf", &[&y], |p| p);
                let y = self.part(name, "shifted", "Add", &[&y, &one], |p| p);
                let y = self.part(name, "gated", "Mul", &[x, &y], |p| p);
                self.push(node("Mul", name, &[&y, &half], &[output]));
            }
        }
    }

    fn attention(&mut self, this: &Node, dim: usize, heads: usize, x: &str, output: &str) {
        let name = this.name.as_str();
        let [in_weight, in_bias, out_weight, out_bias] = [0, 1, 2, 3].map(|i| &this.parameters[i]);
        let qkv = format!("{name}/qkv");
        self.projection(&qkv, x, Some(in_weight), Some(in_bias), &qkv);
        let [dim, heads] = [dim, heads].map(|n| n as i64);
        let apart = self.integers(&[0, 0, 3, heads, dim / heads]);
        let qkv = self.part(name, "heads", "Reshape", &[&qkv, &apart], |p| p);
        // [3, N, heads, T, dim / heads]
        let qkv = self.part(name, "qkv_first", "Transpose", &[&qkv], |p| {
            p.attributes("perm", &[2, 0, 3, 1, 4])
        });
        let [q, k, v] = [("query", 0), ("key", 1), ("value", 2)].map(|(step, index)| {
            let index = self.scalar(index);
            self.part(name, step, "Gather", &[&qkv, &index], |p| {
                p.attribute("axis", 0)
            })
        });
        let scale = self.real(1.0 / ((dim / heads) as f32).sqrt());
        let q = self.part(name, "query_scaled", "Mul", &[&q, &scale], |p| p);
        let k = self.part(name, "key_transposed", "Transpose", &[&k], |p| {
            p.attributes("perm", &[0, 1, 3, 2])
        });
        let y = self.part(name, "scores", "MatMul", &[&q, &k], |p| p);
        let y = self.part(name, "attention", "Softmax", &[&y], |p| {
            p.attribute("axis", -1)
        });
        let y = self.part(name, "mixed", "MatMul", &[&y, &v], |p| p);
        let y = self.part(name, "tokens", "Transpose", &[&y], |p| {
            p.attributes("perm", &[0, 2, 1, 3])
        });
        let together = self.integers(&[0, 0, dim]);
        let y = self.part(name, "together", "Reshape", &[&y, &together], |p| p);
        self.projection(name, &y, Some(out_weight), Some(out_bias), output);
    }

    /// A linear layer over the features of every token.
    fn projection(
        &mut self,
        name: &str,
        x: &str,
        weight: Option<&Parameter>,
        bias: Option<&Parameter>,
        output: &str,
    ) {
        let Some(weight) = weight else { return };
        let weight = self.initializer(weight, true);
        match bias {
            None => self.push(node("MatMul", name, &[x, &weight], &[output])),
            Some(bias) => {
                let bias = self.initializer(bias, false);
                let y = self.part(name, "product", "MatMul", &[x, &weight], |p| p);
                self.push(node("Add", name, &[&y, &bias], &[output]));
            }
        }
    }

    /// The parameters of a node, as PyTorch lays them out.
    fn initializers(&mut self, node: &Node) -> Vec<String> {
        let parameters = node.parameters.iter();
        parameters.map(|p| self.initializer(p, false)).collect()
    }

    /// Adds a parameter; gives the name of its float32 values.
    fn initializer(&mut self, parameter: &Parameter, transposed: bool) -> String {
        let mut dims: Vec<i64> = parameter.shape.iter().map(|&d| d as i64).collect();
        if transposed {
            dims.reverse();
        }
        let half = self.dtype.is_half(&parameter.shape);
        let (kind, size) = if half { (FLOAT16, 2) } else { (FLOAT, 4) };
        let stored = match half {
            true => format!("{}.f16", parameter.name),
            false => parameter.name.clone(),
        };
        let length = parameter.num_elements() as u64 * size;
        let values = Values {
            parameter: parameter.clone(),
            transposed,
        };
        let tensor = Proto::default()
            .ints(1, &dims)
            .int(2, kind)
            .text(8, &stored)
            .later(9, length, values);
        self.proto = std::mem::take(&mut self.proto).message(5, tensor);
        if half {
            // Stored in half the bytes, computed with in float32.
            let cast = format!("{}/float32", parameter.name);
            let cast = node("Cast", &cast, &[&stored], &[&parameter.name]);
            self.push(cast.attribute("to", FLOAT));
        }
        parameter.name.clone()
    }

    fn integers(&mut self, values: &[i64]) -> String {
        let text: Vec<String> = values.iter().map(i64::to_string).collect();
        let name = format!("integers/{}", text.join(","));
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(name, &[values.len() as i64], INT64, bytes)
    }

    fn scalar(&mut self, value: i64) -> String {
        let bytes = value.to_le_bytes().to_vec();
        self.constant(format!("integer/{value}"), &[], INT64, bytes)
    }

    fn real(&mut self, value: f32) -> String {
        let bytes = value.to_le_bytes().to_vec();
        self.constant(format!("real/{value}"), &[], FLOAT, bytes)
    }

    /// A small tensor, written once.
    fn constant(&mut self, name: String, dims: &[i64], kind: i64, bytes: Vec<u8>) -> String {
        if self.constants.insert(name.clone()) {
            let tensor = Proto::default().ints(1, dims).int(2, kind);
            let tensor = tensor.text(8, &name).bytes(9, &bytes);
            self.proto = std::mem::take(&mut self.proto).message(5, tensor);
        }
        name
    }
}
