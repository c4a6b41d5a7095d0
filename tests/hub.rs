//! Downloads from a local server that speaks the hub's protocol, and misbehaves.

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use predicates::Predicate;
use predicates::str::contains;
use sconce::hub::{Hub, HubError, Repository};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does to one request for a file's bytes.
#[derive(Clone, Debug)]
enum Fault {
    /// Sends so many bytes of what was asked for and hangs up.
    Cut(usize),
    /// Turns a byte of the file over.
    Corrupt(usize),
    Status(u16, &'static str),
    /// Sends the whole file, whatever part was asked for.
    NoRange,
    /// Sends a little and waits.
    Slow,
}

#[derive(Clone)]
struct File {
    bytes: Arc<Vec<u8>>,
    /// Large files are redirected, and named by their SHA-256.
    large: bool,
}

struct State {
    files: HashMap<String, File>,
    /// Taken from the front, one for each GET of bytes.
    faults: Mutex<Vec<Fault>>,
    /// Answers to HEAD, before the real one.
    head_faults: Mutex<Vec<Fault>>,
    /// Method, path, Range and Authorization of every request.
    log: Mutex<Vec<[String; 4]>>,
    xet: bool,
}

struct Server {
    address: String,
    state: Arc<State>,
}

impl Server {
    fn start(files: &[(&str, Vec<u8>, bool)], xet: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let file = |(path, bytes, large): &(&str, Vec<u8>, bool)| {
            let bytes = Arc::new(bytes.clone());
            (
                path.to_string(),
                File {
                    bytes,
                    large: *large,
                },
            )
        };
        let state = Arc::new(State {
            files: files.iter().map(file).collect(),
            faults: Mutex::default(),
            head_faults: Mutex::default(),
            log: Mutex::default(),
            xet,
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    let _ = answer(&state, stream, port);
                });
            }
        });
        Self {
            address: format!("http://127.0.0.1:{port}"),
            state,
        }
    }

    fn faults(&self, faults: &[Fault]) {
        *self.state.faults.lock().unwrap() = faults.to_vec();
    }

    fn head_faults(&self, faults: &[Fault]) {
        *self.state.head_faults.lock().unwrap() = faults.to_vec();
    }

    fn log(&self) -> Vec<[String; 4]> {
        self.state.log.lock().unwrap().clone()
    }

    fn gets(&self) -> usize {
        let log = self.log();
        log.iter().filter(|r| r[0] == "GET").count()
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

fn git_sha1(bytes: &[u8]) -> String {
    let mut hasher = sha1::Sha1::new();
    hasher.update(format!("blob {}\0", bytes.len()));
    hasher.update(bytes);
    hasher
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// `/OWNER/NAME/resolve/REVISION/FILE` is the hub, `/cdn/OWNER/NAME/FILE` where large files lie,
/// `/models/FILE` torchvision's server, `/loop` an endless redirect. Data sets are at
/// `/datasets/OWNER/NAME/resolve/REVISION/FILE`, files of another revision than main under
/// `datasets/OWNER/NAME@REVISION/FILE`, and `/api/datasets/OWNER/NAME/revision/REVISION` lists them.
fn answer(state: &State, stream: TcpStream, port: u16) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut parts = line.split_whitespace();
    let method = parts.next().unwrap_or_default().to_string();
    let path = parts.next().unwrap_or_default().to_string();
    let (mut range, mut authorization) = (String::new(), String::new());
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? <= 2 {
            break;
        }
        if let Some((name, value)) = header.split_once(':') {
            match name.to_lowercase().as_str() {
                "range" => range = value.trim().into(),
                "authorization" => authorization = value.trim().into(),
                _ => {}
            }
        }
    }
    let entry = [method.clone(), path.clone(), range.clone(), authorization];
    state.log.lock().unwrap().push(entry);
    let mut out = stream;
    let mut reply = |status: u16,
                     headers: &str,
                     body: &[u8],
                     length: usize|
     -> std::io::Result<()> {
        write!(
            out,
            "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        )?;
        if method != "HEAD" {
            out.write_all(body)?;
        }
        out.flush()
    };
    if path.starts_with("/loop") {
        return reply(302, "Location: /loop\r\n", b"", 0);
    }
    if path.starts_with("/elsewhere") {
        return reply(302, "Location: /loop\r\n", b"", 0);
    }
    let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let page = b"<html>not found</html>";
    let folder = |repository: &[&str], revision: &str| match (repository[0], revision) {
        ("datasets", revision) if revision != "main" => {
            format!("{}@{revision}", repository.join("/"))
        }
        _ => repository.join("/"),
    };
    if let ["api", ref repository @ .., "revision", revision] = segments[..] {
        let root = format!("{}/", folder(repository, revision));
        let files = state.files.keys().filter_map(|key| key.strip_prefix(&root));
        let mut files: Vec<&str> = files.collect();
        files.sort();
        if files.is_empty() {
            let header = "X-Error-Code: RevisionNotFound\r\n";
            return reply(404, header, page, page.len());
        }
        let files = files
            .iter()
            .map(|file| serde_json::json!({"rfilename": file}));
        let list = serde_json::json!({"siblings": files.collect::<Vec<_>>()}).to_string();
        return reply(200, "", list.as_bytes(), list.len());
    }
    let resolve = segments.iter().position(|segment| *segment == "resolve");
    let name = match (resolve, &segments[..]) {
        (Some(at), _) if segments.len() > at + 2 => {
            let folder = folder(&segments[..at], segments[at + 1]);
            format!("{folder}/{}", segments[at + 2..].join("/"))
        }
        (_, ["cdn", rest @ ..]) => rest.join("/"),
        _ => path.trim_start_matches('/').to_string(),
    };
    let hub = resolve.is_some();
    let Some(file) = state.files.get(&name) else {
        let repository = segments[..segments.len().min(2)].join("/");
        let known = state
            .files
            .keys()
            .any(|k| k.starts_with(&format!("{repository}/")));
        let code = if known {
            "EntryNotFound"
        } else {
            "RepoNotFound"
        };
        let header = format!("X-Error-Code: {code}\r\nX-Error-Message: {code} said the server\r\n");
        return reply(404, &header, page, page.len());
    };
    let bytes = &file.bytes;
    let etag = match file.large {
        true => sha256(bytes),
        false => git_sha1(bytes),
    };
    let mut headers = format!("ETag: \"{etag}\"\r\n");
    if hub {
        headers += &format!("X-Repo-Commit: {COMMIT}\r\n");
        if state.xet {
            headers += "X-Xet-Hash: 00ff\r\n";
        }
    }
    if method == "HEAD" {
        let fault = state.head_faults.lock().unwrap().pop_front();
        match fault {
            Some(Fault::Status(status, more)) => return reply(status, more, page, page.len()),
            Some(_) => return Ok(()),
            None => {}
        }
    }
    if hub && file.large {
        headers += &format!(
            "X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n",
            bytes.len()
        );
        // Another host, as the hub's is.
        headers += &format!("Location: http://localhost:{port}/cdn/{name}\r\n");
        return reply(302, &headers.replacen("ETag", "X-Old", 1), page, page.len());
    }
    if method == "HEAD" {
        return reply(200, &headers, b"", bytes.len());
    }
    let fault = state.faults.lock().unwrap().pop_front();
    let mut start = range
        .strip_prefix("bytes=")
        .and_then(|r| r.strip_suffix('-')?.parse().ok())
        .unwrap_or(0);
    if let Some(Fault::NoRange) = fault {
        start = 0;
    }
    if start > bytes.len() || (start == bytes.len() && start > 0) {
        return reply(416, "", b"", 0);
    }
    let status = if start > 0 { 206 } else { 200 };
    if start > 0 {
        let last = bytes.len() - 1;
        headers += &format!("Content-Range: bytes {start}-{last}/{}\r\n", bytes.len());
    }
    let body = &bytes[start..];
    match fault {
        Some(Fault::Cut(length)) => reply(
            status,
            &headers,
            &body[..length.min(body.len())],
            body.len(),
        ),
        Some(Fault::Corrupt(at)) => {
            let mut wrong = body.to_vec();
            wrong[at] ^= 1;
            reply(status, &headers, &wrong, wrong.len())
        }
        Some(Fault::Status(status, more)) => reply(status, more, page, page.len()),
        Some(Fault::Slow) => {
            write!(
                out,
                "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n",
                body.len()
            )?;
            for part in body.chunks(body.len() / 8 + 1) {
                out.write_all(part)?;
                out.flush()?;
                std::thread::sleep(Duration::from_millis(60));
            }
            Ok(())
        }
        Some(Fault::NoRange) | None => reply(status, &headers, body, body.len()),
    }
}

trait PopFront<T> {
    fn pop_front(&mut self) -> Option<T>;
}

impl<T> PopFront<T> for Vec<T> {
    fn pop_front(&mut self) -> Option<T> {
        (!self.is_empty()).then(|| self.remove(0))
    }
}

/// Bytes that do not repeat.
fn content(length: usize) -> Vec<u8> {
    let values = common::uniform("content", length);
    values.map(|v| ((v + 1.0) * 127.9) as u8).collect()
}

fn repository() -> Repository {
    Repository::parse("owner/name").unwrap()
}

const LARGE: &str = "owner/name/model.safetensors";

/// Every file below a folder that could be taken for a finished one.
fn finished(cache: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut folders = vec![cache.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if ![".incomplete", ".partial", ".lock"]
                .iter()
                .any(|s| name.ends_with(s))
            {
                all.push(path);
            }
        }
    }
    all.sort();
    all
}

