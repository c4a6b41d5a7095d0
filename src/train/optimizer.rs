use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, Var};

use super::slices::{PART, Workers, with, with_mut};
#[cfg(any(feature = "cuda", test))]
use crate::exec;
use crate::kernels::optimizer as kernels;

/// How gradients become steps; the computation is PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Stochastic gradient descent.
    Sgd { momentum: f64, nesterov: bool },
    /// Adam with decoupled weight decay (Loshchilov and Hutter, 2019).
    AdamW { betas: (f64, f64), eps: f64 },
}

/// What is particular to one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// The learning rate is multiplied with it.
    pub rate_scale: f64,
    pub weight_decay: f64,
}

/// A rule, and what it remembers of every parameter.
pub struct Optimizer {
    rule: Rule,
    /// One for each parameter.
    groups: Vec<Group>,
    names: Vec<String>,
    /// For each parameter, a tensor for each of the rule's [`Rule::slots`].
    state: Vec<Vec<Tensor>>,
    /// Steps done.
    steps: u64,
}

impl Rule {
    /// Names of what is remembered of a parameter.
    fn slots(self) -> &'static [&'static str] {
        match self {
            Rule::Sgd { momentum: 0.0, .. } => &[],
            Rule::Sgd { .. } => &["velocity"],
            Rule::AdamW { .. } => &["mean", "square"],
        }
    }
}

impl Optimizer {
    /// # Errors
    /// Where the device has no room.
    ///
    /// # Panics
    /// Where there is not one group for each parameter.
    pub fn new(rule: Rule, parameters: &[(String, Var)], groups: Vec<Group>) -> Result<Self> {
        assert_eq!(parameters.len(), groups.len(), "a group for each parameter");
        let slots = rule.slots().len();
        let zeros = |variable: &Var| (0..slots).map(|_| variable.zeros_like()).collect();
        Ok(Self {
            rule,
            groups,
            names: parameters.iter().map(|(name, _)| name.clone()).collect(),
            state: parameters
                .iter()
                .map(|(_, v)| zeros(v))
                .collect::<Result<_>>()?,
            steps: 0,
        })
    }

    /// Steps done so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates every parameter in place. `gradients` are in the parameters' order and are
    /// multiplied with `gradient_scale` first.
    ///
    /// # Errors
    /// Where shapes disagree or the device fails.
    pub fn step(
        &mut self,
        parameters: &[(String, Var)],
        gradients: &[Tensor],
        rate: f64,
        gradient_scale: f64,
        workers: &Workers,
    ) -> Result<()> {
        self.steps += 1;
        for (index, ((_, parameter), gradient)) in parameters.iter().zip(gradients).enumerate() {
            let update = Update {
                rule: self.rule,
                rate: rate * self.groups[index].rate_scale,
                weight_decay: self.groups[index].weight_decay,
                gradient_scale,
                step: self.steps,
            };
            let state = &self.state[index];
            match parameter.device() {
                Device::Cpu => update.on_cpu(parameter, gradient, state, workers)?,
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => update.on_cuda(parameter, gradient, state)?,
                _ => update.on_device(parameter, gradient, state)?,
            }
        }
        Ok(())
    }

    /// What is remembered, by `SLOT.PARAMETER`.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        for (name, tensors) in self.names.iter().zip(&self.state) {
            for (slot, tensor) in self.rule.slots().iter().zip(tensors) {
                all.insert(format!("{slot}.{name}"), tensor.clone());
            }
        }
        all
    }

    /// Goes on from what [`Optimizer::state`] gave after so many steps; `read` gives a tensor by
    /// its name there.
    ///
    /// # Errors
    /// What `read` returns.
    pub fn restore<E>(
        &mut self,
        steps: u64,
        mut read: impl FnMut(&str, &Tensor) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<(), E> {
        self.steps = steps;
        for (name, tensors) in self.names.iter().zip(&mut self.state) {
            for (slot, tensor) in self.rule.slots().iter().zip(tensors) {
                *tensor = read(&format!("{slot}.{name}"), tensor)?;
            }
        }
        Ok(())
    }
}

