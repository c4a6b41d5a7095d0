//! An expansion, a depthwise convolution and a projection in one, a few lines at a time.
//!
//! The map between expansion and depthwise convolution is the widest of an inverted residual, and
//! is read only once: it never exists as a whole. A [`Worker`] keeps the few expanded lines that
//! the windows of its present output lines reach, in a ring: line `y` lies in slot `y % slots`, and
//! going on to the next output lines overwrites those that no window needs any more. The depthwise
//! convolution makes lines of a small block from them, which the projection stores in the output.
//! Everything stays in the second-level cache.
//!
//! Either end may be missing: a depthwise convolution whose output is not projected here (its
//! channels are to be weighted first), or one that reads a map that is there (MobileNetV1). The
//! expansion may be any convolution, such as a network's first.
//!
//! Every line is computed by the kernels that would compute it alone, so its bits are the same.

use super::depthwise::{Depthwise, Line, MOST_ROWS};
use super::gemm::{Packed, Rows, Store, gemm};
use super::{Dims, Source, Target, Window};

/// The convolutions of a block, and what is stored after each.
pub struct Bottleneck {
    expand: Option<Expansion>,
    depthwise: (Depthwise, Store),
    project: Option<(Packed, Store)>,
    /// What the depthwise convolution reads.
    hidden: Dims,
    /// Height and width of what it writes, and of the block's output.
    size: [usize; 2],
    /// Columns of zeros on the left and on the right of an expanded line.
    sides: [usize; 2],
    /// Output lines that are computed together at most.
    lines: usize,
}

/// The convolution that makes lines for the depthwise one.
pub struct Expansion {
    pub window: Window,
    /// First channel that it reads.
    pub start: usize,
    pub weights: Packed,
    pub store: Store,
}

/// Pixels that a product wants at least: each of its weights is then loaded for eight tiles.
const PIXELS: usize = 48;
/// Values of a worker's memory that the second-level cache holds.
const MOST_VALUES: usize = 96 << 10;

impl Bottleneck {
    /// A block whose depthwise convolution reads a map of `hidden` dims and writes one of `size`.
    pub fn new(
        expand: Option<Expansion>,
        depthwise: (Depthwise, Store),
        project: Option<(Packed, Store)>,
        hidden: Dims,
        size: [usize; 2],
    ) -> Self {
        let window = depthwise.0.window;
        assert!(window.kernel[0] <= MOST_ROWS, "a kernel of too many rows");
        let border = window.border(hidden, Dims::new(size[0], size[1], hidden.c));
        let mut block = Self {
            expand,
            depthwise,
            project,
            hidden,
            size,
            sides: [border.left, border.right],
            lines: PIXELS.div_ceil(size[1]).min(size[0]),
        };
        while block.lines > 1 && block.scratch_len() > MOST_VALUES {
            block.lines -= 1;
        }
        block
    }

    /// Output lines that are best computed together.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Expanded lines that the windows of [`Bottleneck::lines`] output lines reach.
    fn slots(&self) -> usize {
        let Window { kernel, stride, .. } = self.depthwise.0.window;
        (self.lines - 1) * stride + kernel[0]
    }

    /// Values of an expanded line with its sides.
    fn line_len(&self) -> usize {
        (self.sides[0] + self.hidden.w + self.sides[1]) * self.hidden.c
    }

    /// Values of memory that a worker needs: a line of zeros, the ring, and lines to project.
    pub fn scratch_len(&self) -> usize {
        let ring = match self.expand {
            Some(_) => (1 + self.slots()) * self.line_len(),
            None => 0,
        };
        let wide = match self.project {
            Some(_) => self.lines * self.wide_len(),
            None => 0,
        };
        ring + wide
    }

    /// Values of a line that the depthwise convolution writes.
    fn wide_len(&self) -> usize {
        self.size[1] * self.hidden.c
    }
}

/// Who computes lines of a block's output, one batch of them after the other; each thread has one.
pub struct Worker<'a> {
    block: &'a Bottleneck,
    /// A line of zeros, for windows that reach beyond the image.
    zeros: *const f32,
    ring: *mut f32,
    wide: *mut f32,
    /// The expanded lines in the ring, and whose they are.
    image: usize,
    made: std::ops::Range<usize>,
}

impl<'a> Worker<'a> {
    /// A worker with memory of its own.
    ///
    /// # Safety
    /// Behind `scratch` lie [`Bottleneck::scratch_len`] values, as long as the worker is there,
    /// and for it alone.
    pub unsafe fn new(block: &'a Bottleneck, scratch: *mut f32) -> Self {
        let (line, slots) = (block.line_len(), block.slots());
        // SAFETY: the parts of the scratch, in the order of `scratch_len`.
        unsafe {
            let mut wide = scratch;
            if block.expand.is_some() {
                scratch.write_bytes(0, line);
                // Of the ring only the sides have to be zeros.
                let [left, right] = block.sides.map(|columns| columns * block.hidden.c);
                for slot in 1..=slots {
                    let start = scratch.add(slot * line);
                    start.write_bytes(0, left);
                    start.add(line - right).write_bytes(0, right);
                }
                wide = scratch.add((1 + slots) * line);
            }
            Self {
                block,
                zeros: scratch,
                ring: scratch.add(if block.expand.is_some() { line } else { 0 }),
                wide,
                image: 0,
                made: 0..0,
            }
        }
    }

