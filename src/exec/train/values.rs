//! The values of a training step: where they lie, and how steps read and write them.

use crate::exec::cpu::Pool;
use crate::graph::Activation;
use crate::kernels::rowwise::{self, Affine, NormGradient};
use crate::kernels::{Border, Dims, Isa, Layout};

/// Index of a value: a batch of images without borders, or scratch memory.
pub(super) type ValueId = usize;
/// Index of a batch norm.
pub(super) type NormId = usize;
/// Index of one of the graph's parameters and buffers, in graph order.
pub(super) type ParameterId = usize;

/// Some channels of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub value: ValueId,
    pub start: usize,
    pub channels: usize,
    /// Of the whole value.
    pub stride: usize,
}

impl View {
    pub fn whole(value: ValueId, channels: usize) -> Self {
        Self {
            value,
            start: 0,
            channels,
            stride: channels,
        }
    }

    pub fn is_whole(&self) -> bool {
        self.channels == self.stride
    }
}

/// What a step reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Feed {
    /// Values as they lie there.
    Plain(View),
    /// `activation(norm(value))`, computed by who reads it and kept nowhere.
    Lazy {
        value: ValueId,
        channels: usize,
        norm: Option<NormId>,
        activation: Option<Activation>,
    },
}

impl Feed {
    pub fn value(&self) -> ValueId {
        match *self {
            Feed::Plain(view) => view.value,
            Feed::Lazy { value, .. } => value,
        }
    }

    pub fn channels(&self) -> usize {
        match *self {
            Feed::Plain(view) => view.channels,
            Feed::Lazy { channels, .. } => channels,
        }
    }
}

/// Where a step puts the gradient for what it read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Destination {
    /// The gradient of a value's channels, written or added.
    Plain { view: View, add: bool },
    /// The gradient before the activation of a lazy feed, and the sums that its norm needs.
    Masked {
        buffer: ValueId,
        value: ValueId,
        channels: usize,
        norm: Option<NormId>,
        activation: Option<Activation>,
    },
}

/// A batch norm in training.
pub(super) struct Norm {
    pub name: String,
    pub channels: usize,
    pub eps: f64,
    pub momentum: f64,
    /// Weight, bias, running mean, running variance.
    pub parameters: [ParameterId; 4],
    /// Normalises with the batch's statistics, not the stored ones.
    pub batch: bool,
    /// Values of a channel in a batch, and in all processes' parts of it together.
    pub count: usize,
    pub total: f64,
    /// Pixels behind each pair of partial moments.
    pub moment_counts: Vec<usize>,
    /// `[blocks, 2, C]`: mean, and sum of squared distances from it.
    pub moments: Vec<f32>,
    /// `[blocks, 2, C]`: Σ g, Σ g · (z - mean).
    pub sums: Vec<f32>,
    pub weight: Vec<f32>,
    pub mean: Vec<f32>,
    pub inverse_deviation: Vec<f64>,
    /// u = z · scale + shift.
    pub scale: Vec<f32>,
    pub shift: Vec<f32>,
    /// dz = a · g + b · (z - mean) + c.
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
}

impl Norm {
    pub fn affine(&self) -> Affine<'_> {
        Affine {
            scale: &self.scale,
            shift: &self.shift,
        }
    }

    /// Mean and variance over the batch from the blocks' moments, joined in their order (Chan,
    /// Golub & LeVeque 1979).
    pub fn join_moments(&self) -> (Vec<f64>, Vec<f64>) {
        let c = self.channels;
        let mut mean = vec![0.0; c];
        let mut squares = vec![0.0; c];
        let mut seen = 0.0;
        for (block, &count) in self.moments.chunks_exact(2 * c).zip(&self.moment_counts) {
            let (means, block_squares) = block.split_at(c);
            let count = count as f64;
            let total = seen + count;
            for i in 0..c {
                let distance = f64::from(means[i]) - mean[i];
                mean[i] += distance * (count / total);
                squares[i] +=
                    f64::from(block_squares[i]) + distance * distance * (seen * count / total);
            }
            seen = total;
        }
        squares.iter_mut().for_each(|s| *s /= seen);
        (mean, squares)
    }

    /// Σ g and Σ g · (z - mean) over the batch.
    pub fn join_sums(&self) -> (Vec<f64>, Vec<f64>) {
        let c = self.channels;
        let mut sums = vec![0.0; 2 * c];
        for block in self.sums.chunks_exact(2 * c) {
            let pairs = sums.iter_mut().zip(block);
            pairs.for_each(|(sum, &part)| *sum += f64::from(part));
        }
        let products = sums.split_off(c);
        (sums, products)
    }
}

