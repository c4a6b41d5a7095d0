//! A few threads that share the tasks of one step after another.
//!
//! A network is dozens of steps of a tenth of a millisecond, so that handing out work must cost a
//! microsecond: workers spin for a moment between steps before they sleep, and tasks are claimed
//! one by one. Each thread has a share of them, neighbours of each other, the same part of every
//! step: as tasks are in the order of what they write, a thread mostly reads what it wrote itself,
//! which its own caches hold (cores of one machine need not have a cache in common). Whoever is
//! done takes tasks from the end of the largest share that is left. A step ends when its tasks are
//! done, not when every worker has noticed: where another process has taken a core away, the
//! others do the work and nobody waits for the thread that is not running. Threads beyond the
//! machine's cores are left asleep: they could only take turns with the others.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
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

/// The tasks of a step that a thread has left. Alone on its cache lines.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

/// What is in a [`Share`]: the step's epoch (its last bits), the first task and the end, so that all
/// change at once.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Left {
    epoch: u32,
    start: u64,
    end: u64,
}

impl Left {
    const TASK_BITS: u32 = 20;
    /// Most tasks that are told apart.
    const MOST: usize = (1 << Self::TASK_BITS) - 1;
    const EPOCHS: u32 = u32::MAX >> (2 * Self::TASK_BITS - 32);

    fn new(epoch: u32, tasks: std::ops::Range<usize>) -> Self {
        Self {
            epoch: epoch & Self::EPOCHS,
            start: tasks.start as u64,
            end: tasks.end as u64,
        }
    }

    fn pack(self) -> u64 {
        (u64::from(self.epoch) << Self::TASK_BITS | self.start) << Self::TASK_BITS | self.end
    }

    fn unpack(word: u64) -> Self {
        let mask = Self::MOST as u64;
        Self {
            epoch: (word >> (2 * Self::TASK_BITS)) as u32,
            start: word >> Self::TASK_BITS & mask,
            end: word & mask,
        }
    }

    /// Tasks that are left of that step.
    fn len(self, epoch: u32) -> u64 {
        if self.epoch == epoch & Self::EPOCHS {
            self.end - self.start
        } else {
            0
        }
    }
}

#[derive(Default)]
struct Shared {
    /// Counts the steps; workers wait for it to change.
    epoch: AtomicU32,
    /// By thread; the first is the caller's.
    shares: Vec<Share>,
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
        let shared = Shared {
            shares: (0..threads.max(1)).map(|_| Share::default()).collect(),
            ..Shared::default()
        };
        let mut pool = Self {
            shared: Arc::new(shared),
            workers: Vec::new(),
            useful: std::thread::available_parallelism().map_or(threads, |cores| cores.get()) - 1,
            running: Mutex::new(()),
        };
        for index in 1..threads {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("plan-{index}"));
            pool.workers.push(builder.spawn(move || shared.work(index))?);
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
        if count > Left::MOST {
            // Several at a time.
            let each = count.div_ceil(Left::MOST);
            return self.start(count.div_ceil(each), &|part| {
                (part * each..((part + 1) * each).min(count)).for_each(&task);
            });
        }
        self.start(count, &task);
    }

    fn start(&self, count: usize, task: Task) {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        shared.done.store(0, Ordering::Release);
        let pointer = std::ptr::from_ref(&task).cast_mut().cast();
        shared.task.store(pointer, Ordering::Release);
        // Shares of the last step are empty, so that nothing is claimed until they are set; a late
        // worker of that step finds another epoch in them.
        let epoch = shared.epoch.load(Ordering::Relaxed).wrapping_add(1);
        let threads = shared.shares.len();
        let bound = |thread: usize| count * thread / threads;
        for (thread, share) in shared.shares.iter().enumerate() {
            let left = Left::new(epoch, bound(thread)..bound(thread + 1));
            share.0.store(left.pack(), Ordering::Release);
        }
        shared.epoch.store(epoch, Ordering::Release);
        let sleeping = *lock(&shared.sleeping);
        let awake = self.workers.len() - sleeping;
        for _ in awake..self.useful.min(count - 1).min(self.workers.len()) {
            shared.wake.notify_one();
        }
        shared.take_part(0, epoch);
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
    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.wait_for_step(seen) {
            self.take_part(thread, epoch);
            seen = epoch;
        }
    }

    fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Acquire)
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
    fn take_part(&self, thread: usize, epoch: u32) {
        while let Some(index) = self.claim(thread, epoch) {
            // SAFETY: the claim succeeded within the epoch, so the step is not over until this
            // task is counted as done, and whoever runs it keeps the task on its stack until
            // then. It was set before the shares of the epoch were.
            let task = unsafe { *self.task.load(Ordering::Acquire).cast::<Task>() };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                lock(&self.panic).get_or_insert(panic);
            }
            self.done.fetch_add(1, Ordering::Release);
        }
    }

    /// The first task of the thread's own share, or the last of the largest.
    fn claim(&self, thread: usize, epoch: u32) -> Option<usize> {
        let look = |share: &Share| Left::unpack(share.0.load(Ordering::Acquire));
        let exchange = |share: &Share, old: Left, new: Left| {
            let (old, new) = (old.pack(), new.pack());
            share
                .0
                .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        loop {
            let (own, left) = (&self.shares[thread], look(&self.shares[thread]));
            if left.len(epoch) > 0 {
                let start = left.start + 1;
                if exchange(own, left, Left { start, ..left }) {
                    return Some(left.start as usize);
                }
                continue;
            }
            let others = self.shares.iter().map(|share| (share, look(share)));
            let (share, left) = others.max_by_key(|(_, left)| left.len(epoch))?;
            if left.len(epoch) == 0 {
                return None;
            }
            let end = left.end - 1;
            if exchange(share, left, Left { end, ..left }) {
                return Some(end as usize);
            }
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
    fn more_tasks_than_a_share_tells_apart() {
        let pool = Pool::new(3).unwrap();
        let count = 2 * Left::MOST + 7;
        let (runs, sum) = (AtomicUsize::new(0), AtomicUsize::new(0));
        pool.run(count, |i| {
            runs.fetch_add(1, Ordering::Relaxed);
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(runs.into_inner(), count);
        assert_eq!(sum.into_inner(), count * (count - 1) / 2);
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
