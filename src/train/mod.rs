//! Training: losses, optimisers, schedules, metrics, and the loop that never loses work.
//!
//! [`Run::fit`] is the loop. What the network is trained with ([`crate::exec::TrainingStep`]) hands
//! out logits and parameter gradients; everything above that is here. [`complete`] chooses what
//! nobody said. Where the settings want it, the head that suits the frozen network best is fitted
//! first (`frozen`, `head`); then `trial` finds a learning rate and plans by the clock, and only then
//! the first step is taken.

mod calibration;
mod error;
mod events;
mod fit;
mod frozen;
mod groups;
mod head;
mod lbfgs;
mod loss;
mod metrics;
mod optimizer;
mod recipe;
mod schedule;
mod settings;
mod slices;
mod source;
mod state;
mod team;
mod trial;

pub use calibration::{Bin, Reliability, best_temperature};
pub use error::TrainError;
pub use events::{BatchReport, End, EpochReport, Event, Finding, Plan, RateReport, Summary};
pub use fit::{CHECKPOINT_FILE, CONFIG_FILE, METRICS_FILE, MODEL_FILE, Run};
pub use groups::{frozen_names, groups};
pub use head::HeadReport;
pub use loss::{CrossEntropy, Targets, mixed_targets};
pub use metrics::{ClassMetrics, Evaluation, Verdict};
pub use optimizer::{Group, Optimizer, Rule};
pub use recipe::{Facts, complete};
pub use schedule::{Schedule, Shape};
pub use settings::{ClassWeights, HeadStart, LearningRate, Metric, Norms, OptimizerKind, Settings};
pub use slices::Workers;
pub use state::{Best, Progress, State, StateError};
