//! The forward pass in stock candle operations, `[N, C, H, W]`: the reference for every other
//! executor, and the way to CUDA and Metal. Differentiable.
//!
//! Where a candle operation is wrong or cannot be differentiated (grouped convolutions cost a
//! kernel a group, max-pooling's gradient is scaled wrongly and refused for overlapping windows,
//! the fused layer norm and softmax cut the graph), the result is composed from operations that
//! are right. Sums that candle would add up in one long chain are made in parts, so that
//! gradients are as near to float64 as PyTorch's.

use std::collections::BTreeMap;

use candle_core::{D, Result, Tensor, bail};
use candle_nn::ops::softmax;
use candle_nn::var_builder::VarBuilder;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::Variables;
use super::params::fetch;
use crate::graph::{Activation, Conv2d, Graph, NodeId, Op, Padding, Pool2d};
use crate::kernels::resample;

/// Terms that a product on the CPU may add up in one chain.
const CHAIN: usize = 256;

/// A network whose parameters are candle tensors.
pub struct Eager {
    graph: Graph,
    /// Each node's parameters, in the order of [`crate::graph::Node::parameters`].
    parameters: Vec<Vec<Tensor>>,
    /// Nodes that are in evaluation mode always: batch norms on their stored statistics.
    fixed: Vec<bool>,
    /// No convolution is candle's own: all are products of unfolded images.
    composed: bool,
}

/// What distinguishes training from evaluation.
pub enum Mode<'a> {
    /// Batch norm on its running statistics, no dropout.
    Eval,
    Train(&'a mut Training),
}

/// The state of a forward pass in training mode.
pub struct Training {
    /// Draws the dropout masks.
    pub rng: ChaCha8Rng,
    /// Whether dropout is applied.
    pub dropout: bool,
    /// Filled by the forward pass: running means and variances by parameter name, updated with the
    /// batch's.
    pub running: BTreeMap<String, Tensor>,
}

impl Training {
    pub fn new(rng: ChaCha8Rng) -> Self {
        Self {
            rng,
            dropout: true,
            running: BTreeMap::new(),
        }
    }
}

