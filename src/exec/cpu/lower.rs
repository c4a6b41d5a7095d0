//! From the graph to steps: fusion, packed weights, lifetimes.

use candle_core::Tensor;
use candle_nn::var_builder::VarBuilder;

use super::PlanError;
use super::arena::{Lifetime, ValueId};
use super::step::{Epilogue, Kind, Step};
use crate::exec::params::fetch;
use crate::graph::{Activation, Conv2d, Graph, Node, NodeId, Op, Padding, Pool2d, Shape};
use crate::kernels::conv::{Conv, Depthwise};
use crate::kernels::pool::Pool;
use crate::kernels::{Dims, Window, resample};

pub(super) struct Lowered {
    pub steps: Vec<Step>,
    /// By value.
    pub lifetimes: Vec<Lifetime>,
    pub input: ValueId,
    pub outputs: Vec<(ValueId, Dims)>,
}

pub(super) fn lower(
    graph: &Graph,
    vb: &VarBuilder,
    image: [usize; 2],
    outputs: &[NodeId],
) -> Result<Lowered, PlanError> {
    let shapes = graph.shapes(image[0], image[1])?;
    let mut readers: Vec<Vec<NodeId>> = vec![Vec::new(); shapes.len()];
    for id in graph.ids() {
        for input in &graph.node(id).inputs {
            readers[input.index()].push(id);
        }
    }
    let mut lowering = Lowering {
        graph,
        vb,
        image,
        dims: shapes.iter().map(|&s| layout(s)).collect(),
        readers,
        outputs,
        value_of: vec![None; shapes.len()],
        fused: vec![false; shapes.len()],
        steps: Vec::new(),
        value_dims: Vec::new(),
    };
    for id in graph.ids() {
        if !lowering.fused[id.index()] {
            lowering.node(id)?;
        }
    }
    Ok(lowering.finish())
}

/// How a value lies in memory: a sequence is an image of width 1, a vector one pixel.
fn layout(shape: Shape) -> Dims {
    match shape {
        Shape::Map {
            channels,
            height,
            width,
        } => Dims::new(height, width, channels),
        Shape::Tokens { length, dim } => Dims::new(length, 1, dim),
        Shape::Vector { features } => Dims::new(1, 1, features),
    }
}

struct Lowering<'a> {
    graph: &'a Graph,
    vb: &'a VarBuilder<'a>,
    image: [usize; 2],
    /// By node.
    dims: Vec<Dims>,
    readers: Vec<Vec<NodeId>>,
    outputs: &'a [NodeId],
    value_of: Vec<Option<ValueId>>,
    fused: Vec<bool>,
    steps: Vec<Step>,
    /// By value.
    value_dims: Vec<Dims>,
}

/// What follows a convolution and becomes part of it.
struct Tail {
    /// Output = sum · scale + shift, from a batch norm; identity without one.
    scale: Vec<f64>,
    shift: Vec<f64>,
    residual: Option<ValueId>,
    activation: Option<Activation>,
    /// The last node that was taken in.
    end: NodeId,
}

