//! Steps that leave no trace: to find a learning rate (the range test of Smith, "Cyclical learning
//! rates for training neural networks", 2017), and to know how many steps a time allows.

use std::time::Instant;

use candle_core::{Tensor, Var};

use super::error::TrainError;
use super::events::{Event, Finding, Plan, RateReport};
use super::fit::Fitting;
use super::settings::{LearningRate, OptimizerKind};
use super::source::Source;
use crate::data::{Purpose, generator};

/// Steps of the range test.
const RATES: usize = 40;
/// How much of the smoothed loss is that of the steps before.
const SMOOTHING: f64 = 0.8;
/// Steps that are timed; the first few wait for the first images and are not counted.
const TIMED: usize = 6;
const UNTIMED: usize = 2;
/// What steps may cost more than those that were timed.
const MARGIN: f64 = 1.1;
/// The epoch whose random numbers the trials take: no run gets there.
const EPOCH: u64 = u64::MAX;

struct Trial {
    loss: f64,
    seconds: f64,
}

impl Fitting {
    /// Finds what the settings leave to be found before the first step, and writes them down.
    /// False where the run was asked to stop meanwhile.
    pub(super) fn find_settings(
        &mut self,
        source: &mut Source,
        observe: &mut dyn FnMut(Event),
    ) -> Result<bool, TrainError> {
        if self.progress.step > 0 || self.progress.finished {
            return Ok(true);
        }
        let mut found = false;
        if self.run.settings.learning_rate == LearningRate::AUTO {
            let Some(report) = self.range_test(source)? else {
                return Ok(false);
            };
            observe(Event::Rate(&report));
            self.run.settings.learning_rate = LearningRate::Is(report.rate);
            found = true;
        }
        if let (Some(limit), None) = (self.run.settings.time, self.run.settings.steps) {
            let Some(plan) = self.plan_steps(source, limit)? else {
                return Ok(false);
            };
            observe(Event::Planned(&plan));
            found = true;
        }
        if self.run.settings.steps == Some(0) {
            self.progress.finished = true;
        }
        if found || self.progress.finished {
            self.run.write_config()?;
            self.save()?;
        }
        Ok(true)
    }

    /// Takes up to `count` steps, until `enough`, and undoes them. None where the run was asked to
    /// stop.
    fn try_steps(
        &mut self,
        source: &mut Source,
        count: usize,
        rate: &dyn Fn(usize) -> f64,
        enough: &dyn Fn(&[Trial]) -> bool,
    ) -> Result<Option<Vec<Trial>>, TrainError> {
        let variables = self.step.parameters().iter().chain(self.step.buffers());
        let keep = |(_, variable): &(String, Var)| -> candle_core::Result<(Var, Tensor)> {
            Ok((variable.clone(), variable.as_tensor().copy()?.detach()))
        };
        let kept: Vec<(Var, Tensor)> = variables.map(keep).collect::<candle_core::Result<_>>()?;
        let averages = std::mem::take(&mut self.averages);
        let trials = self.steps_for_trial(source, count, rate, enough);
        self.averages = averages;
        for (variable, value) in kept {
            variable.set(&value)?;
        }
        self.optimizer = self.new_optimizer()?;
        trials
    }

    fn steps_for_trial(
        &mut self,
        source: &mut Source,
        count: usize,
        rate: &dyn Fn(usize) -> f64,
        enough: &dyn Fn(&[Trial]) -> bool,
    ) -> Result<Option<Vec<Trial>>, TrainError> {
        let mut trials = Vec::with_capacity(count);
        let seed = self.run.settings.seed;
        let mut gradients = vec![None; self.step.parameters().len()];
        for pass in 0.. {
            let before = trials.len();
            let mut inputs = source.epoch(EPOCH - pass, 0)?;
            let mut began = Instant::now();
            while let Some(batch) = inputs.next() {
                if self.run.ranks.any(self.is_stopped()) {
                    return Ok(None);
                }
                let batch = batch?;
                let index = trials.len();
                let mut dropout = generator(seed, Purpose::Dropout, EPOCH, index as u64);
                let learned = self.learn(&batch, &mut dropout, &mut gradients, true)?;
                if learned.images == 0 {
                    continue;
                }
                let updated = self.update(&mut gradients, 1, rate(index), index as u64);
                trials.push(Trial {
                    loss: learned.loss,
                    seconds: began.elapsed().as_secs_f64(),
                });
                began = Instant::now();
                if let Err(TrainError::Diverged { .. }) = updated {
                    return Ok(Some(trials));
                }
                updated?;
                if trials.len() == count || enough(&trials) {
                    return Ok(Some(trials));
                }
            }
            if trials.len() == before {
                break;
            }
        }
        Ok(Some(trials))
    }