#[test]
fn a_download_that_is_cut_ten_times_ends_whole() {
    let bytes = content(1_000_003);
    for xet in [false, true] {
        for (file, large) in [("model.safetensors", true), ("config.json", false)] {
            let server = Server::start(
                &[(&format!("owner/name/{file}"), bytes.clone(), large)],
                xet,
            );
            let cuts =
                common::uniform(file, 10).map(|v| Fault::Cut(((v + 1.0) * 40_000.0) as usize + 1));
            server.faults(&cuts.collect::<Vec<_>>());
            let root = tempfile::tempdir().unwrap();
            let hub = Hub::at(&server.address, root.path().into());
            let path = hub.fetch(&repository(), file).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
            let log = server.log();
            let resumed = log
                .iter()
                .filter(|r| r[0] == "GET" && r[2].starts_with("bytes="));
            assert!(resumed.count() >= 10, "{log:?}");
            // Nothing is fetched twice.
            let gets = server.gets();
            assert_eq!(hub.fetch(&repository(), file).unwrap(), path);
            assert_eq!(server.gets(), gets);
        }
    }
}

#[test]
fn a_server_without_ranges_is_asked_again_from_the_start() {
    let bytes = content(200_000);
    let server = Server::start(&[(LARGE, bytes.clone(), true)], false);
    server.faults(&[Fault::Cut(60_000), Fault::NoRange]);
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::at(&server.address, root.path().into());
    let path = hub.fetch(&repository(), "model.safetensors").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
}

