use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use candle_core::{Result, Tensor, Var, bail};
use candle_nn::var_builder::VarBuilder;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::cpu::Options;
use super::eager::{self, Eager, Mode, Training};
use super::params::fetch;
use super::train::PlanStep;
use crate::graph::{Graph, Op};
use crate::ranks::Ranks;

/// What other processes have of a batch that several train on together.
#[derive(Clone, Debug, Default)]
pub struct Others {
    pub ranks: Ranks,
    /// Batch norms go by the statistics of all images, not of those that this process has.
    pub sync_norms: bool,
    /// Images of the batch that other processes have: those before the own ones, and those behind.
    pub before: usize,
    pub behind: usize,
    /// The batch has nothing for this process: its image only keeps it in step.
    pub absent: bool,
}

impl Others {
    /// Draws for all images of the batch, with what `draw` gives for the own ones: so dropout does not
    /// depend on who has which. `each` numbers are drawn for an image.
    pub(super) fn draw<T>(
        &self,
        generator: &mut ChaCha8Rng,
        each: usize,
        draw: impl FnOnce(&mut ChaCha8Rng) -> T,
    ) -> T {
        let skip = |generator: &mut ChaCha8Rng, images: usize| {
            // A number takes two words.
            let words = 2 * images as u128 * each as u128;
            generator.set_word_pos(generator.get_word_pos() + words);
        };
        skip(generator, self.before);
        let drawn = draw(generator);
        skip(generator, self.behind);
        drawn
    }
}

/// One network in training: forward and backward of a batch, its parameters as candle variables.
pub trait TrainingStep {
    /// Trainable parameters, in the graph's order; the index is what `backward` hands to its sink.
    fn parameters(&self) -> &[(String, Var)];

    /// Running statistics of the batch norms that are trained (`forward` updates them), in the
    /// graph's order.
    fn buffers(&self) -> &[(String, Var)];

    /// Logits `[N, classes]` of images `[N, 3, H, W]` in training mode (batch statistics where
    /// norms are trained, dropout from `generator`), detached from any graph. Keeps what
    /// `backward` needs.
    ///
    /// # Errors
    /// Where the images do not fit the network, or the device fails.
    fn forward(&mut self, images: &Tensor, generator: &mut ChaCha8Rng) -> Result<Tensor>;

    /// Gradients of the parameters for the gradient at the logits `[N, classes]` of the last
    /// `forward`. Each is handed to `sink` once, as soon as it is ready, in an order that depends
    /// on the network alone.
    ///
    /// # Errors
    /// Where no `forward` came before, where the device fails, or what `sink` returns.
    fn backward(
        &mut self,
        logits_gradient: &Tensor,
        sink: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()>;

    /// Says who else trains on the next batch.
    ///
    /// # Errors
    /// Where statistics are to be shared and this way of training cannot.
    fn train_with(&mut self, others: Others) -> Result<()>;

    /// Whether a step of the first `count` of these images has room: what it computes is of no use.
    ///
    /// # Errors
    /// Where the device fails, for want of memory or else.
    fn probe(&mut self, images: &Tensor, count: usize) -> Result<()> {
        let images = images.narrow(0, 0, count)?.contiguous()?;
        let logits = self.forward(&images, &mut ChaCha8Rng::seed_from_u64(0))?;
        self.backward(&logits.zeros_like()?, &mut |_, _| Ok(()))
    }

    /// For every step of a compiled plan the node that it belongs to, what kind of step it is, and
    /// the time spent in it so far; empty where there is no plan.
    fn timings(&self) -> Vec<(&str, &'static str, Duration)> {
        Vec::new()
    }
}

/// The tensors of a network in training. A clone shares them.
#[derive(Clone)]
pub struct Variables {
    parameters: Vec<(String, Var)>,
    buffers: Vec<(String, Var)>,
    /// Every tensor of the graph by name, frozen ones included.
    tensors: BTreeMap<String, Tensor>,
}

impl Variables {
    /// Takes the graph's tensors from `vb`. Those named in `frozen` are plain tensors that no
    /// gradient reaches; a batch norm whose weight is frozen stays on its stored statistics.
    ///
    /// # Errors
    /// Where `vb` cannot give a tensor.
    pub fn new(graph: &Graph, vb: &VarBuilder, frozen: &BTreeSet<String>) -> Result<Self> {
        let mut variables = Self {
            parameters: Vec::new(),
            buffers: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for node in graph.nodes() {
            let fixed_norm = matches!(node.op, Op::BatchNorm { .. })
                && frozen.contains(&node.parameters[0].name);
            for parameter in &node.parameters {
                let tensor = fetch(vb, parameter)?;
                let name = parameter.name.clone();
                let tensor = if fixed_norm && parameter.buffer || frozen.contains(&name) {
                    tensor.detach()
                } else {
                    let variable = Var::from_tensor(&tensor)?;
                    let tensor = variable.as_tensor().clone();
                    let list = if parameter.buffer {
                        &mut variables.buffers
                    } else {
                        &mut variables.parameters
                    };
                    list.push((name.clone(), variable));
                    tensor
                };
                variables.tensors.insert(name, tensor);
            }
        }
        Ok(variables)
    }

    /// Trainable parameters, in the graph's order.
    pub fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    /// Running statistics that training updates, in the graph's order.
    pub fn buffers(&self) -> &[(String, Var)] {
        &self.buffers
    }

    /// Every tensor of the network by name, as it is now.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// Whether a tensor is trained: as a parameter, or as a running statistic.
    pub fn is_trained(&self, name: &str) -> bool {
        self.tensors.get(name).is_some_and(Tensor::is_variable)
    }
}

/// [`TrainingStep`] in candle's operations, with candle's backward pass: the reference, and the
/// way to other devices.
pub struct EagerStep {
    network: Eager,
    variables: Variables,
    /// What the last `forward` gave, with its graph.
    logits: Option<Tensor>,
}

impl EagerStep {
    /// # Errors
    /// Where `variables` are those of another graph.
    pub fn new(graph: Graph, variables: &Variables) -> Result<Self> {
        Ok(Self {
            network: Eager::in_training(graph, variables)?,
            variables: variables.clone(),
            logits: None,
        })
    }

