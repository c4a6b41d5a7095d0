//! Running a network: [`params`] hands out its tensors, [`eager`] computes with candle's
//! operations on any device, [`cpu`] with a compiled plan of our own kernels. [`TrainingStep`] is
//! what training asks for: of [`EagerStep`] on any device, of [`PlanStep`] on the CPU.

pub mod cpu;
mod device;
pub mod eager;
pub mod params;
mod runner;
mod step;
mod train;

pub use device::{DeviceChoice, DeviceError};
pub use runner::Runner;
pub use step::{EagerStep, HeadStep, Others, TrainingStep, Variables, head_logits, training_step};
pub use train::PlanStep;