#[test]
fn an_earlier_process_part_is_gone_on_with_unless_it_is_wrong() {
    let bytes = content(300_000);
    let server = Server::start(&[(LARGE, bytes.clone(), true)], false);
    for (part, requests) in [
        (bytes[..100_000].to_vec(), 1),
        (content(100_001)[1..].to_vec(), 2),
    ] {
        let root = tempfile::tempdir().unwrap();
        let blobs = root.path().join("models--owner--name/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.incomplete", sha256(&bytes))), part).unwrap();
        let hub = Hub::at(&server.address, root.path().into());
        let before = server
            .log()
            .iter()
            .filter(|r| r[1].starts_with("/cdn"))
            .count();
        let path = hub.fetch(&repository(), "model.safetensors").unwrap();
        assert_eq!(std::fs::read(path).unwrap(), bytes);
        let log = server.log();
        let cdn: Vec<_> = log
            .iter()
            .filter(|r| r[1].starts_with("/cdn"))
            .skip(before)
            .collect();
        assert_eq!(cdn.len(), requests);
        assert_eq!(cdn[0][2], "bytes=100000-");
    }
}

/// What goes wrong on the way ends in an error, and in no file under a good name.
#[test]
fn what_goes_wrong_is_an_error_and_leaves_no_file() {
    let bytes = content(100_000);
    let small = content(1000);
    let always = |fault: Fault| vec![fault; 40];
    type Check = fn(&HubError) -> bool;
    let cases: [(&str, Vec<Fault>, Vec<Fault>, Check); 8] = [
        ("a wrong byte", always(Fault::Corrupt(77)), vec![], |e| {
            matches!(e, HubError::Damaged { .. })
        }),
        ("no byte at all", always(Fault::Cut(0)), vec![], |e| {
            matches!(e, HubError::Short { .. })
        }),
        ("a page", always(Fault::Status(404, "")), vec![], |e| {
            matches!(e, HubError::NoFile { .. })
        }),
        ("503", always(Fault::Status(503, "")), vec![], |e| {
            matches!(e, HubError::Status { status: 503, .. })
        }),
        ("503 at once", vec![], always(Fault::Status(503, "")), |e| {
            matches!(e, HubError::Status { status: 503, .. })
        }),
        ("hanging up", vec![], always(Fault::Cut(0)), |e| {
            matches!(e, HubError::Connection { .. })
        }),
        (
            "a loop",
            vec![],
            always(Fault::Status(302, "Location: /loop\r\n")),
            |e| matches!(e, HubError::RedirectLoop { .. }),
        ),
        (
            "another server",
            vec![],
            always(Fault::Status(200, "")),
            |e| matches!(e, HubError::Protocol { .. }),
        ),
    ];
    for (what, faults, head_faults, expected) in cases {
        for file in ["model.safetensors", "config.json"] {
            let server = Server::start(
                &[
                    (LARGE, bytes.clone(), true),
                    ("owner/name/config.json", small.clone(), false),
                ],
                false,
            );
            server.faults(&faults);
            server.head_faults(&head_faults);
            let root = tempfile::tempdir().unwrap();
            let hub = Hub::at(&server.address, root.path().into());
            let error = hub.fetch(&repository(), file).unwrap_err();
            assert!(expected(&error), "{what}, {file}: {error}");
            assert!(error.to_string().contains(file), "{error}");
            assert_eq!(finished(root.path()), Vec::<PathBuf>::new(), "{what}");
            // Once the server is well again, so is the file.
            server.faults(&[]);
            server.head_faults(&[]);
            let path = hub.fetch(&repository(), file).unwrap();
            let good = if file == "config.json" {
                &small
            } else {
                &bytes
            };
            assert_eq!(&std::fs::read(path).unwrap(), good, "{what}");
        }
    }
}