impl Lowering<'_> {
    fn node(&mut self, id: NodeId) -> Result<(), PlanError> {
        let graph = self.graph;
        let node = graph.node(id);
        let input = |l: &Self, i: usize| {
            l.value_of[node.inputs[i].index()].expect("inputs come before readers")
        };
        let kind = match node.op {
            Op::Input => {
                let value = self.new_value(self.dims[id.index()]);
                self.value_of[id.index()] = Some(value);
                return Ok(());
            }
            Op::Flatten | Op::Dropout { .. } | Op::Tokens => {
                self.value_of[id.index()] = Some(input(self, 0));
                return Ok(());
            }
            Op::Conv2d(ref c) => return self.convolution(id, c),
            Op::Linear { .. } => {
                let parameters = self.parameters(node)?;
                let dims = self.dims[id.index()];
                let source = input(self, 0);
                return self.linear(id, source, &parameters[0], parameters.get(1), dims.c);
            }
            Op::SelfAttention { dim, heads } => {
                let parameters = self.parameters(node)?;
                let Dims { h, w, .. } = self.dims[id.index()];
                let [weight, bias] = [&parameters[0], &parameters[1]];
                let source = input(self, 0);
                let qkv = self.projection(source, weight, bias, Dims::new(h, w, 3 * dim));
                let mixed = self.new_value(Dims::new(h, w, dim));
                self.push(Kind::Attention { heads }, vec![qkv], mixed);
                return self.linear(id, mixed, &parameters[2], Some(&parameters[3]), dim);
            }
            Op::BatchNorm { eps, .. } => {
                let (scale, shift) = fold_batch_norm(&self.parameters(node)?, eps);
                Kind::ScaleShift {
                    scale: scale.iter().map(|&v| v as f32).collect(),
                    shift: shift.iter().map(|&v| v as f32).collect(),
                }
            }
            Op::Activation(activation) => Kind::Activation(activation),
            Op::Add => Kind::Add,
            Op::Multiply => Kind::Multiply,
            Op::Concat => Kind::Concat,
            Op::Slice { start, .. } => Kind::Slice { start },
            Op::ChannelShuffle { groups } => Kind::ChannelShuffle { groups },
            Op::MaxPool(pool) => Kind::MaxPool(self.pool(id, pool)),
            Op::AvgPool(pool) => Kind::AvgPool(self.pool(id, pool)),
            Op::GlobalAvgPool => Kind::GlobalAvgPool,
            Op::ClassToken { .. } => Kind::ClassToken {
                token: self.parameters(node)?.swap_remove(0),
            },
            Op::PositionEmbedding {
                dim,
                grid,
                prefix,
                patch,
                interpolation,
            } => {
                let positions = self.parameters(node)?.swap_remove(0);
                let target = self.image.map(|side| side / patch);
                let values = if target == [grid, grid] {
                    positions
                } else {
                    let [rows, columns] =
                        target.map(|to| resample::position_weights(interpolation, grid, to));
                    resample_grid(&positions, prefix, grid, dim, &rows, &columns)
                };
                Kind::AddConstant { values }
            }
            Op::LayerNorm { eps, .. } => {
                let mut parameters = self.parameters(node)?;
                let bias = parameters.swap_remove(1);
                let weight = parameters.swap_remove(0);
                Kind::LayerNorm { weight, bias, eps }
            }
            Op::SelectToken { index } => Kind::SelectToken { index },
        };
        let inputs = (0..node.inputs.len()).map(|i| input(self, i)).collect();
        let output = self.new_value(self.dims[id.index()]);
        self.push(kind, inputs, output);
        self.value_of[id.index()] = Some(output);
        Ok(())
    }

    fn convolution(&mut self, id: NodeId, c: &Conv2d) -> Result<(), PlanError> {
        let node = self.graph.node(id);
        let parameters = self.parameters(node)?;
        let input_dims = self.dims[node.inputs[0].index()];
        let output_dims = self.dims[id.index()];
        let window = window(input_dims, c.kernel, c.stride, c.padding);
        let tail = self.tail(id)?;
        let source = self.value_of[node.inputs[0].index()].expect("inputs come before readers");
        let epilogue = tail.epilogue(parameters.get(1).map(Vec::as_slice));
        let kind = if c.is_depthwise() {
            let conv = Depthwise {
                input: input_dims,
                output: output_dims,
                window,
            };
            Kind::Depthwise {
                packed: conv.pack(&parameters[0], &tail.scale),
                conv,
                epilogue,
            }
        } else {
            let conv = Conv {
                input: input_dims,
                output: output_dims,
                window,
                groups: c.groups,
            };
            Kind::Conv {
                packed: conv.pack(&parameters[0], &tail.scale),
                conv,
                epilogue,
            }
        };
        self.push_fused(kind, source, output_dims, &tail);
        Ok(())
    }

    /// A linear layer over the pixels of `source`, with what follows node `id` taken in.
    fn linear(
        &mut self,
        id: NodeId,
        source: ValueId,
        weight: &[f32],
        bias: Option<&Vec<f32>>,
        outputs: usize,
    ) -> Result<(), PlanError> {
        let tail = self.tail(id)?;
        let Dims { h, w, .. } = self.value_dims[source];
        let output = Dims::new(h, w, outputs);
        let conv = pointwise(self.value_dims[source], output);
        let kind = Kind::Conv {
            packed: conv.pack(weight, &tail.scale),
            conv,
            epilogue: tail.epilogue(bias.map(Vec::as_slice)),
        };
        self.push_fused(kind, source, output, &tail);
        Ok(())
    }

    /// A linear layer inside a node, with nothing taken in.
    fn projection(
        &mut self,
        source: ValueId,
        weight: &[f32],
        bias: &[f32],
        output: Dims,
    ) -> ValueId {
        let conv = pointwise(self.value_dims[source], output);
        let kind = Kind::Conv {
            packed: conv.pack(weight, &vec![1.0; output.c]),
            conv,
            epilogue: Epilogue {
                bias: bias.to_vec(),
                residual: false,
                activation: None,
            },
        };
        let value = self.new_value(output);
        self.push(kind, vec![source], value);
        value
    }

    fn push_fused(&mut self, kind: Kind, source: ValueId, dims: Dims, tail: &Tail) {
        let output = self.new_value(dims);
        let mut inputs = vec![source];
        inputs.extend(tail.residual);
        self.push(kind, inputs, output);
        self.value_of[tail.end.index()] = Some(output);
    }

    /// Follows the nodes after a convolution as long as they can become part of it: dropout, one
    /// batch norm, one sum with a value that is there already, one activation, in this order.
    fn tail(&mut self, id: NodeId) -> Result<Tail, PlanError> {
        let channels = self.dims[id.index()].c;
        let mut tail = Tail {
            scale: vec![1.0; channels],
            shift: vec![0.0; channels],
            residual: None,
            activation: None,
            end: id,
        };
        let mut normalized = false;
        while let Some(next) = self.only_reader(tail.end) {
            let node = self.graph.node(next);
            match node.op {
                Op::Dropout { .. } => {}
                Op::BatchNorm { eps, .. } if !normalized && tail.residual.is_none() => {
                    (tail.scale, tail.shift) = fold_batch_norm(&self.parameters(node)?, eps);
                    normalized = true;
                }
                Op::Add if tail.residual.is_none() => {
                    let other = node.inputs.iter().find(|&&i| i != tail.end);
                    let Some(value) = other.and_then(|i| self.value_of[i.index()]) else {
                        break;
                    };
                    tail.residual = Some(value);
                }
                Op::Activation(activation) => {
                    tail.activation = Some(activation);
                    self.fused[next.index()] = true;
                    tail.end = next;
                    break;
                }
                _ => break,
            }
            self.fused[next.index()] = true;
            tail.end = next;
        }
        Ok(tail)
    }

    /// The node that alone reads this one's output, where nobody asked for that output.
    fn only_reader(&self, id: NodeId) -> Option<NodeId> {
        match self.readers[id.index()][..] {
            [reader] if !self.outputs.contains(&id) => Some(reader),
            _ => None,
        }
    }

    fn pool(&self, id: NodeId, pool: Pool2d) -> Pool {
        let input = self.dims[self.graph.node(id).inputs[0].index()];
        let padding = Padding::Symmetric(pool.padding);
        Pool {
            input,
            output: self.dims[id.index()],
            window: window(input, [pool.kernel; 2], pool.stride, padding),
        }
    }

    fn parameters(&self, node: &Node) -> Result<Vec<Vec<f32>>, PlanError> {
        let values = |tensor: Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let all = node.parameters.iter().map(|p| values(fetch(self.vb, p)?));
        Ok(all.collect::<candle_core::Result<_>>()?)
    }

    fn new_value(&mut self, dims: Dims) -> ValueId {
        self.value_dims.push(dims);
        self.value_dims.len() - 1
    }

    fn push(&mut self, kind: Kind, inputs: Vec<ValueId>, output: ValueId) {
        self.steps.push(Step {
            kind,
            input_dims: inputs.iter().map(|&i| self.value_dims[i]).collect(),
            output_dims: self.value_dims[output],
            inputs,
            output,
        });
    }

    fn finish(self) -> Lowered {
        let value = |id: NodeId| self.value_of[id.index()].expect("outputs are not fused away");
        let outputs: Vec<_> = self
            .outputs
            .iter()
            .map(|&id| (value(id), self.dims[id.index()]))
            .collect();
        let mut lifetimes: Vec<Lifetime> = self
            .value_dims
            .iter()
            .map(|dims| Lifetime {
                first: 0,
                last: 0,
                len: dims.len(),
            })
            .collect();
        for (index, step) in self.steps.iter().enumerate() {
            lifetimes[step.output].first = index;
            for &value in step.inputs.iter().chain([&step.output]) {
                lifetimes[value].last = index;
            }
        }
        for &(value, _) in &outputs {
            lifetimes[value].last = self.steps.len();
        }
        Lowered {
            steps: self.steps,
            lifetimes,
            input: value(self.graph.input()),
            outputs,
        }
    }
}

