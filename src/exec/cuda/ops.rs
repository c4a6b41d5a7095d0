//! Operations and their gradients on a device, by the kernels of `kernels.cu` and cuBLAS.
//!
//! Images are `[N, H, W, C]`. Activations and their gradients have the dtype that is computed in;
//! statistics, parameters of norms and gradients of parameters are float32.

use candle_core::{DType, Result, Tensor};

use super::launch::{Work, launch, launch_as};
use crate::graph::{Activation, Conv2d, Padding, Pool2d};
use crate::ranks::Collectives;

/// Bytes that unfolded windows may take at once.
const UNFOLDED: usize = 256 << 20;

/// A tensor for a kernel to fill.
fn empty(shape: &[usize], dtype: DType, like: &Tensor) -> Result<Tensor> {
    // SAFETY: every kernel writes all of its outputs before anything reads them.
    unsafe { Tensor::empty(shape, dtype, like.device()) }
}

/// The number by which `kernels.cu` knows it.
fn kind(activation: Option<Activation>) -> usize {
    match activation {
        None => 0,
        Some(Activation::Relu) => 1,
        Some(Activation::Relu6) => 2,
        Some(Activation::HardSigmoid) => 3,
        Some(Activation::HardSwish) => 4,
        Some(Activation::Gelu) => 5,
    }
}

fn last_dim(x: &Tensor) -> usize {
    x.dims().last().copied().unwrap_or(1)
}

/// How many neighbouring values a thread takes at once.
fn pack(x: &Tensor) -> usize {
    let begins = |x: &Tensor| x.storage_and_layout().1.start_offset();
    if last_dim(x).is_multiple_of(4) && begins(x).is_multiple_of(4) {
        4
    } else {
        1
    }
}

/// What is done to a layer's output in one pass: centred, scaled and shifted by channel, another tensor
/// added, an activation.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// What is subtracted; float32, one for each channel, like the next two.
    pub centre: Option<&'a Tensor>,
    pub scale: Option<&'a Tensor>,
    pub shift: Option<&'a Tensor>,
    pub residual: Option<&'a Tensor>,
    pub activation: Option<Activation>,
}

impl Epilogue<'_> {
    fn is_nothing(&self) -> bool {
        self.centre.is_none()
            && self.scale.is_none()
            && self.shift.is_none()
            && self.residual.is_none()
            && self.activation.is_none()
    }

    fn numbers(&self, x: &Tensor) -> [usize; 4] {
        let pack = match self.residual {
            Some(residual) => pack(x).min(pack(residual)),
            None => pack(x),
        };
        [x.elem_count(), last_dim(x), kind(self.activation), pack]
    }

    /// # Errors
    /// Where the device fails, as everywhere here.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_nothing() {
            return Ok(x.clone());
        }
        let y = empty(x.dims(), x.dtype(), x)?;
        let numbers = self.numbers(x);
        let tensors = [
            Some(x),
            self.centre,
            self.scale,
            self.shift,
            self.residual,
            Some(&y),
        ];
        let work = Work::Values(x.elem_count() / numbers[3]);
        launch("epilogue", x.dtype(), work, &tensors, &numbers, &[])?;
        Ok(y)
    }

    /// The gradient before the activation, which is that of the residual too, from the output's; `x` is
    /// what [`Epilogue::apply`] was given.
    pub fn backward(&self, g: &Tensor, x: &Tensor) -> Result<Tensor> {
        if self.activation.is_none() {
            return Ok(g.clone());
        }
        let dz = empty(x.dims(), x.dtype(), x)?;
        let mut numbers = self.numbers(x);
        numbers[3] = numbers[3].min(pack(g));
        let tensors = [
            Some(g),
            Some(x),
            self.centre,
            self.scale,
            self.shift,
            self.residual,
            Some(&dz),
        ];
        let work = Work::Values(x.elem_count() / numbers[3]);
        launch(
            "epilogue_backward",
            x.dtype(),
            work,
            &tensors,
            &numbers,
            &[],
        )?;
        Ok(dz)
    }
}

