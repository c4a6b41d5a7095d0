//! A network's steps on a device, forward and, along a tape, back.

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::var_builder::VarBuilder;
use rand_chacha::ChaCha8Rng;

use super::ops::{
    BatchNorm, Convolution, Epilogue, MaxPool, Shared, layer_norm, layer_norm_backward, product,
    scale_channels, softmax, softmax_backward, spread, sum_pixels, sum_rows, sum_to_channels,
};
use super::steps::{Step, steps};
use crate::exec::eager;
use crate::exec::params::fetch;
use crate::exec::{Others, Precision, Variables};
use crate::graph::{Activation, Graph, Node, NodeId, Op, Parameter};
use crate::kernels::resample;

/// A gradient's way back through one step: from the output's to those of the inputs, where these are asked
/// for, the parameters' being handed to the sink.
pub(super) type Backward = Box<dyn Fn(&Tensor, &mut Sink) -> Result<Vec<Option<Tensor>>>>;

/// Takes the gradient of a parameter, by its place among those that are trained.
pub(super) type Sink<'a> = dyn FnMut(usize, Tensor) -> Result<()> + 'a;

pub(super) struct Entry {
    pub output: NodeId,
    pub inputs: Vec<NodeId>,
    pub backward: Backward,
}

/// What a forward pass in training needs besides the images.
pub(super) struct InTraining<'a> {
    pub generator: &'a mut ChaCha8Rng,
    pub others: &'a Others,
    pub tape: Vec<Entry>,
    /// New running statistics: the node, and its mean and variance.
    pub running: Vec<(NodeId, [Tensor; 2])>,
}

/// A network whose parameters are on a CUDA device, float32, computed in another precision where that is
/// asked for.
pub struct CudaNetwork {
    pub(super) graph: Graph,
    steps: Vec<Step>,
    pub(super) precision: Precision,
    /// Each node's parameters, in the order of [`crate::graph::Node::parameters`].
    parameters: Vec<Vec<Tensor>>,
    /// What evaluation takes in their place, made once: see [`prepare`].
    prepared: Vec<Vec<Tensor>>,
    /// Their places among those that are trained.
    trained: Vec<Vec<Option<usize>>>,
    /// Batch norms on their stored statistics in training too.
    fixed: Vec<bool>,
    /// Nodes whose gradient is asked for.
    pub(super) needed: Vec<bool>,
}

impl CudaNetwork {
    /// Takes the graph's parameters from `vb`, under their own names.
    ///
    /// # Errors
    /// Where `vb` cannot give a tensor.
    pub fn new(graph: Graph, vb: &VarBuilder, precision: Precision) -> Result<Self> {
        let tensors = |node: &Node| {
            let tensors = node.parameters.iter().map(|p| fetch(vb, p));
            tensors.collect::<Result<Vec<_>>>()
        };
        let parameters: Vec<_> = graph.nodes().iter().map(tensors).collect::<Result<_>>()?;
        let nodes = graph.nodes().iter().zip(&parameters);
        let dtype = precision.dtype();
        let prepared = nodes.map(|(node, tensors)| prepare(&node.op, tensors, true, dtype));
        let prepared = prepared.collect::<Result<_>>()?;
        // Another thread, with a stream of its own, may be the one that computes.
        vb.device().synchronize()?;
        let mut network = Self::from_parts(graph, parameters, precision, &|_| None);
        network.prepared = prepared;
        Ok(network)
    }

    /// The network over variables that are being trained.
    pub(super) fn in_training(
        graph: Graph,
        variables: &Variables,
        precision: Precision,
    ) -> Result<Self> {
        let tensor = |p: &Parameter| {
            let tensor = variables.tensors().get(&p.name).cloned();
            tensor.ok_or_else(|| candle_core::Error::CannotFindTensor {
                path: p.name.clone(),
            })
        };
        let tensors = |node: &Node| {
            let tensors = node.parameters.iter().map(tensor);
            tensors.collect::<Result<Vec<_>>>()
        };
        let parameters = graph.nodes().iter().map(tensors).collect::<Result<_>>()?;
        let trained = variables.parameters();
        let place = |name: &str| trained.iter().position(|(n, _)| n == name);
        let mut network = Self::from_parts(graph, parameters, precision, &place);
        for (node, fixed) in network.graph.nodes().iter().zip(&mut network.fixed) {
            let mut statistics = node.parameters.iter().filter(|p| p.buffer);
            *fixed = statistics.any(|p| !variables.is_trained(&p.name));
        }
        Ok(network)
    }

