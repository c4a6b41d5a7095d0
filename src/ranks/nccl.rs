//! [`Collectives`] on NCCL: the CUDA devices of one machine, a process each.
//!
//! Everything goes over the device's own stream, behind the kernels that make what is told. As with MPI,
//! a call that fails ends the process; the one that started it then ends the others.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::cuda_backend::CudaStorage;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, Device, Result, Storage, Tensor, bail};

use super::{Collectives, Messages};

/// What processes need to find each other, as text.
pub fn new_id() -> std::result::Result<String, String> {
    let id = Id::new().map_err(|e| format!("NCCL cannot be started: {e:?}"))?;
    let hex = id.internal().iter().map(|&b| format!("{:02x}", b as u8));
    Ok(hex.collect())
}

fn id_of(text: &str) -> Option<Id> {
    let mut internal = [0; 128];
    if text.len() != 2 * internal.len() || !text.is_ascii() {
        return None;
    }
    for (byte, index) in internal.iter_mut().zip((0..text.len()).step_by(2)) {
        *byte = u8::from_str_radix(&text[index..index + 2], 16).ok()? as _;
    }
    Some(Id::uninit(internal))
}

pub struct World {
    comm: Comm,
    device: CudaDevice,
    stream: Arc<CudaStream>,
    /// What was begun: NCCL reads the first and writes the second until the stream is there.
    sums: RefCell<Vec<[Tensor; 2]>>,
}

/// What a call gave; where it failed, the process ends.
fn or_end<T, E: std::fmt::Debug>(outcome: std::result::Result<T, E>) -> T {
    outcome.unwrap_or_else(|error| {
        crate::cli::complain(&format!(
            "what NCCL tells the other devices failed: {error:?}"
        ));
        std::process::exit(2)
    })
}

impl World {
    /// Meets the others.
    ///
    /// # Errors
    /// Where the device is not there, or NCCL cannot be started.
    pub fn new(
        device: &Device,
        rank: usize,
        count: usize,
        id: &str,
    ) -> std::result::Result<Self, String> {
        let Device::Cuda(device) = device else {
            return Err("NCCL works on CUDA devices".into());
        };
        let id = id_of(id).ok_or("the number by which processes find each other is broken")?;
        let stream = device.cuda_stream();
        let comm = Comm::from_rank(stream.clone(), rank, count, id)
            .map_err(|e| format!("NCCL cannot be started: {e:?}"))?;
        Ok(Self {
            comm,
            device: device.clone(),
            stream,
            sums: RefCell::default(),
        })
    }

    /// The sum over all ranks of a float32 tensor.
    fn total(&self, values: &Tensor) -> Result<Tensor> {
        let (storage, layout) = values.storage_and_layout();
        let (Storage::Cuda(storage), true) = (&*storage, layout.is_contiguous()) else {
            bail!("NCCL sums contiguous tensors of the device");
        };
        let first = layout.start_offset();
        let own = storage.as_cuda_slice::<f32>()?;
        let own = own.slice(first..first + values.elem_count());
        // SAFETY: the sum is written to all of it.
        let mut total = unsafe { self.device.alloc::<f32>(values.elem_count()) }?;
        let done = self.comm.all_reduce(&own, &mut total, &ReduceOp::Sum);
        done.map_err(|e| candle_core::Error::Msg(format!("NCCL: {e:?}")))?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(total, self.device.clone()));
        Ok(Tensor::from_storage(
            storage,
            values.shape(),
            BackpropOp::none(),
            false,
        ))
    }

    /// One rank's bytes, in all.
    fn tell(&self, root: usize, bytes: &mut [u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut told = or_end(self.stream.clone_htod(bytes));
        or_end(self.comm.broadcast_in_place(&mut told, root as i32));
        or_end(self.stream.memcpy_dtoh(&told, bytes));
        or_end(self.stream.synchronize());
    }
}

impl Collectives for World {
    fn place(&self) -> (usize, usize) {
        (self.comm.rank(), self.comm.world_size())
    }

    fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    fn sum(&self, values: &mut [f64]) {
        let mut all = or_end(self.stream.clone_htod(&*values));
        or_end(self.comm.all_reduce_in_place(&mut all, &ReduceOp::Sum));
        or_end(self.stream.memcpy_dtoh(&all, values));
        or_end(self.stream.synchronize());
    }

    fn sum_now(&self, values: &Tensor) -> Result<Tensor> {
        self.total(values)
    }

    fn begin_sum(&self, values: Tensor) -> Result<()> {
        let total = self.total(&values)?;
        self.sums.borrow_mut().push([values, total]);
        Ok(())
    }

    fn progress(&self) {}

    fn sums(&self) -> Result<Vec<Tensor>> {
        let sums = std::mem::take(&mut *self.sums.borrow_mut());
        Ok(sums.into_iter().map(|[_, total]| total).collect())
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let (rank, count) = self.place();
        let mut lens = vec![0.0; count];
        lens[rank] = bytes.len() as f64;
        self.sum(&mut lens);
        let tell = |(root, len): (usize, f64)| {
            let mut told = vec![0; len as usize];
            if root == rank {
                told.copy_from_slice(bytes);
            }
            self.tell(root, &mut told);
            told
        };
        lens.into_iter().enumerate().map(tell).collect()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let mut len = [match self.place().0 {
            0 => bytes.len() as f64,
            _ => 0.0,
        }];
        self.sum(&mut len);
        bytes.resize(len[0] as usize, 0);
        self.tell(0, bytes);
    }

    fn messages(&self) -> Option<&dyn Messages> {
        None
    }

    fn abort(&self, code: i32) -> ! {
        std::process::exit(code)
    }
}