/// `a` `[M, K]` times `b` `[K, N]`.
///
/// On the CPU, where the tests run, candle adds up all K in one chain, which loses digits that cuBLAS keeps:
/// there in parts.
pub fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const CHAIN: usize = 256;
    let inner = a.dim(1)?;
    if !a.device().is_cpu() || inner <= CHAIN {
        return a.matmul(b);
    }
    let part = |first: usize| {
        let count = CHAIN.min(inner - first);
        let [a, b] = [a.narrow(1, first, count)?, b.narrow(0, first, count)?];
        a.contiguous()?.matmul(&b.contiguous()?)
    };
    let rest = (CHAIN..inner).step_by(CHAIN);
    rest.map(part).try_fold(part(0)?, |sum, part| sum + part?)
}

/// In how many parts a sum over rows is begun: enough threads for a large device, and enough rows for each.
fn parts(rows: usize, channels: usize) -> usize {
    const THREADS: usize = 1 << 17;
    if rows <= 128 {
        return 1;
    }
    (rows / 32).min(THREADS / channels.max(1)).max(1)
}

/// Sums over the middle of `x` `[B, R, C]` (of its products with `other`), times `factor`: `[B, C]`.
pub fn sum_rows(
    x: &Tensor,
    other: Option<&Tensor>,
    [batches, rows, channels]: [usize; 3],
    factor: f64,
) -> Result<Tensor> {
    let parts = parts(rows, channels);
    let sums = empty(&[batches, parts, channels], DType::F32, x)?;
    let numbers = [batches, rows, channels, parts];
    let last = parts == 1;
    let now = if last { factor as f32 } else { 1.0 };
    let work = Work::Values(sums.elem_count());
    let tensors = [Some(x), other, Some(&sums)];
    launch("sum_rows", x.dtype(), work, &tensors, &numbers, &[now])?;
    if last {
        return sums.reshape((batches, channels));
    }
    sum_rows(&sums, None, [batches, parts, channels], factor)
}

/// The rest of sums over rows that a kernel has begun: `[B, parts, C]` to `[B, C]`.
fn finish(sums: &Tensor) -> Result<Tensor> {
    let (batches, parts, channels) = sums.dims3()?;
    if parts == 1 {
        return sums.reshape((batches, channels));
    }
    sum_rows(sums, None, [batches, parts, channels], 1.0)
}

/// A bias's gradient: the sum over everything but the channels.
pub fn sum_to_channels(g: &Tensor) -> Result<Tensor> {
    let channels = last_dim(g);
    let rows = g.elem_count() / channels;
    sum_rows(g, None, [1, rows, channels], 1.0)?.flatten_all()
}

/// The numbers of a batch norm on the statistics of a batch.
pub struct BatchNorm {
    /// As batch_norm_numbers writes them, `[6, C]`.
    numbers: Tensor,
    /// Pixels of the batch, those of other ranks too.
    rows: usize,
}