    fn range_test(&mut self, source: &mut Source) -> Result<Option<RateReport>, TrainError> {
        let (lowest, highest) = match self.run.settings.optimizer {
            OptimizerKind::AdamW => (1e-6f64, 1e-1f64),
            OptimizerKind::Sgd => (1e-5, 1e1),
        };
        let ratio = (highest / lowest).ln() / (RATES - 1) as f64;
        let rate = |index: usize| lowest * (ratio * index as f64).exp();
        let exploded = |trials: &[Trial]| {
            let losses: Vec<f64> = trials.iter().map(|t| t.loss).collect();
            has_exploded(&losses)
        };
        let Some(trials) = self.try_steps(source, RATES, &rate, &exploded)? else {
            return Ok(None);
        };
        let losses: Vec<f64> = trials.iter().map(|t| t.loss).collect();
        let rates: Vec<f64> = (0..losses.len()).map(rate).collect();
        let (rate, why) = choose(&rates, &losses);
        Ok(Some(RateReport {
            rate,
            why,
            steps: trials.len(),
            range: [lowest, rates.last().copied().unwrap_or(highest)],
        }))
    }

    /// Plans as many steps as fit into `limit` seconds for the whole run.
    fn plan_steps(&mut self, source: &mut Source, limit: f64) -> Result<Option<Plan>, TrainError> {
        let Some(trials) = self.try_steps(source, TIMED, &|_| 0.0, &|_| false)? else {
            return Ok(None);
        };
        let timed = trials.get(UNTIMED..).filter(|t| !t.is_empty());
        let timed = timed.unwrap_or(&trials);
        let seconds = timed.iter().map(|t| t.seconds).sum::<f64>() / timed.len().max(1) as f64;
        let elapsed = self.seconds_before + self.began.elapsed().as_secs_f64();
        let [seconds, elapsed] = self.run.ranks.broadcast([seconds, elapsed]);
        let settings = &mut self.run.settings;
        let per_epoch = self.steps_per_epoch;
        let step = seconds * settings.accumulate as f64 * MARGIN;
        // Validation goes forward only, and is never as fast as that alone.
        let validation =
            self.run.dataset.validation.len() as f64 * seconds / (2.0 * settings.batch_size as f64);
        (self.validation_seconds, self.heeds_clock) = (validation, true);
        let left = 0.98 * limit - elapsed;
        let (steps, epochs) = fitting_steps(left, step, validation, per_epoch, settings.epochs);
        // Something must come of a run that has no head yet.
        let steps = if self.progress.best.is_none() {
            steps.max(1)
        } else {
            steps
        };
        settings.steps = Some(steps);
        settings.epochs = epochs.max(u64::from(steps > 0));
        settings.warmup = settings.warmup.min(0.1 * steps as f64 / per_epoch as f64);
        self.schedule = settings.schedule(per_epoch);
        Ok(Some(Plan {
            seconds: limit,
            step_seconds: seconds,
            steps,
            epochs: steps as f64 / per_epoch as f64,
        }))
    }
}

/// Steps, at most `most` epochs of them, that fit into some seconds with a validation after each
/// epoch; and the epochs that they begin.
fn fitting_steps(left: f64, step: f64, validation: f64, per_epoch: u64, most: u64) -> (u64, u64) {
    let epoch = per_epoch as f64 * step + validation;
    if left <= step + validation {
        return (0, 0);
    }
    let whole = ((left / epoch) as u64).min(most);
    let rest = left - whole as f64 * epoch - validation;
    let more = match whole < most && rest > 0.0 {
        true => ((rest / step) as u64).min(per_epoch - 1),
        false => 0,
    };
    // A few steps at the end are not worth a validation of their own.
    let more = if whole > 0 && more * 10 < per_epoch {
        0
    } else {
        more
    };
    (whole * per_epoch + more, whole + u64::from(more > 0))
}

