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

/// Alone on its cache lines: cores hand lines to each other, and each time costs some of the
/// microsecond.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

/// The step at hand, as one word.
#[derive(Clone, Copy, PartialEq, Eq)]
struct StepWord {
    /// Counts the steps, see [`Left`].
    epoch: u32,
    /// Tasks.
    count: usize,
}

/// The tasks that a thread has left, as one word that changes at once: the step's epoch, the first
/// task and the end. A share of an earlier step is as good as the thread's whole share of this one:
/// whoever takes from it first makes it so. Thus a share stays in the cache of its thread as long as
/// nobody else takes from it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Left {
    epoch: u32,
    start: usize,
    end: usize,
}

/// For the number of a task; the rest of a word is the epoch's.
const TASK_BITS: u32 = 20;
/// Most tasks that are told apart.
const MOST_TASKS: usize = (1 << TASK_BITS) - 1;
const EPOCHS: u32 = u32::MAX >> (2 * TASK_BITS - 32);

impl StepWord {
    fn pack(self) -> u64 {
        u64::from(self.epoch) << TASK_BITS | self.count as u64
    }

    fn unpack(word: u64) -> Self {
        Self {
            epoch: (word >> TASK_BITS) as u32,
            count: word as usize & MOST_TASKS,
        }
    }

    /// What a thread of so many has left of this step, given its share's word; None where the word is
    /// of a later step, so that this one is over.
    fn left(self, word: u64, thread: usize, threads: usize) -> Option<Left> {
        let left = Left::unpack(word);
        let ahead = left.epoch.wrapping_sub(self.epoch) & EPOCHS;
        if ahead == 0 {
            return Some(left);
        }
        let bound = |thread: usize| self.count * thread / threads;
        (ahead > EPOCHS / 2).then(|| Left {
            epoch: self.epoch,
            start: bound(thread),
            end: bound(thread + 1),
        })
    }
}

impl Left {
    fn pack(self) -> u64 {
        let Self { epoch, start, end } = self;
        (u64::from(epoch) << TASK_BITS | start as u64) << TASK_BITS | end as u64
    }

    fn unpack(word: u64) -> Self {
        Self {
            epoch: (word >> (2 * TASK_BITS)) as u32,
            start: (word >> TASK_BITS) as usize & MOST_TASKS,
            end: word as usize & MOST_TASKS,
        }
    }

    fn len(self) -> usize {
        self.end - self.start
    }
}

#[derive(Default)]
struct Shared {
    step: Line<Current>,
    /// Tasks that are done.
    done: Line<AtomicUsize>,
    /// [`Left`] by thread; the first is the caller's.
    shares: Vec<Line<AtomicU64>>,
    /// A task's panic, to go on with on the calling thread.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    /// Workers asleep.
    sleeping: Mutex<usize>,
    wake: Condvar,
}

#[derive(Default)]
struct Current {
    /// A [`StepWord`]; workers wait for it to change.
    word: AtomicU64,
    /// Points at the step's [`Task`], on the stack of who runs it.
    task: AtomicPtr<()>,
}

impl Pool {
    /// Starts `threads - 1` workers.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Shared {
            shares: (0..threads.max(1)).map(|_| Line::default()).collect(),
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
            pool.workers
                .push(builder.spawn(move || shared.work(index))?);
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
        if count > MOST_TASKS {
            // Several at a time.
            let each = count.div_ceil(MOST_TASKS);
            return self.start(count.div_ceil(each), &|part| {
                (part * each..((part + 1) * each).min(count)).for_each(&task);
            });
        }
        self.start(count, &task);
    }

    fn start(&self, count: usize, task: Task) {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        shared.done.0.store(0, Ordering::Release);
        let pointer = std::ptr::from_ref(&task).cast_mut().cast();
        shared.step.0.task.store(pointer, Ordering::Release);
        let epoch = shared.current().epoch.wrapping_add(1) & EPOCHS;
        let step = StepWord { epoch, count };
        shared.step.0.word.store(step.pack(), Ordering::Release);
        let sleeping = *lock(&shared.sleeping);
        let awake = self.workers.len() - sleeping;
        for _ in awake..self.useful.min(count - 1).min(self.workers.len()) {
            shared.wake.notify_one();
        }
        shared.take_part(0, step);
        let mut spins = 0;
        while shared.done.0.load(Ordering::Acquire) < count {
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
        let mut seen = StepWord::unpack(0);
        while let Some(step) = self.wait_for_step(seen) {
            self.take_part(thread, step);
            seen = step;
        }
    }

    fn current(&self) -> StepWord {
        StepWord::unpack(self.step.0.word.load(Ordering::Acquire))
    }

    /// The next step after `seen`; None when the pool ends.
    fn wait_for_step(&self, seen: StepWord) -> Option<StepWord> {
        let ready = || self.current() != seen || self.stop.load(Ordering::Acquire);
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
        let step = self.current();
        (!self.stop.load(Ordering::Acquire) && step != seen).then_some(step)
    }

    /// Claims and does tasks of the step until none is left or the step is over.
    fn take_part(&self, thread: usize, step: StepWord) {
        let mut done = 0;
        while let Some(index) = self.claim(thread, step) {
            // SAFETY: the claim succeeded, so the step is not over until this task is counted as
            // done, and whoever runs it keeps the task on its stack until then.
            let task = unsafe { *self.step.0.task.load(Ordering::Acquire).cast::<Task>() };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
                lock(&self.panic).get_or_insert(panic);
            }
            done += 1;
        }
        if done > 0 {
            self.done.0.fetch_add(done, Ordering::Release);
        }
    }

    /// The first task of the thread's own share, or the last of the largest that is left.
    ///
    /// A claim never succeeds when the step is over: then every share that has tasks in it is a word of
    /// this step, with nothing left, or of a later one.
    fn claim(&self, thread: usize, step: StepWord) -> Option<usize> {
        let threads = self.shares.len();
        let look = |thread: usize| {
            let share = &self.shares[thread].0;
            let word = share.load(Ordering::Acquire);
            Some((share, word, step.left(word, thread, threads)?))
        };
        let exchange = |share: &AtomicU64, old: u64, new: Left| {
            let (done, failed) = (Ordering::AcqRel, Ordering::Relaxed);
            share
                .compare_exchange(old, new.pack(), done, failed)
                .is_ok()
        };
        loop {
            let (share, word, left) = look(thread)?;
            if left.len() > 0 {
                let start = left.start + 1;
                if exchange(share, word, Left { start, ..left }) {
                    return Some(left.start);
                }
                continue;
            }
            let mut largest = None;
            for other in (0..threads).filter(|&other| other != thread) {
                let found = look(other)?;
                if found.2.len() > largest.map_or(0, |(_, _, left): (_, _, Left)| left.len()) {
                    largest = Some(found);
                }
            }
            let (share, word, left) = largest?;
            let end = left.end - 1;
            if exchange(share, word, Left { end, ..left }) {
                return Some(end);
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
        let count = 2 * MOST_TASKS + 7;
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