impl BatchNorm {
    /// Of `x` `[N, H, W, C]`; `parameters` are weight, bias, running mean and running variance.
    /// With `shared` the batch is what all ranks have.
    pub fn of_batch(
        x: &Tensor,
        parameters: &[Tensor],
        [eps, momentum]: [f64; 2],
        shared: Option<Shared>,
    ) -> Result<Self> {
        let channels = last_dim(x);
        let rows = x.elem_count() / channels;
        let parts = parts(rows, channels);
        let sums = empty(&[2, parts, channels], DType::F32, x)?;
        let work = Work::Values(parts * channels);
        let tensors = [Some(x), Some(&sums)];
        launch(
            "moments",
            x.dtype(),
            work,
            &tensors,
            &[rows, channels, parts],
            &[],
        )?;
        let sums = finish(&sums)?;
        let first = x.flatten_all()?.narrow(0, 0, channels)?;
        let (first, sums, rows) = match shared {
            None => (first, sums, rows),
            Some(shared) => shared.moments(&first.to_dtype(DType::F32)?, &sums, rows)?,
        };
        let numbers = empty(&[6, channels], DType::F32, x)?;
        let [weight, bias, mean, variance] = [0, 1, 2, 3].map(|i| parameters[i].detach());
        let tensors = [
            Some(&first),
            Some(&sums),
            Some(&weight),
            Some(&bias),
            Some(&mean),
            Some(&variance),
            Some(&numbers),
        ];
        let floats = [eps as f32, momentum as f32];
        let work = Work::Values(channels);
        launch(
            "batch_norm_numbers",
            first.dtype(),
            work,
            &tensors,
            &[rows, channels],
            &floats,
        )?;
        Ok(Self { numbers, rows })
    }

    fn row(&self, row: usize) -> Result<Tensor> {
        self.numbers.get(row)
    }

    /// What is subtracted from the input, what it is multiplied with, and what is added then.
    pub fn centre_scale_shift(&self) -> Result<[Tensor; 3]> {
        Ok([self.row(0)?, self.row(2)?, self.row(3)?])
    }

    /// The running mean and variance after this batch.
    pub fn running(&self) -> Result<[Tensor; 2]> {
        Ok([self.row(4)?, self.row(5)?])
    }

    /// Gradients of `x`, weight and bias, where the output's goes through `activation` first.
    pub fn backward(
        &self,
        g: &Tensor,
        x: &Tensor,
        activation: Option<Activation>,
        shared: Option<Shared>,
    ) -> Result<[Tensor; 3]> {
        let channels = last_dim(x);
        let rows = x.elem_count() / channels;
        let parts = parts(rows, channels);
        let sums = empty(&[2, parts, channels], DType::F32, x)?;
        let kind = kind(activation);
        let work = Work::Values(parts * channels);
        let tensors = [Some(g), Some(x), Some(&self.numbers), Some(&sums)];
        let numbers = [rows, channels, parts, kind];
        launch("batch_norm_sums", x.dtype(), work, &tensors, &numbers, &[])?;
        let own = finish(&sums)?;
        // The parameters' gradients are summed over the ranks later, with all others.
        let sums = match shared {
            None => own.clone(),
            Some(shared) if shared.absent => shared.others.sum_now(&own.zeros_like()?)?,
            Some(shared) => shared.others.sum_now(&own)?,
        };
        let dx = empty(x.dims(), x.dtype(), x)?;
        let pack = pack(x).min(pack(g));
        let tensors = [
            Some(g),
            Some(x),
            Some(&self.numbers),
            Some(&sums),
            Some(&dx),
        ];
        let numbers = [x.elem_count(), channels, kind, pack];
        let work = Work::Values(x.elem_count() / pack);
        let floats = [1.0 / self.rows as f32];
        launch(
            "batch_norm_backward",
            x.dtype(),
            work,
            &tensors,
            &numbers,
            &floats,
        )?;
        Ok([dx, own.get(1)?, own.get(0)?])
    }
}

/// Ranks whose batches are one to batch norms.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    pub others: &'a dyn Collectives,
    /// What this rank has does not count.
    pub absent: bool,
}

impl Shared<'_> {
    /// The moments of all ranks' batches from those of this one's: about a common mean, which takes the place
    /// of `first`, and how many rows they are of.
    fn moments(
        &self,
        first: &Tensor,
        sums: &Tensor,
        rows: usize,
    ) -> Result<(Tensor, Tensor, usize)> {
        let counted = if self.absent { 0.0 } else { rows as f64 };
        let mut counts = [counted];
        self.others.sum(&mut counts);
        let [count] = counts;
        let away = (sums.get(0)? / rows as f64)?;
        let variance = ((sums.get(1)? / rows as f64)? - away.sqr()?)?;
        let own_mean = (first + away)?;
        let mean = (self.others.sum_now(&(&own_mean * counted)?)? / count)?;
        let squares = ((variance + (own_mean - &mean)?.sqr()?)? * counted)?;
        let squares = self.others.sum_now(&squares)?;
        let sums = Tensor::stack(&[mean.zeros_like()?, squares], 0)?;
        Ok((mean, sums, count as usize))
    }
}

