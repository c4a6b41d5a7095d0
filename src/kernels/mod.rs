//! Computations on slices: no candle type, no thread, no I/O.
//!
//! # Layout
//! Images are `[H, W, C]` (channels innermost) inside a border of zeros, see [`Layout`]; a
//! sequence `[T, D]` is an image of width 1, a vector one pixel. With the border in place, the
//! window of an output pixel is `kernel height` runs of `kernel width · C` contiguous values, and
//! no kernel asks whether it is inside the image.
//!
//! # Which kernel for what
//! - [`gemm`]: products, that is linear layers, pointwise convolutions, and all others that have
//!   no kernel of their own.
//! - `amx`: what a product on a matrix unit is made of, for [`gemm`] and [`transposed`].
//! - [`winograd`]: 3x3 convolutions of stride 1, with fewer multiplications and other digits.
//! - [`depthwise`]: one channel a group; [`grouped`]: four or eight; [`grouped_strip`]: eight or
//!   sixteen.
//! - [`bottleneck`]: a depthwise convolution with the products around it, line by line.
//! - [`matrix`]: a matrix that is multiplied from both sides.
//! - [`attention`], [`norm`], [`pool`], [`elementwise`], [`resample`]: what their names say.
//! - [`memory`]: blocks of memory in large pages.
//!
//! # Work
//! Each kernel computes a part of an output that its caller chooses. The value of a pixel never
//! depends on that choice: the order of the sums behind it is fixed by the layer.
//!
//! # Instruction sets
//! Kernels are written once, over [`pulp`]'s vectors, or as plain loops that the compiler turns
//! into vectors; [`Isa`] picks the best that the machine has. Products have a second form for matrix
//! units, which [`Isa::for_product`] chooses by a layer's shape.
//!
//! # Safety
//! Kernels read and write through pointers, since several threads write disjoint parts of one
//! image. Their contract is that of [`Source`] and [`Target`]: the image that is named lies
//! wholly behind the pointer, and nobody else touches the part that is written.

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod attention_gradient;
pub mod bottleneck;
pub mod crop;
pub mod depthwise;
pub mod depthwise_gradient;
pub mod elementwise;
pub mod gemm;
pub mod grouped;
pub mod grouped_strip;
mod isa;
pub mod matrix;
pub mod memory;
pub mod norm;
pub mod optimizer;
pub mod pool;
pub mod resample;
pub mod rowwise;
pub mod transposed;
pub mod winograd;
pub mod winograd_training;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub use isa::Isa;
pub(crate) use isa::{prefetch, prefetch_far};

/// Height, width and channels of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    pub h: usize,
    pub w: usize,
    pub c: usize,
}

impl Dims {
    pub const fn new(h: usize, w: usize, c: usize) -> Self {
        Self { h, w, c }
    }

    /// Number of values.
    pub const fn len(self) -> usize {
        self.h * self.w * self.c
    }

    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    pub const fn pixels(self) -> usize {
        self.h * self.w
    }
}

/// An image and the rows and columns of zeros around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub dims: Dims,
    pub border: Border,
}

/// Rows and columns of zeros on each side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Border {
    pub top: usize,
    pub left: usize,
    pub bottom: usize,
    pub right: usize,
}

impl Border {
    /// Enough for both.
    pub fn union(self, other: Self) -> Self {
        Self {
            top: self.top.max(other.top),
            left: self.left.max(other.left),
            bottom: self.bottom.max(other.bottom),
            right: self.right.max(other.right),
        }
    }
}

impl Layout {
    pub fn plain(dims: Dims) -> Self {
        Self {
            dims,
            border: Border::default(),
        }
    }

    /// Values from a row to the next.
    pub fn row_stride(&self) -> usize {
        (self.border.left + self.dims.w + self.border.right) * self.dims.c
    }

    /// Values of the image with its border.
    pub fn len(&self) -> usize {
        (self.border.top + self.dims.h + self.border.bottom) * self.row_stride()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where a pixel of the image lies.
    pub fn offset(&self, y: usize, x: usize) -> usize {
        (y + self.border.top) * self.row_stride() + (x + self.border.left) * self.dims.c
    }

    /// Whether rows follow each other without a gap.
    pub fn is_plain(&self) -> bool {
        self.border == Border::default()
    }
}

/// A sliding window over an image: kernel height and width, stride, and the padding before the
/// first row and column (what comes after follows from the output's size).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub kernel: [usize; 2],
    pub stride: usize,
    pub before: [usize; 2],
}

impl Window {
    /// The border that an input needs so that every window lies inside it.
    pub fn border(&self, input: Dims, output: Dims) -> Border {
        let after = |size: usize, out: usize, axis: usize| {
            let end = (out - 1) * self.stride + self.kernel[axis];
            end.saturating_sub(self.before[axis] + size)
        };
        Border {
            top: self.before[0],
            left: self.before[1],
            bottom: after(input.h, output.h, 0),
            right: after(input.w, output.w, 1),
        }
    }

