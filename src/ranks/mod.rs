//! The processes that do one job together: ranks, as MPI calls them.
//!
//! Started by `mpirun` or `srun`, with the cargo feature `mpi`, every process finds itself one of
//! several; else it is alone, and everything here costs nothing. What processes say to each other goes
//! through [`Collectives`], so that something else than MPI can stand behind it.
//!
//! A collective call is made by all ranks, in the same order. A rank that dies ends the job: the others
//! would wait for it for ever.

pub mod local;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;

use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use candle_core::{Device, Tensor};

/// What is wrong with data that ranks do not agree on.
pub const RANKS_DIFFER: &str =
    "the processes do not all see the same images there (give them one folder, or equal copies)";

/// What processes that work together can do.
pub trait Collectives {
    /// This process's number, and how many there are.
    fn place(&self) -> (usize, usize);

    /// The sum over all ranks of each value, with the same bits everywhere.
    fn sum(&self, values: &mut [f64]);

    /// The same of a float32 tensor.
    fn sum_now(&self, values: &Tensor) -> candle_core::Result<Tensor> {
        let mut all: Vec<f64> = values
            .flatten_all()?
            .to_vec1::<f32>()?
            .into_iter()
            .map(f64::from)
            .collect();
        self.sum(&mut all);
        let all: Vec<f32> = all.into_iter().map(|v| v as f32).collect();
        Tensor::from_vec(all, values.shape(), values.device())
    }

    /// Where tensors are that [`Collectives::begin_sum`] takes.
    fn device(&self) -> Device {
        Device::Cpu
    }

    /// Begins such a sum of a contiguous float32 tensor, that others may overtake;
    /// [`Collectives::sums`] gives it. Nobody may write to the tensor any more.
    fn begin_sum(&self, values: Tensor) -> candle_core::Result<()>;

    /// Lets what was begun go on. To be called now and then.
    fn progress(&self);

    /// Waits for all sums that were begun, and gives them in that order.
    fn sums(&self) -> candle_core::Result<Vec<Tensor>>;

    /// What each rank has, in their order.
    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>>;

    /// The first rank's bytes, to all.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// The way to one of them alone, where there is one.
    fn messages(&self) -> Option<&dyn Messages>;

    /// Ends all ranks at once.
    fn abort(&self, code: i32) -> !;
}

/// What processes can say to one of the others.
pub trait Messages {
    /// Sends bytes to one rank, which does not wait for them.
    fn send(&self, rank: usize, bytes: &[u8]);

    /// The next message of any rank, or of one, and whose it is. None where there is none yet and
    /// `wait` does not say to wait.
    fn receive(&self, from: Option<usize>, wait: bool) -> Option<(usize, Vec<u8>)>;
}

/// This process and those that work with it.
#[derive(Clone)]
pub struct Ranks(Option<Rc<dyn Collectives>>);

impl Default for Ranks {
    fn default() -> Self {
        Self::alone()
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} of {}", self.rank(), self.count())
    }
}

impl Ranks {
    /// A process of its own.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Those that are reached so.
    #[cfg(test)]
    pub fn by(collectives: impl Collectives + 'static) -> Self {
        Self(Some(Rc::new(collectives)))
    }

    /// Those that were started together with this process.
    ///
    /// # Errors
    /// Where MPI cannot be started.
    pub fn join() -> Result<Self, String> {
        #[cfg(feature = "mpi")]
        if self::mpi::is_launched() {
            let world = self::mpi::World::new()?;
            return Ok(match world.place() {
                (_, 1) => Self::alone(),
                _ => Self(Some(Rc::new(world))),
            });
        }
        Ok(Self::alone())
    }

    /// The processes that [`local::run`] has started, each with a device of its own; None where this is
    /// not one of them.
    ///
    /// # Errors
    /// Where they cannot meet.
    pub fn on_devices(device: &Device) -> Result<Option<Self>, String> {
        let Some(place) = local::Place::found() else {
            return Ok(None);
        };
        #[cfg(feature = "nccl")]
        {
            let world = nccl::World::new(device, place.rank, place.count, &place.meeting)?;
            Ok(Some(Self(Some(Rc::new(world)))))
        }
        #[cfg(not(feature = "nccl"))]
        Err(format!(
            "process {} of {} on {:?}: this sconce was built without NCCL",
            place.rank,
            place.count,
            device.location()
        ))
    }

    /// Starts this program once for each of several devices, and waits for all.
    ///
    /// # Errors
    /// Where that cannot be done.
    pub fn start_each(count: usize) -> Result<u8, String> {
        #[cfg(feature = "nccl")]
        {
            let meeting = nccl::new_id()?;
            let command = || {
                let mut command = std::process::Command::new(std::env::current_exe()?);
                command.args(std::env::args_os().skip(1));
                Ok(command)
            };
            local::run(count, &meeting, command).map_err(|e| format!("cannot start processes: {e}"))
        }
        #[cfg(not(feature = "nccl"))]
        Err(format!(
            "{count} devices: this sconce was built without NCCL (build with `cargo build --release --features nccl`, or name one device)"
        ))
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |c| c.place().0)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.as_ref().map_or(1, |c| c.place().1)
    }

    /// Whether there are others.
    pub fn are_several(&self) -> bool {
        self.count() > 1
    }

    /// Whether this is the one that writes and shows.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Where there are others: the way to them.
    pub fn others(&self) -> Option<&dyn Collectives> {
        self.0.as_deref()
    }

    /// Whether any rank says so.
    pub fn any(&self, own: bool) -> bool {
        self.sum([f64::from(u8::from(own))]) != [0.0]
    }

    /// The sum over all ranks of each value.
    pub fn sum<const N: usize>(&self, mut values: [f64; N]) -> [f64; N] {
        if let Some(others) = self.others() {
            others.sum(&mut values);
        }
        values
    }

    /// The first rank's values, to all.
    pub fn broadcast<const N: usize>(&self, values: [f64; N]) -> [f64; N] {
        if self.is_first() {
            self.sum(values)
        } else {
            self.sum([0.0; N])
        }
    }

    /// Whether all ranks have the same number.
    pub fn agree(&self, own: u64) -> bool {
        let halves = [own >> 32, own & 0xffff_ffff].map(|half| half as f64);
        !self.any(self.broadcast(halves) != halves)
    }

    /// Ends all processes at once, where there are others.
    pub fn abort(&self, code: u8) {
        if let Some(others) = self.others() {
            others.abort(code.into());
        }
    }
}

/// A rank's part of so many things, each part as large as the others or larger by one.
pub fn share(things: usize, rank: usize, count: usize) -> Range<usize> {
    let bound = |rank: usize| rank * things / count;
    bound(rank)..bound(rank + 1)
}

/// Numbers as bytes, and back.
pub mod bytes {
    /// Of float32.
    pub fn of_f32(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// To float32; what is left over is dropped.
    pub fn to_f32(bytes: &[u8]) -> Vec<f32> {
        let (values, _) = bytes.as_chunks();
        values.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_everything_once() {
        for count in 1..9 {
            for things in 0..40 {
                let mut next = 0;
                for rank in 0..count {
                    let share = share(things, rank, count);
                    assert_eq!(share.start, next);
                    assert!(share.len() <= things.div_ceil(count));
                    next = share.end;
                }
                assert_eq!(next, things);
            }
        }
    }

    #[test]
    fn numbers_come_back_as_they_were() {
        let values = [0.0, -1.5, f32::MIN_POSITIVE, f32::INFINITY];
        assert_eq!(bytes::to_f32(&bytes::of_f32(&values)), values);
    }
}
