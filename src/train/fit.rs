//! The loop.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor, Var};
use serde::Serialize;

use super::groups::{frozen_names, groups};
use super::loss::{CrossEntropy, Targets, mixed_targets};
use super::metrics::Evaluation;
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::settings::{ClassWeights, Metric, Settings};
use super::slices::Workers;
use super::source::{Features, Source};
use super::state::{Best, Progress, State, StateError, WEIGHTS};
use crate::data::{
    Augmentation, BatchPlan, Cache, CacheLimit, Dataset, Decoder, Purpose, Sample, Skipped,
    generator,
};
use crate::exec::cpu::{Options, PlanError};
use crate::exec::params::{Params, TensorMap, TensorSource};
use crate::exec::{HeadStep, Runner, TrainingStep, Variables, head_logits, training_step};
use crate::graph::Graph;
use crate::weights::{Description, WeightsError, write_tensors, write_whole};

/// A run: what to train, on what, and where the results go.
pub struct Run {
    pub settings: Settings,
    /// What the model file will say; its labels are the data set's classes.
    pub model: Description,
    /// What to begin with; None: random weights.
    pub source: Option<Arc<dyn TensorSource>>,
    pub dataset: Dataset,
    pub device: Device,
    pub threads: usize,
    /// Bytes that decoded images may take, so that they need not be decoded in each epoch.
    pub cache_bytes: u64,
    /// A folder that exists.
    pub out: PathBuf,
    /// Checkpoints within an epoch come that far apart.
    pub checkpoint_every: Duration,
    /// Set from outside to end after the step that is under way.
    pub stop: Arc<AtomicBool>,
}

/// The best model, as it becomes better.
pub const MODEL_FILE: &str = "model.safetensors";
/// Enough to go on as if never stopped.
pub const CHECKPOINT_FILE: &str = "last.checkpoint";
/// A line of JSON an epoch.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// Every setting, as resolved.
pub const CONFIG_FILE: &str = "config.toml";

/// What happens during a run, for those who watch.
pub enum Event<'a> {
    /// An image could not be read; each is named once.
    Skipped(&'a Skipped),
    /// So many images went through the frozen backbone.
    Features {
        done: usize,
        total: usize,
    },
    Batch(BatchReport),
    /// An epoch's figures, and what its network said of each validation image.
    Epoch(&'a EpochReport, &'a Evaluation),
}

/// Where an epoch stands.
#[derive(Clone, Copy, Debug)]
pub struct BatchReport {
    /// From 1.
    pub epoch: u64,
    pub epochs: u64,
    /// Batches done, of so many.
    pub batch: u64,
    pub batches: u64,
    /// Of the epoch so far, on the training images as they were augmented.
    pub loss: f64,
    pub accuracy: f64,
    pub learning_rate: f64,
    pub images_per_second: f64,
    /// Time that the rest of the run will take.
    pub left: Duration,
}

/// A line of metrics.jsonl.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EpochReport {
    /// From 1.
    pub epoch: u64,
    pub train_loss: f64,
    pub train_accuracy: f64,
    pub val_loss: f64,
    pub val_accuracy: f64,
    pub val_top5: f64,
    pub val_macro_f1: f64,
    /// Of the epoch's last step.
    pub learning_rate: f64,
    /// Trained on, validation not counted.
    pub images_per_second: f64,
    /// Of the epoch with its validation.
    pub seconds: f64,
    /// Better than all before it.
    #[serde(skip)]
    pub is_best: bool,
}