/// The losses with a memory, without its bias at the beginning.
fn smoothed(losses: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    let smooth = |(i, loss): (usize, &f64)| {
        sum = SMOOTHING * sum + (1.0 - SMOOTHING) * loss;
        sum / (1.0 - SMOOTHING.powi(i as i32 + 1))
    };
    losses.iter().enumerate().map(smooth).collect()
}

fn has_exploded(losses: &[f64]) -> bool {
    let smooth = smoothed(losses);
    let best = smooth.iter().copied().fold(f64::INFINITY, f64::min);
    let last = smooth.last().copied().unwrap_or(0.0);
    !last.is_finite() || last > 4.0 * best.max(0.05)
}

/// The rate at which the smoothed loss falls most steeply; where it falls by less than a tenth in
/// all, a tenth of the rate at which it is lowest.
fn choose(rates: &[f64], losses: &[f64]) -> (f64, Finding) {
    let smooth = smoothed(losses);
    let finite = smooth.iter().take_while(|l| l.is_finite()).count();
    let smooth = &smooth[..finite];
    let lowest = (0..finite).min_by(|&a, &b| smooth[a].total_cmp(&smooth[b]));
    let Some(lowest) = lowest else {
        return (rates[0], Finding::LowestTenth);
    };
    if smooth[lowest] > 0.9 * smooth[0] || lowest < 2 {
        return ((rates[lowest] / 10.0).max(rates[0]), Finding::LowestTenth);
    }
    let slope = |i: usize| smooth[i + 1] - smooth[i - 1];
    let steepest = (1..lowest).min_by(|&a, &b| slope(a).total_cmp(&slope(b)));
    (rates[steepest.unwrap_or(lowest)], Finding::Steepest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_where_the_loss_falls_most_steeply() {
        let rates: Vec<f64> = (0..40).map(|i| 10f64.powf(-6.0 + i as f64 / 8.0)).collect();
        let falling: Vec<f64> = (0..40)
            .map(|i| match i {
                0..34 => 3.0 - 2.0 / (1.0 + (-(i as f64 - 18.0)).exp()),
                _ => 1.0 + 4.0 * (i as f64 - 33.0),
            })
            .collect();
        let (rate, why) = choose(&rates, &falling);
        assert_eq!(why, Finding::Steepest);
        // The memory makes it a few steps late.
        assert!((rates[18]..=rates[23]).contains(&rate), "{rate:e}");
        assert!(!has_exploded(&falling[..34]) && has_exploded(&falling));
        let flat: Vec<f64> = (0..40)
            .map(|i| match i {
                0..24 => 0.5 - 0.001 * i as f64,
                _ => 0.5 + 0.2 * (i as f64 - 23.0),
            })
            .collect();
        let (rate, why) = choose(&rates, &flat);
        assert_eq!(why, Finding::LowestTenth);
        assert!((rates[12]..rates[18]).contains(&rate), "{rate:e}");
        assert!(has_exploded(&[0.5, f64::NAN]));
    }

    #[test]
    fn steps_fit_into_the_time() {
        // Ten steps of a second and two seconds of validation.
        assert_eq!(fitting_steps(60.0, 1.0, 2.0, 10, 9), (50, 5));
        assert_eq!(fitting_steps(60.0, 1.0, 2.0, 10, 3), (30, 3));
        assert_eq!(fitting_steps(20.0, 1.0, 2.0, 10, 9), (16, 2));
        assert_eq!(fitting_steps(8.5, 1.0, 2.0, 10, 9), (6, 1));
        assert_eq!(fitting_steps(2.5, 1.0, 2.0, 10, 9), (0, 0));
        assert_eq!(fitting_steps(-3.0, 1.0, 2.0, 10, 9), (0, 0));
    }
}
