//! Images that several processes classify together.
//!
//! The first one finds the images and hands them out in small blocks, to whoever asks for more, itself
//! included; so a slow machine gets fewer. It writes all results, in the order of the images. Every
//! process has a thread that computes, and its main thread, the only one that speaks to the others.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};

use super::classify::Answer;
use crate::data::{Found, Input, InputError};
use crate::ranks::{Collectives, Ranks};

/// Images of a block.
const BLOCK: usize = 16;
/// Blocks that a process has at a time: one that it works on, and the next.
const AHEAD: usize = 2;
/// Blocks, for each process, that may be done before the first of them is.
const WINDOW: usize = 64;
/// How long a block that is not full waits for another image.
const PATIENCE: Duration = Duration::from_millis(20);
/// How long a thread sleeps that has nothing to do.
const NAP: Duration = Duration::from_micros(200);

/// Paths to classify, to a process that asked for them. None at the end.
#[derive(Serialize, Deserialize)]
struct Job {
    index: usize,
    paths: Vec<Vec<u8>>,
}

/// What became of them, to the first process: at the same time it asks for the next block.
#[derive(Serialize, Deserialize)]
struct Done {
    index: usize,
    answers: Vec<Answer>,
}

/// The thread that computes.
struct Engine {
    jobs: Option<Sender<Found>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    /// Blocks it has: their number, how many images, and the answers so far.
    blocks: VecDeque<(usize, usize, Vec<Answer>)>,
}

impl Engine {
    /// `work` takes images and gives an answer to each, in their order, until no more come.
    fn start(
        work: impl FnOnce(Receiver<Found>, &mut dyn FnMut(Answer)) -> anyhow::Result<()>
        + Send
        + 'static,
    ) -> anyhow::Result<Self> {
        let (jobs, taken) = mpsc::channel();
        let (given, answers) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("classify".into())
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

    fn give(&mut self, index: usize, inputs: Vec<Found>) {
        self.blocks.push_back((index, inputs.len(), Vec::new()));
        let Some(jobs) = &self.jobs else { return };
        for input in inputs {
            // Whether the thread is there, `take` tells.
            let _ = jobs.send(input);
        }
    }

    /// The next block that is done.
    fn take(&mut self) -> anyhow::Result<Option<(usize, Vec<Answer>)>> {
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

/// Classifies `inputs` (those of the first process count) together with others; `write` gets the
/// answers on the first process, in their order, with their names.
pub fn classify(
    ranks: &Ranks,
    inputs: impl Iterator<Item = Found> + Send + 'static,
    work: impl FnOnce(Receiver<Found>, &mut dyn FnMut(Answer)) -> anyhow::Result<()> + Send + 'static,
    write: &mut dyn FnMut(String, Answer) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let Some(others) = ranks.others() else {
        return Ok(());
    };
    let engine = Engine::start(work)?;
    if ranks.is_first() {
        Lead {
            others,
            engine,
            blocks: Blocks::find(inputs)?,
            next: 0,
            written: 0,
            asking: VecDeque::new(),
            names: BTreeMap::new(),
            answers: BTreeMap::new(),
            window: WINDOW * ranks.count(),
            local: None,
        }
        .run(AHEAD * (ranks.count() - 1), write)
    } else {
        follow(others, engine)
    }
}

fn told<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(bytes).context("what another process said makes no sense")
}

/// Does blocks that the first process hands out.
fn follow(others: &dyn Collectives, mut engine: Engine) -> anyhow::Result<()> {
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
            if let Some(Job { index, paths }) = told(&bytes)? {
                let inputs = paths.into_iter().map(|path| Ok(Input::File(path_of(path))));
                engine.give(index, inputs.collect());
            }
        }
        while let Some((index, answers)) = engine.take()? {
            idle = false;
            others.send(0, &serde_json::to_vec(&Some(Done { index, answers }))?);
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

/// Images in blocks, as they are found.
struct Blocks {
    found: Receiver<Found>,
    /// The block that is filled, and since when.
    block: Vec<Found>,
    since: Instant,
    at_end: bool,
}

impl Blocks {
    fn find(inputs: impl Iterator<Item = Found> + Send + 'static) -> anyhow::Result<Self> {
        let (sender, found) = mpsc::sync_channel(4 * BLOCK);
        let find = move || {
            for input in inputs {
                if sender.send(input).is_err() {
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
            block: Vec::new(),
            since: Instant::now(),
            at_end: false,
        })
    }

    /// The next block, once it is full or nothing more comes for a moment.
    fn next(&mut self) -> Option<Vec<Found>> {
        while self.block.len() < BLOCK && !self.at_end {
            match self.found.recv_timeout(Duration::ZERO) {
                Ok(input) => {
                    if self.block.is_empty() {
                        self.since = Instant::now();
                    }
                    self.block.push(input);
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
struct Lead<'a> {
    others: &'a dyn Collectives,
    engine: Engine,
    blocks: Blocks,
    /// Number of the next block, and of the next one to write.
    next: usize,
    written: usize,
    /// Processes that wait for a block, once for each that they want.
    asking: VecDeque<usize>,
    names: BTreeMap<usize, Vec<String>>,
    answers: BTreeMap<usize, Vec<Answer>>,
    /// Blocks that may be under way.
    window: usize,
    /// A block that is for this process alone: standard input cannot be sent.
    local: Option<Vec<Found>>,
}

impl Lead<'_> {
    /// In the end the others ask `left` times in all, and are told so often that there is no more.
    fn run(
        mut self,
        mut left: usize,
        write: &mut dyn FnMut(String, Answer) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        loop {
            let mut idle = true;
            while let Some((rank, bytes)) = self.others.receive(None, false) {
                idle = false;
                if let Some(Done { index, answers }) = told(&bytes)? {
                    self.answers.insert(index, answers);
                }
                self.asking.push_back(rank);
            }
            while let Some((index, answers)) = self.engine.take()? {
                idle = false;
                self.answers.insert(index, answers);
            }
            idle &= !self.hand_out()?;
            while let Some(answers) = self.answers.remove(&self.written) {
                idle = false;
                let names = self.names.remove(&self.written).unwrap_or_default();
                for (name, answer) in names.into_iter().zip(answers) {
                    write(name, answer)?;
                }
                self.written += 1;
            }
            let finished = self.blocks.at_end && self.local.is_none() && self.written == self.next;
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
        while self.next < self.written + self.window {
            if !self.engine.is_hungry() && (self.asking.is_empty() || self.local.is_some()) {
                break;
            }
            let Some(block) = self.local.take().or_else(|| self.blocks.next()) else {
                break;
            };
            any = true;
            let paths: Option<Vec<Vec<u8>>> = block.iter().map(path_to_send).collect();
            if paths.is_none() && !self.engine.is_hungry() {
                self.local = Some(block);
                break;
            }
            let names = block.iter().map(|found| match found {
                Ok(input) => input.name(),
                Err(InputError { name, .. }) => name.clone(),
            });
            self.names.insert(self.next, names.collect());
            let index = self.next;
            self.next += 1;
            if self.engine.is_hungry() {
                self.engine.give(index, block);
            } else if let (Some(paths), Some(rank)) = (paths, self.asking.pop_front()) {
                let job = Job { index, paths };
                self.others.send(rank, &serde_json::to_vec(&Some(job))?);
            }
        }
        Ok(any)
    }
}

/// An image's path, where another process can read it.
fn path_to_send(found: &Found) -> Option<Vec<u8>> {
    match found {
        Ok(Input::File(path)) => Some(bytes_of(path.clone())),
        Ok(Input::Stdin) | Err(_) => None,
    }
}
