//! From the graph to steps: fusion, packed weights, lifetimes.

use std::borrow::Cow;

use candle_nn::var_builder::VarBuilder;

use super::arena::{Lifetime, ValueId};
use super::step::{Kind, Step, View};
use super::{Options, PlanError};
use crate::exec::params::{fetch, with_values};
use crate::graph::{
    Activation, Conv2d, Graph, Node, NodeId, Op, Padding, Parameter, Pool2d, Shape,
};
use crate::kernels::bottleneck::{Bottleneck, Expansion};
use crate::kernels::crop::Crop;
use crate::kernels::depthwise::Depthwise;
use crate::kernels::gemm::{Packed, Store};
use crate::kernels::grouped::Grouped;
use crate::kernels::grouped_strip::GroupedStrip;
use crate::kernels::memory::Slab;
use crate::kernels::pool::Reduction;
use crate::kernels::winograd::Winograd;
use crate::kernels::{Dims, Layout, Window, resample};

/// Reads a layer's weights and packs them into the slab. Those of different layers may run at the
/// same time.
pub(super) type Job<'a> = Box<dyn FnOnce(&Slab) -> candle_core::Result<()> + Send + 'a>;

pub(super) struct Lowered<'a> {
    pub steps: Vec<Step>,
    /// By value.
    pub lifetimes: Vec<Lifetime>,
    pub layouts: Vec<Layout>,
    /// By value: the value whose memory it is, itself as a rule.
    pub memory_of: Vec<ValueId>,
    /// What is left to do before the steps can run.
    pub jobs: Vec<Job<'a>>,
    pub input: ValueId,
    pub outputs: Vec<(ValueId, Dims)>,
}

pub(super) fn lower<'a>(
    graph: &'a Graph,
    vb: &'a VarBuilder,
    image: [usize; 2],
    outputs: &'a [NodeId],
    options: Options,
) -> Result<Lowered<'a>, PlanError> {
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
        options,
        dims: shapes.iter().map(|&s| layout(s)).collect(),
        readers,
        outputs,
        value_of: vec![None; shapes.len()],
        fused: vec![false; shapes.len()],
        steps: Vec::new(),
        layouts: Vec::new(),
        memory_of: Vec::new(),
        current: graph.input(),
        jobs: Vec::new(),
    };
    for id in graph.ids() {
        if !lowering.fused[id.index()] {
            lowering.current = id;
            lowering.node(id)?;
        }
    }
    Ok(lowering.finish())
}

/// How a value lies in memory: a sequence is an image of width 1, a vector one pixel.
pub(in crate::exec) fn layout(shape: Shape) -> Dims {
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
    options: Options,
    /// By node.
    dims: Vec<Dims>,
    readers: Vec<Vec<NodeId>>,
    outputs: &'a [NodeId],
    value_of: Vec<Option<View>>,
    fused: Vec<bool>,
    steps: Vec<Step>,
    /// By value; borders grow as readers are found.
    layouts: Vec<Layout>,
    /// By value: the value whose memory it is, itself as a rule.
    memory_of: Vec<ValueId>,
    /// The node that steps are made for.
    current: NodeId,
    jobs: Vec<Job<'a>>,
}

/// What follows a convolution and becomes part of it.
struct Tail {
    /// Output = sum · scale + shift, from a batch norm; identity without one.
    scale: Vec<f64>,
    shift: Vec<f64>,
    residual: Option<View>,
    activation: Option<Activation>,
    /// The last node that was taken in.
    end: NodeId,
}