/// What a forward pass shows to its observer.
pub enum Observed<'a> {
    /// A node's output: `[N, C, H, W]`, `[N, T, D]` or `[N, F]`.
    Output(&'a Tensor),
    /// A self-attention node's weights after softmax: `[N, heads, T, T]`, rows sum to 1.
    Attention(&'a Tensor),
}

impl Eager {
    /// Takes the graph's parameters from `vb`, under their own names.
    pub fn new(graph: Graph, vb: &VarBuilder) -> Result<Self> {
        let parameters = graph
            .nodes()
            .iter()
            .map(|node| node.parameters.iter().map(|p| fetch(vb, p)).collect())
            .collect::<Result<Vec<_>>>()?;
        let fixed = vec![false; graph.nodes().len()];
        Ok(Self {
            composed: needs_composing(&parameters),
            graph,
            parameters,
            fixed,
        })
    }

    /// The network over variables that are being trained; batch norms whose statistics are not
    /// among them stay on the stored ones in every mode.
    ///
    /// # Errors
    /// Where `variables` are those of another graph.
    pub fn in_training(graph: Graph, variables: &Variables) -> Result<Self> {
        let tensor = |name: &String| {
            let tensor = variables.tensors().get(name).cloned();
            tensor.ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.clone() })
        };
        let parameters = graph
            .nodes()
            .iter()
            .map(|node| node.parameters.iter().map(|p| tensor(&p.name)).collect())
            .collect::<Result<Vec<_>>>()?;
        let fixed = graph
            .nodes()
            .iter()
            .map(|node| {
                let mut statistics = node.parameters.iter().filter(|p| p.buffer);
                statistics.any(|p| !variables.is_trained(&p.name))
            })
            .collect();
        Ok(Self {
            composed: needs_composing(&parameters),
            graph,
            parameters,
            fixed,
        })
    }

    /// The same without candle's convolutions, as on Metal.
    pub fn composed(self) -> Self {
        Self {
            composed: true,
            ..self
        }
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Logits `[N, classes]` for images `[N, 3, H, W]`, in evaluation mode.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        self.forward_observed(images, Mode::Eval, &mut |_, _| Ok(()))
    }

    /// The forward pass in either mode, with every node's output shown to `observe`.
    pub fn forward_observed(
        &self,
        images: &Tensor,
        mode: Mode,
        observe: &mut dyn FnMut(NodeId, Observed) -> Result<()>,
    ) -> Result<Tensor> {
        self.forward_replaced(images, mode, &mut |id, observed| {
            observe(id, observed).map(|()| None)
        })
    }

    /// The same, where `observe` may put another tensor in the place of a node's output.
    pub fn forward_replaced(
        &self,
        images: &Tensor,
        mut mode: Mode,
        observe: &mut dyn FnMut(NodeId, Observed) -> Result<Option<Tensor>>,
    ) -> Result<Tensor> {
        let mut readers_left = self.graph.reader_counts();
        let mut values: Vec<Option<Tensor>> = vec![None; readers_left.len()];
        for id in self.graph.ids() {
            let inputs: Vec<Tensor> = self
                .graph
                .node(id)
                .inputs
                .iter()
                .map(|i| {
                    values[i.index()]
                        .clone()
                        .expect("inputs come before readers")
                })
                .collect();
            let value = match self.graph.node(id).op {
                Op::Input => images.clone(),
                _ => {
                    let attention = &mut |weights: &Tensor| {
                        observe(id, Observed::Attention(weights)).map(|_| ())
                    };
                    self.evaluate(id, &inputs, images.dims(), &mut mode, attention)?
                }
            };
            let replaced = observe(id, Observed::Output(&value))?;
            values[id.index()] = Some(replaced.unwrap_or(value));
            for input in &self.graph.node(id).inputs {
                readers_left[input.index()] -= 1;
                if readers_left[input.index()] == 0 {
                    values[input.index()] = None;
                }
            }
        }
        let logits = values.pop().flatten();
        logits.ok_or_else(|| candle_core::Error::Msg("the network has no output".into()))
    }

    fn evaluate(
        &self,
        id: NodeId,
        inputs: &[Tensor],
        image_dims: &[usize],
        mode: &mut Mode,
        attention: &mut dyn FnMut(&Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let node = self.graph.node(id);
        let parameters = &self.parameters[id.index()];
        let x = &inputs[0];
        match node.op {
            Op::Input => Ok(x.clone()),
            Op::Conv2d(ref c) => conv2d(c, x, &parameters[0], parameters.get(1), self.composed),
            Op::BatchNorm { eps, momentum, .. } => match mode {
                Mode::Train(training) if !self.fixed[id.index()] => {
                    let (y, running) = train_batch_norm(&node.name, x, parameters, eps, momentum)?;
                    for (parameter, value) in node.parameters[2..].iter().zip(running) {
                        training.running.insert(parameter.name.clone(), value);
                    }
                    Ok(y)
                }
                _ => {
                    let [weight, bias, mean, variance] = four(parameters);
                    normalize(x, weight, bias, &mean.detach(), &variance.detach(), eps)
                }
            },
            Op::Activation(activation) => activate(activation, x),
            Op::Add => x + &inputs[1],
            Op::Multiply => x.broadcast_mul(&inputs[1]),
            Op::Concat => Tensor::cat(inputs, 1),
            Op::Slice { start, length } => x.narrow(1, start, length)?.contiguous(),
            Op::ChannelShuffle { groups } => {
                let (n, c, h, w) = x.dims4()?;
                x.reshape((n, groups, c / groups, h * w))?
                    .transpose(1, 2)?
                    .reshape((n, c, h, w))
            }
            Op::MaxPool(pool) => {
                let x = pad_with(x, pool.padding, f64::from(f32::MIN))?;
                let mut taps = windows(&x, [pool.kernel; 2], pool.stride)?.into_iter();
                let first = taps.next().expect("a window has a pixel");
                // The first of equal values takes the gradient, as in PyTorch; candle's maximum
                // would split it.
                taps.try_fold(first, |max, tap| tap.gt(&max)?.where_cond(&tap, &max))
            }
            Op::AvgPool(Pool2d {
                kernel,
                stride,
                padding,
            }) => {
                let x = pad(x, Padding::Symmetric(padding), [kernel; 2], stride)?;
                let mut taps = windows(&x, [kernel; 2], stride)?.into_iter();
                let first = taps.next().expect("a window has a pixel");
                let sum = taps.try_fold(first, |sum, tap| sum + tap)?;
                sum / (kernel * kernel) as f64
            }
            Op::GlobalAvgPool => x.mean_keepdim((2, 3)),
            Op::Flatten => x.flatten_from(1),
            Op::Dropout { p } => match mode {
                Mode::Train(training) if training.dropout => dropout(x, p, &mut training.rng),
                _ => Ok(x.clone()),
            },
            Op::Linear { .. } => linear(x, &parameters[0], parameters.get(1)),
            Op::Tokens => x.flatten_from(2)?.transpose(1, 2)?.contiguous(),
            Op::ClassToken { dim } => {
                let token = parameters[0].broadcast_as((x.dim(0)?, 1, dim))?;
                Tensor::cat(&[&token, x], 1)
            }
            Op::PositionEmbedding {
                grid,
                prefix,
                patch,
                interpolation,
                ..
            } => {
                let target = [image_dims[2] / patch, image_dims[3] / patch];
                let positions = &parameters[0];
                if target == [grid, grid] {
                    return x.broadcast_add(positions);
                }
                let along = |to: usize| {
                    let weights = resample::position_weights(interpolation, grid, to);
                    Tensor::from_vec(weights, (to, grid), x.device())?.to_dtype(x.dtype())
                };
                let maps = [along(target[0])?, along(target[1])?];
                x.broadcast_add(&on_positions(positions, prefix, [grid; 2], &maps)?)
            }
            Op::LayerNorm { eps, .. } => {
                let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
                let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
                centred
                    .broadcast_div(&(variance + eps)?.sqrt()?)?
                    .broadcast_mul(&for_sequences(&parameters[0], x)?)?
                    .broadcast_add(&for_sequences(&parameters[1], x)?)
            }
            Op::SelfAttention { dim, heads } => {
                let [in_weight, in_bias, out_weight, out_bias] = four(parameters);
                let (n, t, _) = x.dims3()?;
                let width = dim / heads;
                let qkv = linear(x, in_weight, Some(in_bias))?
                    .reshape((n, t, 3, heads, width))?
                    .permute((2, 0, 3, 1, 4))?;
                let part = |i: usize| qkv.get(i)?.contiguous();
                let query = (part(0)? * (1.0 / (width as f64).sqrt()))?;
                let scores = query.matmul(&part(1)?.transpose(2, 3)?.contiguous()?)?;
                let weights = softmax(&scores, D::Minus1)?;
                attention(&weights)?;
                let mixed = weights
                    .matmul(&part(2)?)?
                    .transpose(1, 2)?
                    .reshape((n, t, dim))?;
                linear(&mixed, out_weight, Some(out_bias))
            }
            Op::SelectToken { index } => x.narrow(1, index, 1)?.squeeze(1)?.contiguous(),
        }
    }
}

