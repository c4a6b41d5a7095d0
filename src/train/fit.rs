//! The loop.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::error::TrainError;
use super::events::{BatchReport, End, EpochReport, Event, Summary};
use super::frozen::{FirstEpoch, FrozenPart};
use super::groups::{frozen_names, groups, norm_names};
use super::loss::{CrossEntropy, Targets, mixed_targets};
use super::metrics::Evaluation;
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::settings::{ClassWeights, HeadStart, Metric, Norms, Settings};
use super::slices::Workers;
use super::source::{Features, Inputs, Source};
use super::state::{Best, Progress, State, StateError, WEIGHTS};
use super::team::{Exchange, Rows, first_ones, follow_first};
use crate::data::{
    Augmentation, BatchPlan, Cache, CacheLimit, Dataset, Decoder, Purpose, Sample, Skipped,
    fingerprint, generator,
};
use crate::exec::cpu::{Options, PlanError};
use crate::exec::params::{Params, TensorMap, TensorSource};
use crate::exec::{HeadStep, Others, Runner, TrainingStep, Variables, training_step, with_advice};
use crate::graph::Graph;
use crate::ranks::{Ranks, share};
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
    /// The processes that train together. The first alone writes.
    pub ranks: Ranks,
}

/// What a batch gave.
#[derive(Default)]
pub(super) struct Learned {
    /// The mean over its images.
    pub loss: f64,
    /// Images that were named rightly, and all of them.
    pub correct: u64,
    pub images: u64,
}

/// The best model, as it becomes better.
pub const MODEL_FILE: &str = "model.safetensors";
/// Enough to go on as if never stopped.
pub const CHECKPOINT_FILE: &str = "last.checkpoint";
/// A line of JSON an epoch.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// Every setting, as resolved.
pub const CONFIG_FILE: &str = "config.toml";

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
        let fingerprint = self.fingerprint();
        if !self.ranks.agree(fingerprint) {
            return Err(TrainError::RanksDiffer {
                path: self.settings.data,
            });
        }
        if let Some(state) = state {
            if state.data_fingerprint != format!("{fingerprint:016x}") {
                return Err(TrainError::OtherData {
                    path: self.settings.data,
                });
            }
            if state.progress.finished {
                return Ok(End::Finished(self.summary(&state.progress, None)));
            }
        }
        match Fitting::start(self, state, observe)? {
            Some((fitting, source, first)) => fitting.run(source, first, observe),
            None => Ok(End::Interrupted {
                epoch: state.map_or(0, |s| s.progress.epoch),
            }),
        }
    }

    /// Writes config.toml: the settings as they are known by now.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write_config(&self) -> Result<(), TrainError> {
        if !self.ranks.is_first() {
            return Ok(());
        }
        let text = self.settings.to_toml();
        let path = self.out.join(CONFIG_FILE);
        let text = format!("# sconce finetune --config FILE\n{text}");
        write_whole(&path, |temporary| fs::write(temporary, text))
            .map_err(|error| io_error(&path, error))
    }

    fn summary(&self, progress: &Progress, evaluation: Option<Evaluation>) -> Summary {
        Summary {
            model: self.out.join(MODEL_FILE),
            classes: self.dataset.classes.len(),
            train_images: self.dataset.train.len(),
            val_images: self.dataset.validation.len(),
            best: progress.best.unwrap_or(Best {
                epoch: 0,
                accuracy: 0.0,
                macro_f1: 0.0,
            }),
            epochs: progress.epoch,
            seconds: progress.seconds,
            evaluation,
        }
    }

    /// Everything of the data that decides what is learned.
    fn fingerprint(&self) -> u64 {
        let Dataset {
            classes,
            train,
            validation,
            ..
        } = &self.dataset;
        fingerprint(&self.settings.data, classes, &[train, validation])
    }

    /// How networks are computed.
    fn options(&self) -> Options {
        Options::threads(self.threads)
            .exact(self.settings.exact)
            .precision(self.settings.precision)
    }

    /// Of each image of the plan, at most `limit` bytes in all are kept.
    pub(super) fn batch_plan(
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
                exact: self.settings.exact,
            },
            preprocessing: self.model.preprocessing,
            augmentation,
            batch_size: self.settings.batch_size,
            seed: self.settings.seed,
            threads: self.threads,
            parts: self.ranks.count(),
            part: self.ranks.rank(),
        }
    }
}

