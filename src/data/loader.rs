//! Decoding ahead of the network, in several threads, in input order and in bounded memory.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::{Decoder, ImageError, Input, InputError, prepare};
use crate::models::Preprocessing;

/// Files of more bytes are not read.
const MAX_FILE_BYTES: u64 = 512 << 20;
/// What pictures being decoded may take together; a larger one is decoded alone.
const DECODING_BYTES: u64 = 192 << 20;
/// How the names of decoding threads begin. Their panics are errors of one image: a program may
/// want its panic hook to be silent about them.
pub const THREAD_NAME: &str = "decode";
/// Finished images that may wait for the network, for each thread.
const AHEAD: usize = 8;

/// An image ready for the network.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Of the picture, as it is shown.
    pub width: usize,
    pub height: usize,
    /// `[crop, crop, 3]`, normalised.
    pub pixels: Vec<f32>,
}

/// One input, read or not.
#[derive(Debug)]
pub struct Loaded {
    pub name: String,
    pub result: Result<Prepared, String>,
}

/// What [`Loader::next`] gives.
pub enum Next {
    Image(Loaded),
    /// Nothing within the time that was given.
    Waiting,
    End,
}

type Job = (Input, SyncSender<Loaded>);

/// A running pipeline.
pub struct Loader {
    /// In input order, where each image will arrive.
    queue: Receiver<Receiver<Loaded>>,
    /// The first of the queue, where it was not ready in time.
    waiting: Mutex<Option<Receiver<Loaded>>>,
}

impl Loader {
    /// Starts to read `inputs` with so many threads.
    ///
    /// # Errors
    /// Where threads cannot be started.
    pub fn start(
        inputs: impl Iterator<Item = Result<Input, InputError>> + Send + 'static,
        decoder: Decoder,
        preprocessing: Preprocessing,
        threads: usize,
    ) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let (queue_in, queue) = mpsc::sync_channel(threads * AHEAD);
        let (jobs, job_queue) = mpsc::channel::<Job>();
        let job_queue = Arc::new(Mutex::new(job_queue));
        let budget = Arc::new(Budget::default());
        for index in 0..threads {
            let (jobs, budget) = (job_queue.clone(), budget.clone());
            let work = move || {
                // A job's channel has room for its one message.
                while let Some((input, done)) = receive(&jobs) {
                    let result = load(&input, &decoder, &preprocessing, &budget);
                    let name = input.name();
                    let _ = done.send(Loaded {
                        name,
                        result: result.map_err(|e| e.to_string()),
                    });
                }
            };
            thread::Builder::new()
                .name(format!("{THREAD_NAME}-{index}"))
                .spawn(work)?;
        }
        // Finding inputs may wait for a person at a terminal, so it has a thread of its own.
        let find = move || {
            for found in inputs {
                let (done, image) = mpsc::sync_channel(1);
                // The queue first: it is what bounds the work ahead. Where the other side is
                // gone, nobody waits for the rest.
                if queue_in.send(image).is_err() {
                    return;
                }
                match found {
                    Ok(input) => {
                        if jobs.send((input, done)).is_err() {
                            return;
                        }
                    }
                    Err(InputError { name, reason }) => {
                        let result = Err(reason);
                        let _ = done.send(Loaded { name, result });
                    }
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

    /// The next image in input order; with `wait`, gives up after that time.
    pub fn next(&self, wait: Option<Duration>) -> Next {
        let mut waiting = self.waiting.lock().unwrap_or_else(|e| e.into_inner());
        let image = match waiting.take() {
            Some(image) => image,
            None => match receive_within(&self.queue, wait) {
                Ok(image) => image,
                Err(RecvTimeoutError::Timeout) => return Next::Waiting,
                Err(RecvTimeoutError::Disconnected) => return Next::End,
            },
        };
        match receive_within(&image, wait) {
            Ok(loaded) => Next::Image(loaded),
            Err(RecvTimeoutError::Timeout) => {
                *waiting = Some(image);
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

fn receive(jobs: &Mutex<Receiver<Job>>) -> Option<Job> {
    jobs.lock().unwrap_or_else(|e| e.into_inner()).recv().ok()
}

fn load(
    input: &Input,
    decoder: &Decoder,
    preprocessing: &Preprocessing,
    budget: &Budget,
) -> Result<Prepared, ImageError> {
    let bytes = input.read(MAX_FILE_BYTES)?;
    let (width, height) = decoder.dimensions(&bytes)?;
    // The decoder's picture and its conversion to RGB, and the file.
    let needed = u64::from(width) * u64::from(height) * 7 + bytes.len() as u64;
    let _share = budget.take(needed);
    let image = decoder.decode(&bytes)?;
    drop(bytes);
    Ok(Prepared {
        width: image.width,
        height: image.height,
        pixels: prepare(&image, preprocessing),
    })
}

/// Memory that threads share.
#[derive(Default)]
struct Budget {
    taken: Mutex<u64>,
    changed: Condvar,
}

struct Share<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Budget {
    /// Waits until so many bytes are free, or nobody else holds any.
    fn take(&self, bytes: u64) -> Share<'_> {
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