/// Positions `[1, prefix + h·w, D]` on another grid, by what its rows and its columns are made of:
/// `[to, h]` and `[to, w]`.
pub(super) fn on_positions(
    positions: &Tensor,
    prefix: usize,
    [h, w]: [usize; 2],
    [rows, columns]: &[Tensor; 2],
) -> Result<Tensor> {
    let dim = positions.dim(2)?;
    let head = positions.narrow(1, 0, prefix)?;
    let body = positions.narrow(1, prefix, h * w)?.contiguous()?;
    let tall = rows.dim(0)?;
    let body = rows.matmul(&body.reshape((h, w * dim))?)?;
    let body = body.reshape((tall, w, dim))?;
    let body = columns
        .broadcast_left(tall)?
        .contiguous()?
        .matmul(&body)?
        .reshape((1, (), dim))?;
    Tensor::cat(&[&head, &body], 1)
}

/// Random zeros at the rate `p`, drawn in the order of the elements; the rest is scaled up.
pub(super) fn dropout(x: &Tensor, p: f64, rng: &mut ChaCha8Rng) -> Result<Tensor> {
    if p <= 0.0 {
        return Ok(x.clone());
    }
    let keep = 1.0 - p;
    let scale = |_| {
        let kept = rng.random::<f64>() < keep;
        if kept { (1.0 / keep) as f32 } else { 0.0 }
    };
    let mask: Vec<f32> = (0..x.elem_count()).map(scale).collect();
    x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?
}

