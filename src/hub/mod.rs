//! Fetching published files: of Hugging Face hub repositories, into the cache that Python's
//! huggingface_hub shares, and of plain URLs, into the one that torch.hub shares.
//!
//! A file takes its name when it is whole and right, and not before: it grows under another name,
//! a cut transfer is taken up where it ended, size and checksum are compared with what the server
//! announced (or the URL's file name says), and only then is it renamed. A lock keeps two
//! processes from fetching the same file at once.
//!
//! `hf_hub` says where the cache is and what is in it; requests are made here, because it neither
//! resumes nor checks what it receives.
//!
//! The environment is that of the Python libraries: HF_ENDPOINT, HF_TOKEN (and the token that
//! `hf auth login` stores), HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, TORCH_HOME, and the usual
//! variables for proxies. SCONCE_TORCH_ENDPOINT is a mirror of download.pytorch.org/models.

mod http;
mod repository;
mod url;
mod verify;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::Http;
use repository::Client;

/// What is told of a download while it runs. Methods do nothing unless they are overridden.
pub trait Progress: Send + Sync {
    /// A file of so many bytes begins, of which some are here from an earlier try.
    fn begin(&self, _file: &str, _from: &str, _size: Option<u64>, _have: u64) {}
    /// So many bytes of it are here.
    fn position(&self, _bytes: u64) {}
    /// It has ended, well or not.
    fn end(&self) {}
    /// Something worth a line: a retry, a wait.
    fn note(&self, _text: &str) {}
}

struct Silent;

impl Progress for Silent {}

/// The way to published files.
#[derive(Clone)]
pub struct Hub {
    http: Arc<Http>,
    /// Knows the cache; made when it is first needed.
    client: Arc<OnceLock<Client>>,
    progress: Arc<dyn Progress>,
    offline: bool,
    torch_home: Option<PathBuf>,
    /// Instead of what the environment says.
    cache: Option<PathBuf>,
    endpoint: Option<String>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the client: it knows the token.
        let mut shown = f.debug_struct("Hub");
        shown
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self::new()
    }
}

impl Hub {
    /// As the environment says.
    pub fn new() -> Self {
        Self {
            http: Arc::new(Http::new(Duration::from_millis(400))),
            client: Arc::default(),
            progress: Arc::new(Silent),
            offline: is_set("HF_HUB_OFFLINE"),
            torch_home: None,
            cache: None,
            endpoint: None,
        }
    }

    /// Tells `progress` of every download.
    pub fn progress(self, progress: Arc<dyn Progress>) -> Self {
        Self { progress, ..self }
    }

    /// Keeps the files of URLs in that folder's `hub/checkpoints` instead of TORCH_HOME's.
    pub fn torch_home(self, folder: Option<PathBuf>) -> Self {
        Self {
            torch_home: folder.or(self.torch_home),
            ..self
        }
    }

    /// Another server and another cache than the environment's, with short waits between tries:
    /// for tests.
    pub fn at(endpoint: &str, cache: PathBuf) -> Self {
        Self {
            http: Arc::new(Http::new(Duration::from_millis(2))),
            offline: false,
            endpoint: Some(endpoint.into()),
            torch_home: Some(cache.join("torch")),
            cache: Some(cache),
            ..Self::new()
        }
    }

    /// Fetches nothing: what is not here is an error.
    pub fn offline(self) -> Self {
        Self {
            offline: true,
            ..self
        }
    }

    /// Tells whoever watches the downloads.
    pub fn note(&self, text: &str) {
        self.progress.note(text);
    }

    /// Whether nothing may be fetched.
    pub fn is_offline(&self) -> bool {
        self.offline
    }
}

/// Whether an environment variable is on, as huggingface_hub reads it.
fn is_set(variable: &str) -> bool {
    let value = std::env::var(variable).unwrap_or_default().to_uppercase();
    ["1", "ON", "YES", "TRUE"].contains(&value.as_str())
}

/// What a repository of the hub holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepositoryKind {
    Model,
    Dataset,
}

/// A repository on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    pub kind: RepositoryKind,
    /// `OWNER/NAME`.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Repository {
    /// Reads `OWNER/NAME[@REVISION]` of a model.
    ///
    /// # Errors
    /// Where it is not of that form.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let plain = |part: &str| {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            !part.is_empty()
                && part.len() <= 96
                && part.bytes().all(allowed)
                && !part.contains("..")
        };
        let parts: Vec<&str> = id.split('/').collect();
        let named = parts.len() == 2 && parts.iter().all(|part| plain(part));
        let revised = revision.len() <= 200 && revision.split('/').all(plain);
        if !named || !revised {
            return Err(HubError::Name { name: text.into() });
        }
        Ok(Self {
            kind: RepositoryKind::Model,
            id: id.into(),
            revision: revision.into(),
        })
    }

    /// Reads `OWNER/NAME[@REVISION]` of a data set.
    ///
    /// # Errors
    /// Where it is not of that form.
    pub fn dataset(text: &str) -> Result<Self, HubError> {
        let kind = RepositoryKind::Dataset;
        Ok(Self {
            kind,
            ..Self::parse(text)?
        })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.revision.as_str() {
            "main" => write!(f, "hub:{}", self.id),
            revision => write!(f, "hub:{}@{revision}", self.id),
        }
    }
}

/// Why a file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("hub:{name}: not of the form hub:OWNER/NAME[@REVISION]")]
    Name { name: String },
    #[error("{0}: not an http or https address of a file")]
    Address(String),
    #[error("{what}: not on this machine, and HF_HUB_OFFLINE is set (unset it to download)")]
    Offline { what: String },
    #[error("{what}: {reason} (is the network there? HTTPS_PROXY and HF_ENDPOINT are heeded)")]
    Connection { what: String, reason: String },
    #[error("{what}: the server answers {status}{}", advice(*.status))]
    Status { what: String, status: u16 },
    #[error("{what}: there is no such file{}", said(.message))]
    NoFile { what: String, message: String },
    #[error("{what}: there is no such repository or revision, or it is private{} (HF_TOKEN gives access to private ones)", said(.message))]
    NoRepository { what: String, message: String },
    #[error("{what}: redirected more than {} times", http::MOST_REDIRECTS)]
    RedirectLoop { what: String },
    #[error("{what}: the answer is not the hub's: {reason} (is HF_ENDPOINT right?)")]
    Protocol { what: String, reason: String },
    #[error("{what}: {have} of {size} bytes came, then no more (try again: it goes on from there)")]
    Short { what: String, have: u64, size: u64 },
    #[error("{what}: damaged on its way: {reason} (nothing was kept; try again)")]
    Damaged { what: String, reason: String },
    #[error("{path}: {error}")]
    Io { path: String, error: std::io::Error },
    #[error("the cache of hub files: {0}")]
    Cache(String),
}

fn advice(status: u16) -> &'static str {
    match status {
        401 | 403 => " (accept the repository's terms on its page, and set HF_TOKEN)",
        429 => " (too many requests: wait a while, or set HF_TOKEN)",
        500.. => " (try again later)",
        _ => "",
    }
}

fn said(message: &str) -> String {
    match message {
        "" => String::new(),
        message => format!(": {message}"),
    }
}

impl HubError {
    fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        |error| HubError::Io { path, error }
    }
}
