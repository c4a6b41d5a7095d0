//! Plain computations on slices: no candle type, no thread, no I/O.
//!
//! Images are `[H, W, C]` (channels innermost), sequences `[T, D]`, matrices row-major. Each
//! kernel computes a range of output rows of one image, so that its caller decides how work is
//! shared; the result of a row never depends on that decision.

pub mod attention;
pub mod conv;
pub mod elementwise;
pub mod gemm;
pub mod norm;
pub mod pool;
pub mod resample;

#[cfg(test)]
mod tests;

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

    /// Values in a row of pixels.
    pub const fn row(self) -> usize {
        self.w * self.c
    }

    /// The pixel at a signed position, or None where that is outside the image.
    #[inline]
    pub fn pixel(self, image: &[f32], y: isize, x: isize) -> Option<&[f32]> {
        let y = usize::try_from(y).ok().filter(|&y| y < self.h)?;
        let x = usize::try_from(x).ok().filter(|&x| x < self.w)?;
        let start = (y * self.w + x) * self.c;
        Some(&image[start..start + self.c])
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
    /// Upper left input position of the window at an output position; negative in the padding.
    #[inline]
    fn origin(&self, y: usize, x: usize) -> [isize; 2] {
        [
            (y * self.stride) as isize - self.before[0] as isize,
            (x * self.stride) as isize - self.before[1] as isize,
        ]
    }
}