fn four(parameters: &[Tensor]) -> [&Tensor; 4] {
    [
        &parameters[0],
        &parameters[1],
        &parameters[2],
        &parameters[3],
    ]
}

/// A vector over the channels, shaped to broadcast over `x` `[N, C, H, W]`: `[N, C, 1, 1]`.
///
/// What is broadcast at once is summed at once on the way back, and candle adds up all images' pixels in one
/// long chain, which loses digits; so each image's are summed first, then the images.
fn per_channel(vector: &Tensor, x: &Tensor) -> Result<Tensor> {
    vector
        .reshape((1, (), 1, 1))?
        .broadcast_as((x.dim(0)?, x.dim(1)?, 1, 1))
}

/// A vector over the features, shaped to broadcast over `x` `[N, T, D]`, for the same reason `[N, 1, D]`.
fn for_sequences(vector: &Tensor, x: &Tensor) -> Result<Tensor> {
    match *x.dims() {
        [n, _, d] => vector.reshape((1, 1, ()))?.broadcast_as((n, 1, d)),
        _ => Ok(vector.clone()),
    }
}

fn normalize(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    mean: &Tensor,
    variance: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let scale = (weight / (variance + eps)?.sqrt()?)?;
    let shift = (bias - (mean * &scale)?)?;
    x.broadcast_mul(&per_channel(&scale, x)?)?
        .broadcast_add(&per_channel(&shift, x)?)
}

/// What is wrong with a batch of one value a channel.
pub(super) fn too_few_for_variance(layer: &str) -> String {
    format!(
        "layer {layer}: one value a channel has no variance to train on (use a larger batch or larger images)"
    )
}

/// Batch norm on the batch's statistics; also the updated running mean and (unbiased) variance.
fn train_batch_norm(
    name: &str,
    x: &Tensor,
    parameters: &[Tensor],
    eps: f64,
    momentum: f64,
) -> Result<(Tensor, [Tensor; 2])> {
    let [weight, bias, running_mean, running_variance] = four(parameters);
    let (n, _, h, w) = x.dims4()?;
    let count = n * h * w;
    if count < 2 {
        bail!("{}", too_few_for_variance(name));
    }
    // Along one axis after the other: sums of few values at a time lose fewer digits.
    let mean_of = |x: &Tensor| x.mean_keepdim(3)?.mean_keepdim(2)?.mean_keepdim(0);
    let mean = mean_of(x)?;
    let centred = x.broadcast_sub(&per_channel(&mean, x)?)?;
    let variance = mean_of(&centred.sqr()?)?;
    let scale = (weight.reshape((1, (), 1, 1))? / (&variance + eps)?.sqrt()?)?;
    let y = centred
        .broadcast_mul(&per_channel(&scale, x)?)?
        .broadcast_add(&per_channel(bias, x)?)?;
    let unbiased = (variance.detach().flatten_all()? * (count as f64 / (count - 1) as f64))?;
    let blend = |old: &Tensor, new: &Tensor| (old.detach() * (1.0 - momentum))? + (new * momentum)?;
    let running = [
        blend(running_mean, &mean.detach().flatten_all()?)?,
        blend(running_variance, &unbiased)?,
    ];
    Ok((y, running))
}

fn activate(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Relu => x.relu(),
        Activation::Relu6 => clip(x),
        Activation::HardSigmoid => clip(&(x + 3.0)?)? / 6.0,
        Activation::HardSwish => x * (clip(&(x + 3.0)?)? / 6.0)?,
        // candle's own GELU has a gradient of six digits.
        Activation::Gelu => x * (x / std::f64::consts::SQRT_2)?.erf()?.affine(0.5, 0.5)?,
    }
}

/// min(max(x, 0), 6), without gradient at the ends and beyond, as in PyTorch; candle's clamp lets
/// half of it pass at the ends.
fn clip(x: &Tensor) -> Result<Tensor> {
    let clipped = x.detach().clamp(0.0, 6.0)?;
    // Where the value is that of the input and neither end, the input itself.
    let inside = (x.gt(0.0)? * x.lt(6.0)?)?;
    inside.where_cond(x, &clipped)
}

