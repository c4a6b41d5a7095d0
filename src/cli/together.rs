//! Work on images that several processes share.
//!
//! The first one finds the images and hands them out in small blocks, to whoever asks for more, itself
//! included; so a slow machine gets fewer. It takes all results, in the order of the images. Every
//! process has a thread that computes, and its main thread, the only one that speaks to the others.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::data::{Found, Input};
use crate::ranks::{Collectives, Messages, Ranks};

/// Images of a block, unless a batch of the network has more.
const BLOCK: usize = 16;
/// Blocks that a process has at a time: one that it works on, and the next.
const AHEAD: usize = 2;
/// Blocks, for each process, that may be done before the first of them is.
const WINDOW: usize = 64;
/// How long a block that is not full waits for another image.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long a thread sleeps that has nothing to do.
const NAP: Duration = Duration::from_millis(2);

/// What is handed out.
pub trait Task: Sized + Send + 'static {
    /// For another process, where one can do it.
    fn to_bytes(&self) -> Option<Vec<u8>>;

    /// What [`Task::to_bytes`] told.
    fn from_bytes(bytes: Vec<u8>) -> Self;
}

/// An image to classify, where others can read it: not standard input, and nothing that is missing.
impl Task for Found {
    fn to_bytes(&self) -> Option<Vec<u8>> {
        match self {
            Ok(Input::File(path)) => Some(bytes_of(path.clone())),
            Ok(Input::Stdin) | Err(_) => None,
        }
    }

    fn from_bytes(bytes: Vec<u8>) -> Self {
        Ok(Input::File(path_of(bytes)))
    }
}

/// A sample of data that all have opened, by its place.
impl Task for usize {
    fn to_bytes(&self) -> Option<Vec<u8>> {
        Some(self.to_string().into_bytes())
    }

    fn from_bytes(bytes: Vec<u8>) -> Self {
        let text = String::from_utf8(bytes).unwrap_or_default();
        text.parse().unwrap_or(usize::MAX)
    }
}

/// Values that are told bit by bit.
pub mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(values: &[f32], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|value| value.to_bits()))
    }

    pub fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<Vec<f32>, D::Error> {
        let values = Vec::<u32>::deserialize(from)?;
        Ok(values.into_iter().map(f32::from_bits).collect())
    }
}

/// A block, to a process that asked for one. None at the end.
#[derive(Serialize, Deserialize)]
struct Job {
    index: usize,
    tasks: Vec<Vec<u8>>,
}

/// What became of it, to the first process: at the same time it asks for the next block.
#[derive(Serialize, Deserialize)]
struct Done<S> {
    index: usize,
    settled: S,
}

/// The thread that computes.
struct Engine<T, A> {
    jobs: Option<Sender<T>>,
    answers: Receiver<A>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    /// Blocks it has: their number, how many tasks, and the answers so far.
    blocks: VecDeque<(usize, usize, Vec<A>)>,
}

impl<T: Task, A: Send + 'static> Engine<T, A> {
    fn start(
        work: impl FnOnce(Receiver<T>, &mut dyn FnMut(A)) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (jobs, taken) = mpsc::channel();
        let (given, answers) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("compute".into())
            .spawn(move || {
                work(taken, &mut |answer| {
                    // Nobody waits for it where the process ends.
                    let _ = given.send(answer);
                })
            });
        Ok(Self {
            jobs: Some(jobs),
            answers,
            thread: Some(thread.context("cannot start threads")?),
            blocks: VecDeque::new(),
        })
    }

    fn is_hungry(&self) -> bool {
        self.blocks.len() < AHEAD
    }

    fn give(&mut self, index: usize, tasks: Vec<T>) {
        self.blocks.push_back((index, tasks.len(), Vec::new()));
        let Some(jobs) = &self.jobs else { return };
        for task in tasks {
            // Whether the thread is there, `take` tells.
            let _ = jobs.send(task);
        }
    }

    /// The next block that is done.
    fn take(&mut self) -> anyhow::Result<Option<(usize, Vec<A>)>> {
        while let Some((_, count, answers)) = self.blocks.front_mut() {
            if answers.len() == *count {
                let done = self.blocks.pop_front();
                return Ok(done.map(|(index, _, answers)| (index, answers)));
            }
            match self.answers.try_recv() {
                Ok(answer) => answers.push(answer),
                Err(TryRecvError::Empty) => return Ok(None),
                Err(TryRecvError::Disconnected) => {
                    self.join()?;
                    return Err(anyhow!("the thread that computes is gone"));
                }
            }
        }
        Ok(None)
    }

    /// Waits for the thread's end.
    fn join(&mut self) -> anyhow::Result<()> {
        self.jobs = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow!("the thread that computes gave up")),
            None => Ok(()),
        }
    }
}

