//! Running a network: [`params`] hands out its tensors, [`eager`] computes with candle's
//! operations on any device, [`cpu`] with a compiled plan of our own kernels. [`TrainingStep`] is
//! what training asks for: of [`EagerStep`] on any device, of [`PlanStep`] on the CPU.

pub mod cpu;
#[cfg(any(feature = "cuda", feature = "emulated", test))]
pub mod cuda;
mod device;
pub mod eager;
mod memory;
pub mod params;
mod precision;
mod runner;
mod step;
#[cfg(test)]
mod tests;
mod train;

pub use device::{DeviceChoice, DeviceError, check_precision};
pub use memory::with_advice;
pub use precision::Precision;
pub use runner::Runner;
pub use step::{EagerStep, HeadStep, Others, TrainingStep, Variables, head_logits, training_step};
pub use train::PlanStep;