/// `x` `[.., in]` times the transposed weight `[out, in]`.
fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    let rows = x.reshape(((), x.dim(D::Minus1)?))?;
    if let Some(last) = dims.last_mut() {
        *last = weight.dim(0)?;
    }
    let y = in_parts(&rows, &weight.t()?, CHAIN)?.reshape(dims)?;
    match bias {
        Some(bias) => y.broadcast_add(&for_sequences(bias, &y)?),
        None => Ok(y),
    }
}

/// `a` `[.., R, K]` times `b` `[.., K, C]`, in parts along all three: each is what is summed over in the
/// product itself or in one of its gradients, and candle's sums on the CPU are long chains. `chain` terms are
/// added up at once.
fn in_parts(a: &Tensor, b: &Tensor, chain: usize) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return a.matmul(b);
    }
    let along = |tensor: &Tensor, dim: usize| -> Result<Vec<Tensor>> {
        tensor.chunk(tensor.dim(dim)?.div_ceil(chain).max(1), dim)
    };
    let rank = a.rank();
    let (rows, columns) = (rank - 2, rank - 1);
    let product = |a: &Tensor, b: &Tensor| match rank {
        2 => a.matmul(b),
        // A batch of parts has to lie together.
        _ => a.contiguous()?.matmul(&b.contiguous()?),
    };
    let factors = along(b, columns)?
        .iter()
        .map(|outputs| along(outputs, rows))
        .collect::<Result<Vec<_>>>()?;
    let line = |a: &Tensor| {
        let inputs = along(a, columns)?;
        let block = |factors: &Vec<Tensor>| {
            let mut products = inputs.iter().zip(factors).map(|(a, b)| product(a, b));
            let first = products.next().expect("a layer has inputs")?;
            products.try_fold(first, |sum, part| sum + part?)
        };
        Tensor::cat(
            &factors.iter().map(block).collect::<Result<Vec<_>>>()?,
            columns,
        )
    };
    let lines = along(a, rows)?;
    Tensor::cat(&lines.iter().map(line).collect::<Result<Vec<_>>>()?, rows)
}

/// Whether convolutions have to be composed: on Metal candle reads a kernel that is not contiguous wrongly,
/// and its way back makes such kernels.
fn needs_composing(parameters: &[Vec<Tensor>]) -> bool {
    let mut tensors = parameters.iter().flatten();
    tensors.next().is_some_and(|t| t.device().is_metal())
}

fn conv2d(
    c: &Conv2d,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    composed: bool,
) -> Result<Tensor> {
    let y = if c.groups == 1 && !composed {
        match c.padding {
            Padding::Symmetric(p) if c.stride == 1 => x.conv2d(weight, p, 1, 1, 1)?,
            // Padded by hand, to just what the windows reach: candle's backward pass takes the
            // rest of a division by the stride to be the same for rows and columns.
            _ => {
                let padded = pad(x, c.padding, c.kernel, c.stride)?;
                let (_, _, h, w) = padded.dims4()?;
                let reach = |size: usize, k: usize| (size - k) / c.stride * c.stride + k;
                padded
                    .narrow(2, 0, reach(h, c.kernel[0]))?
                    .narrow(3, 0, reach(w, c.kernel[1]))?
                    .contiguous()?
                    .conv2d(weight, 0, c.stride, 1, 1)?
            }
        }
    } else if c.is_depthwise() {
        depthwise(c, x, weight)?
    } else {
        grouped(c, x, weight)?
    };
    match bias {
        Some(bias) => y.broadcast_add(&per_channel(bias, &y)?),
        None => Ok(y),
    }
}

/// Sum over the kernel's taps of the shifted image times that tap's weight for each channel.
fn depthwise(c: &Conv2d, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let taps = windows(&pad(x, c.padding, c.kernel, c.stride)?, c.kernel, c.stride)?;
    let weight = weight.reshape((c.out_channels, taps.len()))?;
    let mut sum: Option<Tensor> = None;
    for (index, tap) in taps.iter().enumerate() {
        let scale = per_channel(&weight.narrow(1, index, 1)?.contiguous()?, tap)?;
        let product = tap.broadcast_mul(&scale)?;
        sum = Some(match sum {
            Some(sum) => (sum + product)?,
            None => product,
        });
    }
    sum.ok_or_else(|| candle_core::Error::Msg("a kernel without taps".into()))
}

