use std::collections::BTreeSet;
use std::io::Write;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::Context;
use candle_core::Tensor;
use clap::Args;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::{Global, Outcome, ReportFormat, complain};
use crate::exec::cpu::Plan;
use crate::exec::params::Params;
use crate::exec::{Precision, Runner, TrainingStep, Variables, training_step, with_advice};
use crate::train::{CrossEntropy, Group, Optimizer, Rule, Targets, Workers};
use crate::weights::{Model, ModelError, Request, WeightsChoice, resolve};

/// Time forward passes, or training steps, on random input
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce bench -m resnet50
  sconce bench -m mobilenet_v2 -b 16 -j 1 --format json
  sconce bench -m resnet18 -b 16 --train
  sconce bench -m resnet18 -v              where the time goes, step by step")]
pub struct Arguments {
    /// Images that go through the network together
    #[arg(short, long, value_name = "N", default_value = "1")]
    batch_size: NonZeroUsize,
    /// Time full training steps (forward, backward, SGD with momentum) instead
    #[arg(long)]
    train: bool,
    /// How long to measure
    #[arg(long, value_name = "S", default_value = "3", value_parser = seconds)]
    seconds: Duration,
    /// Height and width of the images [default: what the network was trained on]
    #[arg(long, value_name = "N")]
    image_size: Option<NonZeroUsize>,
    /// How to print
    #[arg(long, value_enum, default_value_t = ReportFormat::Text)]
    format: ReportFormat,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "expected a number of seconds".into())
}

/// What was measured, as `--format json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    batch_size: usize,
    threads: usize,
    device: String,
    /// What a CUDA device computes with; the CPU's is f32.
    precision: Precision,
    train: bool,
    /// From nothing to a network that is ready: reading the weights and packing them.
    load_ms: f64,
    median_ms: f64,
    min_ms: f64,
    images_per_second: f64,
    /// Of the whole process; None where the system does not say.
    peak_memory_mb: Option<f64>,
}

/// What is timed.
enum Work {
    /// The images, `[N, H, W, 3]`.
    Forward(Box<Runner>, Vec<f32>),
    /// The same, with the images on the device.
    There(Box<Runner>, Tensor),
    Train(Box<Training>),
}

impl Work {
    /// For every step of a plan the node that it belongs to, what it is, and the time spent in it.
    fn timings(&self) -> Vec<(&str, &'static str, Duration)> {
        match self {
            Work::Forward(runner, _) => runner.plan().into_iter().flat_map(Plan::timings).collect(),
            Work::There(..) => Vec::new(),
            Work::Train(training) => training.step.timings(),
        }
    }
}

/// A network in training on one batch.
struct Training {
    step: Box<dyn TrainingStep>,
    optimizer: Optimizer,
    workers: Workers,
    loss: CrossEntropy,
    /// `[N, 3, H, W]`
    images: Tensor,
    labels: Vec<usize>,
    generator: ChaCha8Rng,
}

impl Training {
    fn new(model: &Model, images: Tensor, global: &Global) -> anyhow::Result<Self> {
        let graph = model.graph.clone();
        let params = Params::new(model.source.clone(), model.seed);
        let vb = params.var_builder(images.device());
        let variables = Variables::new(&graph, &vb, &BTreeSet::new())?;
        let classes = graph.num_classes();
        let labels = (0..images.dim(0)?).map(|i| i * 7 % classes).collect();
        let step = training_step(graph, &variables, global.plan_options())?;
        let rule = Rule::Sgd {
            momentum: 0.9,
            nesterov: false,
        };
        let group = Group {
            rate_scale: 1.0,
            weight_decay: 0.0,
        };
        let groups = vec![group; step.parameters().len()];
        Ok(Self {
            optimizer: Optimizer::new(rule, step.parameters(), groups)?,
            step,
            workers: Workers::new(global.threads())?,
            loss: CrossEntropy::default(),
            images,
            labels,
            generator: ChaCha8Rng::seed_from_u64(global.seed()),
        })
    }

    fn step(&mut self) -> anyhow::Result<()> {
        const RATE: f64 = 1e-4;
        let (images, count) = (&self.images, self.images.dim(0)?);
        let outcome = self.step.forward(images, &mut self.generator);
        let logits = with_advice(outcome, count, |count| self.step.probe(images, count))?;
        let targets = Targets::Classes(&self.labels);
        let (_, gradient) = self.loss.loss(&logits, targets)?;
        let mut gradients = vec![None; self.step.parameters().len()];
        let outcome = self.step.backward(&gradient, &mut |index, gradient| {
            gradients[index] = Some(gradient);
            Ok(())
        });
        with_advice(outcome, count, |count| {
            gradients.fill(None);
            self.step.probe(images, count)
        })?;
        let gradients: Option<Vec<Tensor>> = gradients.into_iter().collect();
        let gradients = gradients.context("a parameter without a gradient")?;
        let parameters = self.step.parameters();
        self.optimizer
            .step(parameters, &gradients, RATE, 1.0, &self.workers)?;
        Ok(())
    }
}

