//! Files of hub repositories, in the cache of huggingface_hub: `blobs/` holds contents under their
//! etags, `snapshots/COMMIT/FILE` points there, `refs/BRANCH` holds a commit.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use hf_hub::{HFClient, HFClientSync};
use reqwest::blocking::Response;
use reqwest::header::{CONTENT_LENGTH, ETAG, HeaderMap};
use reqwest::{Method, StatusCode, Url};

use super::http::{Follow, Target, Wanted, text};
use super::verify::Checksum;
use super::{Hub, HubError, Progress, Repository, RepositoryKind, is_set};

/// Both faces of hf_hub's client: settings are the one's, the cache is the other's.
pub(super) struct Client {
    inner: HFClient,
    blocking: HFClientSync,
}

/// What the hub says of a file before it sends it.
struct Metadata {
    /// The content's name.
    etag: String,
    commit: String,
    size: Option<u64>,
}

impl Hub {
    /// The client that knows the cache.
    fn client(&self) -> Result<&Client, HubError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let mut builder = HFClient::builder();
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        let cache = |e: hf_hub::HFError| HubError::Cache(e.to_string());
        let inner = builder.build().map_err(cache)?;
        let blocking = HFClientSync::from_inner(inner.clone()).map_err(cache)?;
        let client = Client { inner, blocking };
        Ok(self.client.get_or_init(|| client))
    }

    /// A file of a repository, where this machine has it.
    pub fn cached(&self, repository: &Repository, file: &str) -> Option<PathBuf> {
        self.cached_by(self.client().ok()?, repository, file)
    }

    fn cached_by(&self, client: &Client, repository: &Repository, file: &str) -> Option<PathBuf> {
        // Some old data sets have no owner.
        let (owner, name) = repository
            .id
            .split_once('/')
            .unwrap_or(("", &repository.id));
        let revision = repository.revision.clone();
        let found = match repository.kind {
            RepositoryKind::Model => client
                .blocking
                .model(owner, name)
                .download_file()
                .filename(file)
                .revision(revision)
                .local_files_only(true)
                .send(),
            RepositoryKind::Dataset => client
                .blocking
                .dataset(owner, name)
                .download_file()
                .filename(file)
                .revision(revision)
                .local_files_only(true)
                .send(),
        };
        found.ok().filter(|path| path.is_file())
    }

    /// The repositories that this machine has something of, and their files.
    ///
    /// # Errors
    /// Where the cache cannot be read.
    pub fn cached_repositories(&self) -> Result<Vec<(String, Vec<String>)>, HubError> {
        let info = self.client()?.blocking.scan_cache().send();
        let info = info.map_err(|e| HubError::Cache(e.to_string()))?;
        let models = info.repos.into_iter().filter(|r| r.repo_type == "model");
        let listed = models.map(|repo| {
            let files = repo.revisions.into_iter().flat_map(|r| r.files);
            (repo.repo_id, files.map(|f| f.file_name).collect())
        });
        Ok(listed.collect())
    }

    /// Brings a file of a repository into the cache, unless it is there as the server has it now;
    /// gives its path.
    ///
    /// # Errors
    /// See [`HubError`]. [`HubError::NoFile`] where the repository is there and the file is not.
    pub fn fetch(&self, repository: &Repository, file: &str) -> Result<PathBuf, HubError> {
        let what = format!("{repository}/{file}");
        let client = self.client()?;
        if self.offline {
            let cached = self.cached_by(client, repository, file);
            return cached.ok_or(HubError::Offline { what });
        }
        let protocol = |reason: &str| HubError::Protocol {
            what: what.clone(),
            reason: reason.into(),
        };
        let mut url = Url::parse(client.inner.endpoint()).map_err(|_| protocol("no address"))?;
        let kind = match repository.kind {
            RepositoryKind::Model => None,
            RepositoryKind::Dataset => Some("datasets"),
        };
        url.path_segments_mut()
            .map_err(|()| protocol("no address"))?
            .pop_if_empty()
            .extend(kind)
            .extend(repository.id.split('/'))
            .push("resolve")
            // As one segment: a revision may hold slashes.
            .push(&repository.revision)
            .extend(file.split('/'));
        let token = token();
        let progress = &*self.progress;
        let target = Target {
            what: &what,
            url: &url,
            token: token.as_deref(),
        };
        let metadata = match self.metadata(target, progress) {
            Ok(metadata) => metadata,
            // What is here serves as long as the server does not.
            Err(error @ (HubError::Connection { .. } | HubError::Status { status: 500.., .. })) => {
                let cached = self.cached_by(client, repository, file);
                if cached.is_some() {
                    progress.note(&format!("{error}; the copy on this machine is used"));
                }
                return cached.ok_or(error);
            }
            Err(error) => return Err(error),
        };
        let folder = cache_folder(repository);
        let cache = client.inner.cache_dir();
        let store = Store {
            root: cache.join(&folder),
            locks: cache.join(".locks").join(&folder),
        };
        let blob = store.root.join("blobs").join(&metadata.etag);
        if !is_whole(&blob, metadata.size) {
            let _lock = store.lock(&metadata.etag, &what, progress)?;
            // Another process may have been faster.
            if !is_whole(&blob, metadata.size) {
                let partial = with_suffix(&blob, ".incomplete");
                let checksum = Checksum::of_etag(&metadata.etag);
                let wanted = Wanted {
                    target,
                    size: metadata.size,
                    // Its name is the content's.
                    resume: true,
                };
                self.fetch_checked(&wanted, &partial, &blob, &checksum)?;
            }
        }
        store.point(&metadata, file)?;
        if repository.revision != metadata.commit {
            let reference = store.root.join("refs").join(&repository.revision);
            write_atomically(&reference, &metadata.commit)?;
        }
        Ok(store.snapshot(&metadata.commit, file))
    }

    /// The files of a repository: as the server lists them, or where it cannot be asked, those that
    /// this machine has.
    ///
    /// # Errors
    /// See [`HubError`].
    pub fn files(&self, repository: &Repository) -> Result<Vec<String>, HubError> {
        let what = repository.to_string();
        if self.offline {
            let held = self.held_files(repository)?;
            return held.ok_or(HubError::Offline { what });
        }
        let protocol = |reason: String| HubError::Protocol {
            what: what.clone(),
            reason,
        };
        let endpoint = self.client()?.inner.endpoint();
        let mut url = Url::parse(endpoint).map_err(|_| protocol("no address".into()))?;
        let kind = match repository.kind {
            RepositoryKind::Model => "models",
            RepositoryKind::Dataset => "datasets",
        };
        url.path_segments_mut()
            .map_err(|()| protocol("no address".into()))?
            .pop_if_empty()
            .extend(["api", kind])
            .extend(repository.id.split('/'))
            .extend(["revision", &repository.revision]);
        let token = token();
        let target = Target {
            what: &what,
            url: &url,
            token: token.as_deref(),
        };
        let progress = &*self.progress;
        let (headers, follow) = (HeaderMap::new(), Follow::Relative);
        let sent = self
            .http
            .send(Method::GET, target, &headers, follow, progress);
        let response = match sent {
            Err(error @ (HubError::Connection { .. } | HubError::Status { status: 500.., .. })) => {
                let Some(held) = self.held_files(repository)? else {
                    return Err(error);
                };
                progress.note(&format!("{error}; what is on this machine is used"));
                return Ok(held);
            }
            other => other?,
        };
        check_status(&response, &what)?;
        #[derive(serde::Deserialize)]
        struct Listing {
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let text = response.text().map_err(|e| protocol(e.to_string()))?;
        let listing: Listing =
            serde_json::from_str(&text).map_err(|e| protocol(format!("no list of files: {e}")))?;
        let names = listing.siblings.into_iter().map(|s| s.rfilename);
        // They become paths below the cache.
        let safe = |name: &String| {
            let parts = || name.split(['/', '\\']);
            parts().all(|part| !["", ".", ".."].contains(&part)) && !name.contains(':')
        };
        Ok(names.filter(safe).collect())
    }

    /// The files of a repository that this machine has; None where it has none.
    fn held_files(&self, repository: &Repository) -> Result<Option<Vec<String>>, HubError> {
        let client = self.client()?;
        let root = client.inner.cache_dir().join(cache_folder(repository));
        let reference = root.join("refs").join(&repository.revision);
        let commit = fs::read_to_string(reference).unwrap_or(repository.revision.clone());
        let snapshot = root.join("snapshots").join(commit.trim());
        let mut files = Vec::new();
        for entry in walkdir::WalkDir::new(&snapshot).follow_links(true) {
            let Ok(entry) = entry else { continue };
            if let (true, Ok(path)) = (
                entry.file_type().is_file(),
                entry.path().strip_prefix(&snapshot),
            ) {
                let parts = path.components().map(|c| c.as_os_str().to_string_lossy());
                files.push(parts.collect::<Vec<_>>().join("/"));
            }
        }
        files.sort();
        Ok(Some(files).filter(|f| !f.is_empty()))
    }

    /// Fetches into `partial`, checks, and renames. A wrong file is thrown away; where some of it
    /// came from an earlier run, it is fetched once more as a whole.
    pub(super) fn fetch_checked(
        &self,
        wanted: &Wanted,
        partial: &Path,
        target: &Path,
        checksum: &Checksum,
    ) -> Result<(), HubError> {
        let progress = &*self.progress;
        if let Some(parent) = partial.parent() {
            fs::create_dir_all(parent).map_err(HubError::io(parent))?;
        }
        let mut resumed = partial.metadata().is_ok_and(|m| m.len() > 0);
        loop {
            let fetched = self.http.transfer(wanted, partial, progress);
            progress.end();
            fetched?;
            let differs = checksum.differs(partial).map_err(HubError::io(partial))?;
            let Some(reason) = differs else {
                return fs::rename(partial, target).map_err(HubError::io(target));
            };
            fs::remove_file(partial).map_err(HubError::io(partial))?;
            if !std::mem::take(&mut resumed) {
                return Err(HubError::Damaged {
                    what: wanted.target.what.into(),
                    reason,
                });
            }
            progress.note(&format!(
                "{}: {reason}; fetching it again",
                wanted.target.what
            ));
        }
    }

    fn metadata(&self, target: Target, progress: &dyn Progress) -> Result<Metadata, HubError> {
        let headers = HeaderMap::new();
        let follow = Follow::Relative;
        let response = self
            .http
            .send(Method::HEAD, target, &headers, follow, progress)?;
        check_status(&response, target.what)?;
        let headers = response.headers();
        let status = response.status();
        let what = || target.what.to_string();
        let missing = |header: &str| HubError::Protocol {
            what: what(),
            reason: format!("no header {header}"),
        };
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, ETAG));
        let etag = etag.map(|e| e.trim_start_matches("W/").trim_matches('"').to_string());
        let etag = etag
            .filter(|e| is_plain(e))
            .ok_or_else(|| missing("ETag"))?;
        let commit = text(headers, "x-repo-commit").filter(|c| is_plain(c));
        let commit = commit.ok_or_else(|| missing("X-Repo-Commit"))?;
        let size = text(headers, "x-linked-size").or_else(|| {
            // A redirect's own length is that of a page.
            let direct = status.is_success();
            text(headers, CONTENT_LENGTH).filter(|_| direct)
        });
        Ok(Metadata {
            etag,
            commit,
            size: size.and_then(|s| s.parse().ok()),
        })
    }
}