/// What validation takes in.
enum Validation {
    Images(BatchPlan),
    Features(Features),
}

/// A run under way.
pub(super) struct Fitting {
    pub(super) run: Run,
    graph: Graph,
    fingerprint: String,
    variables: Variables,
    pub(super) step: Box<dyn TrainingStep>,
    validation: Validation,
    pub(super) optimizer: Optimizer,
    loss: CrossEntropy,
    pub(super) schedule: Schedule,
    /// Moving averages of parameters and running statistics, by name.
    pub(super) averages: BTreeMap<String, Tensor>,
    workers: Workers,
    pub(super) progress: Progress,
    /// Names of images that were reported as unreadable.
    named: BTreeSet<String>,
    last_checkpoint: Instant,
    /// When this process began, and the time that others spent before.
    pub(super) began: Instant,
    pub(super) seconds_before: f64,
    best_evaluation: Option<Evaluation>,
    pub(super) steps_per_epoch: u64,
    /// When this process took its first step, and which that was.
    steps_began: (Instant, u64),
    /// What validation is thought to take.
    pub(super) validation_seconds: f64,
    /// Whether this process planned by the clock: who resumes or repeats a run wants what it came
    /// to, however long that takes.
    pub(super) heeds_clock: bool,
}

fn learned(loss: f64, correct: f64, images: f64) -> Learned {
    Learned {
        loss,
        correct: correct as u64,
        images: images as u64,
    }
}

impl Fitting {
    /// None where it was asked to stop meanwhile.
    fn start(
        run: Run,
        state: Option<&State>,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<(Self, Source, Option<FirstEpoch>)>, TrainError> {
        let began = Instant::now();
        let settings = &run.settings;
        let graph = run.model.architecture.graph(run.model.labels.len());
        let fingerprint = format!("{:016x}", run.fingerprint());
        let size = [run.model.preprocessing.crop; 2];
        graph.shapes(size[0], size[1]).map_err(PlanError::from)?;
        let mut frozen =
            frozen_names(&graph, &settings.freeze).map_err(|expected| TrainError::Freeze {
                given: settings.freeze.clone(),
                model: run.model.name.clone(),
                expected,
            })?;
        if settings.norms == Norms::Stored {
            frozen.extend(norm_names(&graph));
        }
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
        let loss = CrossEntropy {
            label_smoothing: settings.label_smoothing,
            class_weights: match settings.class_weights {
                ClassWeights::None => None,
                ClassWeights::Auto => Some(class_weights(&run.dataset.class_counts())),
            },
        };
        let workers = Workers::new(run.threads).map_err(|error| TrainError::Io {
            path: "threads".into(),
            error,
        })?;
        let options = run.options();
        let limit = CacheLimit::new(run.cache_bytes);
        let head_only = settings.freeze == "backbone";
        let fits = settings.head == HeadStart::Fit && state.is_none();
        let mut frozen_part = FrozenPart::new(&run, observe);
        let mut first = None;
        let mut known = (None, None);
        let mut runner = None;
        if head_only || fits {
            let (node, _) = graph.features();
            let runner = runner.insert(Runner::new(graph.clone(), &vb, size, node, options)?);
            let reused =
                head_only && settings.augmentation() == Augmentation::NONE && settings.epochs > 0;
            let Some(features) = frozen_part.compute(runner, fits, fits || reused)? else {
                return Ok(None);
            };
            known = features;
        }
        if fits && let (Some(training), Some(validation)) = &known {
            first =
                frozen_part.fit_head(&graph, &variables, training, validation, &loss, &workers)?;
            if run.ranks.any(first.is_none()) {
                return Ok(None);
            }
        }
        // Machines that are not alike may have fitted another head in the last digits.
        let all = variables.parameters().iter().chain(variables.buffers());
        follow_first(&run.ranks, all)?;
        let named = frozen_part.named;
        let plan = run.batch_plan(&run.dataset.train, settings.augmentation(), &limit);
        let (step, source, validation) = match (known, runner) {
            ((training, Some(validation)), Some(runner)) if head_only => {
                let step: Box<dyn TrainingStep> = Box::new(HeadStep::new(&graph, &variables)?);
                let training = training.filter(|_| settings.augmentation() == Augmentation::NONE);
                let source = Source::behind(runner, training, plan, &run.device);
                (step, source, Validation::Features(validation))
            }
            _ => {
                let step = training_step(graph.clone(), &variables, options)?;
                let validation = &run.dataset.validation;
                let validation = run.batch_plan(validation, Augmentation::NONE, &limit);
                let source = Source::images(plan, &run.device);
                (step, source, Validation::Images(validation))
            }
        };
        let mut optimizer = new_optimizer(settings, &graph, step.as_ref())?;
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
        let steps_per_epoch = batches.div_ceil(settings.accumulate as u64);
        let schedule = settings.schedule(steps_per_epoch);
        let seconds_before = progress.seconds;
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
            steps_per_epoch,
            steps_began: (began, 0),
            validation_seconds: 0.0,
            heeds_clock: false,
            run,
        };
        Ok(Some((fitting, source, first)))
    }

