//! Folders that are watched: images as they arrive, once they are whole.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, Metadata};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

use super::input::is_image;
use super::{Found, Input, InputError, Inputs};

/// Where the system does not tell that a file was closed by who wrote it, it counts as whole when
/// nothing has happened to it for so long.
const QUIET: Duration = Duration::from_secs(2);

/// Length and time of a file's content.
type Stamp = (u64, Option<SystemTime>);

/// The images of some folders: first those that are there, then, without an end, those that arrive or
/// change. Ends when all of the folders are gone.
pub struct Watch {
    existing: Inputs,
    folders: Vec<Folder>,
    /// Nothing below it is taken: results are put there.
    except: Option<PathBuf>,
    /// Files that something has happened to.
    pending: HashMap<PathBuf, Pending>,
    ready: VecDeque<Found>,
    /// What was taken, by the hash of its path, so that a million take 40 MB.
    taken: HashMap<u64, Stamp>,
    hasher: RandomState,
    events: Receiver<notify::Result<Event>>,
    /// Events come as long as it lives.
    _watcher: RecommendedWatcher,
}

struct Folder {
    /// As it was named.
    name: PathBuf,
    /// As events name it.
    absolute: PathBuf,
}

/// A file that may not be whole.
struct Pending {
    /// When it counts as whole, if nothing more happens.
    due: Instant,
    stamp: Option<Stamp>,
}

fn stamp(metadata: &Metadata) -> Stamp {
    (metadata.len(), metadata.modified().ok())
}

impl Watch {
    /// Begins to watch. What lies below `except` is left alone.
    ///
    /// # Errors
    /// Names what is no folder or cannot be watched.
    pub fn start(folders: Vec<PathBuf>, except: Option<&Path>) -> Result<Self, InputError> {
        let (sender, events) = mpsc::channel();
        let failed = |folder: &Path, reason: String| InputError {
            name: folder.display().to_string(),
            reason,
        };
        let here = std::env::current_dir().map_err(|e| failed(Path::new("."), e.to_string()))?;
        let mut watcher = notify::recommended_watcher(sender)
            .map_err(|e| failed(Path::new("--watch"), e.to_string()))?;
        let watched = |name: &PathBuf| {
            if !name.is_dir() {
                return Err(failed(name, "--watch takes folders".into()));
            }
            let absolute = here.join(name);
            watcher
                .watch(&absolute, RecursiveMode::Recursive)
                .map_err(|e| failed(name, format!("cannot be watched: {e}")))?;
            Ok(Folder {
                name: name.clone(),
                absolute,
            })
        };
        let watched = folders.iter().map(watched).collect::<Result<_, _>>()?;
        Ok(Self {
            existing: Inputs::new(folders, None),
            folders: watched,
            except: except.map(|path| here.join(path)),
            pending: HashMap::new(),
            ready: VecDeque::new(),
            taken: HashMap::new(),
            hasher: RandomState::new(),
            events,
            _watcher: watcher,
        })
    }

    /// A path of an event as the folder was named, where it is one of an image to be taken.
    fn named(&self, path: &Path) -> Option<PathBuf> {
        if self.except.as_ref().is_some_and(|e| path.starts_with(e)) {
            return None;
        }
        let mut folders = self.folders.iter();
        let (folder, rest) =
            folders.find_map(|f| Some((&f.name, path.strip_prefix(&f.absolute).ok()?)))?;
        let hidden = |part: &std::ffi::OsStr| part.as_encoded_bytes().starts_with(b".");
        let wanted = !rest.iter().any(hidden) && is_image(rest);
        wanted.then(|| folder.join(rest))
    }