/// Layer norm over the last axis; also what its gradient needs.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<[Tensor; 2]> {
    let width = last_dim(x);
    let rows = x.elem_count() / width;
    let y = empty(x.dims(), x.dtype(), x)?;
    let numbers = empty(&[2, rows], DType::F32, x)?;
    let tensors = [Some(x), Some(weight), Some(bias), Some(&y), Some(&numbers)];
    let floats = [eps as f32];
    launch(
        "layer_norm",
        x.dtype(),
        Work::Rows(rows),
        &tensors,
        &[rows, width],
        &floats,
    )?;
    Ok([y, numbers])
}

/// Gradients of `x`, weight and bias.
pub fn layer_norm_backward(
    g: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    numbers: &Tensor,
) -> Result<[Tensor; 3]> {
    let width = last_dim(x);
    let rows = x.elem_count() / width;
    let dx = empty(x.dims(), x.dtype(), x)?;
    let tensors = [Some(g), Some(x), Some(weight), Some(numbers), Some(&dx)];
    let work = Work::Rows(rows);
    launch(
        "layer_norm_backward",
        x.dtype(),
        work,
        &tensors,
        &[rows, width],
        &[],
    )?;
    let parts = parts(rows, width);
    let sums = empty(&[2, parts, width], DType::F32, x)?;
    let tensors = [Some(g), Some(x), Some(numbers), Some(&sums)];
    let work = Work::Values(parts * width);
    launch(
        "layer_norm_sums",
        x.dtype(),
        work,
        &tensors,
        &[rows, width, parts],
        &[],
    )?;
    let sums = finish(&sums)?;
    Ok([dx, sums.get(1)?, sums.get(0)?])
}

/// Softmax over the last axis of `x` times `factor`.
pub fn softmax(x: &Tensor, factor: f64) -> Result<Tensor> {
    let width = last_dim(x);
    let rows = x.elem_count() / width;
    let y = empty(x.dims(), x.dtype(), x)?;
    let tensors = [Some(x), Some(&y)];
    let work = Work::Rows(rows);
    launch(
        "softmax",
        x.dtype(),
        work,
        &tensors,
        &[rows, width],
        &[factor as f32],
    )?;
    Ok(y)
}

/// Its gradient, from its output.
pub fn softmax_backward(g: &Tensor, y: &Tensor, factor: f64) -> Result<Tensor> {
    let width = last_dim(y);
    let rows = y.elem_count() / width;
    let dx = empty(y.dims(), y.dtype(), y)?;
    let tensors = [Some(g), Some(y), Some(&dx)];
    let work = Work::Rows(rows);
    launch(
        "softmax_backward",
        y.dtype(),
        work,
        &tensors,
        &[rows, width],
        &[factor as f32],
    )?;
    Ok(dx)
}

/// `x` `[N, H, W, C]` times `s` `[N, 1, 1, C]`.
pub fn scale_channels(x: &Tensor, s: &Tensor) -> Result<Tensor> {
    let y = empty(x.dims(), x.dtype(), x)?;
    let numbers = [x.elem_count(), x.elem_count() / x.dim(0)?, last_dim(x)];
    let work = Work::Values(x.elem_count());
    let tensors = [Some(x), Some(s), Some(&y)];
    launch("scale_channels", x.dtype(), work, &tensors, &numbers, &[])?;
    Ok(y)
}