impl Tail {
    fn epilogue(&self, bias: Option<&[f32]>) -> Epilogue {
        let folded = |(i, shift): (usize, &f64)| {
            let bias = bias.map_or(0.0, |b| f64::from(b[i]));
            (shift + bias * self.scale[i]) as f32
        };
        Epilogue {
            bias: self.shift.iter().enumerate().map(folded).collect(),
            residual: self.residual.is_some(),
            activation: self.activation,
        }
    }
}

/// Batch norm on its running statistics as `x · scale + shift`.
fn fold_batch_norm(parameters: &[Vec<f32>], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let [weight, bias, mean, variance] = [0, 1, 2, 3].map(|i| &parameters[i]);
    (0..weight.len())
        .map(|c| {
            let scale = f64::from(weight[c]) / (f64::from(variance[c]) + eps).sqrt();
            (scale, f64::from(bias[c]) - f64::from(mean[c]) * scale)
        })
        .unzip()
}

fn window(input: Dims, kernel: [usize; 2], stride: usize, padding: Padding) -> Window {
    Window {
        kernel,
        stride,
        before: [
            padding.amounts(input.h, kernel[0], stride).0,
            padding.amounts(input.w, kernel[1], stride).0,
        ],
    }
}

fn pointwise(input: Dims, output: Dims) -> Conv {
    Conv {
        input,
        output,
        window: Window {
            kernel: [1, 1],
            stride: 1,
            before: [0, 0],
        },
        groups: 1,
    }
}

