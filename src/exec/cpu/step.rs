//! The steps of a plan, and how each is shared among threads.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::arena::ValueId;
use crate::graph::Activation;
use crate::kernels::conv::{Conv, Depthwise};
use crate::kernels::pool::{Pool, global_average};
use crate::kernels::{Dims, attention, elementwise, norm};

/// One operation on values of the arena.
pub(super) struct Step {
    pub kind: Kind,
    /// What the kind says that it reads, in order.
    pub inputs: Vec<ValueId>,
    pub output: ValueId,
    /// Of one image.
    pub input_dims: Vec<Dims>,
    pub output_dims: Dims,
}

/// What is stored after a convolution or linear layer: its sum plus bias, plus the step's second
/// input where `residual`, through the activation.
pub(super) struct Epilogue {
    pub bias: Vec<f32>,
    pub residual: bool,
    pub activation: Option<Activation>,
}

pub(super) enum Kind {
    /// Also linear layers, as convolutions over the tokens (or the one pixel).
    Conv {
        conv: Conv,
        packed: Vec<f32>,
        epilogue: Epilogue,
    },
    Depthwise {
        conv: Depthwise,
        packed: Vec<f32>,
        epilogue: Epilogue,
    },
    /// A batch norm that follows no convolution.
    ScaleShift {
        scale: Vec<f32>,
        shift: Vec<f32>,
    },
    Activation(Activation),
    Add,
    /// The second input may be one pixel.
    Multiply,
    Concat,
    Slice {
        start: usize,
    },
    ChannelShuffle {
        groups: usize,
    },
    MaxPool(Pool),
    AvgPool(Pool),
    GlobalAvgPool,
    /// The token, then the input's.
    ClassToken {
        token: Vec<f32>,
    },
    /// Adds a constant of the image's shape.
    AddConstant {
        values: Vec<f32>,
    },
    LayerNorm {
        weight: Vec<f32>,
        bias: Vec<f32>,
        eps: f64,
    },
    /// Reads queries, keys and values side by side.
    Attention {
        heads: usize,
    },
    SelectToken {
        index: usize,
    },
}