#[test]
fn a_busy_server_is_asked_again() {
    let bytes = content(10_000);
    let server = Server::start(&[(LARGE, bytes.clone(), true)], false);
    server.head_faults(&[
        Fault::Status(503, ""),
        Fault::Status(429, "Retry-After: 0\r\n"),
    ]);
    server.faults(&[
        Fault::Status(500, ""),
        Fault::Status(429, "Retry-After: 0\r\n"),
    ]);
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::at(&server.address, root.path().into());
    let path = hub.fetch(&repository(), "model.safetensors").unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
}

#[test]
fn what_is_not_there_is_said() {
    let server = Server::start(&[(LARGE, content(10), true)], false);
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::at(&server.address, root.path().into());
    let error = hub.fetch(&repository(), "absent.bin").unwrap_err();
    assert!(matches!(&error, HubError::NoFile { .. }), "{error}");
    assert!(
        error.to_string().contains("EntryNotFound said the server"),
        "{error}"
    );
    let other = Repository::parse("nobody/nothing").unwrap();
    let error = hub.fetch(&other, "config.json").unwrap_err();
    assert!(matches!(&error, HubError::NoRepository { .. }), "{error}");
    for name in [
        "owner", "a/b/c", "../x", "a/..", "a/b@", "a/b@../x", "a b/c", "/a/b",
    ] {
        assert!(Repository::parse(name).is_err(), "{name}");
    }
}

#[test]
fn the_cache_is_laid_out_as_pythons() {
    let bytes = content(5_000);
    let server = Server::start(
        &[
            (LARGE, bytes.clone(), true),
            ("owner/name/sub/config.json", b"{}".to_vec(), false),
        ],
        false,
    );
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::at(&server.address, root.path().into());
    hub.fetch(&repository(), "model.safetensors").unwrap();
    let nested = hub.fetch(&repository(), "sub/config.json").unwrap();
    let folder = root.path().join("models--owner--name");
    assert_eq!(
        std::fs::read_to_string(folder.join("refs/main")).unwrap(),
        COMMIT
    );
    let snapshot = folder.join("snapshots").join(COMMIT);
    assert_eq!(nested, snapshot.join("sub/config.json"));
    for (file, blob, up) in [
        ("model.safetensors", sha256(&bytes), "../../"),
        ("sub/config.json", git_sha1(b"{}"), "../../../"),
    ] {
        let target = std::fs::read_link(snapshot.join(file)).unwrap();
        assert_eq!(target, Path::new(&format!("{up}blobs/{blob}")));
        assert!(folder.join("blobs").join(&blob).is_file());
        assert!(
            root.path()
                .join(format!(".locks/models--owner--name/{blob}.lock"))
                .is_file()
        );
    }
    // Without the server, what is here is found, by branch and by commit.
    let offline = hub.offline();
    let by_commit = Repository::parse(&format!("owner/name@{COMMIT}")).unwrap();
    for repository in [repository(), by_commit] {
        let found = offline.fetch(&repository, "model.safetensors").unwrap();
        assert_eq!(std::fs::read(found).unwrap(), bytes);
    }
    let error = offline.fetch(&repository(), "other").unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert_eq!(
        offline.cached_repositories().unwrap()[0].0,
        "owner/name".to_string()
    );
}

