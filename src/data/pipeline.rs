//! Work ahead of the network, in several threads, in order and in bounded memory.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// What pictures being decoded may take together; a larger one is decoded alone.
const DECODING_BYTES: u64 = 192 << 20;
/// How the names of decoding threads begin. Their panics are errors of one image: a program may
/// want its panic hook to be silent about them.
pub const THREAD_NAME: &str = "decode";
/// Finished results that may wait, for each thread.
const AHEAD: usize = 8;

/// What a pipeline gives when it is asked for more.
pub enum Next<T> {
    Item(T),
    /// Nothing within the time that was given.
    Waiting,
    End,
}

/// A running pipeline. Dropped, it stops.
pub struct Pipeline<T> {
    /// In order, where each result will arrive.
    queue: Receiver<Receiver<T>>,
    /// The first of the queue, where it was not ready in time.
    waiting: Mutex<Option<Receiver<T>>>,
}

impl<T: Send + 'static> Pipeline<T> {
    /// Starts to do `work` on every job with so many threads.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn start<J: Send + 'static>(
        jobs: impl Iterator<Item = J> + Send + 'static,
        threads: usize,
        work: impl Fn(J, &Budget) -> T + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let (queue_in, queue) = mpsc::sync_channel(threads * AHEAD);
        let (job_in, job_queue) = mpsc::channel::<(J, SyncSender<T>)>();
        let job_queue = Arc::new(Mutex::new(job_queue));
        let shared = Arc::new((work, Budget::default()));
        for index in 0..threads {
            let (jobs, shared) = (job_queue.clone(), shared.clone());
            let run = move || {
                // A job's channel has room for its one result.
                while let Some((job, done)) = receive(&jobs) {
                    let (work, budget) = &*shared;
                    let _ = done.send(work(job, budget));
                }
            };
            thread::Builder::new()
                .name(format!("{THREAD_NAME}-{index}"))
                .spawn(run)?;
        }
        // Finding jobs may wait for a person at a terminal, so it has a thread of its own.
        let find = move || {
            for job in jobs {
                let (done, result) = mpsc::sync_channel(1);
                // The queue first: it is what bounds the work ahead. Where the other side is
                // gone, nobody waits for the rest.
                if queue_in.send(result).is_err() || job_in.send((job, done)).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("find-inputs".into())
            .spawn(find)?;
        Ok(Self {
            queue,
            waiting: Mutex::new(None),
        })
    }

    /// The next result in order; with `wait`, gives up after that time.
    pub fn next(&self, wait: Option<Duration>) -> Next<T> {
        let mut waiting = self.waiting.lock().unwrap_or_else(|e| e.into_inner());
        let result = match waiting.take() {
            Some(result) => result,
            None => match receive_within(&self.queue, wait) {
                Ok(result) => result,
                Err(RecvTimeoutError::Timeout) => return Next::Waiting,
                Err(RecvTimeoutError::Disconnected) => return Next::End,
            },
        };
        match receive_within(&result, wait) {
            Ok(item) => Next::Item(item),
            Err(RecvTimeoutError::Timeout) => {
                *waiting = Some(result);
                Next::Waiting
            }
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }
}

fn receive_within<T>(channel: &Receiver<T>, wait: Option<Duration>) -> Result<T, RecvTimeoutError> {
    match wait {
        Some(wait) => channel.recv_timeout(wait),
        None => channel.recv().map_err(|_| RecvTimeoutError::Disconnected),
    }
}

fn receive<T>(jobs: &Mutex<Receiver<T>>) -> Option<T> {
    jobs.lock().unwrap_or_else(|e| e.into_inner()).recv().ok()
}

/// Memory that threads share.
#[derive(Default)]
pub struct Budget {
    taken: Mutex<u64>,
    changed: Condvar,
}

/// Some of the memory, given back when it is dropped.
pub struct Share<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    /// Waits until so many bytes are free, or nobody else holds any.
    pub fn take(&self, bytes: u64) -> Share<'_> {
        let taken = self.taken.lock().unwrap_or_else(|e| e.into_inner());
        let full = |taken: &mut u64| *taken > 0 && *taken + bytes > DECODING_BYTES;
        let taken = self.changed.wait_while(taken, full);
        *taken.unwrap_or_else(|e| e.into_inner()) += bytes;
        Share {
            budget: self,
            bytes,
        }
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        let taken = self.budget.taken.lock();
        *taken.unwrap_or_else(|e| e.into_inner()) -= self.bytes;
        self.budget.changed.notify_all();
    }
}
