//! Training: losses, optimisers, schedules, metrics, and the loop that never loses work.
//!
//! [`Run::fit`] is the loop. What the network is trained with ([`crate::exec::TrainingStep`]) hands
//! out logits and parameter gradients; everything above that is here.

mod calibration;
mod fit;
mod groups;
mod loss;
mod metrics;
mod optimizer;
mod schedule;
mod settings;
mod slices;
mod source;
mod state;

pub use calibration::{Bin, Reliability, best_temperature};
pub use fit::{
    BatchReport, CHECKPOINT_FILE, CONFIG_FILE, End, EpochReport, Event, METRICS_FILE, MODEL_FILE,
    Run, Summary, TrainError,
};
pub use groups::{frozen_names, groups};
pub use loss::{CrossEntropy, Targets, mixed_targets};
pub use metrics::{ClassMetrics, Evaluation, Verdict};
pub use optimizer::{Group, Optimizer, Rule};
pub use schedule::{Schedule, Shape};
pub use settings::{ClassWeights, Metric, OptimizerKind, Settings};
pub use slices::Workers;
pub use state::{Best, Progress, State, StateError};
