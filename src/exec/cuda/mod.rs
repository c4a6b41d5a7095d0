//! Networks on a CUDA device: kernels of our own and cuBLAS (with the feature `cudnn` cuDNN too), on
//! images `[N, H, W, C]`.
//!
//! What candle does on such a device is right in [`super::eager`], and slow: a convolution in groups is a
//! dozen launches, a batch norm as many, and its way back skips cuDNN. Here the graph becomes a list of
//! steps ([`steps`]), a norm with the sum and the activation behind it in one, each one or two launches. A
//! forward pass in training leaves a tape of what the way back needs, and candle's own graph of operations
//! is not used.
//!
//! Where there is no device, the tests run the same steps on the CPU, the kernels compiled as C++
//! (`emulated`).

#[cfg(feature = "cudnn")]
mod cudnn;
#[cfg(all(target_os = "linux", any(feature = "emulated", test)))]
mod emulated;
mod launch;
mod network;
mod ops;
mod steps;
mod training;

pub use network::CudaNetwork;
pub use ops::{adamw, sgd};
pub use training::CudaStep;