    /// What an event says of a file or folder.
    fn note(&mut self, event: &Event) {
        if event.need_rescan() {
            let folders = self.folders.iter().map(|f| f.name.clone()).collect();
            self.existing = Inputs::new(folders, None);
        }
        let wait = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(_)) => Duration::ZERO,
            EventKind::Create(_)
            | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any)
            | EventKind::Any => QUIET,
            EventKind::Remove(_) => {
                for path in &event.paths {
                    self.forget(path);
                }
                return;
            }
            _ => return,
        };
        for path in &event.paths {
            if path.is_dir() {
                // What came with it or before it was watched.
                for found in Inputs::new(vec![path.clone()], None).flatten() {
                    if let Input::File(path) = found {
                        self.put_off(&path, QUIET);
                    }
                }
            } else {
                self.put_off(path, wait);
            }
        }
    }

    fn put_off(&mut self, path: &Path, wait: Duration) {
        if let Some(path) = self.named(path) {
            let pending = Pending {
                due: Instant::now() + wait,
                stamp: fs::metadata(&path).ok().map(|m| stamp(&m)),
            };
            self.pending.insert(path, pending);
        }
    }

    fn forget(&mut self, path: &Path) {
        if let Some(path) = self.named(path) {
            self.taken.remove(&self.hasher.hash_one(&path));
            self.pending.remove(&path);
        }
        let gone = |folder: &Folder| folder.absolute == path && !path.exists();
        for folder in self.folders.extract_if(.., |folder| gone(folder)) {
            self.ready.push_back(Err(InputError {
                name: folder.name.display().to_string(),
                reason: "the folder is gone".into(),
            }));
        }
    }

    /// Moves on what is whole by now.
    fn settle(&mut self) {
        let now = Instant::now();
        let due = self.pending.extract_if(|_, pending| pending.due <= now);
        let mut due: Vec<(PathBuf, Pending)> = due.collect();
        due.sort_by(|a, b| a.0.cmp(&b.0));
        for (path, pending) in due {
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            let stamp = stamp(&metadata);
            if pending.stamp != Some(stamp) {
                let pending = Pending {
                    due: now + QUIET,
                    stamp: Some(stamp),
                };
                self.pending.insert(path, pending);
            } else if metadata.is_file() && self.takes(&path, stamp) {
                self.ready.push_back(Ok(Input::File(path)));
            }
        }
    }

    /// Whether a content is new; then it counts as taken.
    fn takes(&mut self, path: &Path, stamp: Stamp) -> bool {
        let key = self.hasher.hash_one(path);
        self.taken.insert(key, stamp) != Some(stamp)
    }

    /// The next image that was there before.
    fn existing(&mut self) -> Option<Found> {
        loop {
            match self.existing.next()? {
                Ok(Input::File(path)) => {
                    let Ok(metadata) = fs::metadata(&path) else {
                        return Some(Ok(Input::File(path)));
                    };
                    let age = metadata
                        .modified()
                        .ok()
                        .and_then(|time| time.elapsed().ok());
                    if age.is_none_or(|age| age < QUIET) {
                        // Somebody may be writing it.
                        let due = Instant::now() + QUIET;
                        let stamp = Some(stamp(&metadata));
                        self.pending.insert(path, Pending { due, stamp });
                    } else if !self.excepted(&path) && self.takes(&path, stamp(&metadata)) {
                        return Some(Ok(Input::File(path)));
                    }
                }
                // The first may be still to come.
                Err(error) if error.reason == super::input::NO_IMAGES => {}
                other => return Some(other),
            }
        }
    }

    fn excepted(&self, path: &Path) -> bool {
        let Some(except) = &self.except else {
            return false;
        };
        let mut folders = self.folders.iter();
        let absolute =
            folders.find_map(|f| Some(f.absolute.join(path.strip_prefix(&f.name).ok()?)));
        absolute.is_some_and(|path| path.starts_with(except))
    }
}

impl Iterator for Watch {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        loop {
            if let Some(found) = self.ready.pop_front() {
                return Some(found);
            }
            if self.folders.is_empty() {
                return None;
            }
            if let Some(found) = self.existing() {
                return Some(found);
            }
            let due = self.pending.values().map(|pending| pending.due).min();
            let event = match due {
                Some(due) => {
                    let wait = due.saturating_duration_since(Instant::now());
                    self.events.recv_timeout(wait)
                }
                None => self
                    .events
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Ok(event)) => self.note(&event),
                Ok(Err(error)) => {
                    return Some(Err(InputError {
                        name: "--watch".into(),
                        reason: error.to_string(),
                    }));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            self.settle();
        }
    }
}
