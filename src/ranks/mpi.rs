//! [`Collectives`] on MPI.
//!
//! All calls come from the thread that started MPI. MPI ends the job itself where something fails, a
//! dead rank included.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::mem::MaybeUninit;

use candle_core::Tensor;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use mpi::{Count, Threading};

use super::{Collectives, Messages};
use crate::exec::params::with_values;
use crate::kernels::memory::in_large_pages;

/// Variables that launchers set for each process.
const LAUNCHERS: [&str; 5] = [
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "PMI_RANK",
    "PMIX_RANK",
    "MPI_LOCALNRANKS",
];

/// Whether somebody started this process as one of several.
pub fn is_launched() -> bool {
    LAUNCHERS
        .iter()
        .any(|name| std::env::var_os(name).is_some())
}

/// Bytes that are told at a time: counts are 32-bit.
const MOST: usize = 1 << 28;
/// Values that are summed at a time: what the caches hold. On one machine 45 MB take 10 ms in parts of 1 MiB, and 44 ms as one.
const SUMMED: usize = 256 << 10;
/// A sum that was begun: MPI reads the tensor and writes the total until it is done.
struct Sum {
    own: Tensor,
    total: Vec<f32>,
    /// One for each part.
    requests: Vec<Cell<ffi::MPI_Request>>,
}

/// A message on its way: MPI reads it until it is done.
struct Message {
    _bytes: Vec<u8>,
    request: Cell<ffi::MPI_Request>,
}

pub struct World {
    sums: RefCell<Vec<Sum>>,
    messages: RefCell<VecDeque<Message>>,
    communicator: SimpleCommunicator,
    /// Ends MPI when it is dropped, so it comes last.
    _universe: Universe,
}

impl World {
    pub fn new() -> Result<Self, String> {
        let started = mpi::initialize_with_threading(Threading::Funneled);
        let (universe, threading) = started.ok_or("MPI was started already")?;
        if threading < Threading::Funneled {
            return Err("this MPI allows no threads".into());
        }
        Ok(Self {
            sums: RefCell::default(),
            messages: RefCell::default(),
            communicator: universe.world(),
            _universe: universe,
        })
    }

    /// Lets go of messages that have arrived; with `wait`, of all.
    fn clear_messages(&self, wait: bool) {
        self.messages
            .borrow_mut()
            .retain(|message| !is_done(&message.request, wait));
    }
}

/// Whether a request is done; with `wait`, when it is.
fn is_done(request: &Cell<ffi::MPI_Request>, wait: bool) -> bool {
    let mut done = 1;
    // SAFETY: the request is MPI's own, or null, which counts as done.
    unsafe {
        if wait {
            ffi::MPI_Wait(request.as_ptr(), ffi::RSMPI_STATUS_IGNORE);
        } else {
            ffi::MPI_Test(request.as_ptr(), &mut done, ffi::RSMPI_STATUS_IGNORE);
        }
    }
    done != 0
}

fn count(len: usize) -> Count {
    Count::try_from(len).unwrap_or(Count::MAX)
}

impl Collectives for World {
    fn place(&self) -> (usize, usize) {
        let world = &self.communicator;
        (world.rank() as usize, world.size() as usize)
    }

    fn sum(&self, values: &mut [f64]) {
        let own = values.to_vec();
        self.communicator
            .all_reduce_into(&own[..], values, SystemOperation::sum());
    }

    fn begin_sum(&self, values: Tensor) -> candle_core::Result<()> {
        let mut total = in_large_pages(values.elem_count());
        let begin = |(own, total): (&[f32], &mut [MaybeUninit<f32>])| {
            // SAFETY: a constant of MPI's.
            let request = Cell::new(unsafe { ffi::RSMPI_REQUEST_NULL });
            // SAFETY: both hold so many values, in a tensor and a vector whose values stay where they are
            // until the request is done: nobody touches them before `sums` has waited for it, and `drop`
            // waits too.
            unsafe {
                ffi::MPI_Iallreduce(
                    own.as_ptr().cast::<c_void>(),
                    total.as_mut_ptr().cast::<c_void>(),
                    count(own.len()),
                    ffi::RSMPI_FLOAT,
                    ffi::RSMPI_SUM,
                    self.communicator.as_raw(),
                    request.as_ptr(),
                );
            }
            request
        };
        let requests = with_values(&values, |values| {
            let room = &mut total.spare_capacity_mut()[..values.len()];
            let parts = values.chunks(SUMMED).zip(room.chunks_mut(SUMMED));
            parts.map(begin).collect()
        })?;
        self.sums.borrow_mut().push(Sum {
            own: values,
            total,
            requests,
        });
        Ok(())
    }