/// Whether the hub gives what it was asked for.
fn check_status(response: &Response, what: &str) -> Result<(), HubError> {
    let (headers, status) = (response.headers(), response.status());
    let message = text(headers, "x-error-message").unwrap_or_default();
    let what = || what.to_string();
    if status == StatusCode::NOT_FOUND || status == StatusCode::UNAUTHORIZED {
        let code = text(headers, "x-error-code").unwrap_or_default();
        let what = what();
        return Err(match code.as_str() {
            "RepoNotFound" | "RevisionNotFound" => HubError::NoRepository { what, message },
            "GatedRepo" => HubError::Status { what, status: 403 },
            // The hub hides private repositories in this way.
            _ if status == StatusCode::UNAUTHORIZED => HubError::NoRepository { what, message },
            _ => HubError::NoFile { what, message },
        });
    }
    if !status.is_success() && !status.is_redirection() {
        return Err(HubError::Status {
            what: what(),
            status: status.as_u16(),
        });
    }
    Ok(())
}

/// A repository's folder in the cache.
fn cache_folder(repository: &Repository) -> String {
    let kind = match repository.kind {
        RepositoryKind::Model => "models",
        RepositoryKind::Dataset => "datasets",
    };
    format!("{kind}--{}", repository.id.replace('/', "--"))
}