/// Everything that a step works on. Copies share the memory.
#[derive(Clone, Copy)]
pub(super) struct Memory<'a> {
    pub isa: Isa,
    pub pool: &'a Pool,
    /// Images in the batch.
    pub count: usize,
    pub base: *mut f32,
    /// By value: offset and length.
    pub places: &'a [(usize, usize)],
    pub norms: *mut Norm,
}

// SAFETY: addresses; steps keep to the contract below.
unsafe impl Send for Memory<'_> {}
unsafe impl Sync for Memory<'_> {}

/// Contract of all that follows: within a step, what a task writes is its own, and what tasks read
/// is written by no task of the step. The plan's arena keeps values apart that are alive together.
impl Memory<'_> {
    pub fn values(&self, value: ValueId) -> &[f32] {
        let (offset, len) = self.places[value];
        // SAFETY: inside the arena, by the contract.
        unsafe { std::slice::from_raw_parts(self.base.add(offset), len) }
    }

    pub fn pointer(&self, value: ValueId) -> *mut f32 {
        // SAFETY: inside the arena.
        unsafe { self.base.add(self.places[value].0) }
    }

    /// # Safety
    /// The range is the task's own.
    #[allow(clippy::mut_from_ref)] // the contract makes the range the caller's own
    pub unsafe fn part(&self, value: ValueId, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.places[value].1);
        // SAFETY: inside the value, and the task's own as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(value).add(start), len) }
    }

    pub fn norm(&self, norm: NormId) -> &Norm {
        // SAFETY: norms are changed between steps, or in the one task of a step.
        unsafe { &*self.norms.add(norm) }
    }

    /// # Safety
    /// The block's partial sums are the task's own.
    #[allow(clippy::mut_from_ref)] // as `part`
    pub unsafe fn partial<'b>(
        &self,
        partials: &'b [f32],
        block: usize,
        len: usize,
    ) -> &'b mut [f32] {
        assert!((block + 1) * len <= partials.len());
        // SAFETY: inside the vector, and the task's own as the caller promises.
        unsafe {
            let start = partials.as_ptr().cast_mut().add(block * len);
            std::slice::from_raw_parts_mut(start, len)
        }
    }

    fn affine(&self, norm: Option<NormId>) -> Affine<'_> {
        match norm {
            Some(norm) => self.norm(norm).affine(),
            None => Affine {
                scale: &[],
                shift: &[],
            },
        }
    }

    /// Pixels `start..start + pixels` (counted through all images) of a feed, to `out`.
    pub fn read(&self, feed: &Feed, start: usize, pixels: usize, out: &mut [f32]) {
        match *feed {
            Feed::Plain(view) => {
                let values =
                    &self.values(view.value)[start * view.stride..][..pixels * view.stride];
                if view.is_whole() {
                    out.copy_from_slice(values);
                    return;
                }
                let rows = values.chunks_exact(view.stride);
                for (out, row) in out.chunks_exact_mut(view.channels).zip(rows) {
                    out.copy_from_slice(&row[view.start..][..view.channels]);
                }
            }
            Feed::Lazy {
                value,
                channels,
                norm,
                activation,
            } => {
                let z = &self.values(value)[start * channels..][..pixels * channels];
                rowwise::apply(self.isa, z, self.affine(norm), activation, out);
            }
        }
    }

    /// The same, added to `out`, and the activation of the sum.
    pub fn add(
        &self,
        feed: &Feed,
        start: usize,
        pixels: usize,
        activation: Option<Activation>,
        out: &mut [f32],
    ) {
        let (value, stride, norm) = match *feed {
            Feed::Plain(view) => {
                assert!(view.is_whole(), "sums are of whole values");
                (view.value, view.stride, None)
            }
            Feed::Lazy {
                value,
                channels,
                norm,
                activation,
            } => {
                assert_eq!(activation, None, "sums are of values before an activation");
                (value, channels, norm)
            }
        };
        let z = &self.values(value)[start * stride..][..pixels * stride];
        rowwise::apply_to_sum(self.isa, z, self.affine(norm), activation, out);
    }

    /// Hands the gradient of pixels `start..` of a feed to its destination; `block` numbers the
    /// partial sums of the norm behind it.
    ///
    /// # Safety
    /// The pixels and the block are the task's own.
    pub unsafe fn deliver(
        &self,
        destination: &Destination,
        start: usize,
        gradient: &[f32],
        block: usize,
    ) {
        match *destination {
            Destination::Plain { view, add } => {
                let pixels = gradient.len() / view.channels;
                // SAFETY: the pixels are the task's own; other channels of them may be another
                // step's, never another task's.
                let out =
                    unsafe { self.part(view.value, start * view.stride, pixels * view.stride) };
                if view.is_whole() {
                    if add {
                        rowwise::accumulate(self.isa, gradient, out);
                    } else {
                        out.copy_from_slice(gradient);
                    }
                    return;
                }
                let rows = gradient.chunks_exact(view.channels);
                for (out, row) in out.chunks_exact_mut(view.stride).zip(rows) {
                    let out = &mut out[view.start..][..view.channels];
                    if add {
                        out.iter_mut().zip(row).for_each(|(out, g)| *out += g);
                    } else {
                        out.copy_from_slice(row);
                    }
                }
            }
            Destination::Masked {
                buffer,
                value,
                channels,
                norm,
                activation,
            } => {
                let at = start * channels;
                let z = &self.values(value)[at..][..gradient.len()];
                // SAFETY: the pixels are the task's own.
                let g = unsafe { self.part(buffer, at, gradient.len()) };
                // SAFETY: the block is the task's own.
                match unsafe { norm.and_then(|norm| self.norm_sums(norm, block)) } {
                    Some((sums, mean)) => {
                        let affine = self.affine(norm);
                        rowwise::mask_and_sum(
                            self.isa, gradient, z, affine, activation, g, mean, sums,
                        );
                    }
                    None => {
                        g.copy_from_slice(gradient);
                        if activation.is_some() {
                            rowwise::mask(self.isa, z, self.affine(norm), activation, g);
                        }
                    }
                }
            }
        }
    }

    /// `g` times the derivative of a lazy feed's activation, for pixels from `start` on.
    pub fn mask(&self, feed: &Feed, start: usize, g: &mut [f32]) {
        let Feed::Lazy {
            value,
            channels,
            norm,
            activation,
        } = *feed
        else {
            return;
        };
        let z = &self.values(value)[start * channels..][..g.len()];
        rowwise::mask(self.isa, z, self.affine(norm), activation, g);
    }

    /// Adds a block's gradient to the sums of a norm, where it wants them.
    ///
    /// # Safety
    /// The block is the task's own.
    pub unsafe fn sum_gradient(&self, norm: NormId, g: &[f32], z: &[f32], block: usize) {
        // SAFETY: as the caller promises.
        if let Some((sums, mean)) = unsafe { self.norm_sums(norm, block) } {
            rowwise::gradient_sums(self.isa, g, z, mean, sums);
        }
    }

    /// A block's partial sums for the gradient of a norm, zeros yet, where it wants them; and the norm's mean.
    ///
    /// # Safety
    /// The block is the task's own.
    #[allow(clippy::mut_from_ref)] // the contract makes the sums the caller's own
    unsafe fn norm_sums(&self, norm: NormId, block: usize) -> Option<([&mut [f32]; 2], &[f32])> {
        let norm = self.norm(norm);
        if norm.sums.is_empty() {
            return None;
        }
        // SAFETY: as the caller promises.
        let partial = unsafe { self.partial(&norm.sums, block, 2 * norm.channels) };
        partial.fill(0.0);
        let (sum, products) = partial.split_at_mut(norm.channels);
        Some(([sum, products], &norm.mean))
    }

    /// The gradient at a convolution's output, from the gradient behind its norm.
    pub fn read_gradient(
        &self,
        from: &OutputGradient,
        start: usize,
        pixels: usize,
        out: &mut [f32],
    ) {
        let at = start * from.channels;
        let len = pixels * from.channels;
        let g = &self.values(from.gradient)[at..][..len];
        match from.norm {
            None => {
                out.copy_from_slice(g);
                if let Some(activation) = from.activation {
                    let y = &self.values(from.value)[at..][..len];
                    rowwise::mask_by_output(self.isa, y, activation, out);
                }
            }
            Some(norm) => {
                let Norm { a, b, c, mean, .. } = self.norm(norm);
                let z = &self.values(from.value)[at..][..len];
                rowwise::norm_gradient(self.isa, g, z, NormGradient { a, b, c, mean }, out);
            }
        }
    }
}

