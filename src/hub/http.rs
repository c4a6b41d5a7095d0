//! Requests, with retries and redirects; transfers that go on where they were cut.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use reqwest::blocking::{Client, Response};
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName,
    HeaderValue, IF_RANGE, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Method, StatusCode, Url};

use super::{HubError, Progress};

pub const MOST_REDIRECTS: usize = 10;

/// So many tries in a row that bring nothing.
const MOST_TRIES: u32 = 5;

/// Nobody waits longer between two tries, whatever the server says.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

pub struct Http {
    /// Made when it is first needed: setting up TLS takes a while.
    client: OnceLock<Client>,
    /// Before the first retry; doubled for each further one.
    delay: Duration,
}

/// Which redirects are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    All,
    /// Those that name no server: the hub's own headers are gone behind the others.
    Relative,
}

/// What is asked for.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// For messages.
    pub what: &'a str,
    pub url: &'a Url,
    pub token: Option<&'a str>,
}

/// A file to fetch.
pub struct Wanted<'a> {
    pub target: Target<'a>,
    /// Where the server announced it.
    pub size: Option<u64>,
    /// Whether what the partial file holds from an earlier run may be gone on with: its name, or a
    /// checksum, tells that it is of the same content.
    pub resume: bool,
}

impl Http {
    pub fn new(delay: Duration) -> Self {
        Self {
            client: OnceLock::new(),
            delay,
        }
    }

    fn client(&self, what: &str) -> Result<&Client, HubError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = Client::builder()
            .user_agent(concat!("sconce/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(15))
            // For each read, not for the whole of a transfer.
            .timeout(Duration::from_secs(30))
            .build()
            .map_err(|e| connection(what, &e))?;
        Ok(self.client.get_or_init(|| client))
    }

    /// Sends a request, follows redirects, tries again what may be better the next time.
    pub fn send(
        &self,
        method: Method,
        target: Target,
        headers: &HeaderMap,
        follow: Follow,
        progress: &dyn Progress,
    ) -> Result<Response, HubError> {
        let Target {
            what,
            url,
            mut token,
        } = target;
        let client = self.client(what)?;
        let mut url = url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let response = self.retrying(what, progress, || {
                let mut request = client.request(method.clone(), url.clone());
                request = request.headers(headers.clone());
                request = request.header(ACCEPT_ENCODING, "identity");
                if let Some(token) = token {
                    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                        .unwrap_or(HeaderValue::from_static(""));
                    value.set_sensitive(true);
                    request = request.header(AUTHORIZATION, value);
                }
                request.send()
            })?;
            let location = match response.status().is_redirection() {
                true => text(response.headers(), LOCATION),
                false => None,
            };
            let absolute = location.as_deref().is_some_and(is_absolute);
            if absolute && follow == Follow::Relative {
                return Ok(response);
            }
            let Some(target) = location.and_then(|l| url.join(&l).ok()) else {
                return Ok(response);
            };
            if target.origin() != url.origin() {
                // The token is for the hub alone.
                token = None;
            }
            url = target;
        }
        Err(HubError::RedirectLoop { what: what.into() })
    }

    fn retrying(
        &self,
        what: &str,
        progress: &dyn Progress,
        mut send: impl FnMut() -> reqwest::Result<Response>,
    ) -> Result<Response, HubError> {
        let mut tries = 0;
        loop {
            let (reason, wait, failure) = match send() {
                Ok(response) if !is_transient(response.status()) => return Ok(response),
                Ok(response) => {
                    let status = response.status().as_u16();
                    let wait = text(response.headers(), RETRY_AFTER);
                    let wait = wait.and_then(|seconds| seconds.parse().ok());
                    let what = what.to_string();
                    let reason = format!("the server answers {status}");
                    let wait = wait.map(Duration::from_secs);
                    (reason, wait, HubError::Status { what, status })
                }
                Err(error) if error.is_builder() => {
                    return Err(HubError::Address(what.into()));
                }
                // Nobody is there: that seldom passes in seconds.
                Err(error) if error.is_connect() && tries > 0 => {
                    return Err(connection(what, &error));
                }
                Err(error) => {
                    let failure = connection(what, &error);
                    (root_cause(&error), None, failure)
                }
            };
            tries += 1;
            if tries == MOST_TRIES {
                return Err(failure);
            }
            self.wait(what, &reason, tries, wait, progress);
        }
    }

    fn wait(
        &self,
        what: &str,
        reason: &str,
        tries: u32,
        asked: Option<Duration>,
        progress: &dyn Progress,
    ) {
        let wait = asked.unwrap_or(self.delay * 2u32.pow(tries.min(8) - 1));
        let wait = wait.min(LONGEST_WAIT);
        let seconds = wait.as_secs_f64();
        progress.note(&format!("{what}: {reason}; trying again in {seconds:.1} s"));
        std::thread::sleep(wait);
    }

