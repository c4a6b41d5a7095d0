//! From the graph to the steps of a batch: forward, and backward in reverse.
//!
//! Going forward, a convolution's output is kept as it is; the batch norm and activation behind it
//! become part of whoever reads it ([`Feed::Lazy`]) as long as that is one reader that can compute
//! them on the way, else a step of their own. Going backward, each value that a gradient is wanted
//! for has a buffer for it. The first reader writes the buffer, others add to it; a sum's gradient
//! is that of both its terms, and shares one buffer with them where nobody would notice.

use candle_core::{Result, bail};

use super::conv::{self, Folded, Layer, Product, Tiling, WeightSums, Weights};
use super::operation::{self, Kind, Operation, Resampling};
use super::values::{Destination, Feed, Norm, NormId, OutputGradient, ParameterId, ValueId, View};
use crate::exec::cpu::Options;
use crate::exec::cpu::arena::{Lifetime, place};
use crate::exec::cpu::lower::{layout, window};
use crate::exec::eager::too_few_for_variance;
use crate::graph::{Activation, Conv2d, Graph, NodeId, Op, Padding};
use crate::kernels::crop::Crop;
use crate::kernels::{Dims, Isa, Window, resample};

/// One step of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Layer(usize),
    /// A batch norm's statistics from the moments of its blocks.
    Norm(NormId),
    Operation(usize),
    /// Between forward and backward.
    Loss,
    /// A batch norm's gradients from the sums of its blocks.
    NormBackward(NormId),
    LayerBackward(usize),
    OperationBackward(usize),
    /// Zeros for channels of a gradient that nobody wrote.
    Zero(View),
    Copy {
        from: ValueId,
        to: ValueId,
    },
    Add {
        from: ValueId,
        to: ValueId,
    },
}

pub(super) struct Lowered {
    pub layers: Vec<Layer>,
    pub operations: Vec<Operation>,
    pub norms: Vec<Norm>,
    pub steps: Vec<Step>,
    /// By value: offset in the arena and length.
    pub places: Vec<(usize, usize)>,
    /// Values that are given: the image, or what the frozen part computes.
    pub inputs: Vec<(NodeId, ValueId)>,
    pub logits: ValueId,
    /// None where nothing is trained.
    pub logits_gradient: Option<ValueId>,
}

impl Lowered {
    /// The node that a step belongs to, and what kind of step it is.
    pub fn describe(&self, step: Step) -> (&str, &'static str) {
        match step {
            Step::Layer(layer) => (&self.layers[layer].name, "layer"),
            Step::LayerBackward(layer) => (&self.layers[layer].name, "layer, backward"),
            Step::Norm(norm) => (&self.norms[norm].name, "statistics"),
            Step::NormBackward(norm) => (&self.norms[norm].name, "statistics, backward"),
            Step::Operation(index) => {
                let operation = &self.operations[index];
                (&operation.name, operation.kind.label()[0])
            }
            Step::OperationBackward(index) => {
                let operation = &self.operations[index];
                (&operation.name, operation.kind.label()[1])
            }
            Step::Loss => ("", "loss"),
            Step::Zero(_) | Step::Copy { .. } | Step::Add { .. } => ("", "gradients joined"),
        }
    }
}

/// What is trained.
pub(super) struct Trained {
    /// By parameter.
    pub parameters: Vec<bool>,
    /// By node: whether a gradient is wanted for it or it is random, so that it is computed anew
    /// for every batch.
    pub nodes: Vec<bool>,
}

impl Trained {
    /// `is_trained` by parameter name.
    pub fn new(graph: &Graph, is_trained: impl Fn(&str) -> bool) -> Self {
        let parameters = graph.parameters().map(|p| is_trained(&p.name)).collect();
        let mut nodes: Vec<bool> = Vec::new();
        for node in graph.nodes() {
            let own = node.parameters.iter().any(|p| is_trained(&p.name));
            let random = matches!(node.op, Op::Dropout { p } if p > 0.0);
            let behind = node.inputs.iter().any(|i| nodes[i.index()]);
            nodes.push(own || random || behind);
        }
        // A norm is part of the convolution before it.
        for id in graph.ids() {
            if let (Op::BatchNorm { .. }, [input]) =
                (&graph.node(id).op, &graph.node(id).inputs[..])
            {
                nodes[input.index()] |= nodes[id.index()];
            }
        }
        Self { parameters, nodes }
    }