/// How a run ended.
pub enum End {
    Finished(Summary),
    /// As was asked for; everything is saved.
    Interrupted {
        epoch: u64,
    },
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub model: PathBuf,
    pub classes: usize,
    pub train_images: usize,
    pub val_images: usize,
    pub best: Best,
    pub epochs: u64,
    pub seconds: f64,
    /// The best model's, where this process saw its epoch.
    pub evaluation: Option<Evaluation>,
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("{}", first_line(.0))]
    Device(#[from] candle_core::Error),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("{path}: {error}")]
    Io { path: String, error: io::Error },
    #[error("--freeze {given}: no such part of {model} (expected {expected})")]
    Freeze {
        given: String,
        model: String,
        expected: String,
    },
    #[error(
        "epoch {epoch}, batch {batch}: the {what} is {value} at a learning rate of {rate:.2e} ({})",
        advice(*.clipped, *.rate)
    )]
    Diverged {
        what: &'static str,
        value: f64,
        epoch: u64,
        batch: u64,
        rate: f64,
        clipped: bool,
    },
    #[error("{error}; {kept}")]
    Save { error: String, kept: String },
    #[error("epoch {epoch}: none of the images could be read, the last: {name}: {reason}")]
    NothingRead {
        epoch: u64,
        name: String,
        reason: String,
    },
    #[error("none of the images to validate on could be read, the last: {name}: {reason}")]
    NothingValidated { name: String, reason: String },
    #[error(
        "{path}: the images are not those that the run was started with (give the same data, or start afresh with --force)"
    )]
    OtherData { path: String },
    #[error(transparent)]
    State(#[from] StateError),
}

/// What comes after is a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().into()
}

fn advice(clipped: bool, rate: f64) -> String {
    let clip = if clipped { "" } else { ", or --clip-norm 1" };
    format!("try --lr {:.0e}, or --warmup 1{clip}", rate / 10.0)
}

impl Run {
    /// Trains, and leaves the results in `out`. Goes on from `state` where there is one, to the
    /// same bytes as without the interruption.
    ///
    /// # Errors
    /// See [`TrainError`]. What was saved before stays.
    pub fn fit(
        self,
        state: Option<&State>,
        observe: &mut dyn FnMut(Event),
    ) -> Result<End, TrainError> {
        match Fitting::start(self, state, observe)? {
            Some((fitting, source)) => fitting.run(source, observe),
            None => Ok(End::Interrupted {
                epoch: state.map_or(0, |s| s.progress.epoch),
            }),
        }
    }