    /// The same without candle's convolutions, as on Metal.
    pub fn composed(self) -> Self {
        Self {
            network: self.network.composed(),
            ..self
        }
    }
}

impl TrainingStep for EagerStep {
    fn parameters(&self) -> &[(String, Var)] {
        self.variables.parameters()
    }

    fn buffers(&self) -> &[(String, Var)] {
        self.variables.buffers()
    }

    fn train_with(&mut self, others: Others) -> Result<()> {
        if others.sync_norms {
            bail!("batch norms are synchronised on the CPU and on CUDA devices only");
        }
        Ok(())
    }

    fn forward(&mut self, images: &Tensor, generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let mut training = Training::new(generator.clone());
        let mode = Mode::Train(&mut training);
        let logits = self
            .network
            .forward_observed(images, mode, &mut |_, _| Ok(()))?;
        *generator = training.rng;
        for (name, variable) in self.variables.buffers() {
            if let Some(value) = training.running.get(name) {
                variable.set(value)?;
            }
        }
        let detached = logits.detach();
        self.logits = Some(logits);
        Ok(detached)
    }

    fn backward(
        &mut self,
        logits_gradient: &Tensor,
        sink: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        let Some(logits) = self.logits.take() else {
            bail!("backward without a forward pass before it");
        };
        let mut gradients = (logits * logits_gradient.detach())?.sum_all()?.backward()?;
        for (index, (_, variable)) in self.variables.parameters().iter().enumerate().rev() {
            let gradient = match gradients.remove(variable) {
                Some(gradient) => gradient.detach(),
                None => variable.zeros_like()?,
            };
            sink(index, gradient)?;
        }
        Ok(())
    }
}

/// The way to train a network where its tensors are: a compiled plan on the CPU, kernels of our own on a
/// CUDA device, candle's operations elsewhere.
///
/// # Errors
/// Where `variables` are those of another graph, or threads cannot be started.
pub fn training_step(
    graph: Graph,
    variables: &Variables,
    options: Options,
) -> Result<Box<dyn TrainingStep>> {
    let mut tensors = variables.tensors().values();
    if tensors.all(|tensor| tensor.device().is_cpu()) {
        return Ok(Box::new(PlanStep::new(graph, variables, options)?));
    }
    #[cfg(feature = "cuda")]
    if variables.tensors().values().all(|t| t.device().is_cuda()) {
        let step = super::cuda::CudaStep::new(graph, variables, options.precision)?;
        return Ok(Box::new(step));
    }
    Ok(Box::new(EagerStep::new(graph, variables)?))
}

/// [`TrainingStep`] of the head alone: dropout and a linear layer over features `[N, F]`, which
/// take the place of the images.
pub struct HeadStep {
    parameters: Vec<(String, Var)>,
    dropout: f64,
    others: Others,
    /// The features of the last `forward`, after dropout.
    features: Option<Tensor>,
}

impl HeadStep {
    /// # Errors
    /// Where the head's tensors are not among those that are trained.
    pub fn new(graph: &Graph, variables: &Variables) -> Result<Self> {
        let head = graph.head();
        let parameters = variables.parameters().to_vec();
        let names = parameters.iter().map(|(name, _)| name);
        if !names.eq(head.parameters.iter().map(|p| &p.name)) {
            bail!("{} and nothing else is to be trained", head.name);
        }
        Ok(Self {
            parameters,
            dropout: graph.features().1,
            others: Others::default(),
            features: None,
        })
    }
}

/// The logits `[N, classes]` of features `[N, F]`, by a head's weight `[classes, F]` and bias.
///
/// # Errors
/// Where shapes disagree.
pub fn head_logits(features: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let logits = features.matmul(&weight.t()?)?;
    match bias {
        Some(bias) => logits.broadcast_add(bias),
        None => Ok(logits),
    }
}

impl TrainingStep for HeadStep {
    fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    fn buffers(&self) -> &[(String, Var)] {
        &[]
    }