/// One batched matrix product over images and groups, on the unfolded image.
fn grouped(c: &Conv2d, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let taps = windows(&pad(x, c.padding, c.kernel, c.stride)?, c.kernel, c.stride)?;
    let (n, _, h, w) = taps[0].dims4()?;
    let (inputs, outputs) = (c.in_channels / c.groups, c.out_channels / c.groups);
    let columns = taps
        .iter()
        .map(|tap| tap.contiguous()?.reshape((n, c.groups, inputs, h * w)))
        .collect::<Result<Vec<_>>>()?;
    let columns = Tensor::stack(&columns, 3)?;
    let columns = columns.reshape((n, c.groups, inputs * taps.len(), h * w))?;
    let weight = weight
        .reshape((1, c.groups, outputs, inputs * taps.len()))?
        .broadcast_as((n, c.groups, outputs, inputs * taps.len()))?
        .contiguous()?;
    // The sums of few channels are short.
    let y = match c.groups {
        1 => in_parts(&weight, &columns, CHAIN / 2)?,
        _ => weight.matmul(&columns)?,
    };
    y.reshape((n, c.out_channels, h, w))
}

/// Zeros around an image `[N, C, H, W]`.
fn pad(x: &Tensor, padding: Padding, kernel: [usize; 2], stride: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let (top, bottom) = padding.amounts(h, kernel[0], stride);
    let (left, right) = padding.amounts(w, kernel[1], stride);
    x.pad_with_zeros(2, top, bottom)?
        .pad_with_zeros(3, left, right)
}

/// `amount` rows and columns of `value` on every side of an image `[N, C, H, W]`.
fn pad_with(x: &Tensor, amount: usize, value: f64) -> Result<Tensor> {
    if amount == 0 {
        return Ok(x.clone());
    }
    let (n, c, h, w) = x.dims4()?;
    let filled = |h, w| Tensor::full(value as f32, (n, c, h, w), x.device())?.to_dtype(x.dtype());
    let side = filled(h, amount)?;
    let edge = filled(amount, w + 2 * amount)?;
    let wide = Tensor::cat(&[&side, x, &side], 3)?;
    Tensor::cat(&[&edge, &wide, &edge], 2)
}