thread_local! {
    /// Each thread's scratch, kept from step to step.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Step {
    /// Computes the output for a batch of `count` images.
    pub fn run(&self, inputs: &[&[f32]], output: &mut [f32], count: usize) {
        let image = |input: usize, i: usize| {
            let len = self.input_dims[input].len();
            &inputs[input][i * len..(i + 1) * len]
        };
        // The part of an input that lies where a block of output rows does.
        let same_rows = |input: usize, i: usize, rows: &Range<usize>| {
            let row = self.input_dims[input].row();
            &image(input, i)[rows.start * row..rows.end * row]
        };
        match &self.kind {
            Kind::Conv {
                conv,
                packed,
                epilogue,
            } => self.for_rows(output, |i, rows, out| {
                let residual = epilogue.residual.then(|| same_rows(1, i, &rows));
                SCRATCH.with_borrow_mut(|columns| {
                    conv.rows(image(0, i), packed, rows, columns, out);
                });
                elementwise::epilogue(out, &epilogue.bias, residual, epilogue.activation);
            }),
            Kind::Depthwise {
                conv,
                packed,
                epilogue,
            } => self.for_rows(output, |i, rows, out| {
                let residual = epilogue.residual.then(|| same_rows(1, i, &rows));
                conv.rows(image(0, i), packed, rows, out);
                elementwise::epilogue(out, &epilogue.bias, residual, epilogue.activation);
            }),
            Kind::ScaleShift { scale, shift } => self.for_rows(output, |i, rows, out| {
                elementwise::scale_shift(same_rows(0, i, &rows), scale, shift, out);
            }),
            Kind::Activation(activation) => self.for_rows(output, |i, rows, out| {
                out.copy_from_slice(same_rows(0, i, &rows));
                elementwise::activate(*activation, out);
            }),
            Kind::Add => self.for_rows(output, |i, rows, out| {
                out.copy_from_slice(same_rows(0, i, &rows));
                elementwise::add(out, same_rows(1, i, &rows));
            }),
            Kind::Multiply => self.for_rows(output, |i, rows, out| {
                out.copy_from_slice(same_rows(0, i, &rows));
                if self.input_dims[1] == self.output_dims {
                    elementwise::multiply(out, same_rows(1, i, &rows));
                } else {
                    for pixel in out.chunks_exact_mut(self.output_dims.c) {
                        elementwise::multiply(pixel, image(1, i));
                    }
                }
            }),
            Kind::Concat => self.for_rows(output, |i, rows, out| {
                let mut to = 0;
                for (input, dims) in self.input_dims.iter().enumerate() {
                    let source = same_rows(input, i, &rows);
                    let place = (self.output_dims.c, to);
                    elementwise::copy_channels(source, (dims.c, 0), out, place, dims.c);
                    to += dims.c;
                }
            }),
            Kind::Slice { start } => self.for_rows(output, |i, rows, out| {
                let source = (self.input_dims[0].c, *start);
                let channels = self.output_dims.c;
                let rows = same_rows(0, i, &rows);
                elementwise::copy_channels(rows, source, out, (channels, 0), channels);
            }),
            Kind::ChannelShuffle { groups } => self.for_rows(output, |i, rows, out| {
                let channels = self.output_dims.c;
                elementwise::channel_shuffle(same_rows(0, i, &rows), channels, *groups, out);
            }),
            Kind::MaxPool(pool) => self.for_rows(output, |i, rows, out| {
                pool.max_rows(image(0, i), rows, out);
            }),
            Kind::AvgPool(pool) => self.for_rows(output, |i, rows, out| {
                pool.average_rows(image(0, i), rows, out);
            }),
            Kind::GlobalAvgPool => self.for_images(output, |i, out| {
                global_average(self.input_dims[0], image(0, i), out);
            }),
            Kind::ClassToken { token } => self.for_images(output, |i, out| {
                let (first, rest) = out.split_at_mut(token.len());
                first.copy_from_slice(token);
                rest.copy_from_slice(image(0, i));
            }),
            Kind::AddConstant { values } => self.for_images(output, |i, out| {
                out.copy_from_slice(image(0, i));
                elementwise::add(out, values);
            }),
            Kind::LayerNorm { weight, bias, eps } => self.for_rows(output, |i, rows, out| {
                norm::layer_norm(same_rows(0, i, &rows), weight, bias, *eps, out);
            }),
            Kind::Attention { heads } => {
                let Dims {
                    h: tokens, c: dim, ..
                } = self.output_dims;
                // Heads interleave in the output, so each is computed apart and then put there.
                let width = dim / heads;
                let mut parts = vec![0.0; output.len()];
                parts
                    .par_chunks_exact_mut(tokens * width)
                    .enumerate()
                    .for_each(|(index, part)| {
                        let (i, head) = (index / heads, index % heads);
                        let shape = (tokens, dim, *heads);
                        SCRATCH.with_borrow_mut(|scores| {
                            attention::head(image(0, i), shape, head, scores, part);
                        });
                    });
                for (index, part) in parts.chunks_exact(tokens * width).enumerate() {
                    let (i, head) = (index / heads, index % heads);
                    let out = &mut output[i * tokens * dim..(i + 1) * tokens * dim];
                    elementwise::copy_channels(part, (width, 0), out, (dim, head * width), width);
                }
            }
            Kind::SelectToken { index } => self.for_images(output, |i, out| {
                let dim = out.len();
                out.copy_from_slice(&image(0, i)[index * dim..(index + 1) * dim]);
            }),
        }
        debug_assert_eq!(output.len(), count * self.output_dims.len());
    }

    /// Shares blocks of output rows among the threads: image, rows, the block.
    fn for_rows(&self, output: &mut [f32], f: impl Fn(usize, Range<usize>, &mut [f32]) + Sync) {
        let dims = self.output_dims;
        let block = block_rows(dims);
        output
            .par_chunks_exact_mut(dims.len())
            .enumerate()
            .flat_map(|(i, image)| {
                let blocks = image.par_chunks_mut(block * dims.row()).enumerate();
                blocks.map(move |(b, out)| (i, b, out))
            })
            .for_each(|(i, b, out)| {
                let start = b * block;
                f(i, start..start + out.len() / dims.row(), out);
            });
    }

    /// Shares images among the threads.
    fn for_images(&self, output: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
        output
            .par_chunks_exact_mut(self.output_dims.len())
            .enumerate()
            .for_each(|(i, out)| f(i, out));
    }
}

/// Rows of a block: about eight blocks an image, each of at least two dozen pixels.
fn block_rows(dims: Dims) -> usize {
    let blocks = (dims.h * dims.w / 24).clamp(1, 8);
    dims.h.div_ceil(blocks)
}