#[test]
fn files_of_urls_are_checked_against_their_names() {
    let bytes = content(400_000);
    let good = format!("net-{}.pth", &sha256(&bytes)[..8]);
    let paths = [
        format!("models/{good}"),
        "models/net-0123abcd.pth".into(),
        "models/plain.pth".into(),
    ];
    let files = paths
        .each_ref()
        .map(|path| (path.as_str(), bytes.clone(), false));
    let server = Server::start(&files, false);
    let root = tempfile::tempdir().unwrap();
    let hub = Hub::at(&server.address, root.path().into());
    server.faults(&[Fault::Cut(1000), Fault::Cut(100_000)]);
    let url = hub.torchvision_url(&good);
    assert_eq!(hub.cached_url(&url), None);
    let path = hub.fetch_url(&url).unwrap();
    assert_eq!(path, root.path().join("torch/hub/checkpoints").join(&good));
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    assert_eq!(hub.cached_url(&url), Some(path));
    let error = hub
        .fetch_url(&hub.torchvision_url("net-0123abcd.pth"))
        .unwrap_err();
    assert!(matches!(&error, HubError::Damaged { .. }), "{error}");
    let error = hub
        .fetch_url(&hub.torchvision_url("absent.pth"))
        .unwrap_err();
    assert!(matches!(&error, HubError::NoFile { .. }), "{error}");
    // Without a checksum, a part of an earlier run is not gone on with.
    let checkpoints = root.path().join("torch/hub/checkpoints");
    std::fs::write(checkpoints.join(".plain.pth.partial"), "stale").unwrap();
    let path = hub.fetch_url(&hub.torchvision_url("plain.pth")).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytes);
    let looping = format!("{}/loop/x.pth", server.address);
    assert!(matches!(
        hub.fetch_url(&looping),
        Err(HubError::RedirectLoop { .. })
    ));
    for url in [
        "ftp://host/x.pth",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
    ] {
        assert!(hub.fetch_url(url).is_err(), "{url}");
    }
}