/// For every image and channel the sum over `x` `[N, H, W, C]` (times `other`) and the factor:
/// `[N, 1, 1, C]`.
pub fn sum_pixels(x: &Tensor, other: Option<&Tensor>, factor: f64) -> Result<Tensor> {
    let (n, h, w, c) = x.dims4()?;
    sum_rows(x, other, [n, h * w, c], factor)?
        .to_dtype(x.dtype())?
        .reshape((n, 1, 1, c))
}

/// `s` `[N, 1, 1, C]` times the factor, at every pixel of an image of shape `[N, H, W, C]`.
pub fn spread(s: &Tensor, shape: &[usize], factor: f64) -> Result<Tensor> {
    let y = empty(shape, s.dtype(), s)?;
    let numbers = [y.elem_count(), y.elem_count() / shape[0], last_dim(s)];
    let work = Work::Values(y.elem_count());
    let tensors = [Some(s), Some(&y)];
    launch(
        "spread",
        s.dtype(),
        work,
        &tensors,
        &numbers,
        &[factor as f32],
    )?;
    Ok(y)
}

/// Windows on an image: what `kernels.cu` calls by that name.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// N, H, W, C.
    pub input: [usize; 4],
    pub output: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Rows above and columns to the left.
    pub padding: [usize; 2],
}

impl Windows {
    fn new(x: &Tensor, kernel: [usize; 2], stride: usize, padding: Padding) -> Result<Self> {
        let (n, h, w, c) = x.dims4()?;
        let (top, bottom) = padding.amounts(h, kernel[0], stride);
        let (left, right) = padding.amounts(w, kernel[1], stride);
        Ok(Self {
            input: [n, h, w, c],
            output: [
                (h + top + bottom - kernel[0]) / stride + 1,
                (w + left + right - kernel[1]) / stride + 1,
            ],
            kernel,
            stride,
            padding: [top, left],
        })
    }

    fn numbers(&self) -> Vec<usize> {
        let [n, h, w, c] = self.input;
        let ([oh, ow], [kh, kw], [top, left]) = (self.output, self.kernel, self.padding);
        vec![n, h, w, c, oh, ow, kh, kw, self.stride, top, left]
    }

    fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    pub fn output_shape(&self, channels: usize) -> [usize; 4] {
        [self.input[0], self.output[0], self.output[1], channels]
    }

    /// Pixels of one image's output.
    fn pixels(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// The same for so many images.
    fn of_images(self, n: usize) -> Self {
        let [_, h, w, c] = self.input;
        Self {
            input: [n, h, w, c],
            ..self
        }
    }
}

/// A convolution ready to run, with its weights as its way of computing takes them.
pub struct Convolution {
    windows: Windows,
    groups: usize,
    outputs: usize,
    way: Way,
    weights: Tensor,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// A matrix product over the pixels. Weights `[K, C]`.
    Pointwise,
    /// The same over unfolded windows. Weights `[K, kh·kw·C]`.
    Unfolded,
    /// By cuDNN. Weights `[K, kh, kw, C / groups]`.
    #[cfg(feature = "cudnn")]
    Cudnn,
    /// By our own kernels. Weights `[kh, kw, C / groups, K]`.
    Grouped,
}

impl Way {
    /// That of a convolution on the device where `x` is.
    #[cfg_attr(not(feature = "cudnn"), expect(unused_variables))]
    fn of(c: &Conv2d, x: &Tensor) -> Self {
        match c.groups {
            1 if c.kernel == [1, 1] && c.stride == 1 => Way::Pointwise,
            #[cfg(feature = "cudnn")]
            _ if x.device().is_cuda() && super::cudnn::takes(c) => Way::Cudnn,
            1 => Way::Unfolded,
            _ => Way::Grouped,
        }
    }
}

impl Convolution {
    /// For input like `x`, with weights as [`Convolution::arrange`] lays them out.
    pub fn new(c: &Conv2d, x: &Tensor, weights: Tensor) -> Result<Self> {
        Ok(Self {
            windows: Windows::new(x, c.kernel, c.stride, c.padding)?,
            groups: c.groups,
            outputs: c.out_channels,
            way: Way::of(c, x),
            weights,
        })
    }