    /// Everything of the data that decides what is learned.
    fn fingerprint(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut eat = |bytes: &[u8]| {
            for byte in bytes.iter().chain(&[0]) {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        self.dataset.classes.iter().for_each(|c| eat(c.as_bytes()));
        for samples in [&self.dataset.train, &self.dataset.validation] {
            eat(&samples.len().to_le_bytes());
            for sample in samples {
                let name = sample.picture.name();
                let name = name.strip_prefix(&self.settings.data).unwrap_or(&name);
                eat(name.as_bytes());
                eat(&sample.label.to_le_bytes());
            }
        }
        format!("{hash:016x}")
    }

    /// Of each image of the plan, at most `limit` bytes in all are kept.
    fn batch_plan(
        &self,
        samples: &[Sample],
        augmentation: Augmentation,
        limit: &CacheLimit,
    ) -> BatchPlan {
        BatchPlan {
            samples: samples.into(),
            cache: Cache::new(samples.len(), limit.clone()),
            decoder: Decoder {
                max_pixels: self.settings.max_pixels,
                background: None,
            },
            preprocessing: self.model.preprocessing,
            augmentation,
            batch_size: self.settings.batch_size,
            seed: self.settings.seed,
            threads: self.threads,
        }
    }
}

/// What validation takes in.
enum Validation {
    Images(BatchPlan),
    Features(Features),
}

/// A run under way.
struct Fitting {
    run: Run,
    graph: Graph,
    fingerprint: String,
    variables: Variables,
    step: Box<dyn TrainingStep>,
    validation: Validation,
    optimizer: Optimizer,
    loss: CrossEntropy,
    schedule: Schedule,
    /// Moving averages of parameters and running statistics, by name.
    averages: BTreeMap<String, Tensor>,
    workers: Workers,
    progress: Progress,
    /// Names of images that were reported as unreadable.
    named: BTreeSet<String>,
    last_checkpoint: Instant,
    /// When this process began, and the time that others spent before.
    began: Instant,
    seconds_before: f64,
    best_evaluation: Option<Evaluation>,
}

impl Fitting {
    /// None where it was asked to stop meanwhile.
    fn start(
        run: Run,
        state: Option<&State>,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<(Self, Source)>, TrainError> {
        let began = Instant::now();
        let settings = &run.settings;
        let graph = run.model.architecture.graph(run.model.labels.len());
        let fingerprint = run.fingerprint();
        if let Some(state) = state
            && state.data_fingerprint != fingerprint
        {
            return Err(TrainError::OtherData {
                path: settings.data.clone(),
            });
        }
        let size = [run.model.preprocessing.crop; 2];
        graph.shapes(size[0], size[1]).map_err(PlanError::from)?;
        let frozen =
            frozen_names(&graph, &settings.freeze).map_err(|expected| TrainError::Freeze {
                given: settings.freeze.clone(),
                model: run.model.name.clone(),
                expected,
            })?;
        let weights = match state {
            Some(state) => Some(state.weights()),
            None => run.source.clone(),
        };
        let params = Params::new(weights, settings.seed);
        let vb = params.var_builder(&run.device);
        let variables = Variables::new(&graph, &vb, &frozen)?;
        if let Some(state) = state {
            state.check_complete(&params.report())?;
        }
        let mut named = BTreeSet::new();
        let options = Options::threads(run.threads).exact(settings.exact);
        let limit = CacheLimit::new(run.cache_bytes);
        let (step, source, validation) = if settings.freeze == "backbone" {
            let step: Box<dyn TrainingStep> = Box::new(HeadStep::new(&graph, &variables)?);
            let (node, _) = graph.features();
            let mut runner = Runner::new(graph.clone(), &vb, size, node, options)?;
            let plain = [&run.dataset.train, &run.dataset.validation]
                // Each is read once.
                .map(|samples| run.batch_plan(samples, Augmentation::NONE, &CacheLimit::default()));
            let reused = settings.augmentation() == Augmentation::NONE;
            let total =
                run.dataset.validation.len() + if reused { run.dataset.train.len() } else { 0 };
            let mut before = 0;
            let mut compute = |plan: &BatchPlan| {
                let features =
                    Features::compute(&mut runner, plan, &run.device, &mut |done, skipped| {
                        for image in skipped {
                            if named.insert(image.name.clone()) {
                                observe(Event::Skipped(image));
                            }
                        }
                        let done = before + done;
                        observe(Event::Features { done, total });
                        !run.stop.load(Ordering::Relaxed)
                    });
                before += plan.samples.len();
                features
            };
            let mut features = None;
            if reused {
                match compute(&plain[0])? {
                    Some(all) => features = Some(all),
                    None => return Ok(None),
                }
            }
            let Some(validation) = compute(&plain[1])? else {
                return Ok(None);
            };
            let plan = run.batch_plan(&run.dataset.train, settings.augmentation(), &limit);
            let source = Source::behind(runner, features, plan, &run.device);
            (step, source, Validation::Features(validation))
        } else {
            let step = training_step(graph.clone(), &variables, options)?;
            let plan = run.batch_plan(&run.dataset.train, settings.augmentation(), &limit);
            let validation = &run.dataset.validation;
            let validation = run.batch_plan(validation, Augmentation::NONE, &limit);
            let source = Source::images(plan, &run.device);
            (step, source, Validation::Images(validation))
        };
        let names = step.parameters().iter().map(|(name, _)| name.as_str());
        let groups = groups(&graph, names, settings.weight_decay, settings.layer_decay);
        let mut optimizer = Optimizer::new(settings.rule(), step.parameters(), groups)?;
        let mut averages = BTreeMap::new();
        if settings.ema.is_some() {
            for (name, variable) in step.parameters().iter().chain(step.buffers()) {
                averages.insert(name.clone(), variable.as_tensor().copy()?.detach());
            }
        }
        let mut progress = Progress::default();
        if let Some(state) = state {
            progress = state.progress.clone();
            optimizer.restore(progress.step, |name, like| {
                state.tensor(&format!("{OPTIMIZER}{name}"), like)
            })?;
            for (name, average) in &mut averages {
                *average = state.tensor(&format!("{AVERAGE}{name}"), average)?;
            }
        }
        let batches = source.plan.training_batches() as u64;
        let schedule = settings.schedule(batches.div_ceil(settings.accumulate as u64));
        let loss = CrossEntropy {
            label_smoothing: settings.label_smoothing,
            class_weights: match settings.class_weights {
                ClassWeights::None => None,
                ClassWeights::Auto => Some(class_weights(&run.dataset.class_counts())),
            },
        };
        let seconds_before = progress.seconds;
        let workers = Workers::new(run.threads).map_err(|error| TrainError::Io {
            path: "threads".into(),
            error,
        })?;
        let fitting = Self {
            graph,
            fingerprint,
            variables,
            step,
            validation,
            optimizer,
            loss,
            schedule,
            averages,
            workers,
            progress,
            named,
            last_checkpoint: Instant::now(),
            began,
            seconds_before,
            best_evaluation: None,
            run,
        };
        Ok(Some((fitting, source)))
    }

    /// Of all processes that worked on the run.
    fn seconds(&self) -> f64 {
        self.seconds_before + self.began.elapsed().as_secs_f64()
    }

    fn run(
        mut self,
        mut source: Source,
        observe: &mut dyn FnMut(Event),
    ) -> Result<End, TrainError> {
        self.cut_metrics()?;
        while !self.progress.finished {
            let began = Instant::now();
            let (rate, images_per_second) = match self.epoch(&mut source, observe)? {
                Some(done) => done,
                None => {
                    return Ok(End::Interrupted {
                        epoch: self.progress.epoch,
                    });
                }
            };
            let Some(evaluation) = self.validate(observe)? else {
                self.save()?;
                return Ok(End::Interrupted {
                    epoch: self.progress.epoch,
                });
            };
            if !evaluation.loss().is_finite() {
                let batch = self.progress.batch;
                return Err(self.diverged("validation loss", evaluation.loss(), batch, rate));
            }
            let Progress {
                loss_sum,
                images,
                correct,
                ..
            } = self.progress;
            let mut report = EpochReport {
                epoch: self.progress.epoch + 1,
                train_loss: loss_sum / images as f64,
                train_accuracy: correct as f64 / images as f64,
                val_loss: evaluation.loss(),
                val_accuracy: evaluation.accuracy(),
                val_top5: evaluation.top5(),
                val_macro_f1: evaluation.macro_f1(),
                learning_rate: rate,
                images_per_second,
                seconds: began.elapsed().as_secs_f64(),
                is_best: false,
            };
            self.finish_epoch(&mut report, &evaluation)?;
            observe(Event::Epoch(&report, &evaluation));
        }
        let best = self.progress.best.unwrap_or(Best {
            epoch: 0,
            accuracy: 0.0,
            macro_f1: 0.0,
        });
        Ok(End::Finished(Summary {
            model: self.run.out.join(MODEL_FILE),
            classes: self.run.dataset.classes.len(),
            train_images: self.run.dataset.train.len(),
            val_images: self.run.dataset.validation.len(),
            best,
            epochs: self.progress.epoch,
            seconds: self.progress.seconds,
            evaluation: self.best_evaluation,
        }))
    }

    /// Trains to the end of the epoch. Gives the last step's rate and the images a second; None
    /// where it was asked to stop.
    fn epoch(
        &mut self,
        source: &mut Source,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<(f64, f64)>, TrainError> {
        let began = Instant::now();
        let epoch = self.progress.epoch;
        let settings = self.run.settings.clone();
        let batches = source.plan.training_batches() as u64;
        let mut rate = self.schedule.rate(self.progress.step.saturating_sub(1));
        let mut images_here = 0;
        let mut unread = None;
        let mut inputs = source.epoch(epoch, self.progress.batch as usize)?;
        let mut gradients: Vec<Option<Tensor>> = vec![None; self.step.parameters().len()];
        // Batches since the last step, those of them that had images, and where they began.
        let (mut waiting, mut filled) = (0, 0);
        let mut pending = self.progress.clone();
        while pending.batch < batches
            && let Some(batch) = inputs.next()
        {
            let batch = batch?;
            for image in &batch.skipped {
                if self.named.insert(image.name.clone()) {
                    observe(Event::Skipped(image));
                }
            }
            unread = batch.skipped.into_iter().next_back().or(unread);
            rate = self.schedule.rate(pending.step);
            let index = pending.batch;
            if !batch.labels.is_empty() {
                let mut dropout = generator(settings.seed, Purpose::Dropout, epoch, index);
                let logits = self.step.forward(&batch.tensor, &mut dropout)?;
                let mixed = batch.own_share.map(|own| {
                    let classes = self.run.dataset.classes.len();
                    mixed_targets(&batch.labels, own, classes)
                });
                let targets = match &mixed {
                    Some(distributions) => Targets::Distributions(distributions),
                    None => Targets::Classes(&batch.labels),
                };
                let (loss, at_logits) = self.loss.loss(&logits, targets)?;
                if !loss.is_finite() {
                    return Err(self.diverged("loss", loss, index, rate));
                }
                let workers = &self.workers;
                self.step.backward(&at_logits, &mut |index, gradient| {
                    match &mut gradients[index] {
                        Some(sum) if sum.device().is_cpu() => workers.add(sum, &gradient)?,
                        Some(sum) => *sum = (&*sum + gradient)?,
                        // What is added to must be this loop's own.
                        empty if settings.accumulate > 1 => *empty = Some(gradient.copy()?),
                        empty => *empty = Some(gradient),
                    }
                    Ok(())
                })?;
                let count = batch.labels.len();
                filled += 1;
                images_here += count as u64;
                pending.images += count as u64;
                pending.loss_sum += loss * count as f64;
                pending.correct += named_rightly(&logits, &batch.labels)?;
            }
            pending.batch += 1;
            waiting += 1;
            if waiting == settings.accumulate || pending.batch == batches {
                if filled > 0 {
                    self.update(&mut gradients, filled, rate, index)?;
                    pending.step += 1;
                }
                (waiting, filled) = (0, 0);
                let spent = began.elapsed().as_secs_f64();
                self.progress = pending.clone();
                observe(Event::Batch(self.batch_report(
                    batches,
                    rate,
                    images_here,
                    spent,
                )));
                if self.run.stop.load(Ordering::Relaxed) {
                    self.save()?;
                    return Ok(None);
                }
                if self.last_checkpoint.elapsed() >= self.run.checkpoint_every {
                    self.save()?;
                }
            }
        }
        if self.progress.images == 0 {
            let Skipped { name, reason } = unread.unwrap_or_else(nothing_skipped);
            return Err(TrainError::NothingRead {
                epoch: epoch + 1,
                name,
                reason,
            });
        }
        let speed = images_here as f64 / began.elapsed().as_secs_f64();
        Ok(Some((rate, speed)))
    }

    fn batch_report(&self, batches: u64, rate: f64, images: u64, spent: f64) -> BatchReport {
        let Progress {
            epoch,
            batch,
            loss_sum,
            ..
        } = self.progress;
        let seen = self.progress.images.max(1) as f64;
        let done = (epoch * batches + batch).max(1) as f64;
        let all = (self.run.settings.epochs * batches) as f64;
        let left = self.seconds() / done * (all - done);
        BatchReport {
            epoch: epoch + 1,
            epochs: self.run.settings.epochs,
            batch,
            batches,
            loss: loss_sum / seen,
            accuracy: self.progress.correct as f64 / seen,
            learning_rate: rate,
            images_per_second: images as f64 / spent,
            left: Duration::try_from_secs_f64(left).unwrap_or_default(),
        }
    }

    /// One step with the mean of `count` batches' gradients.
    fn update(
        &mut self,
        gradients: &mut [Option<Tensor>],
        count: usize,
        rate: f64,
        batch: u64,
    ) -> Result<(), TrainError> {
        let mut ready = Vec::with_capacity(gradients.len());
        let mut squares = 0.0;
        for (gradient, (_, variable)) in gradients.iter_mut().zip(self.step.parameters()) {
            let gradient = match gradient.take() {
                Some(gradient) => gradient,
                None => variable.zeros_like()?,
            };
            squares += if gradient.device().is_cpu() {
                self.workers.sum_of_squares(&gradient)?
            } else {
                f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?)
            };
            ready.push(gradient);
        }
        let norm = squares.sqrt() / count as f64;
        if !norm.is_finite() {
            return Err(self.diverged("gradient", norm, batch, rate));
        }
        let mut scale = 1.0 / count as f64;
        if let Some(most) = self.run.settings.clip_norm {
            // As PyTorch's clip_grad_norm_.
            scale *= (most / (norm + 1e-6)).min(1.0);
        }
        let parameters = self.step.parameters();
        self.optimizer
            .step(parameters, &ready, rate, scale, &self.workers)?;
        if let Some(decay) = self.run.settings.ema {
            // A short memory at first, when everything before is far away.
            let steps = self.optimizer.steps() as f64;
            let decay = decay.min((1.0 + steps) / (10.0 + steps));
            let variables = self.step.parameters().iter().chain(self.step.buffers());
            for (name, variable) in variables {
                let Some(average) = self.averages.get_mut(name) else {
                    continue;
                };
                let value = variable.as_detached_tensor();
                if value.device().is_cpu() {
                    let towards = (1.0 - decay) as f32;
                    self.workers.blend(average, &value, towards)?;
                } else {
                    *average = ((&*average * decay)? + (value * (1.0 - decay))?)?;
                }
            }
        }
        Ok(())
    }

    fn diverged(&self, what: &'static str, value: f64, batch: u64, rate: f64) -> TrainError {
        TrainError::Diverged {
            what,
            value,
            epoch: self.progress.epoch + 1,
            batch: batch + 1,
            rate,
            clipped: self.run.settings.clip_norm.is_some(),
        }
    }

    /// The weights that are judged and kept, by name.
    fn kept_weights(&self) -> BTreeMap<String, Tensor> {
        let mut weights = self.variables.tensors().clone();
        for (name, average) in &self.averages {
            weights.insert(name.clone(), average.clone());
        }
        weights
    }

    /// None where it was asked to stop: the training before it is saved.
    fn validate(
        &mut self,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<Evaluation>, TrainError> {
        let mut evaluation = Evaluation::new(self.run.dataset.classes.len(), 1.0);
        let size = [self.run.model.preprocessing.crop; 2];
        let mut unread = None;
        match &self.validation {
            Validation::Features(features) => {
                let weights = self.kept_weights();
                let value = |(name, _): &(String, Var)| weights.get(name).map(Tensor::detach);
                let head: Vec<Tensor> = self.step.parameters().iter().filter_map(value).collect();
                let logits = head_logits(&features.tensor, &head[0], head.get(1))?;
                let logits = logits.flatten_all()?.to_vec1::<f32>()?;
                evaluation.add(&logits, &features.labels, &features.samples);
            }
            Validation::Images(plan) => {
                let weights = Arc::new(TensorMap(self.kept_weights()));
                let vb = Params::new(Some(weights), 0).var_builder(&self.run.device);
                let options = Options::threads(self.run.threads).exact(self.run.settings.exact);
                let output = self.graph.output();
                let mut runner = Runner::new(self.graph.clone(), &vb, size, output, options)?;
                let batches = plan.evaluation().map_err(|error| TrainError::Io {
                    path: "threads".into(),
                    error,
                })?;
                for batch in batches {
                    if self.run.stop.load(Ordering::Relaxed) {
                        return Ok(None);
                    }
                    for image in batch.skipped {
                        if self.named.insert(image.name.clone()) {
                            observe(Event::Skipped(&image));
                        }
                        unread = Some(image);
                    }
                    if !batch.labels.is_empty() {
                        let logits = runner.run(&batch.pixels, batch.labels.len())?;
                        evaluation.add(&logits, &batch.labels, &batch.samples);
                    }
                }
            }
        }
        if evaluation.images() == 0 {
            let Skipped { name, reason } = unread.unwrap_or_else(nothing_skipped);
            return Err(TrainError::NothingValidated { name, reason });
        }
        Ok(Some(evaluation))
    }

    /// Writes what the epoch gave: the model where it is the best, the line of metrics, and last
    /// the checkpoint, so that whoever goes on from it does the rest again.
    fn finish_epoch(
        &mut self,
        report: &mut EpochReport,
        evaluation: &Evaluation,
    ) -> Result<(), TrainError> {
        let now = Best {
            epoch: report.epoch,
            accuracy: report.val_accuracy,
            macro_f1: report.val_macro_f1,
        };
        let value = |best: &Best| match self.run.settings.metric {
            Metric::Accuracy => best.accuracy,
            Metric::MacroF1 => best.macro_f1,
        };
        report.is_best = self
            .progress
            .best
            .is_none_or(|best| value(&now) > value(&best));
        if report.is_best {
            let path = self.run.out.join(MODEL_FILE);
            let text = serde_json::to_string(&self.run.model).unwrap_or_default();
            write_tensors(&path, &self.kept_weights(), text)
                .map_err(|e| self.not_saved(e.into()))?;
            self.progress.best = Some(now);
            self.best_evaluation = Some(evaluation.clone());
        }
        let since_best = report.epoch - self.progress.best.map_or(0, |b| b.epoch);
        let patience = self.run.settings.patience;
        self.progress = Progress {
            epoch: report.epoch,
            batch: 0,
            loss_sum: 0.0,
            images: 0,
            correct: 0,
            finished: report.epoch >= self.run.settings.epochs
                || patience.is_some_and(|p| since_best >= p),
            ..self.progress
        };
        self.append_metrics(report)?;
        self.save()
    }

    fn save(&mut self) -> Result<(), TrainError> {
        self.progress.seconds = self.seconds();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in self.variables.tensors() {
            tensors.insert(format!("{WEIGHTS}{name}"), tensor.clone());
        }
        for (name, tensor) in self.optimizer.state() {
            tensors.insert(format!("{OPTIMIZER}{name}"), tensor);
        }
        for (name, tensor) in &self.averages {
            tensors.insert(format!("{AVERAGE}{name}"), tensor.clone());
        }
        let path = self.run.out.join(CHECKPOINT_FILE);
        let settings = &self.run.settings;
        State::write(
            &path,
            settings,
            &self.run.model,
            &self.fingerprint,
            &self.progress,
            &tensors,
        )
        .map_err(|e| self.not_saved(e))?;
        self.last_checkpoint = Instant::now();
        Ok(())
    }

    /// An error of writing, with what is left.
    fn not_saved(&self, error: StateError) -> TrainError {
        let checkpoint = self.run.out.join(CHECKPOINT_FILE);
        let kept = match State::open(&checkpoint) {
            Ok(state) => format!(
                "{} of epoch {} is whole (make room, then go on with --resume)",
                checkpoint.display(),
                state.progress.epoch
            ),
            Err(_) => "nothing had been saved before (make room, or choose another --out)".into(),
        };
        TrainError::Save {
            error: error.to_string(),
            kept,
        }
    }

    /// Leaves in metrics.jsonl the epochs that are done.
    fn cut_metrics(&self) -> Result<(), TrainError> {
        let path = self.run.out.join(METRICS_FILE);
        let lines = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_error(&path, error)),
        };
        let kept: String = lines
            .lines()
            .take(self.progress.epoch as usize)
            .flat_map(|line| [line, "\n"])
            .collect();
        write_whole(&path, |temporary| fs::write(temporary, kept))
            .map_err(|error| io_error(&path, error))
    }

    fn append_metrics(&self, report: &EpochReport) -> Result<(), TrainError> {
        let path = self.run.out.join(METRICS_FILE);
        let line = serde_json::to_string(report).unwrap_or_default();
        let append = || -> io::Result<()> {
            let mut file = File::options().create(true).append(true).open(&path)?;
            file.write_all(format!("{line}\n").as_bytes())
        };
        append().map_err(|error| {
            let path = path.display().to_string();
            self.not_saved(WeightsError::Io { path, error }.into())
        })
    }
}

/// What the names of the optimiser's tensors begin with in a checkpoint.
const OPTIMIZER: &str = "optimizer.";
/// What the names of moving averages begin with in a checkpoint.
const AVERAGE: &str = "average.";

/// For an epoch that held no image at all.
fn nothing_skipped() -> Skipped {
    Skipped {
        name: "the data".into(),
        reason: "no images".into(),
    }
}

fn io_error(path: &Path, error: io::Error) -> TrainError {
    TrainError::Io {
        path: path.display().to_string(),
        error,
    }
}

/// How many images of a batch have their class's logit highest.
fn named_rightly(logits: &Tensor, labels: &[usize]) -> candle_core::Result<u64> {
    let named = logits.argmax(1)?.to_vec1::<u32>()?;
    let right = named.iter().zip(labels).filter(|&(&n, &l)| n as usize == l);
    Ok(right.count() as u64)
}

/// In inverse proportion to the number of images; the mean over all images is 1.
fn class_weights(counts: &[usize]) -> Vec<f32> {
    let total: usize = counts.iter().sum();
    let weight = |&count: &usize| match count {
        0 => 1.0,
        count => total as f32 / (counts.len() * count) as f32,
    };
    counts.iter().map(weight).collect()
}