    pub(super) fn new_optimizer(&self) -> candle_core::Result<Optimizer> {
        new_optimizer(&self.run.settings, &self.graph, self.step.as_ref())
    }

    /// Of all processes that worked on the run.
    fn seconds(&self) -> f64 {
        self.seconds_before + self.began.elapsed().as_secs_f64()
    }

    fn run(
        mut self,
        mut source: Source,
        first: Option<FirstEpoch>,
        observe: &mut dyn FnMut(Event),
    ) -> Result<End, TrainError> {
        self.cut_metrics()?;
        if let Some(FirstEpoch {
            mut report,
            evaluation,
        }) = first
        {
            self.finish_epoch(&mut report, &evaluation)?;
            observe(Event::Epoch(&report, &evaluation));
        }
        if !self.find_settings(&mut source, observe)? {
            return Ok(End::Interrupted {
                epoch: self.progress.epoch,
            });
        }
        self.steps_began = (Instant::now(), self.progress.step);
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
        let evaluation = self.best_evaluation.take();
        Ok(End::Finished(self.run.summary(&self.progress, evaluation)))
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
            && pending.step < self.end_step()
            && let Some(batch) = inputs.next()
        {
            let batch = batch?;
            for image in &batch.skipped {
                if self.named.insert(image.name.clone()) {
                    observe(Event::Skipped(image));
                }
            }
            unread = batch.skipped.last().cloned().or(unread);
            rate = self.schedule.rate(pending.step);
            let index = pending.batch;
            let last = waiting + 1 == settings.accumulate || pending.batch + 1 == batches;
            let mut dropout = generator(settings.seed, Purpose::Dropout, epoch, index);
            let Learned {
                loss,
                correct,
                images,
            } = self.learn(&batch, &mut dropout, &mut gradients, last)?;
            if !loss.is_finite() {
                return Err(self.diverged("loss", loss, index, rate));
            }
            filled += usize::from(images > 0);
            images_here += images;
            pending.images += images;
            pending.loss_sum += loss * images as f64;
            pending.correct += correct;
            pending.batch += 1;
            waiting += 1;
            if last {
                if filled > 0 {
                    self.update(&mut gradients, filled, rate, index)?;
                    pending.step += 1;
                }
                (waiting, filled) = (0, 0);
                let spent = began.elapsed().as_secs_f64();
                self.progress = pending.clone();
                let report = self.batch_report(batches, rate, images_here, spent);
                observe(Event::Batch(BatchReport {
                    batch_loss: loss,
                    ..report
                }));
                // The first rank's clock is that of all.
                let ranks = self.run.ranks.clone();
                let time_is_up = ranks.is_first() && self.is_time_up();
                let [stopped, time_is_up] =
                    ranks.sum([self.is_stopped(), time_is_up].map(|b| f64::from(u8::from(b))));
                if stopped > 0.0 {
                    self.save()?;
                    return Ok(None);
                }
                if time_is_up > 0.0 {
                    self.end_here(observe)?;
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

    /// Adds a batch's gradients to what is there; no gradients where the loss is not finite. With the
    /// `last` batch of a step the sums over all ranks take their place.
    pub(super) fn learn(
        &mut self,
        batch: &Inputs,
        dropout: &mut ChaCha8Rng,
        gradients: &mut [Option<Tensor>],
        last: bool,
    ) -> Result<Learned, TrainError> {
        let ranks = self.run.ranks.clone();
        let own = batch.labels.len();
        let absent = own == 0;
        let mixed = batch.own_share.map(|own| {
            let classes = self.run.dataset.classes.len();
            mixed_targets(&batch.labels, own, classes)
        });
        let targets = match &mixed {
            Some(distributions) => Targets::Distributions(distributions),
            None => Targets::Classes(&batch.labels),
        };
        // By rank: images, then what they count.
        let mut table = vec![0.0; 2 * ranks.count()];
        table[ranks.rank()] = own as f64;
        table[ranks.count() + ranks.rank()] = self.loss.share(targets, own);
        if let Some(others) = ranks.others() {
            others.sum(&mut table);
        }
        let (images, shares) = table.split_at(ranks.count());
        let total: f64 = images.iter().sum();
        if total == 0.0 {
            if last {
                self.exchange(gradients)?;
            }
            return Ok(Learned::default());
        }
        if ranks.are_several() {
            self.step.train_with(Others {
                ranks: ranks.clone(),
                sync_norms: self.run.settings.sync_bn,
                before: images[..ranks.rank()].iter().sum::<f64>() as usize,
                behind: images[ranks.rank() + 1..].iter().sum::<f64>() as usize,
                absent,
            })?;
        }
        let outcome = self.step.forward(&batch.tensor, dropout);
        let logits = self.with_advice(outcome, batch)?;
        let (mut loss, mut at_logits, correct) = if absent {
            (0.0, logits.zeros_like()?, 0.0)
        } else {
            let (loss, at_logits) = self.loss.loss(&logits, targets)?;
            (
                loss,
                at_logits,
                named_rightly(&logits, &batch.labels)? as f64,
            )
        };
        if ranks.are_several() {
            let share = shares[ranks.rank()] / shares.iter().sum::<f64>();
            at_logits = (at_logits * share)?;
            loss *= share;
        } else if !loss.is_finite() {
            return Ok(learned(loss, correct, total));
        }
        let workers = &self.workers;
        let accumulates = self.run.settings.accumulate > 1;
        let mut exchange = ranks.others().filter(|_| last).map(Exchange::new);
        let outcome = self.step.backward(&at_logits, &mut |index, gradient| {
            if let Some(exchange) = &mut exchange {
                return match gradients[index].take() {
                    Some(sum) if absent => exchange.add(index, sum, false),
                    Some(sum) => exchange.add(index, (sum + gradient)?, false),
                    None => exchange.add(index, gradient, absent),
                };
            }
            if absent {
                return Ok(());
            }
            match &mut gradients[index] {
                Some(sum) if sum.device().is_cpu() => workers.add(sum, &gradient)?,
                Some(sum) => *sum = (&*sum + gradient)?,
                // What is added to must be this loop's own.
                empty if accumulates => *empty = Some(gradient.copy()?),
                empty => *empty = Some(gradient),
            }
            Ok(())
        });
        if outcome.is_err() {
            gradients.fill(None);
        }
        self.with_advice(outcome, batch)?;
        if let Some(exchange) = exchange {
            exchange.finish(gradients, &self.run.device)?;
        }
        // Last, when the gradients' sums have made the ranks wait for each other anyway.
        let [loss, correct] = ranks.sum([loss, correct]);
        Ok(learned(loss, correct, total))
    }

    /// What came of a step's part; where memory was too small, with the batch that fits. Of several ranks
    /// none can try by itself.
    fn with_advice<T>(
        &mut self,
        outcome: candle_core::Result<T>,
        batch: &Inputs,
    ) -> candle_core::Result<T> {
        if self.run.ranks.are_several() {
            return outcome;
        }
        with_advice(outcome, batch.labels.len(), |count| {
            self.step.probe(&batch.tensor, count)
        })
    }

    /// Puts the sums over all ranks in the place of gradients.
    fn exchange(&self, gradients: &mut [Option<Tensor>]) -> Result<(), TrainError> {
        let Some(others) = self.run.ranks.others() else {
            return Ok(());
        };
        let mut exchange = Exchange::new(others);
        for (index, (_, variable)) in self.step.parameters().iter().enumerate() {
            match gradients[index].take() {
                Some(gradient) => exchange.add(index, gradient, false)?,
                None => exchange.add(index, variable.as_detached_tensor(), true)?,
            }
        }
        Ok(exchange.finish(gradients, &self.run.device)?)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.run.stop.load(Ordering::Relaxed)
    }

    /// The step after which the run ends, whatever its epochs.
    fn end_step(&self) -> u64 {
        let settings = &self.run.settings;
        settings.last_step.or(settings.steps).unwrap_or(u64::MAX)
    }

    /// Whether the run has to end with the step just done.
    fn is_time_up(&self) -> bool {
        let settings = &self.run.settings;
        self.heeds_clock
            && settings.steps.is_some()
            && self.progress.step < self.end_step()
            && settings
                .time
                .is_some_and(|limit| self.seconds() + self.validation_seconds >= limit)
    }

    /// Ends the run with the step just done.
    fn end_here(&mut self, observe: &mut dyn FnMut(Event)) -> Result<(), TrainError> {
        let step = self.progress.step;
        let planned = self.run.settings.steps.unwrap_or(step);
        observe(Event::TimeUp { step, planned });
        self.run.settings.last_step = Some(step);
        self.run.write_config()
    }

    fn batch_report(&self, batches: u64, rate: f64, images: u64, spent: f64) -> BatchReport {
        let Progress {
            epoch,
            batch,
            loss_sum,
            ..
        } = self.progress;
        let seen = self.progress.images.max(1) as f64;
        let step = self.progress.step;
        let (began, first) = self.steps_began;
        let each = began.elapsed().as_secs_f64() / step.saturating_sub(first).max(1) as f64;
        let left = each * self.schedule.total.saturating_sub(step) as f64;
        BatchReport {
            epoch: epoch + 1,
            epochs: self.run.settings.epochs,
            batch,
            batches,
            batch_loss: loss_sum / seen,
            loss: loss_sum / seen,
            accuracy: self.progress.correct as f64 / seen,
            learning_rate: rate,
            images_per_second: images as f64 / spent,
            left: Duration::try_from_secs_f64(left).unwrap_or_default(),
        }
    }

    /// One step with the mean of `count` batches' gradients.
    pub(super) fn update(
        &mut self,
        gradients: &mut [Option<Tensor>],
        count: usize,
        rate: f64,
        batch: u64,
    ) -> Result<(), TrainError> {
        // Several ranks have the same gradients: each looks at a part of them.
        let ranks = self.run.ranks.clone();
        let sizes = self.step.parameters().iter().map(|(_, v)| v.elem_count());
        let own = share(sizes.sum(), ranks.rank(), ranks.count());
        let mut before = 0;
        let mut ready = Vec::with_capacity(gradients.len());
        let mut squares = 0.0;
        let mut on_device = Vec::new();
        for (gradient, (_, variable)) in gradients.iter_mut().zip(self.step.parameters()) {
            let gradient = match gradient.take() {
                Some(gradient) => gradient,
                None => variable.zeros_like()?,
            };
            if own.contains(&before) {
                if gradient.device().is_cpu() {
                    squares += self.workers.sum_of_squares(&gradient)?;
                } else {
                    on_device.push(gradient.sqr()?.sum_all()?);
                }
            }
            before += gradient.elem_count();
            ready.push(gradient);
        }
        if !on_device.is_empty() {
            // All at once: to read one is to wait for the device.
            let sums: Vec<f32> = Tensor::stack(&on_device, 0)?.to_vec1()?;
            squares += sums.into_iter().map(f64::from).sum::<f64>();
        }
        let [squares] = ranks.sum([squares]);
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
        let ranks = self.run.ranks.clone();
        if let Some(others) = ranks.others() {
            follow_first(&ranks, self.step.buffers().iter())?;
            for average in self.averages.values_mut() {
                *average = first_ones(others, average)?;
            }
        }
        match &self.validation {
            Validation::Features(features) => {
                let weights = self.kept_weights();
                features.evaluate(&self.graph, &weights, &mut evaluation)?;
            }
            Validation::Images(plan) => {
                let weights = Arc::new(TensorMap(self.kept_weights()));
                let vb = Params::new(Some(weights), 0).var_builder(&self.run.device);
                let options = self.run.options();
                let output = self.graph.output();
                let mut runner = Runner::new(self.graph.clone(), &vb, size, output, options)?;
                let batches = plan.evaluation().map_err(|error| TrainError::Io {
                    path: "threads".into(),
                    error,
                })?;
                let mut own = Rows::default();
                let mut stopped = false;
                for batch in batches {
                    stopped = self.is_stopped();
                    if stopped {
                        break;
                    }
                    for image in &batch.skipped {
                        if self.named.insert(image.name.clone()) {
                            observe(Event::Skipped(image));
                        }
                        unread = Some(image.clone());
                    }
                    if batch.labels.is_empty() {
                        continue;
                    }
                    let logits = runner.run(&batch.pixels, batch.labels.len())?;
                    if ranks.are_several() {
                        own.add(&batch, logits);
                    } else {
                        evaluation.add(&logits, &batch.labels, &batch.samples);
                    }
                }
                if ranks.any(stopped) {
                    return Ok(None);
                }
                let all = own.of_all(&ranks);
                evaluation.add(&all.values, &all.labels, &all.samples);
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
            if self.run.ranks.is_first() {
                let path = self.run.out.join(MODEL_FILE);
                let text = serde_json::to_string(&self.run.model).unwrap_or_default();
                write_tensors(&path, &self.kept_weights(), text)
                    .map_err(|e| self.not_saved(e.into()))?;
            }
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
                || self.progress.step >= self.end_step()
                || patience.is_some_and(|p| since_best >= p),
            ..self.progress
        };
        self.append_metrics(report)?;
        self.save()
    }

    pub(super) fn save(&mut self) -> Result<(), TrainError> {
        self.progress.seconds = self.seconds();
        if !self.run.ranks.is_first() {
            return Ok(());
        }
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
        if !self.run.ranks.is_first() {
            return Ok(());
        }
        let path = self.run.out.join(METRICS_FILE);
        let lines = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_error(&path, error)),
        };
        let kept: String = lines
            .lines()
            .take(self.lines_done())
            .flat_map(|line| [line, "\n"])
            .collect();
        write_whole(&path, |temporary| fs::write(temporary, kept))
            .map_err(|error| io_error(&path, error))
    }

    /// Lines of the epochs that are done, the fitted head's included.
    fn lines_done(&self) -> usize {
        let fitted = self.run.settings.head == HeadStart::Fit && self.progress.best.is_some();
        self.progress.epoch as usize + usize::from(fitted)
    }

    fn append_metrics(&self, report: &EpochReport) -> Result<(), TrainError> {
        if !self.run.ranks.is_first() {
            return Ok(());
        }
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

fn new_optimizer(
    settings: &Settings,
    graph: &Graph,
    step: &dyn TrainingStep,
) -> candle_core::Result<Optimizer> {
    let names = step.parameters().iter().map(|(name, _)| name.as_str());
    let groups = groups(graph, names, settings.weight_decay, settings.layer_decay);
    Optimizer::new(settings.rule(), step.parameters(), groups)
}

/// What the names of the optimiser's tensors begin with in a checkpoint.
const OPTIMIZER: &str = "optimizer.";
/// What the names of moving averages begin with in a checkpoint.
const AVERAGE: &str = "average.";

/// For an epoch that held no image at all.
pub(super) fn nothing_skipped() -> Skipped {
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