/// Whether a header's text can be a file's name.
fn is_plain(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    !text.is_empty() && text.len() <= 128 && text.bytes().all(allowed) && !text.starts_with('.')
}

fn is_whole(blob: &Path, size: Option<u64>) -> bool {
    blob.metadata()
        .is_ok_and(|m| m.is_file() && size.is_none_or(|size| m.len() == size))
}

/// The token of the environment or of `hf auth login`, as huggingface_hub finds it.
fn token() -> Option<String> {
    let clean = |token: String| {
        let token = token.replace(['\r', '\n'], "").trim().to_string();
        (!token.is_empty()).then_some(token)
    };
    if let Some(token) = std::env::var("HF_TOKEN").ok().and_then(clean) {
        return Some(token);
    }
    if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let path = std::env::var_os("HF_TOKEN_PATH").map(PathBuf::from);
    let path = path.unwrap_or_else(|| hf_hub::hf_home().join("token"));
    fs::read_to_string(path).ok().and_then(clean)
}

/// The folder of one repository.
struct Store {
    root: PathBuf,
    locks: PathBuf,
}

impl Store {
    fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        let folder = self.root.join("snapshots").join(commit);
        file.split('/').fold(folder, |path, part| path.join(part))
    }

    fn lock(&self, etag: &str, what: &str, progress: &dyn Progress) -> Result<File, HubError> {
        lock(&self.locks.join(format!("{etag}.lock")), what, progress)
    }

    /// Makes the snapshot's file point to the blob.
    fn point(&self, metadata: &Metadata, file: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(&metadata.commit, file);
        let blob = self.root.join("blobs").join(&metadata.etag);
        if pointer.is_file() && pointer.canonicalize().ok() == blob.canonicalize().ok() {
            return Ok(());
        }
        if let Some(parent) = pointer.parent() {
            fs::create_dir_all(parent).map_err(HubError::io(parent))?;
        }
        let temporary = temporary_name(&pointer);
        let up = "../".repeat(file.split('/').count() + 1);
        link(&format!("{up}blobs/{}", metadata.etag), &blob, &temporary)
            .and_then(|()| fs::rename(&temporary, &pointer))
            .map_err(HubError::io(&pointer))
    }
}