    /// Where the window of an output pixel begins in an input with enough border.
    #[inline]
    pub fn offset(&self, input: &Layout, y: usize, x: usize) -> usize {
        let row = y * self.stride + input.border.top - self.before[0];
        let column = x * self.stride + input.border.left - self.before[1];
        row * input.row_stride() + column * input.dims.c
    }
}

/// A batch of images to read.
#[derive(Clone, Copy)]
pub struct Source {
    pointer: *const f32,
    pub layout: Layout,
}

/// A batch of images to write.
#[derive(Clone, Copy)]
pub struct Target {
    pointer: *mut f32,
    pub layout: Layout,
}

// SAFETY: they are addresses; who follows them promises what the module's contract says.
unsafe impl Send for Source {}
unsafe impl Sync for Source {}
unsafe impl Send for Target {}
unsafe impl Sync for Target {}

impl Source {
    /// A batch of `count` images.
    ///
    /// # Panics
    /// Where `values` is too short for them.
    pub fn new(values: &[f32], layout: Layout, count: usize) -> Self {
        assert!(values.len() >= layout.len() * count, "a batch too short");
        Self {
            pointer: values.as_ptr(),
            layout,
        }
    }

    /// The images that lie behind a pointer.
    pub fn at(pointer: *const f32, layout: Layout) -> Self {
        Self { pointer, layout }
    }

    /// First value of an image, its border included.
    ///
    /// # Safety
    /// The batch has that image and is still there.
    #[inline]
    pub unsafe fn image(&self, image: usize) -> *const f32 {
        // SAFETY: within the batch, as the caller promises.
        unsafe { self.pointer.add(image * self.layout.len()) }
    }

    /// The values of a row of pixels, without the border.
    ///
    /// # Safety
    /// As [`Source::image`], and nobody writes the row.
    #[inline]
    pub unsafe fn row(&self, image: usize, y: usize) -> &[f32] {
        let Dims { w, c, .. } = self.layout.dims;
        // SAFETY: a row of an image of the batch.
        unsafe {
            let start = self.image(image).add(self.layout.offset(y, 0));
            std::slice::from_raw_parts(start, w * c)
        }
    }
}

impl Target {
    /// A batch of `count` images.
    ///
    /// # Panics
    /// Where `values` is too short for them.
    pub fn new(values: &mut [f32], layout: Layout, count: usize) -> Self {
        assert!(values.len() >= layout.len() * count, "a batch too short");
        Self {
            pointer: values.as_mut_ptr(),
            layout,
        }
    }

    /// The images that lie behind a pointer.
    pub fn at(pointer: *mut f32, layout: Layout) -> Self {
        Self { pointer, layout }
    }

    /// First value of an image, its border included.
    ///
    /// # Safety
    /// The batch has that image and is still there.
    #[inline]
    pub unsafe fn image(&self, image: usize) -> *mut f32 {
        // SAFETY: within the batch, as the caller promises.
        unsafe { self.pointer.add(image * self.layout.len()) }
    }

    /// The values of a row of pixels, without the border.
    ///
    /// # Safety
    /// As [`Target::image`], and nobody else touches the row.
    #[inline]
    #[allow(clippy::mut_from_ref)] // the contract makes the row the caller's own
    pub unsafe fn row(&self, image: usize, y: usize) -> &mut [f32] {
        let Dims { w, c, .. } = self.layout.dims;
        // SAFETY: a row of an image of the batch.
        unsafe {
            let start = self.image(image).add(self.layout.offset(y, 0));
            std::slice::from_raw_parts_mut(start, w * c)
        }
    }

    /// Fills the border beside some rows of an image with zeros, and above the first and below the
    /// last.
    ///
    /// # Safety
    /// As [`Target::image`], and nobody else touches that border.
    pub unsafe fn clear_border(&self, image: usize, rows: Range<usize>) {
        let Layout { dims, border } = self.layout;
        let stride = self.layout.row_stride();
        let (left, right) = (border.left * dims.c, border.right * dims.c);
        // SAFETY: runs beside the rows of one image of the batch.
        unsafe {
            let start = self.image(image);
            let clear = |at: usize, count: usize| start.add(at).write_bytes(0, count);
            if rows.start == 0 {
                clear(0, border.top * stride);
            }
            for y in rows.clone() {
                let row = (border.top + y) * stride;
                clear(row, left);
                clear(row + stride - right, right);
            }
            if rows.end == dims.h {
                clear((border.top + dims.h) * stride, border.bottom * stride);
            }
        }
    }
}