    fn from_parts(
        graph: Graph,
        parameters: Vec<Vec<Tensor>>,
        precision: Precision,
        place: &dyn Fn(&str) -> Option<usize>,
    ) -> Self {
        let trained: Vec<Vec<Option<usize>>> = graph
            .nodes()
            .iter()
            .map(|node| node.parameters.iter().map(|p| place(&p.name)).collect())
            .collect();
        let mut needed = vec![false; trained.len()];
        for id in graph.ids() {
            let below = graph.node(id).inputs.iter().any(|i| needed[i.index()]);
            needed[id.index()] = below || trained[id.index()].iter().any(Option::is_some);
        }
        Self {
            steps: steps(&graph),
            fixed: vec![false; needed.len()],
            graph,
            precision,
            parameters,
            prepared: Vec::new(),
            trained,
            needed,
        }
    }

    /// A node's parameters as its operation takes them.
    fn prepared(&self, node: NodeId, stored: bool) -> Result<Vec<Tensor>> {
        if let Some(prepared) = self.prepared.get(node.index()) {
            return Ok(prepared.clone());
        }
        let op = &self.graph.node(node).op;
        prepare(
            op,
            &self.parameters[node.index()],
            stored,
            self.precision.dtype(),
        )
    }

    /// Logits `[N, classes]`, float32, of images `[N, H, W, 3]`, in evaluation mode; more generally the
    /// value of the graph's last node.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.run(images, &mut None)
    }

    pub(super) fn run(&self, images: &Tensor, training: &mut Option<InTraining>) -> Result<Tensor> {
        self.precision.announce();
        let dtype = self.precision.dtype();
        let mut readers = self.graph.reader_counts();
        let mut values: Vec<Option<Tensor>> = vec![None; readers.len()];
        let image = images.detach().to_dtype(dtype)?.contiguous()?;
        values[self.graph.input().index()] = Some(image);
        for step in &self.steps {
            let mut ids = self.graph.node(step.node).inputs.clone();
            ids.extend(step.residual);
            let inputs: Vec<Tensor> = ids
                .iter()
                .map(|id| values[id.index()].clone().expect("inputs come first"))
                .collect();
            let (value, backward) = self.evaluate(step, &inputs, images.dims(), training)?;
            values[step.output.index()] = Some(value);
            if let Some(training) = training
                && self.needed[step.output.index()]
            {
                training.tape.push(Entry {
                    output: step.output,
                    inputs: ids.clone(),
                    backward,
                });
            }
            for id in ids {
                readers[id.index()] -= 1;
                if readers[id.index()] == 0 {
                    values[id.index()] = None;
                }
            }
        }
        match values[self.graph.output().index()].take() {
            Some(value) => value.to_dtype(DType::F32),
            None => bail!("the network has no output"),
        }
    }

    fn evaluate(
        &self,
        step: &Step,
        inputs: &[Tensor],
        image_dims: &[usize],
        training: &mut Option<InTraining>,
    ) -> Result<(Tensor, Backward)> {
        let node = self.graph.node(step.node);
        let x = inputs[0].clone();
        let dtype = x.dtype();
        let stored = training.is_none() || self.fixed[step.node.index()];
        let parameters = self.prepared(step.node, stored)?;
        let places = self.trained[step.node.index()].clone();
        let needed: Vec<bool> = node
            .inputs
            .iter()
            .map(|id| self.needed[id.index()])
            .collect();
        let activation = step.activation;
        Ok(match node.op {
            Op::Input => bail!("an input is no step"),
            Op::Conv2d(ref c) => {
                let conv = Convolution::new(c, &x, parameters[0].clone())?;
                let raw = conv.forward(&x)?;
                let (y, biased) = Biased::apply(raw, parameters.get(1).cloned(), activation)?;
                (
                    y,
                    Box::new(move |g, sink| {
                        let g = biased.backward(g)?;
                        if let Some(place) = places[0] {
                            sink(place, conv.backward_weights(&g, &x)?)?;
                        }
                        if let Some(&Some(place)) = places.get(1) {
                            sink(place, sum_to_channels(&g)?)?;
                        }
                        Ok(vec![if needed[0] {
                            Some(conv.backward_input(&g)?)
                        } else {
                            None
                        }])
                    }),
                )
            }
            Op::Linear { .. } => {
                let weight = parameters[0].clone();
                let raw = linear(&x, &weight)?;
                let (y, biased) = Biased::apply(raw, parameters.get(1).cloned(), activation)?;
                (
                    y,
                    Box::new(move |g, sink| {
                        let g = biased.backward(g)?;
                        let (weights, bias) = (places[0], places.get(1).copied().flatten());
                        Ok(vec![linear_backward(
                            &g,
                            &x,
                            &weight,
                            [weights, bias],
                            needed[0],
                            sink,
                        )?])
                    }),
                )
            }
            Op::BatchNorm { eps, momentum, .. } => {
                let residual = step.residual.map(|_| inputs[inputs.len() - 1].clone());
                match training {
                    Some(training) if !stored => {
                        let alone = norms_with(training.others).is_none();
                        if alone && x.elem_count() / x.dim(D::Minus1)? < 2 {
                            bail!("{}", eager::too_few_for_variance(&node.name));
                        }
                        let others = training.others.clone();
                        let norm = BatchNorm::of_batch(
                            &x,
                            &parameters,
                            [eps, momentum],
                            norms_with(&others),
                        )?;
                        training.running.push((step.node, norm.running()?));
                        let [centre, scale, shift] = norm.centre_scale_shift()?.map(Some);
                        let after = After {
                            centre,
                            scale,
                            shift,
                            residual,
                            activation,
                        };
                        let y = after.epilogue().apply(&x)?;
                        (
                            y,
                            Box::new(move |g, sink| {
                                // With a residual the gradient before the activation is wanted by itself;
                                // else it is made on the way.
                                let (g, left, residual_gradient) = match after.residual {
                                    Some(_) => {
                                        let g = after.epilogue().backward(g, &x)?;
                                        (g.clone(), None, Some(g))
                                    }
                                    None => (g.clone(), activation, None),
                                };
                                let [dx, dw, db] =
                                    norm.backward(&g, &x, left, norms_with(&others))?;
                                for (place, gradient) in places.iter().zip([dw, db]) {
                                    if let Some(place) = place {
                                        sink(*place, gradient)?;
                                    }
                                }
                                Ok(vec![Some(dx), residual_gradient])
                            }),
                        )
                    }
                    _ => {
                        let [scale, shift] = [0, 1].map(|i| Some(parameters[i].clone()));
                        let after = After {
                            scale,
                            shift,
                            residual,
                            activation,
                            ..After::default()
                        };
                        let y = after.epilogue().apply(&x)?;
                        (
                            y,
                            Box::new(move |g, _| {
                                let g = after.epilogue().backward(g, &x)?;
                                let scaled = Epilogue {
                                    scale: after.scale.as_ref(),
                                    ..Epilogue::default()
                                };
                                Ok(vec![Some(scaled.apply(&g)?), Some(g)])
                            }),
                        )
                    }
                }
            }
            Op::Activation(_) | Op::Add => {
                let after = After {
                    residual: inputs.get(1).cloned(),
                    activation: match node.op {
                        Op::Activation(activation) => Some(activation),
                        _ => activation,
                    },
                    ..After::default()
                };
                let y = after.epilogue().apply(&x)?;
                (
                    y,
                    Box::new(move |g, _| {
                        let g = after.epilogue().backward(g, &x)?;
                        Ok(vec![Some(g.clone()), Some(g)])
                    }),
                )
            }
            Op::Multiply => {
                let s = inputs[1].clone();
                if x.dims() == s.dims() {
                    let y = (&x * &s)?;
                    (
                        y,
                        Box::new(move |g, _| Ok(vec![Some((g * &s)?), Some((g * &x)?)])),
                    )
                } else {
                    let y = scale_channels(&x, &s)?;
                    (
                        y,
                        Box::new(move |g, _| {
                            let dx = scale_channels(g, &s)?;
                            Ok(vec![Some(dx), Some(sum_pixels(g, Some(&x), 1.0)?)])
                        }),
                    )
                }
            }
            Op::Concat => {
                let last = x.rank() - 1;
                let widths: Vec<usize> =
                    inputs.iter().map(|x| x.dim(last)).collect::<Result<_>>()?;
                (
                    Tensor::cat(inputs, last)?,
                    Box::new(move |g, _| {
                        let mut start = 0;
                        let part = |&width: &usize| {
                            let part = g.narrow(last, start, width)?.contiguous()?;
                            start += width;
                            Ok(Some(part))
                        };
                        widths.iter().map(part).collect()
                    }),
                )
            }
            Op::Slice { start, length } => {
                let last = x.rank() - 1;
                let behind = x.dim(last)? - start - length;
                (
                    x.narrow(last, start, length)?.contiguous()?,
                    Box::new(move |g, _| Ok(vec![Some(g.pad_with_zeros(last, start, behind)?)])),
                )
            }
            Op::ChannelShuffle { groups } => {
                let (n, h, w, c) = x.dims4()?;
                let shuffled = move |x: &Tensor, groups: usize| {
                    x.reshape((n, h, w, groups, c / groups))?
                        .transpose(3, 4)?
                        .contiguous()?
                        .reshape((n, h, w, c))
                };
                (
                    shuffled(&x, groups)?,
                    Box::new(move |g, _| Ok(vec![Some(shuffled(g, c / groups)?)])),
                )
            }
            Op::MaxPool(pool) => {
                let (pool, y) = MaxPool::forward(pool, &x)?;
                (y, Box::new(move |g, _| Ok(vec![Some(pool.backward(g)?)])))
            }
            Op::AvgPool(pool) => {
                let average = Convolution::average(pool, &x)?;
                (
                    average.forward(&x)?,
                    Box::new(move |g, _| Ok(vec![Some(average.backward_input(g)?)])),
                )
            }
            Op::GlobalAvgPool => {
                let shape = x.dims().to_vec();
                let share = 1.0 / (shape[1] * shape[2]) as f64;
                (
                    sum_pixels(&x, None, share)?,
                    Box::new(move |g, _| Ok(vec![Some(spread(g, &shape, share)?)])),
                )
            }
            Op::Flatten => {
                let shape = x.dims().to_vec();
                (
                    x.flatten_from(1)?,
                    Box::new(move |g, _| Ok(vec![Some(g.reshape(shape.as_slice())?)])),
                )
            }
            Op::Dropout { p } => match training {
                Some(training) if p > 0.0 => {
                    let each = x.elem_count() / x.dim(0)?;
                    let mask = training
                        .others
                        .draw(training.generator, each, |generator| {
                            eager::dropout(&x.ones_like()?, p, generator)
                        })?;
                    (
                        (&x * &mask)?,
                        Box::new(move |g, _| Ok(vec![Some((g * &mask)?)])),
                    )
                }
                _ => (x, Box::new(|g, _| Ok(vec![Some(g.clone())]))),
            },
            Op::Tokens => {
                let shape = x.dims().to_vec();
                (
                    x.reshape((shape[0], shape[1] * shape[2], shape[3]))?,
                    Box::new(move |g, _| Ok(vec![Some(g.reshape(shape.as_slice())?)])),
                )
            }
            Op::ClassToken { dim } => {
                let n = x.dim(0)?;
                let token = parameters[0].to_dtype(dtype)?;
                let token = token.broadcast_as((n, 1, dim))?.contiguous()?;
                (
                    Tensor::cat(&[&token, &x], 1)?,
                    Box::new(move |g, sink| {
                        let tokens = g.dim(1)?;
                        if let Some(place) = places[0] {
                            let first = g.narrow(1, 0, 1)?.contiguous()?;
                            sink(place, sum_to_channels(&first)?.reshape((1, 1, dim))?)?;
                        }
                        Ok(vec![Some(g.narrow(1, 1, tokens - 1)?.contiguous()?)])
                    }),
                )
            }
            Op::PositionEmbedding {
                grid,
                prefix,
                patch,
                interpolation,
                ..
            } => {
                let target = [image_dims[1] / patch, image_dims[2] / patch];
                let along = |to: usize| {
                    let weights = resample::position_weights(interpolation, grid, to);
                    Tensor::from_vec(weights, (to, grid), x.device())
                };
                let maps = if target == [grid, grid] {
                    None
                } else {
                    Some([along(target[0])?, along(target[1])?])
                };
                let positions = match &maps {
                    None => parameters[0].clone(),
                    Some(maps) => eager::on_positions(&parameters[0], prefix, [grid; 2], maps)?,
                };
                (
                    x.broadcast_add(&positions.to_dtype(dtype)?)?,
                    Box::new(move |g, sink| {
                        if let Some(place) = places[0] {
                            let (n, t, d) = g.dims3()?;
                            let sum = sum_rows(g, None, [1, n, t * d], 1.0)?.reshape((1, t, d))?;
                            let sum = match &maps {
                                None => sum,
                                Some([rows, columns]) => {
                                    let back =
                                        [rows.t()?.contiguous()?, columns.t()?.contiguous()?];
                                    eager::on_positions(&sum, prefix, target, &back)?
                                }
                            };
                            sink(place, sum)?;
                        }
                        Ok(vec![Some(g.clone())])
                    }),
                )
            }
            Op::LayerNorm { eps, .. } => {
                let [y, numbers] = layer_norm(&x, &parameters[0], &parameters[1], eps)?;
                (
                    y,
                    Box::new(move |g, sink| {
                        let [dx, dw, db] = layer_norm_backward(g, &x, &parameters[0], &numbers)?;
                        for (place, gradient) in places.iter().zip([dw, db]) {
                            if let Some(place) = place {
                                sink(*place, gradient)?;
                            }
                        }
                        Ok(vec![Some(dx)])
                    }),
                )
            }
            Op::SelfAttention { heads, .. } => {
                self_attention(x, heads, &parameters, places, needed[0])?
            }
            Op::SelectToken { index } => {
                let tokens = x.dim(1)?;
                (
                    x.narrow(1, index, 1)?.contiguous()?.squeeze(1)?,
                    Box::new(move |g, _| {
                        let g = g.unsqueeze(1)?;
                        Ok(vec![Some(g.pad_with_zeros(
                            1,
                            index,
                            tokens - index - 1,
                        )?)])
                    }),
                )
            }
        })
    }
}