/// What becomes of answers.
pub trait Results {
    /// To one task.
    type Answer: Send + 'static;
    /// What the first process is told of a block.
    type Settled: Serialize + DeserializeOwned;

    /// On the process that had them: the answers to tasks that follow each other.
    ///
    /// # Errors
    /// Those end the job; likewise below.
    fn settle(&mut self, answers: Vec<Self::Answer>) -> anyhow::Result<Self::Settled>;

    /// On the first process: what was told, in the order of the tasks.
    fn take(&mut self, settled: Self::Settled) -> anyhow::Result<()>;
}

/// Does `tasks` (those of the first process count) together with others, in blocks of `batch_size` or
/// more. `work` gives an answer to each task, in their order, until no more come.
///
/// # Errors
/// Those of `work` and `results`, and where threads cannot be started. The other processes have to be
/// ended then.
pub fn share_out<T: Task, R: Results>(
    ranks: &Ranks,
    batch_size: usize,
    tasks: impl Iterator<Item = T> + Send + 'static,
    work: impl FnOnce(Receiver<T>, &mut dyn FnMut(R::Answer)) -> anyhow::Result<()> + Send + 'static,
    results: &mut R,
) -> anyhow::Result<()> {
    let Some(others) = ranks.others().and_then(Collectives::messages) else {
        return Ok(());
    };
    let engine = Engine::start(work)?;
    if ranks.is_first() {
        Lead {
            others,
            engine,
            blocks: Blocks::find(tasks, batch_size.max(BLOCK))?,
            next: 0,
            taken: 0,
            asking: VecDeque::new(),
            settled: BTreeMap::new(),
            window: WINDOW * ranks.count(),
            local: None,
        }
        .run(AHEAD * (ranks.count() - 1), results)
    } else {
        follow(others, engine, results)
    }
}

fn told<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(bytes).context("what another process said makes no sense")
}

/// Does blocks that the first process hands out.
fn follow<T: Task, R: Results>(
    others: &dyn Messages,
    mut engine: Engine<T, R::Answer>,
    results: &mut R,
) -> anyhow::Result<()> {
    for _ in 0..AHEAD {
        others.send(0, b"null");
    }
    // Blocks that were asked for.
    let mut asked = AHEAD;
    while asked > 0 || !engine.blocks.is_empty() {
        let mut idle = true;
        if let Some((_, bytes)) = others.receive(Some(0), false) {
            idle = false;
            asked -= 1;
            if let Some(Job { index, tasks }) = told(&bytes)? {
                engine.give(index, tasks.into_iter().map(T::from_bytes).collect());
            }
        }
        while let Some((index, answers)) = engine.take()? {
            idle = false;
            let settled = results.settle(answers)?;
            others.send(0, &serde_json::to_vec(&Some(Done { index, settled }))?);
            asked += 1;
        }
        if idle {
            thread::sleep(NAP);
        }
    }
    engine.join()
}

#[cfg(unix)]
fn path_of(bytes: Vec<u8>) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(not(unix))]
fn path_of(bytes: Vec<u8>) -> PathBuf {
    String::from_utf8_lossy(&bytes).into_owned().into()
}

#[cfg(unix)]
fn bytes_of(path: PathBuf) -> Vec<u8> {
    use std::os::unix::ffi::OsStringExt;
    path.into_os_string().into_vec()
}

#[cfg(not(unix))]
fn bytes_of(path: PathBuf) -> Vec<u8> {
    path.to_string_lossy().into_owned().into_bytes()
}