/// Learned positions `[prefix + grid², dim]` on another grid, given by the weights of its rows
/// `[height, grid]` and columns `[width, grid]`.
fn resample_grid(
    positions: &[f32],
    prefix: usize,
    grid: usize,
    dim: usize,
    rows: &[f32],
    columns: &[f32],
) -> Vec<f32> {
    let (head, body) = positions.split_at(prefix * dim);
    let mut result = head.to_vec();
    for row in rows.chunks_exact(grid) {
        for column in columns.chunks_exact(grid) {
            let start = result.len();
            result.resize(start + dim, 0.0);
            for (pixel, position) in body.chunks_exact(dim).enumerate() {
                let weight = row[pixel / grid] * column[pixel % grid];
                if weight != 0.0 {
                    let sum = &mut result[start..];
                    sum.iter_mut()
                        .zip(position)
                        .for_each(|(s, p)| *s += weight * p);
                }
            }
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::exec::params::Params;
    use crate::models::registry;

    fn kinds(name: &str, outputs: &[&str]) -> usize {
        let graph = registry::find(name).unwrap().row.architecture.graph(10);
        let vb = Params::new(None, 0).var_builder(&Device::Cpu);
        let mut ids: Vec<NodeId> = outputs.iter().map(|n| graph.find(n).unwrap()).collect();
        ids.push(graph.output());
        lower(&graph, &vb, [64, 64], &ids).unwrap().steps.len()
    }

    #[test]
    fn a_residual_network_is_its_convolutions_and_pools() {
        // 20 convolutions, max-pool, average, linear: nothing else is left.
        assert_eq!(kinds("resnet18", &[]), 23);
        // 52 convolutions, average, linear.
        assert_eq!(kinds("mobilenet_v2", &[]), 54);
    }

    #[test]
    fn a_node_that_is_asked_for_is_not_fused_away() {
        let whole = kinds("resnet18", &[]);
        assert_eq!(kinds("resnet18", &["layer1.0.conv1"]), whole + 2);
        assert_eq!(kinds("resnet18", &["layer1.0.relu"]), whole);
    }
}