/// What an operation takes in the place of its parameters: weights of products in the dtype that is
/// computed in, and laid out as needed; of a batch norm on its `stored` statistics a scale and a shift.
fn prepare(op: &Op, parameters: &[Tensor], stored: bool, dtype: DType) -> Result<Vec<Tensor>> {
    let mut tensors: Vec<Tensor> = parameters.iter().map(Tensor::detach).collect();
    match op {
        Op::Conv2d(c) => tensors[0] = Convolution::arrange(c, &tensors[0].to_dtype(dtype)?)?,
        Op::Linear { .. } => tensors[0] = tensors[0].to_dtype(dtype)?,
        Op::SelfAttention { .. } => {
            for weight in [0, 2] {
                tensors[weight] = tensors[weight].to_dtype(dtype)?;
            }
        }
        Op::BatchNorm { eps, .. } if stored => {
            let [weight, bias, mean, variance] = [0, 1, 2, 3].map(|i| &tensors[i]);
            let scale = (weight / (variance + *eps)?.sqrt()?)?;
            let shift = (bias - (mean * &scale)?)?;
            tensors = vec![scale, shift];
        }
        _ => (),
    }
    Ok(tensors)
}

/// Those with whom batch norms share their statistics.
fn norms_with(others: &Others) -> Option<Shared<'_>> {
    let ranks = others.ranks.others().filter(|_| others.sync_norms)?;
    Some(Shared {
        others: ranks,
        absent: others.absent,
    })
}

