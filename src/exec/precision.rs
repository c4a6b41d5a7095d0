use std::fmt;

use candle_core::DType;
use serde::{Deserialize, Serialize};

/// What numbers a CUDA device computes with. Parameters, statistics and sums are float32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32
    #[default]
    F32,
    /// float32 whose products round their factors to ten bits: several times as fast
    Tf32,
    /// bfloat16: float32's range with three digits
    Bf16,
    /// float16: four digits, with gradients scaled to its range
    F16,
}

impl Precision {
    /// Of activations.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 | Precision::Tf32 => DType::F32,
            Precision::Bf16 => DType::BF16,
            Precision::F16 => DType::F16,
        }
    }

    /// Tells candle's matrix products.
    #[cfg(any(feature = "cuda", feature = "emulated", test))]
    pub(super) fn announce(self) {
        #[cfg(feature = "cuda")]
        candle_core::cuda_backend::set_gemm_reduced_precision_f32(self == Precision::Tf32);
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        })
    }
}
