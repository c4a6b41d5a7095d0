//! Training on a device.

use candle_core::{Result, Tensor, Var, bail};
use rand_chacha::ChaCha8Rng;

use super::network::{CudaNetwork, Entry, InTraining, Sink};
use crate::exec::{Others, Precision, TrainingStep, Variables};
use crate::graph::Graph;

/// [`TrainingStep`] on a CUDA device.
///
/// With `f16` small gradients would become nothing: they are multiplied with a power of two on their way,
/// which is halved whenever one of them overflows (and the way back is gone once more), and doubled after
/// [`CALM`] times without.
pub struct CudaStep {
    network: CudaNetwork,
    variables: Variables,
    others: Others,
    tape: Option<Vec<Entry>>,
    loss_scale: f64,
    calm: usize,
}

/// Ways back without an overflow after which the scale is doubled.
const CALM: usize = 2000;

impl CudaStep {
    /// # Errors
    /// Where `variables` are those of another graph.
    pub fn new(graph: Graph, variables: &Variables, precision: Precision) -> Result<Self> {
        Ok(Self {
            network: CudaNetwork::in_training(graph, variables, precision)?,
            variables: variables.clone(),
            others: Others::default(),
            tape: None,
            loss_scale: match precision {
                Precision::F16 => 65536.0,
                _ => 1.0,
            },
            calm: 0,
        })
    }

    /// The way back along the tape. What is no longer needed is let go of on the way, unless it is to be
    /// gone again.
    fn go_back(
        network: &CudaNetwork,
        tape: &mut Vec<Entry>,
        keep: bool,
        gradient: Tensor,
        sink: &mut Sink,
    ) -> Result<()> {
        let mut gradients: Vec<Option<Tensor>> = vec![None; network.graph.nodes().len()];
        gradients[network.graph.output().index()] = Some(gradient);
        for index in (0..tape.len()).rev() {
            let gone;
            let entry = if keep {
                &tape[index]
            } else {
                gone = tape.pop();
                match &gone {
                    Some(entry) => entry,
                    None => break,
                }
            };
            let Some(gradient) = gradients[entry.output.index()].take() else {
                continue;
            };
            let below = (entry.backward)(&gradient, sink)?;
            for (input, gradient) in entry.inputs.iter().zip(below) {
                let Some(gradient) = gradient.filter(|_| network.needed[input.index()]) else {
                    continue;
                };
                let sum = &mut gradients[input.index()];
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + gradient)?,
                    None => gradient,
                });
            }
        }
        Ok(())
    }
}

impl TrainingStep for CudaStep {
    fn parameters(&self) -> &[(String, Var)] {
        self.variables.parameters()
    }

    fn buffers(&self) -> &[(String, Var)] {
        self.variables.buffers()
    }

    fn train_with(&mut self, others: Others) -> Result<()> {
        self.others = others;
        Ok(())
    }

    fn forward(&mut self, images: &Tensor, generator: &mut ChaCha8Rng) -> Result<Tensor> {
        self.tape = None;
        let images = images.permute((0, 2, 3, 1))?;
        let mut training = Some(InTraining {
            generator,
            others: &self.others,
            tape: Vec::new(),
            running: Vec::new(),
        });
        let logits = self.network.run(&images, &mut training)?;
        if let Some(training) = training {
            for (node, values) in training.running {
                let names = &self.network.graph.node(node).parameters[2..];
                for (name, value) in names.iter().zip(values) {
                    let buffers = self.variables.buffers();
                    let buffer = buffers.iter().find(|(buffer, _)| *buffer == name.name);
                    if let Some((_, buffer)) = buffer {
                        buffer.set(&value)?;
                    }
                }
            }
            self.tape = Some(training.tape);
        }
        Ok(logits)
    }

    fn backward(
        &mut self,
        logits_gradient: &Tensor,
        sink: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        let Some(mut tape) = self.tape.take() else {
            bail!("backward without a forward pass before it");
        };
        let gradient = logits_gradient.detach();
        let dtype = self.network.precision.dtype();
        if self.network.precision != Precision::F16 {
            let gradient = gradient.to_dtype(dtype)?;
            return Self::go_back(&self.network, &mut tape, false, gradient, sink);
        }
        let known = are_finite([&gradient])?;
        loop {
            let scaled = (&gradient * self.loss_scale)?.to_dtype(dtype)?;
            let mut gradients = Vec::new();
            Self::go_back(&self.network, &mut tape, true, scaled, &mut |index, g| {
                gradients.push((index, g));
                Ok(())
            })?;
            let finite = are_finite(gradients.iter().map(|(_, g)| g))?;
            // What does not come from the scale, the caller has to see.
            if finite || !known || self.loss_scale <= 1.0 {
                let back = 1.0 / self.loss_scale;
                self.calm += 1;
                if self.calm == CALM {
                    self.calm = 0;
                    self.loss_scale *= 2.0;
                }
                for (index, gradient) in gradients {
                    sink(index, (gradient * back)?)?;
                }
                return Ok(());
            }
            self.calm = 0;
            self.loss_scale /= 2.0;
        }
    }
}

/// Whether all values of float32 tensors are finite.
fn are_finite<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<bool> {
    let sums = tensors.into_iter().map(|t| t.abs()?.sum_all());
    let sums = sums.collect::<Result<Vec<_>>>()?;
    if sums.is_empty() {
        return Ok(true);
    }
    let sums: Vec<f32> = Tensor::stack(&sums, 0)?.to_vec1()?;
    Ok(sums.iter().all(|sum| sum.is_finite()))
}