/// What is done to a layer's output, kept for the way back: [`Epilogue`] with tensors of its own.
#[derive(Default)]
struct After {
    centre: Option<Tensor>,
    scale: Option<Tensor>,
    shift: Option<Tensor>,
    residual: Option<Tensor>,
    activation: Option<Activation>,
}

impl After {
    fn epilogue(&self) -> Epilogue<'_> {
        Epilogue {
            centre: self.centre.as_ref(),
            scale: self.scale.as_ref(),
            shift: self.shift.as_ref(),
            residual: self.residual.as_ref(),
            activation: self.activation,
        }
    }
}

/// A bias and an activation behind a product.
struct Biased {
    /// What the bias was added to, where an activation's gradient asks for it.
    raw: Option<Tensor>,
    after: After,
}

impl Biased {
    fn apply(
        raw: Tensor,
        bias: Option<Tensor>,
        activation: Option<Activation>,
    ) -> Result<(Tensor, Self)> {
        let after = After {
            shift: bias,
            activation,
            ..After::default()
        };
        let y = after.epilogue().apply(&raw)?;
        let raw = activation.map(|_| raw);
        Ok((y, Self { raw, after }))
    }

    /// The gradient of what the bias was added to.
    fn backward(&self, g: &Tensor) -> Result<Tensor> {
        match &self.raw {
            Some(raw) => self.after.epilogue().backward(g, raw),
            None => Ok(g.clone()),
        }
    }
}