impl<'a> Lowering<'a> {
    fn node(&mut self, id: NodeId) -> Result<(), PlanError> {
        let graph = self.graph;
        let node = graph.node(id);
        let kind = match node.op {
            Op::Input => {
                let value = self.new_value(self.dims[id.index()]);
                self.value_of[id.index()] = Some(self.whole(value));
                return Ok(());
            }
            Op::Flatten | Op::Dropout { .. } => {
                self.value_of[id.index()] = Some(self.input(node, 0));
                return Ok(());
            }
            Op::Tokens => {
                // The same memory, read as an image of width 1.
                let view = self.input(node, 0);
                let map = self.materialize(view).value;
                let tokens = self.new_value(self.dims[id.index()]);
                self.memory_of[tokens] = map;
                self.value_of[id.index()] = Some(self.whole(tokens));
                return Ok(());
            }
            Op::Slice { start, length } => {
                let view = self.input(node, 0);
                self.value_of[id.index()] = Some(View {
                    start: view.start + start,
                    channels: length,
                    ..view
                });
                return Ok(());
            }
            Op::Conv2d(ref c) => return self.convolution(id, c),
            Op::Linear { .. } => {
                let outputs = self.dims[id.index()].c;
                let source = self.input(node, 0);
                return self.linear(id, source, &node.parameters, outputs);
            }
            Op::SelfAttention { dim, heads } => {
                let Dims { h, w, .. } = self.dims[id.index()];
                let source = self.input(node, 0);
                let store = Store {
                    bias: self.values(&node.parameters[1])?,
                    activation: None,
                };
                let qkv = self.new_value(Dims::new(h, w, 3 * dim));
                let projection =
                    self.pointwise(&node.parameters[0], h * w, dim, vec![1.0; 3 * dim], store);
                self.push(projection, vec![source], qkv);
                let mixed = self.new_value(Dims::new(h, w, dim));
                self.push(Kind::Attention { heads }, vec![self.whole(qkv)], mixed);
                let mixed = self.whole(mixed);
                return self.linear(id, mixed, &node.parameters[2..], dim);
            }
            Op::Concat => return self.concat(id),
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
            Op::ChannelShuffle { groups } => Kind::ChannelShuffle { groups },
            Op::MaxPool(pool) => self.pool(id, pool, Reduction::Max),
            Op::AvgPool(pool) => self.pool(id, pool, Reduction::Average),
            Op::GlobalAvgPool => {
                let pixels = self.dims[node.inputs[0].index()].pixels();
                Kind::GlobalAvgPool { pixels }
            }
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
        let inputs = (0..node.inputs.len()).map(|i| {
            let view = self.input(node, i);
            self.materialize(view)
        });
        let inputs = inputs.collect();
        self.push_node(id, kind, inputs);
        Ok(())
    }

    /// Where a node's input lies.
    fn input(&self, node: &Node, index: usize) -> View {
        self.value_of[node.inputs[index].index()].expect("inputs come before readers")
    }

    /// All channels of a value.
    fn whole(&self, value: ValueId) -> View {
        View {
            value,
            start: 0,
            channels: self.layouts[value].dims.c,
        }
    }

    fn is_whole(&self, view: View) -> bool {
        view == self.whole(view.value)
    }

    /// A value of its own for some channels of another.
    fn materialize(&mut self, view: View) -> View {
        if self.is_whole(view) {
            return view;
        }
        let Dims { h, w, .. } = self.layouts[view.value].dims;
        let copy = self.new_value(Dims::new(h, w, view.channels));
        self.push(Kind::Concat { interleave: false }, vec![view], copy);
        self.whole(copy)
    }

    /// Channels of several values side by side; a shuffle of two halves that follows becomes part
    /// of the copy.
    fn concat(&mut self, id: NodeId) -> Result<(), PlanError> {
        let node = self.graph.node(id);
        let inputs: Vec<View> = (0..node.inputs.len())
            .map(|i| self.input(node, i))
            .collect();
        let halves = matches!(inputs[..], [a, b] if a.channels == b.channels);
        let shuffle = self
            .only_reader(id)
            .filter(|&next| halves && self.graph.node(next).op == Op::ChannelShuffle { groups: 2 });
        let kind = Kind::Concat {
            interleave: shuffle.is_some(),
        };
        if let Some(shuffle) = shuffle {
            self.fused[shuffle.index()] = true;
        }
        self.push_node(shuffle.unwrap_or(id), kind, inputs);
        Ok(())
    }

    fn convolution(&mut self, id: NodeId, c: &Conv2d) -> Result<(), PlanError> {
        let node = self.graph.node(id);
        let [weight, bias @ ..] = &node.parameters[..] else {
            unreachable!("a convolution has weights");
        };
        let input_dims = self.dims[node.inputs[0].index()];
        let output_dims = self.dims[id.index()];
        let window = window(input_dims, c.kernel, c.stride, c.padding);
        let crop = Crop::of(window, input_dims, output_dims);
        let window = crop.as_ref().map_or(window, |crop| crop.window(window));
        let tail = self.tail(id)?;
        let bias = bias.first().map(|b| self.values(b)).transpose()?;
        let store = tail.store(bias.as_deref());
        let mut source = self.input(node, 0);
        let (scale, isa) = (&tail.scale, self.options.isa);
        let [kh, kw] = window.kernel;
        let border;
        let kind = if c.is_depthwise() {
            source = self.materialize(source);
            border = window.border(input_dims, output_dims);
            let weight = self.values(weight)?;
            let weight = cut(crop.as_ref(), &weight);
            let area = kh * kw;
            let channels = output_dims.c;
            let value = |i: usize| {
                let (tap, c) = (i / channels, i % channels);
                (f64::from(weight[c * area + tap]) * scale[c]) as f32
            };
            let conv = Depthwise {
                isa,
                window,
                weights: (0..area * channels).map(value).collect(),
            };
            Kind::Depthwise { conv, store }
        } else if c.in_channels == c.out_channels && Grouped::fits(isa, c.in_channels, c.groups) {
            source = self.materialize(source);
            border = window.border(input_dims, output_dims);
            let weight = self.values(weight)?;
            let weight = cut(crop.as_ref(), &weight);
            let ins = c.in_channels / c.groups;
            let channels = [c.in_channels, c.groups];
            let conv = Grouped::new(isa, window, channels, |o, i, tap| {
                (f64::from(weight[(o * ins + i) * kh * kw + tap]) * scale[o]) as f32
            });
            Kind::Grouped { conv, store }
        } else if c.in_channels == c.out_channels
            && GroupedStrip::fits(isa, &window, c.in_channels, c.groups)
        {
            source = self.materialize(source);
            border = window.border(input_dims, output_dims);
            let ins = c.in_channels / c.groups;
            let channels = [c.in_channels, c.groups];
            let weight = self.values(weight)?;
            let weight = cut(crop.as_ref(), &weight);
            let conv = GroupedStrip::new(isa, window, channels, |o, i, tap| {
                (f64::from(weight[(o * ins + i) * kh * kw + tap]) * scale[o]) as f32
            });
            Kind::GroupedStrip { conv, store }
        } else if let Some(tile) = self.winograd_tile(c, &window, output_dims) {
            source = self.materialize(source);
            let conv = Winograd::unfilled(isa, tile, [c.out_channels, c.in_channels]);
            let (later, scale) = (conv.share(), tail.scale.clone());
            self.later(weight, move |slab, weight| {
                later.store(slab, weight, &scale)
            });
            border = conv.border(output_dims);
            Kind::Winograd { conv, store }
        } else {
            border = window.border(input_dims, output_dims);
            let (ins, outs) = (c.in_channels / c.groups, c.out_channels / c.groups);
            let (area, depth) = (kh * kw, kh * kw * ins);
            let whole_rows = c.groups == 1 && self.is_whole(source);
            let runs = if whole_rows {
                [kh, kw * ins]
            } else {
                [area, ins]
            };
            let isa = isa.for_product(output_dims.pixels(), runs, outs);
            let groups = (0..c.groups).map(|_| Packed::unfilled(isa, runs, outs));
            let groups: Vec<Packed> = groups.collect();
            let later: Vec<Packed> = groups.iter().map(Packed::share).collect();
            let scale = tail.scale.clone();
            self.later(weight, move |slab, weight| {
                let weight = cut(crop.as_ref(), weight);
                let weights = weight.chunks_exact(outs * depth);
                for ((packed, weight), scale) in later.iter().zip(weights).zip(scale.chunks(outs)) {
                    packed.store(slab, weight, [ins, area], scale);
                }
            });
            Kind::Conv {
                window,
                groups,
                store,
                gated: false,
            }
        };
        let layout = &mut self.layouts[source.value];
        layout.border = layout.border.union(border);
        self.push_fused(kind, source, output_dims, &tail);
        Ok(())
    }

    /// Rows of the tile with which Winograd's algorithm computes the convolution, where it serves:
    /// by the layer alone, so that an image's result does not depend on its batch.
    fn winograd_tile(&self, c: &Conv2d, window: &Window, output: Dims) -> Option<usize> {
        // Transformed weights grow with the square of the tile: beyond this they cost more to
        // read than they save.
        let tile = if c.in_channels <= 256 { 6 } else { 4 };
        let tiles = [output.h, output.w].map(|size| size.div_ceil(tile - 2));
        let serves = !self.options.exact
            && c.padding.is_same_size(3)
            && c.groups == 1
            && c.stride == 1
            && c.kernel == [3, 3]
            && (window.kernel, window.before) == ([3, 3], [1, 1])
            && c.in_channels.min(c.out_channels) >= 32
            && Winograd::fits(self.options.isa, c.in_channels, c.out_channels)
            // A matrix unit has computed them all before so many transformed weights are read.
            && (c.in_channels <= 256 || !self.options.isa.has_matrix_unit())
            // Over a few pixels most of a tile lies beside them.
            && tiles[0] * tiles[1] * tile * tile < 9 * output.pixels();
        serves.then_some(tile)
    }

    /// A linear layer over the pixels of `source`, with what follows node `id` taken in.
    /// Parameters: weight `[outputs, inputs]`, bias where there is one.
    fn linear(
        &mut self,
        id: NodeId,
        source: View,
        parameters: &'a [Parameter],
        outputs: usize,
    ) -> Result<(), PlanError> {
        let [weight, bias @ ..] = parameters else {
            unreachable!("a linear layer has weights");
        };
        let mut tail = self.tail(id)?;
        let Dims { h, w, c } = self.layouts[source.value].dims;
        let bias = bias.first().map(|b| self.values(b)).transpose()?;
        let store = tail.store(bias.as_deref());
        let scale = std::mem::take(&mut tail.scale);
        let kind = self.pointwise(weight, h * w, c, scale, store);
        self.push_fused(kind, source, Dims::new(h, w, outputs), &tail);
        Ok(())
    }

    /// The convolution that a linear layer `[outputs, inputs]` is.
    fn pointwise(
        &mut self,
        weight: &'a Parameter,
        pixels: usize,
        inputs: usize,
        scale: Vec<f64>,
        store: Store,
    ) -> Kind {
        let window = Window {
            kernel: [1, 1],
            stride: 1,
            before: [0, 0],
        };
        let (isa, outputs) = (self.options.isa, scale.len());
        let isa = isa.for_product(pixels, [1, inputs], outputs);
        let packed = Packed::unfilled(isa, [1, inputs], outputs);
        let later = packed.share();
        self.later(weight, move |slab, weight| {
            later.store(slab, weight, [inputs, 1], &scale);
        });
        Kind::Conv {
            window,
            groups: vec![packed],
            store,
            gated: false,
        }
    }

    /// Leaves a layer's weights for later.
    fn later(&mut self, weight: &'a Parameter, pack: impl FnOnce(&Slab, &[f32]) + Send + 'a) {
        let vb = self.vb;
        self.jobs.push(Box::new(move |slab| {
            with_values(&fetch(vb, weight)?, |weight| pack(slab, weight))
        }));
    }

    fn push_node(&mut self, id: NodeId, kind: Kind, inputs: Vec<View>) {
        let output = self.new_value(self.dims[id.index()]);
        self.push(kind, inputs, output);
        self.value_of[id.index()] = Some(self.whole(output));
    }

    fn push_fused(&mut self, kind: Kind, source: View, dims: Dims, tail: &Tail) {
        let output = self.new_value(dims);
        let mut inputs = vec![source];
        inputs.extend(tail.residual);
        self.push(kind, inputs, output);
        self.value_of[tail.end.index()] = Some(self.whole(output));
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
                    let Some(view) = other.and_then(|i| self.value_of[i.index()]) else {
                        break;
                    };
                    if !self.is_whole(view) {
                        break;
                    }
                    tail.residual = Some(view);
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

    fn pool(&self, id: NodeId, pool: Pool2d, reduction: Reduction) -> Kind {
        let input = self.dims[self.graph.node(id).inputs[0].index()];
        let padding = Padding::Symmetric(pool.padding);
        Kind::Pool {
            reduction,
            window: window(input, [pool.kernel; 2], pool.stride, padding),
        }
    }

    fn parameters(&self, node: &Node) -> Result<Vec<Vec<f32>>, PlanError> {
        node.parameters.iter().map(|p| self.values(p)).collect()
    }

    fn values(&self, parameter: &Parameter) -> Result<Vec<f32>, PlanError> {
        Ok(with_values(&fetch(self.vb, parameter)?, <[f32]>::to_vec)?)
    }

    fn new_value(&mut self, dims: Dims) -> ValueId {
        let value = self.layouts.len();
        self.layouts.push(Layout::plain(dims));
        self.memory_of.push(value);
        value
    }

    fn push(&mut self, kind: Kind, inputs: Vec<View>, output: ValueId) {
        self.steps.push(Step {
            name: self.graph.node(self.current).name.clone(),
            kind,
            isa: self.options.isa,
            inputs,
            output,
            line_sums: None,
        });
    }

    fn finish(mut self) -> Lowered<'a> {
        let wanted: Vec<NodeId> = self.outputs.to_vec();
        let mut outputs = Vec::new();
        for id in wanted {
            let view = self.value_of[id.index()].expect("outputs are not fused away");
            let view = self.materialize(view);
            outputs.push((view.value, self.layouts[view.value].dims));
        }
        self.gate_projections(&outputs);
        self.fuse(&outputs);
        self.sum_lines();
        let mut used = vec![false; self.layouts.len()];
        for step in &self.steps {
            for value in step.values() {
                used[self.memory_of[value]] = true;
            }
        }
        let input = self.value_of[self.graph.input().index()].expect("the input is a value");
        used[input.value] = true;
        let mut lifetimes: Vec<Lifetime> = self
            .layouts
            .iter()
            .enumerate()
            .map(|(value, layout)| Lifetime {
                first: 0,
                last: 0,
                len: if self.memory_of[value] == value && used[value] {
                    layout.len()
                } else {
                    0
                },
            })
            .collect();
        for (index, step) in self.steps.iter().enumerate() {
            for value in step.line_sums.into_iter().chain([step.output]) {
                lifetimes[value].first = index;
            }
            for value in step.values() {
                lifetimes[self.memory_of[value]].last = index;
            }
        }
        for &(value, _) in &outputs {
            lifetimes[self.memory_of[value]].last = self.steps.len();
        }
        Lowered {
            steps: self.steps,
            lifetimes,
            layouts: self.layouts,
            memory_of: self.memory_of,
            jobs: self.jobs,
            input: input.value,
            outputs,
        }
    }
}

/// Depthwise convolutions that write smaller maps stay steps of their own: such maps are in the
/// cache anyway, and have too few lines to share.
const FUSED_LINES: usize = 14;

impl Lowering<'_> {
    /// Makes one step of each depthwise convolution, the convolution that it alone reads from, and
    /// the pointwise one that alone reads from it.
    fn fuse(&mut self, outputs: &[(ValueId, Dims)]) {
        let readers = self.reader_counts(outputs);
        let mut steps = std::mem::take(&mut self.steps).into_iter().peekable();
        while let Some(step) = steps.next() {
            // Whether the next step alone reads all of what this one gives.
            let leads_to = |step: &Step, next: &Step| {
                next.inputs[0] == self.whole(step.output) && readers[step.output] == 1
            };
            let worth = |dims: Dims| dims.h >= FUSED_LINES;
            let is_depthwise = |step: &Step| {
                matches!(step.kind, Kind::Depthwise { .. })
                    && step.inputs.len() == 1
                    && worth(self.layouts[step.output].dims)
            };
            let expands = |step: &Step| match &step.kind {
                Kind::Conv { window, groups, .. } => {
                    let view = step.inputs[0];
                    let whole = view == self.whole(view.value) || window.kernel == [1, 1];
                    step.inputs.len() == 1 && groups.len() == 1 && whole
                }
                _ => false,
            };
            let projects = |step: &Step| match &step.kind {
                Kind::Conv {
                    window,
                    groups,
                    gated,
                    ..
                } => window.kernel == [1, 1] && window.stride == 1 && groups.len() == 1 && !gated,
                _ => false,
            };
            let (expand, depthwise) = if is_depthwise(&step) {
                (None, step)
            } else if expands(&step)
                && let Some(next) =
                    steps.next_if(|next| is_depthwise(next) && leads_to(&step, next))
            {
                (Some(step), next)
            } else {
                self.steps.push(step);
                continue;
            };
            let project = steps.next_if(|next| projects(next) && leads_to(&depthwise, next));
            let step = match (expand, project) {
                (None, None) => depthwise,
                (expand, project) => self.bottleneck(expand, depthwise, project),
            };
            self.steps.push(step);
        }
    }

