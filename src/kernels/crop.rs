//! Kernels that are larger than the map they go over: of 3 x 3 weights over a single pixel, eight meet
//! nothing but padding.

use std::ops::Range;

use super::{Dims, Window};

/// The taps of a kernel that meet a pixel in some window, where that is not all of them.
#[derive(Clone, Debug)]
pub struct Crop {
    /// Height and width of the whole kernel.
    kernel: [usize; 2],
    /// Rows and columns that are left.
    taps: [Range<usize>; 2],
}

impl Crop {
    /// For windows over so large a map.
    pub fn of(window: Window, input: Dims, output: Dims) -> Option<Self> {
        let sizes = [(input.h, output.h), (input.w, output.w)];
        let taps = [0, 1].map(|axis| {
            let (kernel, before) = (window.kernel[axis], window.before[axis]);
            let (input, output) = sizes[axis];
            // The last window has least of its taps before the first pixel, the first one least behind the
            // last pixel.
            let first = before.saturating_sub((output - 1) * window.stride);
            first..kernel.min(before + input)
        });
        let is_part = (0..2).any(|axis| taps[axis].len() < window.kernel[axis]);
        is_part.then_some(Self {
            kernel: window.kernel,
            taps,
        })
    }

    /// What is left of the window.
    pub fn window(&self, whole: Window) -> Window {
        Window {
            kernel: [0, 1].map(|axis| self.taps[axis].len()),
            before: [0, 1].map(|axis| whole.before[axis] - self.taps[axis].start),
            ..whole
        }
    }

    /// Weights of a whole kernel, and how many of them are left.
    pub fn areas(&self) -> [usize; 2] {
        [
            self.kernel.iter().product(),
            self.taps.iter().map(Range::len).product(),
        ]
    }

    /// What is left of kernels, one behind the other.
    pub fn cut(&self, kernels: &[f32]) -> Vec<f32> {
        let [whole, left] = self.areas();
        let mut cut = Vec::with_capacity(kernels.len() / whole * left);
        for kernel in kernels.chunks_exact(whole) {
            for row in self.rows() {
                cut.extend_from_slice(&kernel[row]);
            }
        }
        cut
    }

    /// Puts values to where they were cut from. What was not left stays as it is.
    pub fn restore(&self, cut: &[f32], kernels: &mut [f32]) {
        let [whole, left] = self.areas();
        for (kernel, cut) in kernels.chunks_exact_mut(whole).zip(cut.chunks_exact(left)) {
            for (row, cut) in self.rows().zip(cut.chunks_exact(self.taps[1].len())) {
                kernel[row].copy_from_slice(cut);
            }
        }
    }

    /// Where the rows that are left lie in a kernel.
    fn rows(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let ([rows, columns], width) = (self.taps.clone(), self.kernel[1]);
        rows.map(move |y| y * width + columns.start..y * width + columns.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against every tap of every window.
    #[test]
    fn taps_are_left_that_meet_a_pixel() {
        for case in 0..7 * 2 * 3 * 6 * 6 {
            let (kernel, case) = (case % 7 + 1, case / 7);
            let (stride, case) = (case % 2 + 1, case / 2);
            let (before, case) = ((case % 3).min(kernel - 1), case / 3);
            let size = [case % 6 + 1, case / 6 + 1];
            let dims = |[h, w]: [usize; 2]| Dims { h, w, c: 1 };
            let out = size.map(|size: usize| size.div_ceil(stride));
            let window = Window {
                kernel: [kernel; 2],
                stride,
                before: [before; 2],
            };
            let meets = |tap: usize, axis: usize| {
                let places = (0..out[axis]).map(|o| o * stride + tap);
                let mut pixels = places.filter_map(|place| place.checked_sub(before));
                pixels.any(|pixel| pixel < size[axis])
            };
            let expected: Vec<f32> = (0..kernel * kernel)
                .filter(|tap| meets(tap / kernel, 0) && meets(tap % kernel, 1))
                .map(|tap| (tap + 1) as f32)
                .collect();
            let kernels: Vec<f32> = (1..=kernel * kernel).map(|v| v as f32).collect();
            let Some(crop) = Crop::of(window, dims(size), dims(out)) else {
                assert_eq!(expected, kernels, "{window:?} over {size:?}");
                continue;
            };
            let cut = crop.cut(&kernels);
            assert_eq!(cut, expected, "{window:?} over {size:?}");
            assert!(cut.len() < kernels.len());
            assert_eq!(crop.areas(), [kernels.len(), cut.len()]);
            let rest = crop.window(window);
            assert_eq!(rest.kernel[0] * rest.kernel[1], cut.len());
            let first = (rest.before[0] * kernel + rest.before[1]) as f32;
            assert_eq!(first + cut[0], (before * kernel + before + 1) as f32);
            let mut restored = vec![0.0; kernels.len()];
            crop.restore(&cut, &mut restored);
            for (value, restored) in kernels.iter().zip(restored) {
                assert_eq!(restored, if cut.contains(value) { *value } else { 0.0 });
            }
        }
    }
}