/// The gradient at a convolution's output: that behind its norm, where it has one, and what turns
/// the one into the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutputGradient {
    pub gradient: ValueId,
    pub value: ValueId,
    pub channels: usize,
    pub norm: Option<NormId>,
    /// What the output went through where it lies.
    pub activation: Option<Activation>,
}

impl OutputGradient {
    /// Whether it is the gradient as it lies there.
    pub fn is_plain(&self) -> bool {
        self.norm.is_none() && self.activation.is_none()
    }
}

/// Rows of an image with columns of zeros left and right of them: what a window reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strip {
    pub rows: usize,
    pub left: usize,
    pub right: usize,
    pub dims: Dims,
}

impl Strip {
    pub fn layout(&self) -> Layout {
        Layout {
            dims: Dims {
                h: self.rows,
                ..self.dims
            },
            border: Border {
                left: self.left,
                right: self.right,
                ..Border::default()
            },
        }
    }
}

impl Strip {
    /// Values of one image's strip.
    pub fn len(&self) -> usize {
        self.layout().len()
    }

    /// Fills the strip with rows from `first` on of an image with `height` rows; `read` gives
    /// pixels `start..start + pixels` of the image. Rows outside of the image are zeros.
    pub fn fill(
        &self,
        first: isize,
        height: usize,
        out: &mut [f32],
        read: impl Fn(usize, usize, &mut [f32]),
    ) {
        let Dims { w, c, .. } = self.dims;
        let stride = self.layout().row_stride();
        for (index, row) in out.chunks_exact_mut(stride).enumerate() {
            let Some(y) = first
                .checked_add_unsigned(index)
                .and_then(|y| usize::try_from(y).ok())
                .filter(|&y| y < height)
            else {
                row.fill(0.0);
                continue;
            };
            row[..self.left * c].fill(0.0);
            row[(self.left + w) * c..].fill(0.0);
            read(y * w, w, &mut row[self.left * c..][..w * c]);
        }
    }
}

/// A place that tasks write to, each its own part of it.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub *mut f32);

// SAFETY: an address; who follows it keeps to the contract of `Memory`.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    pub fn get(self) -> *mut f32 {
        self.0
    }
}