    /// For each value, how often it is read.
    fn reader_counts(&self, outputs: &[(ValueId, Dims)]) -> Vec<usize> {
        let mut readers = vec![0; self.layouts.len()];
        let views = self.steps.iter().flat_map(|s| &s.inputs);
        let values = views.map(|v| v.value).chain(outputs.iter().map(|o| o.0));
        for value in values {
            readers[value] += 1;
        }
        // Memory that has another name too is read under that name.
        for (value, &memory) in self.memory_of.iter().enumerate() {
            readers[memory] += usize::from(memory != value);
        }
        readers
    }

    /// A product of a map and a gate of one pixel becomes part of the pointwise convolution that
    /// alone reads it, which multiplies what it is about to use.
    fn gate_projections(&mut self, outputs: &[(ValueId, Dims)]) {
        let readers = self.reader_counts(outputs);
        let mut steps = std::mem::take(&mut self.steps).into_iter().peekable();
        while let Some(step) = steps.next() {
            let gates = matches!(step.kind, Kind::Multiply)
                && self.layouts[step.inputs[1].value].dims.pixels() == 1
                && readers[step.output] == 1;
            let projects = |next: &Step| match &next.kind {
                Kind::Conv { window, groups, .. } => {
                    window.kernel == [1, 1]
                        && window.stride == 1
                        && groups.len() == 1
                        && next.inputs[0] == self.whole(step.output)
                }
                _ => false,
            };
            match steps.next_if(|next| gates && projects(next)) {
                Some(mut next) => {
                    if let Kind::Conv { gated, .. } = &mut next.kind {
                        *gated = true;
                    }
                    next.inputs.splice(0..1, step.inputs);
                    self.steps.push(next);
                }
                None => self.steps.push(step),
            }
        }
    }