    /// Nodes that are not trained, but read by one that is.
    pub fn given(&self, graph: &Graph) -> Vec<NodeId> {
        let read = |id: &NodeId| {
            let readers = graph.ids().filter(|r| graph.node(*r).inputs.contains(id));
            readers.into_iter().any(|r| self.nodes[r.index()])
        };
        let given = |id: &NodeId| !self.nodes[id.index()] && (read(id) || *id == graph.output());
        graph.ids().filter(given).collect()
    }
}

/// Lowers the graph for batches of `count` images of `size`.
pub(super) fn lower(
    graph: &Graph,
    trained: &Trained,
    count: usize,
    size: [usize; 2],
    options: Options,
) -> Result<Lowered> {
    let shapes = graph
        .shapes(size[0], size[1])
        .map_err(candle_core::Error::wrap)?;
    let mut readers: Vec<Vec<NodeId>> = vec![Vec::new(); shapes.len()];
    for id in graph.ids() {
        for input in &graph.node(id).inputs {
            readers[input.index()].push(id);
        }
    }
    let mut first_parameter = Vec::new();
    let mut parameters = 0;
    for node in graph.nodes() {
        first_parameter.push(parameters);
        parameters += node.parameters.len();
    }
    let mut lowering = Lowering {
        graph,
        trained,
        count,
        size,
        isa: options.isa,
        exact: options.exact,
        dims: shapes.into_iter().map(layout).collect(),
        readers,
        first_parameter,
        feeds: vec![None; graph.nodes().len()],
        fused: vec![false; graph.nodes().len()],
        lengths: Vec::new(),
        wanted: Vec::new(),
        pieces: Vec::new(),
        value_readers: Vec::new(),
        producers: Vec::new(),
        layers: Vec::new(),
        layer_norms: Vec::new(),
        operations: Vec::new(),
        norms: Vec::new(),
        steps: Vec::new(),
        uses: Vec::new(),
        gradients: Vec::new(),
        inputs: Vec::new(),
    };
    for id in trained.given(graph) {
        let dims = lowering.dims[id.index()];
        let value = lowering.new_value(dims.len() * count, false);
        lowering.inputs.push((id, value));
        lowering.feeds[id.index()] = Some(Feed::Plain(View::whole(value, dims.c)));
    }
    for id in graph.ids() {
        if trained.nodes[id.index()] && !lowering.fused[id.index()] {
            lowering.node(id)?;
        }
    }
    lowering.finish()
}

/// A step forward that has one backward.
#[derive(Clone, Copy, Debug)]
enum Piece {
    Layer(usize),
    Operation(usize),
}

/// The buffer of a value's gradient, and the channels of it that have been written.
struct Gradient {
    buffer: ValueId,
    written: Vec<View>,
}

struct Lowering<'a> {
    graph: &'a Graph,
    trained: &'a Trained,
    count: usize,
    size: [usize; 2],
    isa: Isa,
    exact: bool,
    /// By node.
    dims: Vec<Dims>,
    readers: Vec<Vec<NodeId>>,
    first_parameter: Vec<ParameterId>,
    feeds: Vec<Option<Feed>>,
    fused: Vec<bool>,
    /// By value.
    lengths: Vec<usize>,
    wanted: Vec<bool>,
    value_readers: Vec<Vec<usize>>,
    producers: Vec<Option<usize>>,
    gradients: Vec<Option<Gradient>>,
    pieces: Vec<Piece>,
    layers: Vec<Layer>,
    /// By layer.
    layer_norms: Vec<Option<NormId>>,
    operations: Vec<Operation>,
    norms: Vec<Norm>,
    steps: Vec<Step>,
    /// By step: the values that it touches.
    uses: Vec<Vec<ValueId>>,
    inputs: Vec<(NodeId, ValueId)>,
}