    /// Computes output lines `lines` (at most [`Bottleneck::lines`]) of one image; `rows` is
    /// working memory.
    ///
    /// # Safety
    /// The batches have that image and those lines, the input has the border that the convolution
    /// that reads it needs, and nobody else touches the lines.
    pub unsafe fn compute(
        &mut self,
        input: &Source,
        output: &Target,
        residual: Option<&Source>,
        image: usize,
        lines: std::ops::Range<usize>,
        rows: &mut Rows,
    ) {
        assert!(lines.len() <= self.block.lines && lines.end <= self.block.size[0]);
        // SAFETY: the contract of this function.
        unsafe {
            self.expand(input, image, lines.clone(), rows);
            self.depthwise(input, output, image, lines.clone());
            self.project(output, residual, image, lines, rows);
        }
    }

    /// Where an expanded line begins, its sides included.
    unsafe fn slot(&self, y: usize) -> *mut f32 {
        // SAFETY: a slot of the ring.
        unsafe {
            self.ring
                .add(y % self.block.slots() * self.block.line_len())
        }
    }

    /// Makes the expanded lines that are missing in the ring.
    unsafe fn expand(
        &mut self,
        input: &Source,
        image: usize,
        lines: std::ops::Range<usize>,
        rows: &mut Rows,
    ) {
        let block = self.block;
        let Some(expansion) = &block.expand else {
            return;
        };
        let window = block.depthwise.0.window;
        let first = (lines.start * window.stride).saturating_sub(window.before[0]);
        let end = (lines.end - 1) * window.stride + window.kernel[0];
        let end = end.saturating_sub(window.before[0]).min(block.hidden.h);
        let goes_on = image == self.image && self.made.start <= first && first <= self.made.end;
        if !goes_on {
            (self.image, self.made) = (image, first..first);
        }
        if self.made.end >= end {
            return;
        }
        let [left, _] = block.sides;
        let channels = block.hidden.c;
        rows.clear();
        for y in self.made.end..end {
            let at = expansion.window.offset(&input.layout, y, 0) + expansion.start;
            let step = expansion.window.stride * input.layout.dims.c;
            // SAFETY: the line's windows lie in the input, its pixels in a slot.
            unsafe {
                let from = input.image(image).add(at);
                let to = self.slot(y).add(left * channels);
                rows.push_line(block.hidden.w, (from, step), (to, channels), None);
            }
        }
        let kernel_rows = expansion.window.kernel[0];
        let mut taps = [0; MOST_ROWS];
        for (ky, tap) in taps[..kernel_rows].iter_mut().enumerate() {
            *tap = ky * input.layout.row_stride();
        }
        let (packed, epilogue) = (&expansion.weights, expansion.store.epilogue());
        // SAFETY: as above; the depth of the weights is the kernel's rows times what lies side by
        // side in a row of a window.
        unsafe {
            gemm(
                packed,
                0..packed.panel_count(),
                rows,
                &taps[..kernel_rows],
                epilogue,
            )
        };
        // What was made before and is overwritten now is gone.
        let oldest = end.saturating_sub(block.slots());
        self.made = self.made.start.max(oldest)..end;
    }

    unsafe fn depthwise(
        &self,
        input: &Source,
        output: &Target,
        image: usize,
        lines: std::ops::Range<usize>,
    ) {
        let block = self.block;
        let (conv, store) = &block.depthwise;
        let window = conv.window;
        for (index, y) in lines.enumerate() {
            let mut inputs = [self.zeros; MOST_ROWS];
            let inputs = &mut inputs[..window.kernel[0]];
            for (ky, line) in inputs.iter_mut().enumerate() {
                // SAFETY: lines of the ring that were made, or of the input or its border.
                unsafe {
                    if block.expand.is_none() {
                        let at = window.offset(&input.layout, y, 0);
                        *line = input.image(image).add(at + ky * input.layout.row_stride());
                    } else {
                        let hidden = (y * window.stride + ky).wrapping_sub(window.before[0]);
                        if hidden < block.hidden.h {
                            *line = self.slot(hidden);
                        }
                    }
                }
            }
            // SAFETY: behind the inputs lie the windows of a whole line.
            unsafe {
                let line = Line {
                    inputs,
                    output: match block.project {
                        Some(_) => self.wide.add(index * block.wide_len()),
                        None => output.image(image).add(output.layout.offset(y, 0)),
                    },
                    residual: None,
                    width: block.size[1],
                    // Lines of the ring are near.
                    below: block.expand.is_none().then(|| input.layout.row_stride()),
                };
                conv.line(line, store.epilogue());
            }
        }
    }

    unsafe fn project(
        &self,
        output: &Target,
        residual: Option<&Source>,
        image: usize,
        lines: std::ops::Range<usize>,
        rows: &mut Rows,
    ) {
        let block = self.block;
        let Some((packed, store)) = &block.project else {
            return;
        };
        rows.clear();
        for (index, y) in lines.enumerate() {
            // SAFETY: lines of the worker's memory, of the output and of the residual.
            unsafe {
                let from = self.wide.add(index * block.wide_len());
                let to = output.image(image).add(output.layout.offset(y, 0));
                let other = residual.map(|r| {
                    let other = r.image(image).add(r.layout.offset(y, 0));
                    (other, r.layout.dims.c)
                });
                let to = (to, output.layout.dims.c);
                rows.push_line(block.size[1], (from, block.hidden.c), to, other);
            }
        }
        // SAFETY: as above.
        unsafe {
            gemm(
                packed,
                0..packed.panel_count(),
                rows,
                &[0],
                store.epilogue(),
            )
        };
    }
}