    /// A mean of all pixels is made from the sums of lines, where the step that computes them can
    /// give those.
    fn sum_lines(&mut self) {
        for index in 1..self.steps.len() {
            let (before, after) = self.steps.split_at_mut(index);
            let [step, ..] = after else { continue };
            let Kind::GlobalAvgPool { .. } = step.kind else {
                continue;
            };
            let maker = before.iter_mut().find(|maker| {
                let sums = matches!(maker.kind, Kind::Bottleneck(_) | Kind::Depthwise { .. });
                sums && maker.output == step.inputs[0].value
            });
            let Some(maker) = maker else { continue };
            let Dims { h, c, .. } = self.layouts[maker.output].dims;
            let dims = Dims::new(h, 1, c);
            let sums = *maker.line_sums.get_or_insert(self.layouts.len());
            step.inputs[0] = View {
                value: sums,
                start: 0,
                channels: c,
            };
            if sums == self.layouts.len() {
                self.new_value(dims);
            }
        }
    }

    /// One step of several: see [`Bottleneck`].
    fn bottleneck(&self, expand: Option<Step>, depthwise: Step, project: Option<Step>) -> Step {
        let hidden = self.layouts[depthwise.inputs[0].value].dims;
        let Dims { h, w, .. } = self.layouts[depthwise.output].dims;
        let product = |step: Step| match step.kind {
            Kind::Conv {
                window,
                mut groups,
                store,
                ..
            } => (window, groups.swap_remove(0), store),
            _ => unreachable!("chosen as a product"),
        };
        let mut inputs = vec![expand.as_ref().unwrap_or(&depthwise).inputs[0]];
        let last = project.as_ref().unwrap_or(&depthwise);
        inputs.extend(last.inputs.get(1));
        let output = last.output;
        let name = expand.as_ref().unwrap_or(&depthwise).name.clone();
        let expansion = expand
            .map(product)
            .map(|(window, weights, store)| Expansion {
                window,
                start: inputs[0].start,
                weights,
                store,
            });
        let projection = project
            .map(product)
            .map(|(_, weights, store)| (weights, store));
        let Kind::Depthwise { conv, store } = depthwise.kind else {
            unreachable!("chosen as a depthwise convolution")
        };
        let block = Bottleneck::new(expansion, (conv, store), projection, hidden, [h, w]);
        Step {
            name,
            kind: Kind::Bottleneck(Box::new(block)),
            isa: depthwise.isa,
            inputs,
            output,
            line_sums: None,
        }
    }
}