    /// Weights `[K, C / groups, kh, kw]` as this convolution takes them.
    pub fn arrange(c: &Conv2d, weights: &Tensor) -> Result<Tensor> {
        match Way::of(c, weights) {
            Way::Pointwise => weights.reshape((c.out_channels, c.in_channels)),
            #[cfg(feature = "cudnn")]
            Way::Cudnn => weights.permute((0, 2, 3, 1))?.contiguous(),
            Way::Unfolded => weights
                .permute((0, 2, 3, 1))?
                .contiguous()?
                .reshape((c.out_channels, ())),
            Way::Grouped => weights.permute((2, 3, 1, 0))?.contiguous(),
        }
    }

    /// The average over windows, padding counted: each channel's convolution with equal weights.
    pub fn average(pool: Pool2d, x: &Tensor) -> Result<Self> {
        let channels = last_dim(x);
        let kernel = [pool.kernel; 2];
        let share = 1.0 / (pool.kernel * pool.kernel) as f64;
        let shape = (pool.kernel, pool.kernel, 1, channels);
        let weights = (Tensor::ones(shape, x.dtype(), x.device())? * share)?;
        Ok(Self {
            windows: Windows::new(x, kernel, pool.stride, Padding::Symmetric(pool.padding))?,
            groups: channels,
            outputs: channels,
            way: Way::Grouped,
            weights,
        })
    }

    /// Images that are unfolded at once.
    fn images_at_once(&self) -> usize {
        let [n, _, _, channels] = self.windows.input;
        let each = self.windows.pixels() * self.windows.taps() * channels * 4;
        (UNFOLDED / each.max(1)).clamp(1, n.max(1))
    }

    /// The parts of the batch whose windows are unfolded one after the other: first image and count.
    fn batch_parts(&self) -> Vec<(usize, usize)> {
        let (n, most) = (self.windows.input[0], self.images_at_once());
        let firsts = (0..n).step_by(most);
        firsts.map(|first| (first, most.min(n - first))).collect()
    }

    /// The windows on so many images, `[pixels, kh·kw·C]`.
    fn unfold(&self, x: &Tensor, (first, count): (usize, usize)) -> Result<Tensor> {
        let x = x.narrow(0, first, count)?;
        let windows = self.windows.of_images(count);
        let width = windows.taps() * windows.input[3];
        let columns = empty(&[count * windows.pixels(), width], x.dtype(), &x)?;
        let work = Work::Values(columns.elem_count());
        let tensors = [Some(&x), Some(&columns)];
        launch("unfold", x.dtype(), work, &tensors, &windows.numbers(), &[])?;
        Ok(columns)
    }

    /// As rows of pixels.
    fn rows(x: &Tensor) -> Result<Tensor> {
        x.reshape(((), last_dim(x)))
    }

    /// `[N, H, W, C]` to `[N, H', W', K]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let shape = self.windows.output_shape(self.outputs);
        match self.way {
            Way::Pointwise => product(&Self::rows(x)?, &self.weights.t()?)?.reshape(&shape),
            Way::Unfolded => {
                let part = |part| product(&self.unfold(x, part)?, &self.weights.t()?);
                let parts = self.batch_parts().into_iter().map(part);
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?.reshape(&shape)
            }
            #[cfg(feature = "cudnn")]
            Way::Cudnn => {
                let done = super::cudnn::forward(&self.windows, self.groups, x, &self.weights);
                self.or_else(done, |other| other.forward(x))
            }
            Way::Grouped => {
                let y = empty(&shape, x.dtype(), x)?;
                self.grouped("grouped", [x, &self.weights, &y])?;
                Ok(y)
            }
        }
    }