impl Lowering<'_> {
    fn node(&mut self, id: NodeId) -> Result<()> {
        let graph = self.graph;
        let node = graph.node(id);
        let first = self.first_parameter[id.index()];
        let dims = self.dims[id.index()];
        let inputs: Vec<Feed> = node
            .inputs
            .iter()
            .map(|i| self.feeds[i.index()].expect("inputs come before readers"))
            .collect();
        let input_dims = match node.inputs[..] {
            [input, ..] => self.dims[input.index()],
            [] => dims,
        };
        let kind = match node.op {
            Op::Input => return Ok(()),
            Op::Conv2d(ref c) => {
                let window = window(input_dims, c.kernel, c.stride, c.padding);
                let z = self.layer(id, c, window, inputs[0], input_dims, dims, first);
                self.feeds[id.index()] = Some(Feed::Plain(View::whole(z, dims.c)));
                return Ok(());
            }
            Op::Linear { .. } => {
                let z = self.linear(
                    id,
                    inputs[0],
                    input_dims,
                    dims,
                    first,
                    node.parameters.len(),
                );
                self.feeds[id.index()] = Some(Feed::Plain(View::whole(z, dims.c)));
                return Ok(());
            }
            Op::SelfAttention { dim, heads } => {
                let wide = Dims { c: 3 * dim, ..dims };
                let qkv = self.linear(id, inputs[0], input_dims, wide, first, 2);
                let qkv = Feed::Plain(View::whole(qkv, 3 * dim));
                let kind = Kind::Attention { heads };
                let mixed = self.operation(id, kind, vec![qkv], wide, dims, false);
                let mixed = Feed::Plain(View::whole(mixed, dim));
                let z = self.linear(id, mixed, dims, dims, first + 2, 2);
                self.feeds[id.index()] = Some(Feed::Plain(View::whole(z, dim)));
                return Ok(());
            }
            Op::BatchNorm {
                channels,
                eps,
                momentum,
            } => {
                if self.fold_norm(id, inputs[0], eps) {
                    self.feeds[id.index()] = Some(inputs[0]);
                    return Ok(());
                }
                let norm = self.norm(id, inputs[0], channels, eps, momentum)?;
                let value = inputs[0].value();
                return self.settle(
                    id,
                    Feed::Lazy {
                        value,
                        channels,
                        norm: Some(norm),
                        activation: None,
                    },
                );
            }
            Op::Activation(activation) => {
                if self.clip_layer(node.inputs[0], inputs[0], activation) {
                    self.feeds[id.index()] = Some(inputs[0]);
                    return Ok(());
                }
                let feed = match inputs[0] {
                    Feed::Lazy {
                        value,
                        channels,
                        norm,
                        activation: None,
                    } => Feed::Lazy {
                        value,
                        channels,
                        norm,
                        activation: Some(activation),
                    },
                    Feed::Plain(view) if view.is_whole() => Feed::Lazy {
                        value: view.value,
                        channels: view.channels,
                        norm: None,
                        activation: Some(activation),
                    },
                    _ => bail!(
                        "layer {}: an activation of an activation, or of some channels, is not planned for",
                        node.name
                    ),
                };
                return self.settle(id, feed);
            }
            Op::Add => return self.sum(id, [inputs[0], inputs[1]]),
            Op::Slice { start, length } => {
                let Feed::Plain(view) = inputs[0] else {
                    unreachable!("a slice reads values")
                };
                self.feeds[id.index()] = Some(Feed::Plain(View {
                    start: view.start + start,
                    channels: length,
                    ..view
                }));
                return Ok(());
            }
            Op::Flatten | Op::Tokens => {
                self.feeds[id.index()] = Some(inputs[0]);
                return Ok(());
            }
            Op::Dropout { p } if p <= 0.0 => {
                self.feeds[id.index()] = Some(inputs[0]);
                return Ok(());
            }
            Op::Dropout { p } => Kind::Dropout {
                p,
                mask: self.new_value(dims.len() * self.count, false),
            },
            Op::Concat => return self.concat(id, inputs, input_dims),
            Op::Multiply => Kind::Multiply,
            Op::ChannelShuffle { groups } => Kind::Shuffle { groups },
            Op::MaxPool(pool) => Kind::MaxPool {
                window: window(
                    input_dims,
                    [pool.kernel; 2],
                    pool.stride,
                    Padding::Symmetric(pool.padding),
                ),
                argmax: self.new_value(dims.len() * self.count, false),
            },
            Op::AvgPool(pool) => Kind::AveragePool {
                window: window(
                    input_dims,
                    [pool.kernel; 2],
                    pool.stride,
                    Padding::Symmetric(pool.padding),
                ),
            },
            Op::GlobalAvgPool => Kind::GlobalAveragePool,
            Op::ClassToken { dim } => Kind::ClassToken {
                parameter: first,
                token: vec![0.0; dim],
            },
            Op::PositionEmbedding {
                dim,
                grid,
                prefix,
                patch,
                interpolation,
            } => {
                let target = self.size.map(|side| side / patch);
                let along = |to: usize| resample::position_weights(interpolation, grid, to);
                Kind::Positions {
                    parameter: first,
                    values: vec![0.0; dims.h * dim],
                    resampling: (target != [grid, grid]).then(|| Resampling {
                        prefix,
                        grid,
                        rows: along(target[0]),
                        columns: along(target[1]),
                    }),
                }
            }
            Op::LayerNorm { dim, eps } => Kind::LayerNorm {
                parameters: [first, first + 1],
                weight: vec![0.0; dim],
                bias: vec![0.0; dim],
                eps,
            },
            Op::SelectToken { index } => Kind::SelectToken { index },
        };
        let own = (first..first + node.parameters.len()).any(|p| self.trained.parameters[p]);
        let value = self.operation(id, kind, inputs, input_dims, dims, own);
        self.feeds[id.index()] = Some(Feed::Plain(View::whole(value, dims.c)));
        Ok(())
    }

    /// The node that alone reads this one's output.
    fn only_reader(&self, id: NodeId) -> Option<NodeId> {
        match self.readers[id.index()][..] {
            [reader] => Some(reader),
            _ => None,
        }
    }

    /// Leaves a lazy feed to its reader, or makes a value of it.
    fn settle(&mut self, id: NodeId, feed: Feed) -> Result<()> {
        let activated = matches!(
            feed,
            Feed::Lazy {
                activation: Some(_),
                ..
            }
        );
        let lazily = self
            .only_reader(id)
            .is_some_and(|reader| match self.graph.node(reader).op {
                Op::Conv2d(_)
                | Op::Linear { .. }
                | Op::Concat
                | Op::ChannelShuffle { .. }
                | Op::MaxPool(_)
                | Op::GlobalAvgPool => true,
                Op::Activation(_) | Op::Add => !activated,
                _ => false,
            });
        let feed = if lazily {
            feed
        } else {
            self.apply(id, vec![feed], None)
        };
        self.feeds[id.index()] = Some(feed);
        Ok(())
    }

    /// A value of lazy feeds: their sum, where there are two, through an activation.
    fn apply(&mut self, id: NodeId, mut inputs: Vec<Feed>, activation: Option<Activation>) -> Feed {
        let mut activation = activation;
        if let [
            Feed::Lazy {
                activation: own @ Some(_),
                ..
            },
        ] = &mut inputs[..]
        {
            activation = own.take();
        }
        let norm = |feed: &Feed| match feed {
            Feed::Lazy { norm, .. } => *norm,
            Feed::Plain(_) => None,
        };
        let kind = Kind::Apply {
            activation,
            norms: inputs.iter().filter_map(norm).collect(),
        };
        let dims = self.dims[id.index()];
        let value = self.operation(id, kind, inputs, dims, dims, false);
        Feed::Plain(View::whole(value, dims.c))
    }

    /// A sum, with the clipping activation that follows it.
    fn sum(&mut self, id: NodeId, [a, b]: [Feed; 2]) -> Result<()> {
        let inputs = match (a, b) {
            (Feed::Plain(_), Feed::Lazy { .. }) => vec![b, a],
            // The later one first: its gradient is done with before the other's is added to.
            (Feed::Plain(_), Feed::Plain(_))
                if self.producers[b.value()] > self.producers[a.value()] =>
            {
                vec![b, a]
            }
            _ => vec![a, b],
        };
        let whole = |feed: &Feed| !matches!(feed, Feed::Plain(view) if !view.is_whole());
        if !inputs.iter().all(whole) {
            let name = &self.graph.node(id).name;
            bail!("layer {name}: a sum of some channels is not planned for");
        }
        let next = self.only_reader(id).and_then(|next| {
            match self.graph.node(next).op {
                // The output tells what these let through.
                Op::Activation(a @ (Activation::Relu | Activation::Relu6)) => Some((next, a)),
                _ => None,
            }
        });
        let activation = next.map(|(_, activation)| activation);
        let feed = self.apply(id, inputs, activation);
        let end = next.map_or(id, |(next, _)| next);
        self.fused[end.index()] = true;
        self.feeds[end.index()] = Some(feed);
        Ok(())
    }

    /// Channels side by side; a shuffle of two halves that follows becomes part of it.
    fn concat(&mut self, id: NodeId, inputs: Vec<Feed>, input_dims: Dims) -> Result<()> {
        let halves = matches!(&inputs[..], [a, b] if a.channels() == b.channels());
        let shuffle = self
            .only_reader(id)
            .filter(|&next| halves && self.graph.node(next).op == Op::ChannelShuffle { groups: 2 });
        let kind = Kind::Concat {
            interleave: shuffle.is_some(),
        };
        let dims = self.dims[id.index()];
        let value = self.operation(id, kind, inputs, input_dims, dims, false);
        let end = shuffle.unwrap_or(id);
        self.fused[end.index()] = true;
        self.feeds[end.index()] = Some(Feed::Plain(View::whole(value, dims.c)));
        Ok(())
    }

    fn new_value(&mut self, len: usize, wanted: bool) -> ValueId {
        self.lengths.push(len);
        self.wanted.push(wanted);
        self.value_readers.push(Vec::new());
        self.producers.push(None);
        self.gradients.push(None);
        self.lengths.len() - 1
    }

    fn push(&mut self, step: Step, uses: Vec<ValueId>) {
        self.steps.push(step);
        self.uses.push(uses);
    }

    fn piece(&mut self, piece: Piece, inputs: &[Feed], output: ValueId) {
        let index = self.pieces.len();
        self.pieces.push(piece);
        self.producers[output] = Some(index);
        for feed in inputs {
            self.value_readers[feed.value()].push(index);
        }
    }

    #[allow(clippy::too_many_arguments)] // all of a layer
    fn layer(
        &mut self,
        id: NodeId,
        conv: &Conv2d,
        window: Window,
        feed: Feed,
        input: Dims,
        output: Dims,
        weight: ParameterId,
    ) -> ValueId {
        let bias = conv.bias.then_some(weight + 1);
        let trained = |p: ParameterId| self.trained.parameters[p];
        let wanted = trained(weight) || bias.is_some_and(trained) || self.wanted[feed.value()];
        let z = self.new_value(output.len() * self.count, wanted);
        let index = self.layers.len();
        let batch = (self.count, output);
        let crop = Crop::of(window, input, output);
        let window = crop.as_ref().map_or(window, |crop| crop.window(window));
        let conv = Conv2d {
            kernel: window.kernel,
            ..conv.clone()
        };
        let tiling = Tiling::of(&conv, self.count, output).filter(|_| !self.exact);
        let mut weights = Layer::new_weights(self.isa, &conv, window, batch, tiling);
        let mut uses = vec![feed.value(), z];
        let packed = match &mut weights {
            Weights::Dense { groups, place } => {
                Some((groups.iter().map(Product::len).sum(), place))
            }
            Weights::Winograd { frequencies, place } => Some((frequencies.values_len(), place)),
            Weights::Wide { wide, place } => Some((wide.panels_len(), place)),
            Weights::Depthwise(_) => None,
        };
        if let Some((len, place)) = packed {
            *place = self.new_value(len, false);
            uses.push(*place);
        }
        self.layers.push(Layer {
            name: self.graph.node(id).name.clone(),
            window,
            crop,
            cut: Vec::new(),
            input,
            output,
            feed,
            z,
            weight,
            bias,
            moments: None,
            folded: None,
            activation: None,
            blocks: Layer::blocks(&conv, tiling, &weights, batch),
            conv,
            tiling,
            weights,
            bias_values: vec![0.0; output.c],
            backward: None,
        });
        self.layer_norms.push(None);
        self.push(Step::Layer(index), uses);
        self.piece(Piece::Layer(index), &[feed], z);
        z
    }

    /// A linear layer over the pixels, as the convolution that it is.
    fn linear(
        &mut self,
        id: NodeId,
        feed: Feed,
        input: Dims,
        output: Dims,
        weight: ParameterId,
        parameters: usize,
    ) -> ValueId {
        let conv = Conv2d {
            bias: parameters > 1,
            ..Conv2d::new(input.c, output.c, 1)
        };
        let window = Window {
            kernel: [1, 1],
            stride: 1,
            before: [0, 0],
        };
        self.layer(id, &conv, window, feed, input, output, weight)
    }

    fn operation(
        &mut self,
        id: NodeId,
        kind: Kind,
        inputs: Vec<Feed>,
        input: Dims,
        output: Dims,
        trained: bool,
    ) -> ValueId {
        let wanted = trained || inputs.iter().any(|feed| self.wanted[feed.value()]);
        let value = self.new_value(output.len() * self.count, wanted);
        let mut uses: Vec<ValueId> = inputs.iter().map(Feed::value).collect();
        uses.push(value);
        if let Kind::Dropout { mask: kept, .. } | Kind::MaxPool { argmax: kept, .. } = kind {
            uses.push(kept);
        }
        let index = self.operations.len();
        self.push(Step::Operation(index), uses);
        self.piece(Piece::Operation(index), &inputs, value);
        self.operations.push(Operation {
            name: self.graph.node(id).name.clone(),
            kind,
            inputs,
            input,
            output,
            value,
            backward: None,
        });
        value
    }

    /// The layer that alone makes a value, before any norm.
    fn layer_of(&self, feed: Feed) -> Option<usize> {
        match self.producers[feed.value()].map(|piece| self.pieces[piece]) {
            Some(Piece::Layer(layer)) if matches!(feed, Feed::Plain(v) if v.is_whole()) => {
                Some(layer)
            }
            _ => None,
        }
    }

    /// Makes a norm on stored statistics part of the layer before it, where nothing of it is
    /// trained and nobody else reads the layer.
    fn fold_norm(&mut self, id: NodeId, feed: Feed, eps: f64) -> bool {
        let first = self.first_parameter[id.index()];
        let parameters = [first, first + 1, first + 2, first + 3];
        let trained = parameters.iter().any(|&p| self.trained.parameters[p]);
        let input = self.graph.node(id).inputs[0];
        let Some(layer) = self.layer_of(feed) else {
            return false;
        };
        if trained || self.only_reader(input).is_none() {
            return false;
        }
        let layer = &mut self.layers[layer];
        layer.folded = Some(Folded {
            parameters,
            eps,
            scale: vec![0.0; layer.output.c],
        });
        true
    }

    /// Applies an activation where the layer before it writes, if its output tells what it let
    /// through and nobody else reads what was there before.
    fn clip_layer(&mut self, input: NodeId, feed: Feed, activation: Activation) -> bool {
        let clips = matches!(activation, Activation::Relu | Activation::Relu6);
        let behind = matches!(
            self.graph.node(input).op,
            Op::Conv2d(_) | Op::Linear { .. } | Op::BatchNorm { .. }
        );
        let Some(layer) = self.layer_of(feed) else {
            return false;
        };
        if !clips || !behind || self.only_reader(input).is_none() {
            return false;
        }
        self.layers[layer].activation = Some(activation);
        true
    }

    /// The norm behind a layer.
    fn norm(
        &mut self,
        id: NodeId,
        feed: Feed,
        channels: usize,
        eps: f64,
        momentum: f64,
    ) -> Result<NormId> {
        let node = self.graph.node(id);
        let first = self.first_parameter[id.index()];
        let Some(layer) = self.layer_of(feed) else {
            bail!(
                "layer {}: a batch norm that follows no convolution is not planned for",
                node.name
            );
        };
        let norm = self.norms.len();
        let trained = |p: ParameterId| self.trained.parameters[p];
        let batch = trained(first);
        let count = self.count * self.dims[id.index()].pixels();
        if batch && count < 2 {
            bail!("{}", too_few_for_variance(&node.name));
        }
        let Layer {
            blocks, output, z, ..
        } = &self.layers[layer];
        self.wanted[*z] |= trained(first) || trained(first + 1);
        let moment_counts: Vec<usize> = blocks.iter().map(|b| b.pixels(*output).1).collect();
        let zeros = vec![0.0; channels];
        self.norms.push(Norm {
            name: node.name.clone(),
            channels,
            eps,
            momentum,
            parameters: [first, first + 1, first + 2, first + 3],
            batch,
            count,
            total: count as f64,
            moments: vec![0.0; moment_counts.len() * 2 * channels],
            moment_counts,
            sums: Vec::new(),
            weight: zeros.clone(),
            mean: zeros.clone(),
            inverse_deviation: vec![0.0; channels],
            scale: zeros.clone(),
            shift: zeros.clone(),
            a: zeros.clone(),
            b: zeros.clone(),
            c: zeros,
        });
        self.layers[layer].moments = batch.then_some(norm);
        self.layer_norms[layer] = Some(norm);
        self.push(Step::Norm(norm), Vec::new());
        Ok(norm)
    }

    /// The buffer for the gradient of a view, and whether to add to what is there.
    fn contribution(&mut self, view: View) -> (ValueId, bool) {
        if self.gradients[view.value].is_none() {
            let buffer = self.new_value(self.lengths[view.value], false);
            self.gradients[view.value] = Some(Gradient {
                buffer,
                written: Vec::new(),
            });
        }
        let gradient = self.gradients[view.value].as_ref().expect("made above");
        let buffer = gradient.buffer;
        let range = |v: &View| v.start..v.start + v.channels;
        let own = range(&view);
        let overlaps = |v: &View| range(v).start < own.end && own.start < range(v).end;
        let covers = |v: &View| range(v).start <= own.start && own.end <= range(v).end;
        let add = gradient.written.iter().any(overlaps);
        if add && !gradient.written.iter().any(covers) {
            // Some of the channels have been written: the others begin with zeros.
            self.fill_gaps(view.value, view.stride);
        }
        let gradient = self.gradients[view.value].as_mut().expect("made above");
        gradient.written.push(view);
        (buffer, add)
    }

    /// Zeros for the channels of a gradient that nobody has written.
    fn fill_gaps(&mut self, value: ValueId, stride: usize) {
        let Some(gradient) = &mut self.gradients[value] else {
            return;
        };
        gradient.written.sort_by_key(|v| v.start);
        let mut gaps = Vec::new();
        let mut end = 0;
        for view in &gradient.written {
            if view.start > end {
                gaps.push((end, view.start));
            }
            end = end.max(view.start + view.channels);
        }
        if end < stride {
            gaps.push((end, stride));
        }
        let buffer = gradient.buffer;
        gradient.written = vec![View::whole(value, stride)];
        for (start, end) in gaps {
            let view = View {
                value: buffer,
                start,
                channels: end - start,
                stride,
            };
            self.push(Step::Zero(view), vec![buffer]);
        }
    }

    /// The complete gradient of a value with so many channels.
    fn complete(&mut self, value: ValueId, channels: usize) -> Option<ValueId> {
        self.fill_gaps(value, channels);
        self.gradients[value].as_ref().map(|g| g.buffer)
    }

    /// Where a step puts the gradient for a feed, if one is wanted; it makes so many partial sums
    /// for the norm behind it.
    fn destination(&mut self, feed: Feed, blocks: usize) -> Option<Destination> {
        if !self.wanted[feed.value()] {
            return None;
        }
        Some(match feed {
            Feed::Plain(view) => {
                let (buffer, add) = self.contribution(view);
                let view = View {
                    value: buffer,
                    ..view
                };
                Destination::Plain { view, add }
            }
            Feed::Lazy {
                value,
                channels,
                norm,
                activation,
            } => {
                let (buffer, add) = self.contribution(View::whole(value, channels));
                assert!(!add, "a lazy feed has one reader");
                self.want_sums(norm, blocks);
                Destination::Masked {
                    buffer,
                    value,
                    channels,
                    norm,
                    activation,
                }
            }
        })
    }

    fn want_sums(&mut self, norm: Option<NormId>, blocks: usize) {
        let Some(norm) = norm.map(|n| &mut self.norms[n]) else {
            return;
        };
        let parameters = &self.trained.parameters;
        if norm.batch || parameters[norm.parameters[0]] || parameters[norm.parameters[1]] {
            norm.sums = vec![0.0; blocks * 2 * norm.channels];
        }
    }

    fn backward_of_layer(&mut self, index: usize) {
        let Layer {
            z,
            feed,
            weight,
            bias,
            ref conv,
            ref output,
            ref blocks,
            ..
        } = self.layers[index];
        let channels = output.c;
        let blocks = blocks.len();
        let conv = conv.clone();
        if !self.wanted[z] {
            return;
        }
        let Some(gradient) = self.complete(z, channels) else {
            return;
        };
        let norm = self.layer_norms[index];
        let mut uses = vec![gradient, z];
        if let Some(norm) = norm {
            self.push(Step::NormBackward(norm), Vec::new());
        }
        let trained = |p: ParameterId| self.trained.parameters[p];
        let trains_bias = bias.is_some_and(trained);
        let weights = trained(weight).then(|| self.layers[index].plan_weight_sums());
        let weights = weights.map(|plan| match plan {
            Ok((lanes, len)) => {
                let sums = self.new_value(len, false);
                uses.push(sums);
                WeightSums::Lanes { lanes, sums }
            }
            Err((panels, sums)) => {
                let [a, z] = panels.map(|len| self.new_value(len, false));
                let sums = sums.map(|len| self.new_value(len, false));
                uses.extend([a, z].into_iter().chain(sums));
                WeightSums::Panels { a, z, sums }
            }
        });
        let destination = self.destination(feed, blocks);
        if let Some(Destination::Plain { view, .. }) = destination {
            uses.push(view.value);
        }
        if let Some(Destination::Masked { buffer, .. }) = destination {
            uses.push(buffer);
        }
        uses.push(feed.value());
        let isa = self.isa;
        let input = destination.map(|to| {
            let layer = &self.layers[index];
            let images = (self.count, layer.input);
            let mut input = Layer::new_input_gradient(isa, &conv, layer.tiling, images, to);
            input.place = self.new_value(input.len(), false);
            uses.push(input.place);
            input
        });
        let from = OutputGradient {
            gradient,
            value: z,
            channels,
            norm,
            activation: self.layers[index].activation,
        };
        self.layers[index].backward = Some(conv::Backward {
            from,
            weights,
            bias: trains_bias.then(|| vec![0.0; blocks * channels]),
            input,
        });
        self.push(Step::LayerBackward(index), uses);
    }

    fn backward_of_operation(&mut self, index: usize, piece: usize) {
        let Operation {
            value,
            ref inputs,
            ref kind,
            output,
            ..
        } = self.operations[index];
        let mut read: Vec<ValueId> = inputs.iter().map(Feed::value).collect();
        let inputs = inputs.clone();
        let apply = matches!(kind, Kind::Apply { .. });
        let mut parameters = false;
        match kind {
            Kind::Apply { .. } => read.push(value),
            Kind::Dropout { mask: kept, .. } | Kind::MaxPool { argmax: kept, .. } => {
                read.push(*kept);
            }
            Kind::ClassToken { parameter, .. } | Kind::Positions { parameter, .. } => {
                parameters = self.trained.parameters[*parameter];
            }
            Kind::LayerNorm { parameters: p, .. } => parameters = self.trained.parameters[p[0]],
            _ => {}
        }
        if !self.wanted[value] {
            return;
        }
        let Some(gradient) = self.complete(value, output.c) else {
            return;
        };
        let blocks = self.operations[index].blocks(self.count);
        let mut uses = vec![gradient];
        uses.extend(read);
        let mut destinations = Vec::new();
        if !apply {
            for &feed in &inputs {
                let destination = self.destination(feed, blocks);
                match destination {
                    Some(Destination::Plain { view, .. }) => uses.push(view.value),
                    Some(Destination::Masked { buffer, .. }) => uses.push(buffer),
                    None => {}
                }
                destinations.push(destination);
            }
        }
        self.operations[index].backward = Some(operation::Backward {
            gradient,
            destinations,
            parameters,
        });
        if apply {
            for feed in &inputs {
                if let Feed::Lazy { norm, .. } = *feed {
                    self.want_sums(norm, blocks);
                }
            }
        }
        self.push(Step::OperationBackward(index), uses);
        if apply {
            self.hand_on(gradient, &inputs, piece);
        }
    }

    /// Gives the gradient of a sum to its terms: the buffer itself, or a copy where one term's
    /// would change while another still reads it.
    fn hand_on(&mut self, gradient: ValueId, inputs: &[Feed], piece: usize) {
        let others = |this: &Self, feed: &Feed| -> Vec<usize> {
            let readers = this.value_readers[feed.value()].iter();
            readers.copied().filter(|&r| r != piece).collect()
        };
        let base = inputs[0];
        // Until when the first term's gradient is read.
        let read_until = match inputs.len() {
            1 => None,
            _ => Some(self.producers[base.value()].unwrap_or(0)),
        };
        for (index, feed) in inputs.iter().enumerate() {
            let value = feed.value();
            if !self.wanted[value] {
                continue;
            }
            let others = others(self, feed);
            let shared = self.gradients[value].is_none()
                && match (index, read_until) {
                    (_, None) => true,
                    (0, _) => others.is_empty(),
                    (_, Some(until)) => {
                        others.iter().all(|&r| r < until)
                            && self.producers[value].is_none_or(|p| {
                                p < until || others.is_empty() && matches!(feed, Feed::Lazy { .. })
                            })
                    }
                };
            let view = View::whole(value, feed.channels());
            if shared {
                self.gradients[value] = Some(Gradient {
                    buffer: gradient,
                    written: vec![view],
                });
                continue;
            }
            let (to, add) = self.contribution(view);
            let step = if add {
                Step::Add { from: gradient, to }
            } else {
                Step::Copy { from: gradient, to }
            };
            self.push(step, vec![gradient, to]);
        }
    }

    fn finish(mut self) -> Result<Lowered> {
        let Some(Feed::Plain(view)) = self.feeds[self.graph.output().index()] else {
            bail!("a network ends in a value");
        };
        let logits = view.value;
        let logits_gradient = self.wanted[logits].then(|| self.contribution(view).0);
        let mut uses: Vec<ValueId> = vec![logits];
        uses.extend(logits_gradient);
        self.push(Step::Loss, uses);
        for index in (0..self.pieces.len()).rev() {
            match self.pieces[index] {
                Piece::Layer(layer) => self.backward_of_layer(layer),
                Piece::Operation(operation) => self.backward_of_operation(operation, index),
            }
        }
        let mut lifetimes: Vec<Lifetime> = self
            .lengths
            .iter()
            .map(|&len| Lifetime {
                first: usize::MAX,
                last: 0,
                len,
            })
            .collect();
        for (step, uses) in self.uses.iter().enumerate() {
            for &value in uses {
                let life = &mut lifetimes[value];
                life.first = life.first.min(step);
                life.last = life.last.max(step);
            }
        }
        for &(_, value) in &self.inputs {
            lifetimes[value].first = 0;
        }
        for life in &mut lifetimes {
            life.first = life.first.min(life.last);
        }
        let slots = place(&lifetimes);
        let places = slots.iter().map(|slot| {
            let range = slot.range(1);
            (range.start, range.len())
        });
        Ok(Lowered {
            places: places.collect(),
            layers: self.layers,
            operations: self.operations,
            norms: self.norms,
            steps: self.steps,
            inputs: self.inputs,
            logits,
            logits_gradient,
        })
    }
}
