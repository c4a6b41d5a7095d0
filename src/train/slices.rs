//! The values of CPU tensors as slices, and work on them in several threads.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

use crate::exec::cpu::Pool;
use crate::kernels::{Isa, optimizer};

/// Values that one task works on. Fixed, so that sums do not depend on the number of threads.
pub(super) const PART: usize = 1 << 15;

/// Hands out a tensor's values to write them.
///
/// # Errors
/// Where the tensor is not contiguous float32 on the CPU.
pub(super) fn with_mut<R>(tensor: &Tensor, write: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    struct Write<F, R>(RefCell<(Option<F>, Option<R>)>);
    impl<R, F: FnOnce(&mut [f32]) -> R> InplaceOp1 for Write<F, R> {
        fn name(&self) -> &'static str {
            "write"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let Some((start, end)) = layout.contiguous_offsets() else {
                bail!("only contiguous tensors are written in place");
            };
            let CpuStorage::F32(values) = storage else {
                bail!("only float32 tensors are written in place");
            };
            let mut cell = self.0.borrow_mut();
            if let Some(write) = cell.0.take() {
                cell.1 = Some(write(&mut values[start..end]));
            }
            Ok(())
        }
    }
    let operation = Write(RefCell::new((Some(write), None)));
    tensor.inplace_op1(&operation)?;
    match operation.0.into_inner().1 {
        Some(result) => Ok(result),
        None => bail!("the tensor is not on the CPU"),
    }
}

/// Hands out a tensor's values.
///
/// # Errors
/// As [`with_mut`].
pub(super) fn with<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        bail!("not a float32 tensor on the CPU");
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(read(&values[start..end])),
        None => bail!("not a contiguous tensor"),
    }
}

/// The threads that update parameters, and their instruction set.
pub struct Workers {
    pool: Pool,
    pub(super) isa: Isa,
}

impl Workers {
    /// # Errors
    /// Where threads cannot be started.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        Ok(Self {
            pool: Pool::new(threads)?,
            isa: Isa::detect(),
        })
    }

    /// Runs `task` on every part.
    pub(super) fn each<T: Send>(&self, parts: Vec<T>, task: impl Fn(T) + Sync) {
        self.pool.each(parts, task);
    }

    /// `sum += values`
    pub(super) fn add(&self, sum: &Tensor, values: &Tensor) -> Result<()> {
        with_mut(sum, |sum| {
            with(values, |values| {
                let parts = sum.chunks_mut(PART).zip(values.chunks(PART)).collect();
                self.each(parts, |(sum, values)| {
                    optimizer::add(self.isa, sum, values);
                });
            })
        })?
    }

    /// `average += (values - average) · towards`
    pub(super) fn blend(&self, average: &Tensor, values: &Tensor, towards: f32) -> Result<()> {
        with_mut(average, |average| {
            with(values, |values| {
                let parts = average.chunks_mut(PART).zip(values.chunks(PART)).collect();
                self.each(parts, |(average, values)| {
                    optimizer::blend(self.isa, average, values, towards);
                });
            })
        })?
    }

    /// The sum of the squares, the same with any number of threads.
    pub(super) fn sum_of_squares(&self, values: &Tensor) -> Result<f64> {
        with(values, |values| {
            let mut sums = vec![0.0; values.len().div_ceil(PART)];
            let parts = sums.iter_mut().zip(values.chunks(PART)).collect();
            self.each(parts, |(sum, values)| {
                *sum = optimizer::sum_of_squares(self.isa, values);
            });
            sums.iter().sum()
        })
    }
}
