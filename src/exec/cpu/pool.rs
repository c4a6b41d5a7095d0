//! A few threads that share the tasks of one step after another.
//!
//! A network is dozens of steps of a tenth of a millisecond, so that handing out work must cost a
//! microsecond: workers spin for a moment between steps before they sleep, and tasks are claimed
//! one by one from a counter. A step ends when its tasks are done, not when every worker has
//! noticed: where another process has taken a core away, the others do the work and nobody waits
//! for the thread that is not running. Threads beyond the machine's cores are left asleep: they
//! could only take turns with the others.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Pauses before a worker without work sleeps.
const SPINS: usize = 2_000;

/// A closure that computes the task of an index.
type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// The threads; the one that calls [`Pool::run`] works too.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Workers that can run at the same time as the caller.
    useful: usize,
    /// One step at a time.
    running: Mutex<()>,
}

#[derive(Default)]
struct Shared {
    /// Epoch of the step in the upper half, tasks claimed in the lower.
    claimed: AtomicU64,
    /// Tasks of the step.
    count: AtomicUsize,
    /// Points at the step's [`Task`], on the stack of who runs it.
    task: AtomicPtr<()>,
    done: AtomicUsize,
    /// A task's panic, to go on with on the calling thread.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// Workers asleep.
    sleeping: Mutex<usize>,
    wake: Condvar,
}

impl Pool {
    /// Starts `threads - 1` workers.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self {
            shared: Arc::default(),
            workers: Vec::new(),
            useful: std::thread::available_parallelism().map_or(threads, |cores| cores.get()) - 1,
            running: Mutex::new(()),
        };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("plan-{index}"));
            pool.workers.push(builder.spawn(move || shared.work())?);
        }
        Ok(pool)
    }

    /// How many threads work, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task` for every part and waits for all of them.
    ///
    /// # Panics
    /// Where a task does.
    pub fn each<T: Send>(&self, parts: Vec<T>, task: impl Fn(T) + Sync) {
        let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|p| Mutex::new(Some(p))).collect();
        self.run(parts.len(), |index| {
            if let Some(part) = lock(&parts[index]).take() {
                task(part);
            }
        });
    }

    /// Runs `task` for every index below `count` and waits for all of them.
    ///
    /// # Panics
    /// Where a task does.
    pub fn run(&self, count: usize, task: impl Fn(usize) + Sync) {
        if count <= 1 || self.workers.is_empty() {
            (0..count).for_each(task);
            return;
        }
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        let task: Task = &task;
        // First an epoch in which nothing can be claimed: a late worker of the last step must not
        // claim with the count and the task of this one, which are set next.
        let closed = shared.epoch().wrapping_add(1);
        let nothing_left = u64::from(u32::MAX);
        shared
            .claimed
            .store(u64::from(closed) << 32 | nothing_left, Ordering::Release);
        shared.done.store(0, Ordering::Release);
        shared.count.store(count, Ordering::Release);
        let pointer = std::ptr::from_ref(&task).cast_mut().cast();
        shared.task.store(pointer, Ordering::Release);
        let epoch = closed.wrapping_add(1);
        shared
            .claimed
            .store(u64::from(epoch) << 32, Ordering::Release);
        let sleeping = *lock(&shared.sleeping);
        let awake = self.workers.len() - sleeping;
        for _ in awake..self.useful.min(count - 1).min(self.workers.len()) {
            shared.wake.notify_one();
        }
        shared.take_part(epoch);
        let mut spins = 0;
        while shared.done.load(Ordering::Acquire) < count {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // Taken so that no worker is between its look at `stop` and its sleep.
        drop(lock(&self.shared.sleeping));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn work(&self) {
        let mut seen = 0;
        while let Some(epoch) = self.wait_for_step(seen) {
            self.take_part(epoch);
            seen = epoch;
        }
    }

    fn epoch(&self) -> u32 {
        (self.claimed.load(Ordering::Acquire) >> 32) as u32
    }

    /// The next step after `seen`; None when the pool ends.
    fn wait_for_step(&self, seen: u32) -> Option<u32> {
        let ready = || self.epoch() != seen || self.stop.load(Ordering::Acquire);
        for _ in 0..SPINS {
            if ready() {
                break;
            }
            std::hint::spin_loop();
        }
        if !ready() {
            let mut sleeping = lock(&self.sleeping);
            *sleeping += 1;
            while !ready() {
                sleeping = self
                    .wake
                    .wait(sleeping)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            *sleeping -= 1;
        }
        let epoch = self.epoch();
        (!self.stop.load(Ordering::Acquire) && epoch != seen).then_some(epoch)
    }

    /// Claims and does tasks of the step until none is left or the step is over.
    fn take_part(&self, epoch: u32) {
        let count = self.count.load(Ordering::Acquire);
        let task = self.task.load(Ordering::Acquire).cast::<Task>();
        loop {
            let claim = self.claimed.load(Ordering::Acquire);
            let index = (claim & u64::from(u32::MAX)) as usize;
            if (claim >> 32) as u32 != epoch || index >= count {
                return;
            }
            let next = claim + 1;
            let exchanged = self.claimed.compare_exchange_weak(
                claim,
                next,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if exchanged.is_err() {
                continue;
            }
            // SAFETY: the claim succeeded within the epoch, so the step is not over until this
            // task is counted as done, and whoever runs it keeps the task on its stack until
            // then. `count` and `task` were read after the epoch was seen; had they been those of
            // a later step, the epoch would have been closed before, and the claim have failed.
            let task = unsafe { *task };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                lock(&self.panic).get_or_insert(panic);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_step() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for step in 0..2_000 {
                let count = step % 17;
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, |i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|r| r.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn workers_that_fell_asleep_wake_up() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let sum = AtomicUsize::new(0);
            pool.run(100, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2).unwrap();
        let run = || pool.run(50, |i| assert!(i != 25, "task {i}"));
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        assert_eq!(panic.downcast_ref::<String>().unwrap(), "task 25");
        let done = AtomicUsize::new(0);
        pool.run(50, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 50);
    }
}