    /// The input's gradient.
    pub fn backward_input(&self, g: &Tensor) -> Result<Tensor> {
        match self.way {
            Way::Pointwise => product(&Self::rows(g)?, &self.weights)?.reshape(&self.windows.input),
            Way::Unfolded => {
                let part = |(first, count)| {
                    let g = Self::rows(&g.narrow(0, first, count)?)?;
                    let columns = product(&g, &self.weights)?;
                    let windows = self.windows.of_images(count);
                    let dx = empty(&windows.input, g.dtype(), &g)?;
                    let work = Work::Values(dx.elem_count());
                    let tensors = [Some(&columns), Some(&dx)];
                    launch("fold", g.dtype(), work, &tensors, &windows.numbers(), &[])?;
                    Ok(dx)
                };
                let parts = self.batch_parts().into_iter().map(part);
                Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
            }
            #[cfg(feature = "cudnn")]
            Way::Cudnn => {
                let done =
                    super::cudnn::backward_input(&self.windows, self.groups, g, &self.weights);
                self.or_else(done, |other| other.backward_input(g))
            }
            Way::Grouped => {
                let dx = empty(&self.windows.input, g.dtype(), g)?;
                self.grouped("grouped_input", [g, &self.weights, &dx])?;
                Ok(dx)
            }
        }
    }

    /// The weights' gradient, float32, `[K, C / groups, kh, kw]`.
    pub fn backward_weights(&self, g: &Tensor, x: &Tensor) -> Result<Tensor> {
        let ([kh, kw], channels) = (self.windows.kernel, self.windows.input[3]);
        let (outputs, inputs) = (self.outputs, channels / self.groups);
        match self.way {
            Way::Pointwise => product(&Self::rows(g)?.t()?, &Self::rows(x)?)?
                .to_dtype(DType::F32)?
                .reshape((outputs, inputs, 1, 1)),
            Way::Unfolded => {
                let mut sum: Option<Tensor> = None;
                for (first, count) in self.batch_parts() {
                    let g = Self::rows(&g.narrow(0, first, count)?)?;
                    let part = product(&g.t()?, &self.unfold(x, (first, count))?)?;
                    let part = part.to_dtype(DType::F32)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + part)?,
                        None => part,
                    });
                }
                let Some(sum) = sum else {
                    candle_core::bail!("a batch of no images");
                };
                sum.reshape((outputs, kh, kw, inputs))?
                    .permute((0, 3, 1, 2))?
                    .contiguous()
            }
            #[cfg(feature = "cudnn")]
            Way::Cudnn => {
                let done = super::cudnn::backward_weights(&self.windows, self.groups, g, x);
                let done = done.and_then(|gradient| {
                    gradient
                        .to_dtype(DType::F32)?
                        .permute((0, 3, 1, 2))?
                        .contiguous()
                });
                self.or_else(done, |other| other.backward_weights(g, x))
            }
            Way::Grouped => {
                let width = kh * kw * inputs * outputs;
                let rows = self.windows.input[0] * self.windows.output[0];
                let parts = parts(rows * 8, width).min(rows).max(1);
                let sums = empty(&[1, parts, width], DType::F32, x)?;
                let mut numbers = self.windows.numbers();
                numbers.push(outputs);
                let floats = [self.groups as f32, parts as f32];
                let work = Work::Values(sums.elem_count());
                let tensors = [Some(g), Some(x), Some(&sums)];
                launch(
                    "grouped_weights",
                    x.dtype(),
                    work,
                    &tensors,
                    &numbers,
                    &floats,
                )?;
                finish(&sums)?
                    .reshape((kh, kw, inputs, outputs))?
                    .permute((3, 2, 0, 1))?
                    .contiguous()
            }
        }
    }

    /// What cuDNN gave, or where it does not support this what our own kernels give.
    #[cfg(feature = "cudnn")]
    fn or_else(
        &self,
        done: Result<Tensor>,
        other: impl FnOnce(&Self) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match done {
            Err(error) if super::cudnn::is_not_supported(&error) => (),
            done => return done,
        }
        let (way, weights) = match self.groups {
            1 => (
                Way::Unfolded,
                self.weights.reshape((self.weights.dim(0)?, ()))?,
            ),
            _ => (
                Way::Grouped,
                self.weights.permute((1, 2, 3, 0))?.contiguous()?,
            ),
        };
        other(&Self {
            windows: self.windows,
            groups: self.groups,
            outputs: self.outputs,
            way,
            weights,
        })
    }

    fn grouped(&self, kernel: &str, [from, weights, to]: [&Tensor; 3]) -> Result<()> {
        let mut numbers = self.windows.numbers();
        numbers.push(self.outputs);
        let tensors = [Some(from), Some(weights), Some(to)];
        let work = Work::Values(to.elem_count());
        let floats = [self.groups as f32];
        launch(kernel, from.dtype(), work, &tensors, &numbers, &floats)
    }
}

