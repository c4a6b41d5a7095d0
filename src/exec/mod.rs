//! Running a network: [`params`] hands out its tensors, [`eager`] computes with candle's
//! operations on any device, [`cpu`] with a compiled plan of our own kernels.

pub mod cpu;
pub mod eager;
pub mod params;
mod runner;

pub use runner::Runner;