/// Tasks in blocks, as they are found.
struct Blocks<T> {
    found: Receiver<T>,
    size: usize,
    /// The block that is filled, and since when.
    block: Vec<T>,
    since: Instant,
    at_end: bool,
}

impl<T: Task> Blocks<T> {
    fn find(tasks: impl Iterator<Item = T> + Send + 'static, size: usize) -> anyhow::Result<Self> {
        let (sender, found) = mpsc::sync_channel(4 * size);
        let find = move || {
            for task in tasks {
                if sender.send(task).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("find-blocks".into())
            .spawn(find)
            .context("cannot start threads")?;
        Ok(Self {
            found,
            size,
            block: Vec::new(),
            since: Instant::now(),
            at_end: false,
        })
    }

    /// The next block, once it is full or nothing more comes for a moment.
    fn next(&mut self) -> Option<Vec<T>> {
        while self.block.len() < self.size && !self.at_end {
            match self.found.recv_timeout(Duration::ZERO) {
                Ok(task) => {
                    if self.block.is_empty() {
                        self.since = Instant::now();
                    }
                    self.block.push(task);
                }
                Err(RecvTimeoutError::Timeout) if self.since.elapsed() < PATIENCE => return None,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => self.at_end = true,
            }
        }
        (!self.block.is_empty()).then(|| std::mem::take(&mut self.block))
    }
}

/// The first process.
struct Lead<'a, T, R: Results> {
    others: &'a dyn Messages,
    engine: Engine<T, R::Answer>,
    blocks: Blocks<T>,
    /// Number of the next block, and of the next one that is taken.
    next: usize,
    taken: usize,
    /// Processes that wait for a block, once for each that they want.
    asking: VecDeque<usize>,
    settled: BTreeMap<usize, R::Settled>,
    /// Blocks that may be under way.
    window: usize,
    /// A block that is for this process alone: standard input cannot be sent.
    local: Option<Vec<T>>,
}

impl<T: Task, R: Results> Lead<'_, T, R> {
    /// In the end the others ask `left` times in all, and are told so often that there is no more.
    fn run(mut self, mut left: usize, results: &mut R) -> anyhow::Result<()> {
        loop {
            let mut idle = true;
            while let Some((rank, bytes)) = self.others.receive(None, false) {
                idle = false;
                if let Some(Done { index, settled }) = told(&bytes)? {
                    self.settled.insert(index, settled);
                }
                self.asking.push_back(rank);
            }
            while let Some((index, answers)) = self.engine.take()? {
                idle = false;
                self.settled.insert(index, results.settle(answers)?);
            }
            idle &= !self.hand_out()?;
            while let Some(settled) = self.settled.remove(&self.taken) {
                idle = false;
                results.take(settled)?;
                self.taken += 1;
            }
            let finished = self.blocks.at_end && self.local.is_none() && self.taken == self.next;
            if finished && self.blocks.block.is_empty() {
                while let Some(rank) = self.asking.pop_front() {
                    self.others.send(rank, b"null");
                    left -= 1;
                }
                if left == 0 {
                    return self.engine.join();
                }
            }
            if idle {
                thread::sleep(NAP);
            }
        }
    }

    /// Hands out blocks to who wants some. Whether there were any.
    fn hand_out(&mut self) -> anyhow::Result<bool> {
        let mut any = false;
        while self.next < self.taken + self.window {
            if !self.engine.is_hungry() && (self.asking.is_empty() || self.local.is_some()) {
                break;
            }
            let Some(block) = self.local.take().or_else(|| self.blocks.next()) else {
                break;
            };
            any = true;
            let index = self.next;
            if self.engine.is_hungry() {
                self.engine.give(index, block);
            } else {
                let tasks: Option<Vec<Vec<u8>>> = block.iter().map(Task::to_bytes).collect();
                let Some(tasks) = tasks else {
                    self.local = Some(block);
                    break;
                };
                let Some(rank) = self.asking.pop_front() else {
                    break;
                };
                let job = Some(Job { index, tasks });
                self.others.send(rank, &serde_json::to_vec(&job)?);
            }
            self.next += 1;
        }
        Ok(any)
    }
}