    fn progress(&self) {
        let sums = self.sums.borrow();
        if let Some(request) = sums.last().and_then(|sum| sum.requests.last()) {
            is_done(request, false);
        }
    }

    fn sums(&self) -> candle_core::Result<Vec<Tensor>> {
        let sums = std::mem::take(&mut *self.sums.borrow_mut());
        // All of them, whatever fails then: MPI writes to them.
        for request in sums.iter().flat_map(|sum| &sum.requests) {
            is_done(request, true);
        }
        let total = |Sum { own, mut total, .. }: Sum| {
            // SAFETY: every value is written by now.
            unsafe { total.set_len(own.elem_count()) };
            Tensor::from_vec(total, own.shape(), own.device())
        };
        sums.into_iter().map(total).collect()
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let size = self.place().1;
        let mut lens = vec![0_u64; size];
        self.communicator
            .all_gather_into(&(bytes.len() as u64), &mut lens[..]);
        // One rank after the other tells what it has, in parts that a count can say.
        let tell = |rank: usize| {
            let mut told = vec![0; lens[rank] as usize];
            if rank == self.place().0 {
                told.copy_from_slice(bytes);
            }
            let root = self.communicator.process_at_rank(count(rank));
            for part in told.chunks_mut(MOST) {
                root.broadcast_into(part);
            }
            told
        };
        (0..size).map(tell).collect()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let root = self.communicator.process_at_rank(0);
        let mut len = bytes.len() as u64;
        root.broadcast_into(&mut len);
        bytes.resize(len as usize, 0);
        for part in bytes.chunks_mut(MOST) {
            root.broadcast_into(part);
        }
    }

    fn messages(&self) -> Option<&dyn Messages> {
        Some(self)
    }

    fn abort(&self, code: i32) -> ! {
        self.communicator.abort(code)
    }
}

impl Messages for World {
    fn send(&self, rank: usize, bytes: &[u8]) {
        self.clear_messages(false);
        let bytes = bytes.to_vec();
        // SAFETY: a constant of MPI's.
        let request = Cell::new(unsafe { ffi::RSMPI_REQUEST_NULL });
        // SAFETY: the bytes stay where they are until the request is done.
        unsafe {
            ffi::MPI_Isend(
                bytes.as_ptr().cast::<c_void>(),
                count(bytes.len()),
                ffi::RSMPI_UINT8_T,
                count(rank),
                0,
                self.communicator.as_raw(),
                request.as_ptr(),
            );
        }
        self.messages.borrow_mut().push_back(Message {
            _bytes: bytes,
            request,
        });
    }

    fn receive(&self, from: Option<usize>, wait: bool) -> Option<(usize, Vec<u8>)> {
        self.clear_messages(false);
        let world = &self.communicator;
        let one = from.map(|rank| world.process_at_rank(count(rank)));
        let (message, status) = match (one, wait) {
            (Some(process), true) => process.matched_probe(),
            (Some(process), false) => process.immediate_matched_probe()?,
            (None, true) => world.any_process().matched_probe(),
            (None, false) => world.any_process().immediate_matched_probe()?,
        };
        let source = status.source_rank() as usize;
        let mut bytes = vec![0_u8; status.count(u8::equivalent_datatype()) as usize];
        message.matched_receive_into(&mut bytes[..]);
        Some((source, bytes))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for request in self.sums.borrow().iter().flat_map(|sum| &sum.requests) {
            is_done(request, true);
        }
        self.clear_messages(true);
    }
}