    fn train_with(&mut self, others: Others) -> Result<()> {
        self.others = others;
        Ok(())
    }

    fn forward(&mut self, features: &Tensor, generator: &mut ChaCha8Rng) -> Result<Tensor> {
        let (p, width) = (self.dropout, features.dim(1)?);
        let each = if p > 0.0 { width } else { 0 };
        let features = self.others.draw(generator, each, |generator| {
            eager::dropout(&features.detach(), p, generator)
        })?;
        let values = self.parameters.iter().map(|(_, v)| v.as_detached_tensor());
        let values: Vec<Tensor> = values.collect();
        let logits = head_logits(&features, &values[0], values.get(1))?;
        self.features = Some(features);
        Ok(logits)
    }

    fn backward(
        &mut self,
        logits_gradient: &Tensor,
        sink: &mut dyn FnMut(usize, Tensor) -> Result<()>,
    ) -> Result<()> {
        let Some(features) = self.features.take() else {
            bail!("backward without a forward pass before it");
        };
        if self.parameters.len() > 1 {
            sink(1, logits_gradient.sum(0)?)?;
        }
        sink(0, logits_gradient.t()?.matmul(&features)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::exec::params::Params;
    use crate::graph::{Activation, Builder, Conv2d, InitScheme, Norm};

    fn graph() -> Graph {
        let mut b = Builder::new(InitScheme::FanIn);
        let image = b.input();
        let x = b.conv_norm("a.0", "a.1", Conv2d::new(3, 4, 3), Norm::PYTORCH, image);
        let x = b.activation("a.2", Activation::Relu6, x);
        let x = b.conv_norm("b.0", "b.1", Conv2d::new(4, 4, 3), Norm::PYTORCH, x);
        let x = b.add("pool", Op::GlobalAvgPool, &[x]);
        let x = b.add("flatten", Op::Flatten, &[x]);
        b.linear("head", 4, 2, x);
        b.finish()
    }

    fn names(list: &[(String, Var)]) -> Vec<&str> {
        list.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn frozen_parts_get_no_gradient_and_keep_their_statistics() -> Result<()> {
        let vb = Params::new(None, 3).var_builder(&Device::Cpu);
        let frozen = ["a.0.weight", "a.1.weight", "a.1.bias"].map(str::to_string);
        let variables = Variables::new(&graph(), &vb, &frozen.into())?;
        let mut step = EagerStep::new(graph(), &variables)?;
        let trained = [
            "b.0.weight",
            "b.1.weight",
            "b.1.bias",
            "head.weight",
            "head.bias",
        ];
        assert_eq!(names(step.parameters()), trained);
        assert_eq!(
            names(step.buffers()),
            ["b.1.running_mean", "b.1.running_var"]
        );
        let before = variables.tensors()["a.1.running_mean"].to_vec1::<f32>()?;
        let old = step.buffers()[0].1.to_vec1::<f32>()?;
        let images = Tensor::rand(-1f32, 1.0, (2, 3, 6, 6), &Device::Cpu)?;
        let logits = step.forward(&images, &mut ChaCha8Rng::seed_from_u64(0))?;
        assert_eq!(logits.dims(), [2, 2]);
        assert!(!logits.track_op());
        let after = variables.tensors()["a.1.running_mean"].to_vec1::<f32>()?;
        assert_eq!(before, after);
        assert_ne!(
            old,
            variables.tensors()["b.1.running_mean"].to_vec1::<f32>()?
        );
        let mut seen = Vec::new();
        step.backward(&logits, &mut |index, gradient| {
            let norm = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
            assert!(norm.is_finite());
            seen.push(index);
            Ok(())
        })?;
        assert_eq!(seen, [4, 3, 2, 1, 0]);
        let again = step.backward(&logits, &mut |_, _| Ok(()));
        assert!(again.unwrap_err().to_string().contains("forward"));
        Ok(())
    }
}