/// One step of one parameter.
struct Update {
    rule: Rule,
    rate: f64,
    weight_decay: f64,
    gradient_scale: f64,
    /// From 1.
    step: u64,
}

impl Update {
    fn on_cpu(
        &self,
        parameter: &Var,
        gradient: &Tensor,
        state: &[Tensor],
        workers: &Workers,
    ) -> Result<()> {
        let isa = workers.isa;
        match self.rule {
            Rule::Sgd { momentum, nesterov } => {
                let sgd = kernels::Sgd {
                    rate: self.rate as f32,
                    momentum: momentum as f32,
                    nesterov,
                    weight_decay: self.weight_decay as f32,
                    gradient_scale: self.gradient_scale as f32,
                };
                with(gradient, |g| {
                    with_mut(parameter, |p| match state {
                        [] => {
                            let parts = p.chunks_mut(PART).zip(g.chunks(PART)).collect();
                            workers.each(parts, |(p, g)| sgd.plain(isa, p, g));
                            Ok(())
                        }
                        [velocity, ..] => with_mut(velocity, |v| {
                            let parts = p.chunks_mut(PART).zip(g.chunks(PART));
                            let parts = parts.zip(v.chunks_mut(PART)).collect();
                            workers.each(parts, |((p, g), v)| sgd.with_velocity(isa, p, g, v));
                        }),
                    })
                })??
            }
            Rule::AdamW { betas, eps } => {
                let [mean_correction, square_correction] = self.corrections(betas);
                let adamw = kernels::AdamW {
                    shrink: (1.0 - self.rate * self.weight_decay) as f32,
                    towards_mean: (1.0 - betas.0) as f32,
                    beta2: betas.1 as f32,
                    towards_square: (1.0 - betas.1) as f32,
                    step_size: (self.rate / mean_correction) as f32,
                    correction: square_correction.sqrt() as f32,
                    eps: eps as f32,
                    gradient_scale: self.gradient_scale as f32,
                };
                let [mean, square] = state else {
                    candle_core::bail!("AdamW remembers two tensors of a parameter");
                };
                with(gradient, |g| {
                    with_mut(parameter, |p| {
                        with_mut(mean, |m| {
                            with_mut(square, |v| {
                                let parts = p.chunks_mut(PART).zip(g.chunks(PART));
                                let parts = parts.zip(m.chunks_mut(PART));
                                let parts = parts.zip(v.chunks_mut(PART)).collect();
                                workers.each(parts, |(((p, g), m), v)| {
                                    adamw.update(isa, p, g, m, v);
                                });
                            })
                        })
                    })
                })???
            }
        }
    }

    /// The same by a kernel of the device.
    #[cfg(any(feature = "cuda", test))]
    fn on_cuda(&self, parameter: &Var, gradient: &Tensor, state: &[Tensor]) -> Result<()> {
        match self.rule {
            Rule::Sgd { momentum, nesterov } => {
                let numbers = [self.rate, momentum, self.weight_decay, self.gradient_scale];
                exec::cuda::sgd([parameter, gradient], state.first(), nesterov, numbers)
            }
            Rule::AdamW { betas, eps } => {
                let [mean, square] = state else {
                    candle_core::bail!("AdamW remembers two tensors of a parameter");
                };
                let [mean_correction, square_correction] = self.corrections(betas);
                let numbers = [
                    1.0 - self.rate * self.weight_decay,
                    self.rate / mean_correction,
                    betas.0,
                    betas.1,
                    eps,
                    square_correction.sqrt(),
                    self.gradient_scale,
                ];
                exec::cuda::adamw([parameter, gradient, mean, square], numbers)
            }
        }
    }