/// The image as each tap of the kernel sees it: kh·kw tensors `[N, C, H', W']`, row by row.
fn windows(x: &Tensor, [kh, kw]: [usize; 2], stride: usize) -> Result<Vec<Tensor>> {
    let (n, c, h, w) = x.dims4()?;
    let out_h = (h - kh) / stride + 1;
    let out_w = (w - kw) / stride + 1;
    let taps = (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx)));
    if stride == 1 {
        return taps
            .map(|(ky, kx)| x.narrow(2, ky, out_h)?.narrow(3, kx, out_w))
            .collect();
    }
    // candle has no strided slice: split rows and columns into phases, then slice a phase.
    let (tall, wide) = (h.div_ceil(stride), w.div_ceil(stride));
    let phases = x
        .pad_with_zeros(2, 0, tall * stride - h)?
        .pad_with_zeros(3, 0, wide * stride - w)?
        .contiguous()?
        .reshape(&[n, c, tall, stride, wide, stride][..])?;
    taps.map(|(ky, kx)| {
        phases
            .narrow(3, ky % stride, 1)?
            .narrow(5, kx % stride, 1)?
            .squeeze(5)?
            .squeeze(3)?
            .narrow(2, ky / stride, out_h)?
            .narrow(3, kx / stride, out_w)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use rand::SeedableRng;

    use super::*;
    use crate::exec::params::Params;
    use crate::graph::{Builder, InitScheme, Norm};

    /// A network that is one operation on the image.
    fn single(add: impl FnOnce(&mut Builder, NodeId)) -> Eager {
        let mut b = Builder::new(InitScheme::FanIn);
        let input = b.input();
        add(&mut b, input);
        let vb = Params::new(None, 0).var_builder(&Device::Cpu);
        Eager::new(b.finish(), &vb).unwrap()
    }

    fn train(network: &Eager, x: &Tensor, seed: u64) -> Result<Tensor> {
        let mut training = Training::new(ChaCha8Rng::seed_from_u64(seed));
        network.forward_observed(x, Mode::Train(&mut training), &mut |_, _| Ok(()))
    }

    #[test]
    fn dropout_follows_its_seed_keeps_the_mean_and_rests_in_evaluation() -> Result<()> {
        let network = single(|b, x| {
            b.add("dropout", Op::Dropout { p: 0.3 }, &[x]);
        });
        let x = Tensor::ones((2, 3, 80, 80), candle_core::DType::F32, &Device::Cpu)?;
        let values = |y: Tensor| y.flatten_all()?.to_vec1::<f32>();
        let first = values(train(&network, &x, 1)?)?;
        assert_eq!(first, values(train(&network, &x, 1)?)?);
        assert_ne!(first, values(train(&network, &x, 2)?)?);
        let dropped = first.iter().filter(|&&v| v == 0.0).count() as f64 / first.len() as f64;
        assert!((dropped - 0.3).abs() < 0.01, "{dropped}");
        let kept = 1.0 / 0.7;
        assert!(first.iter().all(|&v| v == 0.0 || (v - kept).abs() < 1e-6));
        assert!(values(network.forward(&x)?)?.iter().all(|&v| v == 1.0));
        Ok(())
    }

    #[test]
    fn one_value_a_channel_cannot_be_trained_on() -> Result<()> {
        let network = single(|b, x| {
            let conv = Conv2d::new(3, 4, 3).stride(2);
            b.conv_norm("stem.0", "stem.1", conv, Norm::PYTORCH, x);
        });
        let image = |count, side| {
            Tensor::ones(
                (count, 3, side, side),
                candle_core::DType::F32,
                &Device::Cpu,
            )
        };
        let error = train(&network, &image(1, 2)?, 0).unwrap_err().to_string();
        assert!(
            error.contains("layer stem.1") && error.contains("larger batch"),
            "{error}"
        );
        // Two images, or two pixels, are enough, and so is evaluation.
        for (count, side) in [(2, 2), (1, 4)] {
            let values = train(&network, &image(count, side)?, 0)?.flatten_all()?;
            assert!(values.to_vec1::<f32>()?.iter().all(|v| v.is_finite()));
        }
        network.forward(&image(1, 2)?)?;
        Ok(())
    }

    #[test]
    fn gradients_reach_every_trained_parameter() -> Result<()> {
        let mut b = Builder::new(InitScheme::FanIn);
        let image = b.input();
        let x = b.conv_norm("a.0", "a.1", Conv2d::new(3, 8, 3), Norm::PYTORCH, image);
        let pool = Pool2d {
            kernel: 3,
            stride: 2,
            padding: 1,
        };
        let x = b.add("pool", Op::MaxPool(pool), &[x]);
        let x = b.conv("grouped", Conv2d::new(8, 8, 3).groups(2).bias(), x);
        let x = b.conv("depthwise", Conv2d::new(8, 8, 3).groups(8).stride(2), x);
        let x = b.add("tokens", Op::Tokens, &[x]);
        let x = b.add("norm", Op::LayerNorm { dim: 8, eps: 1e-6 }, &[x]);
        let x = b.add("attention", Op::SelfAttention { dim: 8, heads: 2 }, &[x]);
        let x = b.add("first", Op::SelectToken { index: 0 }, &[x]);
        b.linear("head", 8, 3, x);
        let params = Params::trainable(None, 1);
        let network = Eager::new(b.finish(), &params.var_builder(&Device::Cpu))?;
        let images = Tensor::randn(0f32, 1.0, (2, 3, 12, 10), &Device::Cpu)?;
        let gradients = train(&network, &images, 0)?.sqr()?.sum_all()?.backward()?;
        let trained = network.graph().parameters().filter(|p| !p.buffer);
        let variables = params.variables();
        for parameter in trained {
            let gradient = gradients.get(&variables[&parameter.name]);
            let gradient = gradient.unwrap_or_else(|| panic!("{} has none", parameter.name));
            let norm = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
            // What softmax and batch norm take no notice of has a gradient of zero.
            assert!(norm.is_finite(), "{}: {norm}", parameter.name);
        }
        Ok(())
    }
}