/// Passes before measuring, and at least as many measured.
const WARM_UP: usize = 3;

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let request = global.request();
    // Speed needs no download.
    let request = Request {
        hub: request.hub.clone().offline(),
        ..request
    };
    let started = Instant::now();
    let model = match resolve(&request) {
        // Speed does not depend on the weights' values: random ones serve.
        Err(ModelError::NotHere { .. } | ModelError::Unpublished { .. }) => resolve(&Request {
            weights: WeightsChoice::None,
            ..request
        })?,
        other => other?,
    };
    let mut load = started.elapsed();
    let device = global.device()?;
    let size = arguments
        .image_size
        .map_or(model.preprocessing.crop, NonZeroUsize::get);
    let count = arguments.batch_size.get();
    let mut rng = ChaCha8Rng::seed_from_u64(global.seed());
    let images: Vec<f32> = (0..count * size * size * 3)
        .map(|_| rng.random_range(-2.0..2.0))
        .collect();
    let started = Instant::now();
    let mut work = if arguments.train {
        let images = Tensor::from_vec(images, (count, 3, size, size), &device)?;
        Work::Train(Box::new(Training::new(&model, images, global)?))
    } else {
        let runner = model.runner(&device, [size; 2], global.plan_options())?;
        let runner = Box::new(runner);
        if device.is_cpu() {
            Work::Forward(runner, images)
        } else {
            let images = Tensor::from_vec(images, (count, size, size, 3), &device)?;
            Work::There(runner, images)
        }
    };
    load += started.elapsed();
    let mut times = Vec::new();
    let mut pass = || -> anyhow::Result<f64> {
        let started = Instant::now();
        match &mut work {
            Work::Forward(runner, images) => runner.run(images, count).map(drop)?,
            Work::There(runner, images) => {
                let pass = |count| runner.run_there(&images.narrow(0, 0, count)?).map(drop);
                with_advice(pass(count), count, pass)?;
            }
            Work::Train(training) => training.step()?,
        }
        device.synchronize()?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    for _ in 0..WARM_UP {
        pass()?;
    }
    let started = Instant::now();
    while times.len() < WARM_UP || started.elapsed() < arguments.seconds {
        times.push(pass()?);
    }
    times.sort_by(f64::total_cmp);
    let median_ms = times[times.len() / 2];
    let report = Report {
        model: model.name,
        batch_size: count,
        threads: global.threads(),
        device: if device.is_cpu() {
            "cpu"
        } else if device.is_cuda() {
            "cuda"
        } else {
            "metal"
        }
        .into(),
        precision: global.precision.unwrap_or_default(),
        train: arguments.train,
        load_ms: load.as_secs_f64() * 1e3,
        median_ms,
        min_ms: times[0],
        images_per_second: count as f64 / median_ms * 1e3,
        peak_memory_mb: peak_memory_mb(),
    };
    let mut out = global.stdout();
    if global.verbose {
        complain(&format!("ready after {:.1} ms", report.load_ms));
        let passes = (times.len() + WARM_UP) as f64;
        for (name, kind, time) in work.timings() {
            let ms = time.as_secs_f64() * 1e3 / passes;
            complain(&format!("{ms:8.3} ms  {kind:30} {name}"));
        }
    }
    match arguments.format {
        ReportFormat::Json => writeln!(out, "{}", serde_json::to_string(&report)?)?,
        ReportFormat::Text => {
            let computed = match device.is_cpu() {
                true => format!("{} threads", report.threads),
                false => format!("{} in {}", report.device, report.precision),
            };
            writeln!(
                out,
                "{}, {size} x {size}, batch {count}, {computed}: median {median_ms:.2} ms, fastest {:.2} ms, {:.1} images a second",
                report.model, report.min_ms, report.images_per_second
            )?;
            if let Some(peak) = report.peak_memory_mb {
                writeln!(out, "peak memory {peak:.0} MB")?;
            }
        }
    }
    Ok(Outcome::AllDone)
}

/// The most memory that this process has had, in 10⁶ bytes.
#[cfg(unix)]
fn peak_memory_mb() -> Option<f64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the struct that it is given.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
            return None;
        }
        usage.assume_init()
    };
    // Bytes on Apple's systems, KiB elsewhere.
    let unit = if cfg!(target_vendor = "apple") {
        1.0
    } else {
        1024.0
    };
    Some(usage.ru_maxrss as f64 * unit / 1e6)
}

#[cfg(not(unix))]
fn peak_memory_mb() -> Option<f64> {
    None
}