/// A relative link; a copy where the system has none for everybody.
#[cfg(unix)]
fn link(target: &str, _blob: &Path, pointer: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, pointer)
}

#[cfg(not(unix))]
fn link(_target: &str, blob: &Path, pointer: &Path) -> std::io::Result<()> {
    fs::copy(blob, pointer).map(drop)
}

/// Takes a lock that other processes heed, as huggingface_hub does; it ends with the file.
pub(super) fn lock(path: &Path, what: &str, progress: &dyn Progress) -> Result<File, HubError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(HubError::io(parent))?;
    }
    let file = File::create(path).map_err(HubError::io(path))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {
            progress.note(&format!("{what}: another process is fetching it; waiting"));
            file.lock().map_err(HubError::io(path))?;
        }
        // Some network file systems have no locks; then two processes may fetch the same.
        Err(TryLockError::Error(_)) => {}
    }
    Ok(file)
}

fn write_atomically(path: &Path, content: &str) -> Result<(), HubError> {
    if fs::read_to_string(path).is_ok_and(|held| held == content) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(HubError::io(parent))?;
    }
    let temporary = temporary_name(path);
    fs::write(&temporary, content)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(HubError::io(path))
}

/// A name beside `path` that no other process takes.
fn temporary_name(path: &Path) -> PathBuf {
    with_suffix(path, &format!(".{}.tmp", std::process::id()))
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