/// Max pooling, and where each maximum came from.
pub struct MaxPool {
    windows: Windows,
    taps: Tensor,
}

impl MaxPool {
    /// Of `x` `[N, H, W, C]`; also the pooled image.
    pub fn forward(pool: Pool2d, x: &Tensor) -> Result<(Self, Tensor)> {
        let padding = Padding::Symmetric(pool.padding);
        let windows = Windows::new(x, [pool.kernel; 2], pool.stride, padding)?;
        let shape = windows.output_shape(last_dim(x));
        let y = empty(&shape, x.dtype(), x)?;
        let taps = empty(&shape, DType::U8, x)?;
        let work = Work::Values(y.elem_count());
        let tensors = [Some(x), Some(&y), Some(&taps)];
        launch(
            "max_pool",
            x.dtype(),
            work,
            &tensors,
            &windows.numbers(),
            &[],
        )?;
        Ok((Self { windows, taps }, y))
    }

    /// The input's gradient.
    pub fn backward(&self, g: &Tensor) -> Result<Tensor> {
        let dx = empty(&self.windows.input, g.dtype(), g)?;
        let work = Work::Values(dx.elem_count());
        let tensors = [Some(g), Some(&self.taps), Some(&dx)];
        let numbers = self.windows.numbers();
        launch(
            "max_pool_backward",
            g.dtype(),
            work,
            &tensors,
            &numbers,
            &[],
        )?;
        Ok(dx)
    }
}

/// A step of SGD on one parameter, in place; `velocity` where there is momentum. Numbers are the rate,
/// the momentum, the weight decay, and what the gradient is multiplied with.
pub fn sgd(
    [parameter, gradient]: [&Tensor; 2],
    velocity: Option<&Tensor>,
    nesterov: bool,
    numbers: [f64; 4],
) -> Result<()> {
    let gradient = gradient.contiguous()?;
    let tensors = [Some(parameter), Some(&gradient), velocity];
    let count = parameter.elem_count();
    let numbers = numbers.map(|number| number as f32);
    launch_as(
        "sgd",
        Work::Values(count),
        &tensors,
        &[count, usize::from(nesterov)],
        &numbers,
    )
}

/// A step of AdamW on one parameter and its averages, in place. Numbers are 1 - rate · decay, the step's
/// size, both β, ε, the square root of the second correction, and what the gradient is multiplied with.
pub fn adamw(
    [parameter, gradient, mean, square]: [&Tensor; 4],
    [shrink, size, beta1, beta2, eps, correction, scale]: [f64; 7],
) -> Result<()> {
    let gradient = gradient.contiguous()?;
    let tensors = [Some(parameter), Some(&gradient), Some(mean), Some(square)];
    let count = parameter.elem_count();
    let numbers = [shrink, size, beta1, beta2, eps, correction, scale].map(|number| number as f32);
    launch_as("adamw", Work::Values(count), &tensors, &[count], &numbers)
}