    /// Brings `partial` to its full length.
    pub fn transfer(
        &self,
        wanted: &Wanted,
        partial: &Path,
        progress: &dyn Progress,
    ) -> Result<(), HubError> {
        let io = || HubError::io(partial);
        let Target { what, url, .. } = wanted.target;
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .map_err(io())?;
        let mut have = file.metadata().map_err(io())?.len();
        if have > 0 && (!wanted.resume || wanted.size.is_some_and(|size| have > size)) {
            have = restart(&file, partial)?;
        }
        let mut size = wanted.size;
        // What tells that a later part is of the same file as an earlier one.
        let mut validator: Option<String> = None;
        let mut best = have;
        let mut tries = 0;
        progress.begin(what, url.as_str(), size, have);
        loop {
            if size == Some(have) && (have > 0 || tries > 0) {
                break;
            }
            let mut headers = HeaderMap::new();
            if have > 0 {
                insert(&mut headers, RANGE, &format!("bytes={have}-"));
                if let Some(validator) = &validator {
                    insert(&mut headers, IF_RANGE, validator);
                }
            }
            let follow = Follow::All;
            let mut response = self.send(Method::GET, wanted.target, &headers, follow, progress)?;
            match response.status() {
                StatusCode::PARTIAL_CONTENT => {
                    let (start, total) = content_range(response.headers()).unwrap_or((0, None));
                    if start != have {
                        have = restart(&file, partial)?;
                        tries += 1;
                        if tries == MOST_TRIES {
                            let reason = "it answers with another part than asked for".into();
                            return Err(HubError::Protocol {
                                what: what.to_string(),
                                reason,
                            });
                        }
                        continue;
                    }
                    size = size.or(total);
                }
                StatusCode::OK => {
                    have = restart(&file, partial)?;
                    let length = text(response.headers(), CONTENT_LENGTH);
                    size = size.or(length.and_then(|l| l.parse().ok()));
                }
                StatusCode::RANGE_NOT_SATISFIABLE if have > 0 => {
                    have = restart(&file, partial)?;
                    continue;
                }
                StatusCode::NOT_FOUND => {
                    return Err(HubError::NoFile {
                        what: what.to_string(),
                        message: String::new(),
                    });
                }
                other => {
                    return Err(HubError::Status {
                        what: what.to_string(),
                        status: other.as_u16(),
                    });
                }
            }
            let strong = text(response.headers(), ETAG).filter(|e| !e.starts_with("W/"));
            validator = strong.or(validator);
            let ended = receive(&mut response, &mut file, &mut have, size, progress);
            let reason = match ended {
                Ok(None) if size.is_none_or(|size| size == have) => break,
                Ok(None) => "the transfer ended early".to_string(),
                Ok(Some(reason)) => reason,
                Err(error) => return Err(HubError::io(partial)(error)),
            };
            if size.is_some_and(|size| have > size) {
                restart(&file, partial)?;
                return Err(HubError::Damaged {
                    what: what.to_string(),
                    reason: "more bytes came than were announced".into(),
                });
            }
            tries = if have > best { 1 } else { tries + 1 };
            best = best.max(have);
            if tries >= MOST_TRIES {
                return Err(HubError::Short {
                    what: what.to_string(),
                    have,
                    size: size.unwrap_or(0),
                });
            }
            self.wait(what, &reason, tries, None, progress);
        }
        progress.position(have);
        file.sync_all().map_err(io())
    }
}

/// Appends a body to a file. The transfer's own failures are told in words; those of the file are
/// errors.
fn receive(
    response: &mut Response,
    file: &mut File,
    have: &mut u64,
    size: Option<u64>,
    progress: &dyn Progress,
) -> std::io::Result<Option<String>> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = match response.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(count) => count,
            Err(error) => return Ok(Some(root_cause(&error))),
        };
        file.write_all(&buffer[..count])?;
        *have += count as u64;
        progress.position(*have);
        if size.is_some_and(|size| *have > size) {
            return Ok(Some("more bytes came than were announced".into()));
        }
    }
}

/// Empties the partial file.
fn restart(file: &File, partial: &Path) -> Result<u64, HubError> {
    file.set_len(0).map_err(HubError::io(partial))?;
    Ok(0)
}

/// Whether an address names its server.
fn is_absolute(location: &str) -> bool {
    location.starts_with("//") || Url::parse(location).is_ok()
}

/// Whether another try may be answered better.
fn is_transient(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
        || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
}

/// A header's text.
pub fn text(headers: &HeaderMap, name: impl reqwest::header::AsHeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_string)
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// Where a part begins, and how long the whole is: `bytes 100-199/1000`.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = text(headers, CONTENT_RANGE)?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

fn connection(what: &str, error: &reqwest::Error) -> HubError {
    HubError::Connection {
        what: what.into(),
        reason: root_cause(error),
    }
}

/// The innermost of a chain of errors: "connection refused" rather than "error sending request".
fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