impl Tail {
    fn store(&self, bias: Option<&[f32]>) -> Store {
        let folded = |(i, shift): (usize, &f64)| {
            let bias = bias.map_or(0.0, |b| f64::from(b[i]));
            (shift + bias * self.scale[i]) as f32
        };
        Store {
            bias: self.shift.iter().enumerate().map(folded).collect(),
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

/// What is left of weights.
fn cut<'a>(crop: Option<&Crop>, weights: &'a [f32]) -> Cow<'a, [f32]> {
    match crop {
        Some(crop) => crop.cut(weights).into(),
        None => weights.into(),
    }
}

pub(in crate::exec) fn window(
    input: Dims,
    kernel: [usize; 2],
    stride: usize,
    padding: Padding,
) -> Window {
    Window {
        kernel,
        stride,
        before: [
            padding.amounts(input.h, kernel[0], stride).0,
            padding.amounts(input.w, kernel[1], stride).0,
        ],
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
        lower(&graph, &vb, [64, 64], &ids, Options::threads(1))
            .unwrap()
            .steps
            .len()
    }

    #[test]
    fn a_residual_network_is_its_convolutions_and_pools() {
        // 20 convolutions, max-pool, average, linear: nothing else is left.
        assert_eq!(kinds("resnet18", &[]), 23);
        // 52 convolutions, average, linear; three blocks have maps wide enough to be one step.
        assert_eq!(kinds("mobilenet_v2", &[]), 54 - 3 * 2);
    }

    #[test]
    fn a_node_that_is_asked_for_is_not_fused_away() {
        let whole = kinds("resnet18", &[]);
        assert_eq!(kinds("resnet18", &["layer1.0.conv1"]), whole + 2);
        assert_eq!(kinds("resnet18", &["layer1.0.relu"]), whole);
        let whole = kinds("mobilenet_v2", &[]);
        // Expansion and depthwise convolution of that block are steps of their own again, the
        // latter with its projection.
        assert_eq!(kinds("mobilenet_v2", &["features.2.conv.0.2"]), whole + 1);
    }
}