/// `x` `[.., in]` times the transposed weight `[out, in]`.
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let rows = x.reshape(((), x.dim(D::Minus1)?))?;
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    product(&rows, &weight.t()?)?.reshape(shape)
}

/// Hands over the gradients of a weight and a bias, by their places, and gives that of `x` where it is
/// wanted.
fn linear_backward(
    g: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    [weight_place, bias_place]: [Option<usize>; 2],
    wanted: bool,
    sink: &mut Sink,
) -> Result<Option<Tensor>> {
    let rows = g.reshape(((), g.dim(D::Minus1)?))?;
    if let Some(place) = weight_place {
        let inputs = x.reshape(((), x.dim(D::Minus1)?))?;
        sink(place, product(&rows.t()?, &inputs)?.to_dtype(DType::F32)?)?;
    }
    if let Some(place) = bias_place {
        sink(place, sum_to_channels(g)?)?;
    }
    if !wanted {
        return Ok(None);
    }
    Ok(Some(product(&rows, weight)?.reshape(x.dims())?))
}

fn self_attention(
    x: Tensor,
    heads: usize,
    parameters: &[Tensor],
    places: Vec<Option<usize>>,
    wanted: bool,
) -> Result<(Tensor, Backward)> {
    let (n, t, dim) = x.dims3()?;
    let width = dim / heads;
    let factor = 1.0 / (width as f64).sqrt();
    let [in_weight, out_weight] = [parameters[0].clone(), parameters[2].clone()];
    let biased = |x: &Tensor, bias: &Tensor| {
        Epilogue {
            shift: Some(bias),
            ..Epilogue::default()
        }
        .apply(x)
    };
    // [3, N, heads, T, width]
    let qkv = biased(&linear(&x, &in_weight)?, &parameters[1])?
        .reshape((n, t, 3, heads, width))?
        .permute((2, 0, 3, 1, 4))?
        .contiguous()?;
    let [query, key, value] = [qkv.get(0)?, qkv.get(1)?, qkv.get(2)?];
    let weights = softmax(&query.matmul(&key.t()?)?, factor)?;
    let mixed = weights
        .matmul(&value)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((n, t, dim))?;
    let y = biased(&linear(&mixed, &out_weight)?, &parameters[3])?;
    let backward = move |g: &Tensor, sink: &mut Sink| {
        let out_places = [places[2], places[3]];
        let g = linear_backward(g, &mixed, &out_weight, out_places, true, sink)?;
        let Some(g) = g else {
            bail!("a gradient that was asked for is missing");
        };
        let g = g
            .reshape((n, t, heads, width))?
            .transpose(1, 2)?
            .contiguous()?;
        let at_value = weights.t()?.matmul(&g)?;
        let scores = softmax_backward(&g.matmul(&value.t()?)?, &weights, factor)?;
        let at_query = scores.matmul(&key)?;
        let at_key = scores.t()?.matmul(&query)?;
        let g = Tensor::stack(&[at_query, at_key, at_value], 0)?
            .permute((1, 3, 0, 2, 4))?
            .contiguous()?
            .reshape((n, t, 3 * dim))?;
        let in_places = [places[0], places[1]];
        Ok(vec![linear_backward(
            &g, &x, &in_weight, in_places, wanted, sink,
        )?])
    };
    Ok((y, Box::new(backward)))
}