    /// The same in candle's operations.
    fn on_device(&self, parameter: &Var, gradient: &Tensor, state: &[Tensor]) -> Result<()> {
        let gradient = (gradient * self.gradient_scale)?;
        let value = parameter.as_detached_tensor();
        match self.rule {
            Rule::Sgd { momentum, nesterov } => {
                let mut step = (gradient + (&value * self.weight_decay)?)?;
                if let [velocity, ..] = state {
                    let next = ((velocity * momentum)? + &step)?;
                    velocity.slice_set(&next, 0, 0)?;
                    step = if nesterov {
                        (step + (next * momentum)?)?
                    } else {
                        next
                    };
                }
                parameter.set(&(value - (step * self.rate)?)?)
            }
            Rule::AdamW { betas, eps } => {
                let [mean, square] = state else {
                    candle_core::bail!("AdamW remembers two tensors of a parameter");
                };
                let [mean_correction, square_correction] = self.corrections(betas);
                let m = (mean + ((&gradient - mean)? * (1.0 - betas.0))?)?;
                let v = ((square * betas.1)? + (gradient.sqr()? * (1.0 - betas.1))?)?;
                let denominator = ((v.sqrt()? / square_correction.sqrt())? + eps)?;
                let step = ((&m * (self.rate / mean_correction))? / denominator)?;
                mean.slice_set(&m, 0, 0)?;
                square.slice_set(&v, 0, 0)?;
                let shrunk = (value * (1.0 - self.rate * self.weight_decay))?;
                parameter.set(&(shrunk - step)?)
            }
        }
    }

    /// 1 - βᵗ for both averages.
    fn corrections(&self, betas: (f64, f64)) -> [f64; 2] {
        let step = self.step as f64;
        [betas.0, betas.1].map(|beta| 1.0 - beta.powf(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Way<'a> = dyn Fn(&Update, &Var, &Tensor, &[Tensor]) -> Result<()> + 'a;

    /// Ten steps by each of the ways, from the same start.
    #[test]
    fn cuda_and_candle_take_the_cpus_steps() -> Result<()> {
        let rules = [
            Rule::Sgd {
                momentum: 0.0,
                nesterov: false,
            },
            Rule::Sgd {
                momentum: 0.9,
                nesterov: false,
            },
            Rule::Sgd {
                momentum: 0.9,
                nesterov: true,
            },
            Rule::AdamW {
                betas: (0.9, 0.999),
                eps: 1e-8,
            },
        ];
        let random = || Tensor::randn(0f32, 1.0, (37, 29), &Device::Cpu);
        let workers = Workers::new(2).map_err(candle_core::Error::wrap)?;
        for rule in rules {
            let start = random()?;
            let gradients = (0..10).map(|_| random()).collect::<Result<Vec<_>>>()?;
            let run = |step: &Way, device: &Device| {
                let start = start.copy()?.to_device(device)?;
                let parameter = Var::from_tensor(&start)?;
                let zeros = rule.slots().iter().map(|_| start.zeros_like());
                let state = zeros.collect::<Result<Vec<_>>>()?;
                for (index, gradient) in gradients.iter().enumerate() {
                    let update = Update {
                        rule,
                        rate: 0.1,
                        weight_decay: 0.02,
                        gradient_scale: 0.5,
                        step: index as u64 + 1,
                    };
                    step(&update, &parameter, &gradient.to_device(device)?, &state)?;
                }
                parameter.flatten_all()?.to_vec1::<f32>()
            };
            let cpu = &Device::Cpu;
            let on_cpu = run(
                &|update, p, g, state| update.on_cpu(p, g, state, &workers),
                cpu,
            )?;
            let on_device = run(&|update, p, g, state| update.on_device(p, g, state), cpu)?;
            let cuda = match cfg!(feature = "cuda") {
                true => Device::new_cuda(0)?,
                false => Device::Cpu,
            };
            let on_cuda = run(&|update, p, g, state| update.on_cuda(p, g, state), &cuda)?;
            for (name, other) in [("candle", on_device), ("cuda", on_cuda)] {
                let pairs = on_cpu.iter().zip(&other);
                let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-5, "{rule:?}, {name}: {worst}");
            }
        }
        Ok(())
    }
}
