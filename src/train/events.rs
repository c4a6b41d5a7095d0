//! What a run tells those who watch, and what comes of it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::head::HeadReport;
use super::metrics::Evaluation;
use super::state::Best;
use crate::data::Skipped;

/// What happens during a run, for those who watch.
pub enum Event<'a> {
    /// An image could not be read; each is named once.
    Skipped(&'a Skipped),
    /// So many images went through the frozen backbone.
    Features {
        done: usize,
        total: usize,
    },
    /// A head was fitted to the frozen backbone.
    Head(&'a HeadReport),
    /// A learning rate was found.
    Rate(&'a RateReport),
    /// The steps that the time allows.
    Planned(&'a Plan),
    /// The time was up before the planned steps were done.
    TimeUp {
        step: u64,
        planned: u64,
    },
    Batch(BatchReport),
    /// An epoch's figures, and what its network said of each validation image.
    Epoch(&'a EpochReport, &'a Evaluation),
}

/// How a learning rate was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateReport {
    pub rate: f64,
    pub why: Finding,
    /// Steps that were tried, and undone.
    pub steps: usize,
    /// Lowest and highest rate tried.
    pub range: [f64; 2],
}

/// What speaks for a learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// There the loss fell most steeply.
    Steepest,
    /// It is a tenth of where the loss was lowest, which hardly fell at all.
    LowestTenth,
}

/// What a time allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// For the whole run.
    pub seconds: f64,
    /// What a batch takes.
    pub step_seconds: f64,
    pub steps: u64,
    pub epochs: f64,
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
    /// Of the last batch, and of the epoch so far, on the training images as they were augmented.
    pub batch_loss: f64,
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
    /// From 1; 0 is the fitted head on the frozen backbone, before anything else is trained.
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