/// The binary, with everything that it may write below `home`.
fn sconce(server: &Server, home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    for variable in [
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "TORCH_HOME",
        "XDG_CACHE_HOME",
        "HF_TOKEN_PATH",
    ] {
        command.env_remove(variable);
    }
    for proxy in [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ] {
        command.env_remove(proxy);
    }
    command
        .current_dir(common::repository(""))
        .env("HF_ENDPOINT", &server.address)
        .env(
            "SCONCE_TORCH_ENDPOINT",
            format!("{}/models", server.address),
        )
        .env("HF_HOME", home.join("hf"))
        .env("TORCH_HOME", home.join("torch"))
        .env("HF_TOKEN", "hf_secret");
    command
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn two_processes_fetch_one_file_once() {
    let bytes = content(800_000);
    let server = Server::start(&[(LARGE, bytes.clone(), true)], false);
    server.faults(&[Fault::Slow]);
    let root = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = sconce(&server, root.path());
        command.args(["download", "hub:owner/name"]);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let both = [start(), start()];
    for child in both {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let path = String::from_utf8(output.stdout).unwrap();
        assert_eq!(std::fs::read(path.trim()).unwrap(), bytes);
    }
    let transfers = server
        .log()
        .iter()
        .filter(|r| r[0] == "GET" && r[1].starts_with("/cdn"))
        .count();
    assert_eq!(transfers, 1);
}

#[cfg(unix)]
#[test]
fn a_disk_that_takes_no_more_is_an_error() {
    let bytes = content(800_000);
    let server = Server::start(&[(LARGE, bytes, true)], false);
    let root = tempfile::tempdir().unwrap();
    // A limit on the size of files fails as a full disk does.
    let mut limited = Command::new("sh");
    let inner = sconce(&server, root.path());
    limited.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let script = r#"trap '' XFSZ; ulimit -f 200; exec "$0" download hub:owner/name"#;
    limited.args(["-c", script, env!("CARGO_BIN_EXE_sconce")]);
    let (code, _, complaint) = output(limited);
    assert_eq!(code, Some(2), "{complaint}");
    assert!(
        contains("File too large").eval(&complaint) && contains("blobs").eval(&complaint),
        "{complaint}"
    );
    assert!(finished(&root.path().join("hf")).is_empty());
}

#[test]
fn the_token_goes_to_the_hub_alone_and_is_never_shown() {
    let server = Server::start(&[(LARGE, content(1000), true)], false);
    let root = tempfile::tempdir().unwrap();
    let mut command = sconce(&server, root.path());
    command.args(["download", "-v", "hub:owner/name"]);
    let (code, out, err) = output(command);
    assert_eq!(code, Some(0), "{err}");
    assert!(!out.contains("hf_secret") && !err.contains("hf_secret"));
    for [_, path, _, authorization] in server.log() {
        let expected = if path.starts_with("/cdn") {
            ""
        } else {
            "Bearer hf_secret"
        };
        assert_eq!(authorization, expected, "{path}");
    }
}

/// A network of timm on the hub: weights under its names, and its config.json.
fn timm_repository(name: &str) -> Vec<(&'static str, Vec<u8>, bool)> {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("model.safetensors");
    common::write_formula(&path, name, 3);
    let config = format!(
        r#"{{"architecture": "{name}", "num_classes": 3, "label_names": ["ant", "bee", "cat"],
        "pretrained_cfg": {{"input_size": [3, 64, 64], "crop_pct": 0.9, "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}}}"#
    );
    vec![
        (
            "timm/net/model.safetensors",
            std::fs::read(path).unwrap(),
            true,
        ),
        ("timm/net/config.json", config.into_bytes(), false),
    ]
}

#[test]
fn a_repository_is_a_network_with_labels_and_preprocessing() {
    let server = Server::start(&timm_repository("mobilenetv3_small_050"), false);
    let root = tempfile::tempdir().unwrap();
    let run = |offline: bool| {
        let mut command = sconce(&server, root.path());
        if offline {
            command
                .env("HF_HUB_OFFLINE", "1")
                .env("HF_ENDPOINT", "http://127.0.0.1:1");
        }
        command.args([
            "classify",
            "-m",
            "hub:timm/net",
            "assets/cat.png",
            "--format",
            "jsonl",
            "--logits",
        ]);
        output(command)
    };
    let (code, first, err) = run(false);
    assert_eq!(code, Some(0), "{err}");
    let record: serde_json::Value = serde_json::from_str(&first).unwrap();
    assert!(["ant", "bee", "cat"].contains(&record["top"][0]["label"].as_str().unwrap()));
    let (code, second, err) = run(true);
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(first, second);
    // The same with the files in a folder.
    let folder = root.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    for (name, bytes, _) in timm_repository("mobilenetv3_small_050") {
        std::fs::write(folder.join(name.rsplit('/').next().unwrap()), bytes).unwrap();
    }
    let mut command = sconce(&server, root.path());
    command
        .args([
            "classify",
            "assets/cat.png",
            "--format",
            "jsonl",
            "--logits",
            "-m",
        ])
        .arg(&folder);
    assert_eq!(output(command).1, first);
}

#[test]
fn a_name_is_fetched_on_first_use_and_says_so() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("weights");
    common::write_formula(&path, "mobilenetv3_small_050", 1000);
    let repository = "timm/mobilenetv3_small_050.lamb_in1k/model.safetensors";
    let server = Server::start(&[(repository, std::fs::read(path).unwrap(), true)], false);
    let run = |arguments: &[&str], offline: bool| {
        let mut command = sconce(&server, root.path());
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        output({
            command.args(arguments);
            command
        })
    };
    let classify = [
        "classify",
        "-m",
        "mobilenetv3_small_050",
        "assets/cat.png",
        "--format",
        "jsonl",
    ];
    let (code, _, err) = run(&classify, true);
    assert_eq!(code, Some(2));
    assert!(
        contains("sconce download mobilenetv3_small_050").eval(&err),
        "{err}"
    );
    let (code, first, err) = run(&classify, false);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        contains("mobilenetv3_small_050.lamb_in1k: fetching its weights").eval(&err),
        "{err}"
    );
    let requests = server.log().len();
    let (code, second, err) = run(&classify, false);
    assert_eq!((code, second, err), (Some(0), first, String::new()));
    assert_eq!(
        server.log().len(),
        requests,
        "the network is asked nothing once the file is here"
    );
    let (_, listed, _) = run(&["download", "--list"], true);
    let line = listed
        .lines()
        .find(|l| l.starts_with("mobilenetv3_small_050."))
        .unwrap();
    assert!(line.contains("snapshots"), "{line}");
    let (_, listed, _) = run(&["models", "--format", "json"], true);
    let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
    let cached: Vec<&str> = listed
        .iter()
        .filter(|m| {
            m["weights"]
                .as_array()
                .unwrap()
                .iter()
                .any(|w| w["cached"] == true)
        })
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!(cached, ["mobilenet_v2", "mobilenetv3_small_050"]);
    // Speed needs no download.
    let requests = server.log().len();
    let (code, ..) = run(
        &[
            "bench",
            "-m",
            "resnet18",
            "--seconds",
            "0",
            "--image-size",
            "32",
        ],
        false,
    );
    assert_eq!((code, server.log().len()), (Some(0), requests));
}

#[test]
fn downloads_name_what_failed_and_do_the_rest() {
    let server = Server::start(&[(LARGE, content(1000), true)], false);
    let root = tempfile::tempdir().unwrap();
    let mut command = sconce(&server, root.path());
    command.args([
        "download",
        "hub:owner/name",
        "hub:nobody/nothing",
        "resnet18",
        "shufflenet_g1_w1",
        "x",
    ]);
    let (code, out, err) = output(command);
    assert_eq!(code, Some(1), "{err}");
    assert_eq!(out.lines().count(), 1);
    for part in [
        "hub:nobody/nothing",
        "resnet18-f37072fd.pth",
        "shufflenet_g1_w1",
        "no network named x",
    ] {
        assert!(err.contains(part), "{part} in {err}");
    }
    let mut rest = String::new();
    std::fs::File::open(out.trim())
        .unwrap()
        .take(0)
        .read_to_string(&mut rest)
        .unwrap();
}

/// A file of tests/golden/datasets.
#[cfg(feature = "datasets")]
fn table(name: &str) -> Vec<u8> {
    common::golden(&format!("datasets/{name}.parquet"))
}

/// Trains a head for an epoch on `data`, which takes a moment.
fn finetune(server: &Server, root: &Path, data: &str, more: &[&str]) -> Command {
    let mut command = sconce(server, root);
    command
        .args(["finetune", data, "--force", "--format", "json"])
        .args("--freeze backbone --image-size 32 --epochs 1 -b 4".split(' '))
        .args(more)
        .arg("-o")
        .arg(root.join("run"));
    command
}

fn summary(command: Command, expected: i32) -> (serde_json::Value, String) {
    let (code, said, complaint) = output(command);
    assert_eq!(code, Some(expected), "{complaint}");
    (serde_json::from_str(&said).unwrap(), complaint)
}

#[test]
fn image_files_of_a_data_set_are_a_folder_of_classes() {
    let picture = |name: &str| {
        let pixels = common::photo(name, 24, 24, 3);
        let picture = image::RgbImage::from_raw(24, 24, pixels).unwrap();
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    };
    let names = ["train/a/1", "train/a/2", "train/b/1", "val/a/3", "val/b/2"];
    let names = names.map(|name| format!("datasets/owner/pets/data/{name}.png"));
    let mut files: Vec<(&str, Vec<u8>, bool)> = names
        .iter()
        .map(|name| (name.as_str(), picture(name), false))
        .collect();
    files.push(("datasets/owner/pets/README.md", b"text".to_vec(), false));
    let server = Server::start(&files, false);
    let root = tempfile::tempdir().unwrap();
    let command = || finetune(&server, root.path(), "hub:owner/pets", &[]);
    let (summary_, _) = summary(command(), 0);
    assert_eq!(
        (&summary_["train_images"], &summary_["val_images"]),
        (&3.into(), &2.into())
    );
    // Offline, from what is here.
    let requests = server.log().len();
    let mut offline = command();
    offline.env("HF_HUB_OFFLINE", "1");
    assert_eq!(summary(offline, 0).0["train_images"], 3);
    assert_eq!(server.log().len(), requests);
    let (code, _, complaint) = output(finetune(&server, root.path(), "hub:owner/none", &[]));
    assert_eq!(code, Some(2));
    assert!(complaint.contains("no such repository"), "{complaint}");
}

#[test]
#[cfg(not(feature = "datasets"))]
fn a_build_without_tables_names_the_feature() {
    let server = Server::start(
        &[("datasets/owner/shapes/train.parquet", content(100), false)],
        false,
    );
    let root = tempfile::tempdir().unwrap();
    for data in ["mnist", "fashion-mnist", "cifar10", "hub:owner/shapes"] {
        let (code, _, complaint) = output(finetune(&server, root.path(), data, &[]));
        assert_eq!(code, Some(2));
        assert!(complaint.contains("--features datasets"), "{complaint}");
    }
}

#[test]
#[cfg(feature = "datasets")]
fn tables_of_a_data_set_are_read_with_their_classes() {
    let file = |part: &str| format!("datasets/owner/shapes/data/{part}-00000-of-00001.parquet");
    let parts = ["train", "validation", "test"];
    let names = parts.map(file);
    let mut files: Vec<(&str, Vec<u8>, bool)> = Vec::new();
    for (part, name) in parts.iter().zip(&names) {
        files.push((name, table(&format!("shapes-{part}")), true));
    }
    let converted = "datasets/owner/words@refs%2Fconvert%2Fparquet/default/train/0000.parquet";
    files.push((converted, table("words"), true));
    files.push(("datasets/owner/words/words.tar", content(10), false));
    let broken = "datasets/owner/broken/train.parquet";
    files.push((broken, content(2000), true));
    let server = Server::start(&files, false);
    let root = tempfile::tempdir().unwrap();
    let (run, complaint) = summary(finetune(&server, root.path(), "hub:owner/shapes", &[]), 1);
    assert_eq!(
        (&run["classes"], &run["train_images"]),
        (&3.into(), &9.into())
    );
    assert_eq!(run["val_images"], 2);
    assert!(complaint.contains("1 rows have no class"), "{complaint}");
    assert!(complaint.contains("1 rows have no image"), "{complaint}");
    assert!(
        complaint.contains("hub:owner/shapes, train, picture 8: "),
        "{complaint}"
    );
    let model = root.path().join("run/model.safetensors");
    let mut evaluate = sconce(&server, root.path());
    evaluate
        .args([
            "evaluate",
            "hub:owner/shapes",
            "--split",
            "test",
            "--format",
            "json",
            "-m",
        ])
        .arg(model);
    let (figures, _) = summary(evaluate, 0);
    assert_eq!(figures["images"], 3);
    assert_eq!(figures["classes"][2]["label"], "star");
    // What the hub has converted; the words in a column are the classes.
    let command = || finetune(&server, root.path(), "hub:owner/words", &[]);
    let (run, _) = summary(command(), 0);
    assert_eq!(
        (&run["classes"], &run["train_images"]),
        (&2.into(), &4.into())
    );
    let requests = server.log().len();
    let mut offline = command();
    offline.env("HF_HUB_OFFLINE", "1");
    assert_eq!(summary(offline, 0).0["train_images"], 4);
    assert_eq!(server.log().len(), requests);
    let (code, _, complaint) = output(finetune(&server, root.path(), "hub:owner/broken", &[]));
    assert_eq!(code, Some(2));
    assert!(
        complaint.contains("hub:owner/broken/train.parquet: "),
        "{complaint}"
    );
    assert!(!complaint.contains("panicked"), "{complaint}");
}

/// candle-datasets gives CIFAR's pictures of the hub laid on their side: read here from files on disk
/// too, by another reader, they must teach the same.
#[test]
#[cfg(feature = "datasets")]
fn known_data_sets_come_from_the_hub_the_right_way_round() {
    let hub = |id: &str, configuration: &str, part: &str| {
        format!("datasets/{id}@refs%2Fconvert%2Fparquet/{configuration}/{part}/0000.parquet")
    };
    let sets = [
        ("mnist", "ylecun/mnist", "mnist"),
        (
            "fashion-mnist",
            "zalando-datasets/fashion_mnist",
            "fashion_mnist",
        ),
        ("cifar10", "cifar10", "plain_text"),
    ];
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for (name, id, configuration) in sets {
        for part in ["train", "test"] {
            let kind = if name == "cifar10" { name } else { "mnist" };
            files.push((
                hub(id, configuration, part),
                table(&format!("{kind}-{part}")),
            ));
        }
    }
    let serve = |files: &[(String, Vec<u8>)]| {
        let files: Vec<(&str, Vec<u8>, bool)> = files
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.clone(), true))
            .collect();
        Server::start(&files, false)
    };
    let server = serve(&files);
    let root = tempfile::tempdir().unwrap();
    for (name, ..) in sets {
        let model = |data: &str| {
            let (run, _) = summary(finetune(&server, root.path(), data, &[]), 0);
            let counts = ["classes", "train_images", "val_images"].map(|key| run[key].clone());
            assert_eq!(counts, [10, 20, 10], "{data}");
            std::fs::read(root.path().join("run/model.safetensors")).unwrap()
        };
        let from_hub = model(name);
        if name == "fashion-mnist" {
            let text = String::from_utf8_lossy(&from_hub);
            assert!(text.contains("Ankle boot"));
            continue;
        }
        let folder = root.path().join(name);
        for part in ["train", "test"] {
            let folder = folder.join(part);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(
                folder.join("0000.parquet"),
                table(&format!("{name}-{part}")),
            )
            .unwrap();
        }
        let from_disk = model(&format!("{name}:{}", folder.display()));
        assert!(from_hub == from_disk, "{name}: the models differ");
    }
    // One broken picture makes candle-datasets panic.
    files[5].1 = table("cifar10-broken");
    let server = serve(&files);
    let root = tempfile::tempdir().unwrap();
    let (code, _, complaint) = output(finetune(&server, root.path(), "cifar10", &[]));
    assert_eq!(code, Some(2));
    assert!(
        complaint.contains("hub:cifar10@refs/convert/parquet: a picture in it is broken"),
        "{complaint}"
    );
    assert!(!complaint.contains("panicked"), "{complaint}");
}
