//! What classify and embed do with many images: results that go on where they ended, sorted folders,
//! vectors; and folders as the world has them.
#![cfg(feature = "embedded")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use candle_core::{Device, Tensor};
use common::{channels_last, formula_model, golden, images, repository, uniform};
use sconce::exec::cpu::Options;
use serde_json::Value;
use tempfile::TempDir;

fn sconce(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    command.current_dir(folder).args(arguments);
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A folder `photos` of cat, coffee and photographer.
fn photos() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("photos")).unwrap();
    for name in ["cat.png", "coffee.png", "photographer.png"] {
        let from = repository("assets").join(name);
        fs::copy(from, folder.path().join("photos").join(name)).unwrap();
    }
    folder
}

/// The paths of results.
fn paths(jsonl: &str) -> Vec<String> {
    let path = |line: &str| {
        let value: Value = serde_json::from_str(line).ok()?;
        Some(value["path"].as_str().unwrap().to_string())
    };
    jsonl.lines().filter_map(path).collect()
}

#[test]
fn vectors_are_pytorchs() {
    let golden: Value = serde_json::from_slice(&golden("explain.json")).unwrap();
    let expected: BTreeMap<String, [f64; 9]> =
        serde_json::from_value(golden["embeddings"].clone()).unwrap();
    assert!(expected.len() > 6);
    let image = channels_last(&images(1, 224, 224), [1, 3, 224, 224]);
    for (name, expected) in expected {
        let model = formula_model(&name);
        let (node, _) = model.graph.features();
        let runner = model.runner_to(node, &Device::Cpu, [224, 224], Options::threads(2));
        let vector = runner.unwrap().run(&image, 1).unwrap();
        let wide = || vector.iter().map(|&v| f64::from(v));
        let mut found = vec![wide().map(|v| v * v).sum::<f64>().sqrt()];
        found.extend((0..8).map(|index| {
            let along = uniform(&format!("embedding/{index}"), vector.len());
            wide()
                .zip(along)
                .map(|(v, a)| v * f64::from(a))
                .sum::<f64>()
        }));
        for (found, expected_value) in found.iter().zip(expected) {
            let error = (found - expected_value).abs() / expected[0];
            assert!(error < 1e-4, "{name}: {error:.1e}");
        }
    }
}

#[test]
fn embed_writes_the_same_vectors_in_every_format() {
    let folder = photos();
    fs::write(folder.path().join("photos/broken.png"), b"nothing").unwrap();
    for file in ["v.npy", "v.safetensors", "v.jsonl"] {
        let output = sconce(folder.path(), &["embed", "photos", "-o", file, "-b", "2"]);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        let errors = text(&output.stderr);
        assert!(errors.contains("photos/broken.png: "), "{errors}");
    }
    let names = [
        "photos/cat.png",
        "photos/coffee.png",
        "photos/photographer.png",
    ];
    let npy = Tensor::read_npy(folder.path().join("v.npy")).unwrap();
    assert_eq!(npy.dims(), [3, 1280]);
    let listed = fs::read(folder.path().join("v.json")).unwrap();
    let listed: Vec<String> = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed, names);
    let npy: Vec<Vec<f32>> = npy.to_vec2().unwrap();
    let bytes = fs::read(folder.path().join("v.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (shape, values) = common::f32_tensor(&file, "embeddings");
    assert_eq!(shape, [3, 1280]);
    assert_eq!(values, npy.concat());
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let listed = &header.metadata().as_ref().unwrap()["paths"];
    assert_eq!(serde_json::from_str::<Vec<String>>(listed).unwrap(), names);
    let lines = fs::read_to_string(folder.path().join("v.jsonl")).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 4);
    assert!(lines[0]["error"].is_string() && lines[0]["path"] == "photos/broken.png");
    let vector: Vec<f32> = serde_json::from_value(lines[1]["embedding"].clone()).unwrap();
    assert_eq!(vector, npy[0]);
    // Nothing else is left behind.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 5);
}

#[test]
fn embed_says_what_it_cannot_do() {
    let folder = photos();
    for (arguments, expected) in [
        (vec!["embed", "photos"], "--out"),
        (
            vec!["embed", "photos", "-o", "v.txt"],
            "--out v.txt: is no .npy",
        ),
        (vec!["embed", "-o", "v.npy"], "embed: no images given"),
        (vec!["embed", "gone.png", "-o", "v.npy"], "gone.png: "),
    ] {
        let output = sconce(folder.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let errors = text(&output.stderr);
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
    }
    assert!(!folder.path().join("v.npy").exists());
}

#[test]
fn a_run_that_was_cut_off_goes_on_and_names_each_path_once() {
    let folder = photos();
    let classify = ["classify", "photos", "--format", "jsonl", "-k", "1"];
    let whole = sconce(folder.path(), &classify);
    assert!(whole.status.success());
    let whole = text(&whole.stdout);
    let file = folder.path().join("results.jsonl");
    // Cut in the middle of the second line, between lines, and not at all.
    let first = whole.find('\n').unwrap() + 1;
    for end in [first + 20, first, whole.len()] {
        fs::write(&file, &whole[..end]).unwrap();
        let mut arguments = classify.to_vec();
        arguments.extend(["--resume-from", "results.jsonl"]);
        let rest = sconce(folder.path(), &arguments);
        assert!(rest.status.success(), "{}", text(&rest.stderr));
        let both = whole[..end].to_string() + &text(&rest.stdout);
        assert_eq!(paths(&both), paths(&whole));
        // And once more, from what is there then.
        fs::write(&file, &both).unwrap();
        let again = sconce(folder.path(), &arguments);
        assert_eq!(text(&again.stdout), "");
    }
    fs::write(&file, "{\"path\":\"a\"}\nno result\n").unwrap();
    let output = sconce(
        folder.path(),
        &["classify", "photos", "--resume-from", "results.jsonl"],
    );
    assert_eq!(output.status.code(), Some(2));
    let errors = text(&output.stderr);
    assert!(
        errors.contains("--resume-from: results.jsonl: line 2 is no result"),
        "{errors}"
    );
}

#[test]
fn a_folder_of_results_is_gone_on_with() {
    let folder = photos();
    let classify = |more: &[&str]| {
        let mut arguments = vec!["classify", "photos", "--shards", "results"];
        arguments.extend(more);
        sconce(folder.path(), &arguments)
    };
    let lines = || {
        let path = folder.path().join("results/results-0000.jsonl");
        let file = fs::read_to_string(path).unwrap();
        let index = folder.path().join("results/index.jsonl");
        let index = fs::read_to_string(index).unwrap();
        let listed = |line: &str| {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            let number = |key: &str| entry[key].as_u64().unwrap() as usize;
            file[number("offset")..][..number("bytes")].to_string()
        };
        assert_eq!(index.lines().map(listed).collect::<String>(), file);
        file
    };
    let output = classify(&[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "");
    let whole = lines();
    let output = sconce(folder.path(), &["classify", "photos", "--format", "jsonl"]);
    assert_eq!(text(&output.stdout), whole);

    let again = classify(&[]);
    assert_eq!(again.status.code(), Some(2));
    let errors = text(&again.stderr);
    assert!(
        errors.contains("--shards: results: holds results"),
        "{errors}"
    );

    // Cut off in the second line, and before that is in the index.
    let first = whole.find('\n').unwrap() + 1;
    let path = folder.path().join("results/results-0000.jsonl");
    fs::write(path, &whole[..first + 20]).unwrap();
    fs::write(folder.path().join("results/index.jsonl"), "").unwrap();
    let rest = classify(&["--resume-from", "results"]);
    assert!(rest.status.success(), "{}", text(&rest.stderr));
    assert_eq!(lines(), whole);
}

#[test]
fn images_are_sorted_into_folders_of_their_labels() {
    let folder = photos();
    for (option, moved) in [
        (None, false),
        (Some("--copy"), false),
        (Some("--move"), true),
    ] {
        let out = format!("sorted{}", option.unwrap_or(""));
        let mut arguments = vec!["classify", "photos", "--sort-into", &out];
        arguments.extend(option);
        arguments.extend(["--min-probability", "0.9"]);
        let output = sconce(folder.path(), &arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let out = folder.path().join(&out);
        // The cat is an Egyptian one by 72 %.
        for place in [
            "espresso/coffee.png",
            "tripod/photographer.png",
            "unsure/cat.png",
        ] {
            let name = Path::new(place).file_name().unwrap();
            let original = repository("assets").join(name);
            assert_eq!(
                fs::read(out.join(place)).unwrap(),
                fs::read(original).unwrap()
            );
            let link = fs::symlink_metadata(out.join(place)).unwrap().is_symlink();
            assert_eq!(link, cfg!(unix) && option.is_none());
        }
        assert_eq!(folder.path().join("photos/cat.png").exists(), !moved);
    }
}

#[cfg(unix)]
#[test]
fn names_and_links_as_the_world_has_them() {
    use std::os::unix::ffi::OsStrExt;
    let folder = photos();
    let at = |name: &str| folder.path().join("photos").join(name);
    fs::rename(at("cat.png"), at("two\nlines.png")).unwrap();
    fs::rename(at("coffee.png"), folder.path().join("aside.png")).unwrap();
    std::os::unix::fs::symlink("../aside.png", at("link.png")).unwrap();
    std::os::unix::fs::symlink("../gone.png", at("dangling.png")).unwrap();
    let latin = std::ffi::OsStr::from_bytes(b"caf\xe9.png");
    fs::rename(
        at("photographer.png"),
        folder.path().join("photos").join(latin),
    )
    .unwrap();
    let output = sconce(
        folder.path(),
        &["classify", "photos", "--format", "jsonl", "-k", "1"],
    );
    assert_eq!(output.status.code(), Some(1));
    let found: Vec<Value> = text(&output.stdout)
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let label = |path: &str| {
        let found = found.iter().find(|v| v["path"] == path);
        let found = found.unwrap_or_else(|| panic!("{path} is not in {}", text(&output.stdout)));
        found["top"][0]["label"]
            .as_str()
            .unwrap_or("none")
            .to_string()
    };
    assert_eq!(label("photos/two\nlines.png"), "Egyptian cat");
    assert_eq!(label("photos/link.png"), "espresso");
    assert_eq!(label("photos/caf\u{fffd}.png"), "tripod");
    let errors = text(&output.stderr);
    assert!(errors.contains("photos/dangling.png: "), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

/// Results of a running command, as they come.
struct Running {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<Value>,
}

impl Running {
    fn start(folder: &Path, arguments: &[&str]) -> Self {
        use std::io::BufRead;
        let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
        command.current_dir(folder).args(arguments);
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines() {
                let line = serde_json::from_str(&line.unwrap()).unwrap();
                let _ = sender.send(line);
            }
        });
        Self { child, lines }
    }

    /// The path and the label, or the error, of the next result.
    fn next(&self) -> (String, String) {
        let line = self.lines.recv_timeout(Duration::from_secs(30)).unwrap();
        let told = line["top"][0]["label"].as_str().or(line["error"].as_str());
        let path = line["path"].as_str().unwrap();
        (path.to_string(), told.unwrap().to_string())
    }

    /// That nothing comes for a while.
    fn is_quiet(&self, milliseconds: u64) {
        let wait = Duration::from_millis(milliseconds);
        let line = self.lines.recv_timeout(wait);
        assert!(line.is_err(), "{line:?}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_watched_folder_is_classified_as_it_fills() {
    use std::io::Write;
    let root = photos();
    let at = |name: &str| root.path().join("photos").join(name);
    let coffee = fs::read(at("coffee.png")).unwrap();
    for name in ["cat.png", "photographer.png"] {
        fs::rename(at(name), root.path().join(name)).unwrap();
    }
    let arguments = ["classify", "--watch", "photos", "--format", "jsonl"];
    let sorted = ["--sort-into", "photos/sorted"];
    let running = Running::start(root.path(), &[&arguments[..], &sorted].concat());
    let espresso = |path: &str| (format!("photos/{path}"), "espresso".to_string());
    // What was there before.
    assert_eq!(running.next(), espresso("coffee.png"));
    // What is moved there.
    fs::rename(root.path().join("cat.png"), at("cat.png")).unwrap();
    assert_eq!(running.next().0, "photos/cat.png");
    // What is written there, but not before all of it is there.
    let mut file = fs::File::create(at("slow.png")).unwrap();
    for part in coffee.chunks(coffee.len() / 2) {
        file.write_all(part).unwrap();
        file.flush().unwrap();
        running.is_quiet(300);
    }
    drop(file);
    assert_eq!(running.next(), espresso("slow.png"));
    // No images, or not to be seen; what results were sorted into.
    fs::write(at("note.txt"), "text").unwrap();
    fs::write(at(".hidden.png"), &coffee).unwrap();
    assert!(at("sorted/espresso/slow.png").exists());
    // Folders, with what is in them from the start.
    fs::create_dir(root.path().join("new")).unwrap();
    fs::write(root.path().join("new/a.png"), &coffee).unwrap();
    fs::rename(root.path().join("new"), at("new")).unwrap();
    assert_eq!(running.next(), espresso("new/a.png"));
    fs::write(at("new/b.png"), &coffee).unwrap();
    assert_eq!(running.next(), espresso("new/b.png"));
    // Broken ones are named, and taken again once they are changed.
    fs::write(at("broken.png"), &coffee[..1000]).unwrap();
    assert_eq!(running.next().0, "photos/broken.png");
    fs::write(at("broken.png"), &coffee).unwrap();
    assert_eq!(running.next(), espresso("broken.png"));
    // A link, which nobody writes or closes.
    fs::hard_link(root.path().join("photographer.png"), at("link.png")).unwrap();
    assert_eq!(running.next().0, "photos/link.png");
    running.is_quiet(300);
    // Without the folder there is nothing more to come.
    fs::remove_dir_all(root.path().join("photos")).unwrap();
    let mut running = running;
    let status = running.child.wait().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn what_cannot_be_watched_is_said() {
    let root = photos();
    for (arguments, expected) in [
        (
            vec!["classify", "--watch"],
            "--watch: name folders to watch",
        ),
        (
            vec!["classify", "--watch", "photos/cat.png"],
            "photos/cat.png: --watch takes folders",
        ),
        (
            vec!["classify", "--watch", "photos", "--format", "json"],
            "--format jsonl",
        ),
    ] {
        let output = sconce(root.path(), &arguments);
        assert_eq!(output.status.code(), Some(2));
        let errors = text(&output.stderr);
        assert!(errors.contains(expected), "{errors}");
    }
}

/// Broken and hostile files of every format, in one folder with good ones.
#[test]
#[cfg(unix)]
fn a_folder_of_hostile_images_is_classified_to_the_end() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use rand::{RngExt, SeedableRng};
    use sconce::data::Decoder;

    let root = TempDir::new().unwrap();
    let folder = root.path().join("images");
    fs::create_dir(&folder).unwrap();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    for entry in fs::read_dir(repository("tests/images")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let (stem, extension) = name.rsplit_once('.').unwrap();
        let bytes = fs::read(&path).unwrap();
        for tenth in 0..10 {
            let cut = bytes[..bytes.len() * tenth / 10].to_vec();
            files.insert(format!("{stem}-cut-{tenth}.{extension}"), cut);
        }
        for index in 0..4 {
            let mut flipped = bytes.clone();
            for _ in 0..=index {
                let at = rng.random_range(0..bytes.len());
                flipped[at] ^= 1 << rng.random_range(0..8);
            }
            files.insert(format!("{stem}-flip-{index}.{extension}"), flipped);
        }
        files.insert(name, bytes);
    }
    // What headers promise: a picture of 10 Gpx, one within the limit with nothing behind, and far
    // more rows than there are bytes.
    let bmp = |width: i32, height: i32| {
        let mut bytes = files["rgb.bmp"].clone();
        bytes[18..22].copy_from_slice(&width.to_le_bytes());
        bytes[22..26].copy_from_slice(&height.to_le_bytes());
        bytes
    };
    let promises = [
        (100_000, 100_000),
        (9_999, 9_999),
        (1, 99_000_000),
        (i32::MAX, -1),
    ];
    let promises = promises.map(|(w, h)| (format!("promise-{w}x{h}.bmp"), bmp(w, h)));
    files.extend(promises);
    let pbm = |w: usize, h: usize| {
        (
            format!("promise-{w}x{h}.pbm"),
            format!("P4 {w} {h}\n").into(),
        )
    };
    files.extend([pbm(10_000, 10_000), pbm(usize::MAX, 2), pbm(0, 5)]);
    // Large and empty: a picture of 90 Mpx in some ten kilobytes.
    let large = image::GrayImage::new(10_000, 9_000);
    let mut bytes = std::io::Cursor::new(Vec::new());
    large.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    files.insert("large.png".into(), bytes.into_inner());
    assert!(files.len() > 400, "{}", files.len());

    let decoder = Decoder {
        max_pixels: 100_000_000,
        background: None,
        exact: false,
    };
    let preprocessing = sconce::models::Preprocessing::torchvision(256, 224);
    let mut expected: BTreeMap<String, bool> = BTreeMap::new();
    for (name, bytes) in &files {
        fs::write(folder.join(name), bytes).unwrap();
        let good = decoder.decode_for(&preprocessing, bytes).is_ok();
        expected.insert(format!("images/{name}"), good);
    }
    // What is no file.
    let fifo = folder.join("pipe.png");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    symlink("/dev/zero", folder.join("device.png")).unwrap();
    symlink("nowhere.png", folder.join("dangling.png")).unwrap();
    symlink(".", folder.join("loop.png")).unwrap();
    symlink("self.png", folder.join("self.png")).unwrap();
    for name in ["pipe", "device", "dangling", "loop", "self"] {
        expected.insert(format!("images/{name}.png"), false);
    }
    // Names as they come.
    let odd = OsStr::from_bytes(b"not \xff utf8\n.png");
    fs::write(folder.join(odd), &files["rgb.png"]).unwrap();
    expected.insert("images/not \u{fffd} utf8\n.png".into(), true);

    let arguments = ["classify", "images", "--format", "jsonl", "-j", "2"];
    let output = sconce(root.path(), &arguments);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let mut found = BTreeMap::new();
    for line in text(&output.stdout).lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let path = line["path"].as_str().unwrap().to_string();
        let (good, error) = (line["top"].is_array(), line["error"].is_string());
        assert!(good != error, "{line}");
        assert!(found.insert(path, good).is_none(), "{line}");
    }
    let differs = |path: &&String| found.get(*path) != expected.get(*path);
    let differing: Vec<&String> = found
        .keys()
        .chain(expected.keys())
        .filter(differs)
        .collect();
    assert!(differing.is_empty(), "{differing:?}");
    // Each that failed has one line.
    let failed = expected.values().filter(|good| !**good).count();
    assert_eq!(text(&output.stderr).lines().count(), failed);
    assert!(failed > 200, "{failed}");
    // SAFETY: fills in what it is given.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage), 0);
        usage
    };
    // Kibibytes on Linux; the largest of all children of these tests.
    #[cfg(target_os = "linux")]
    assert!(usage.ru_maxrss < 1 << 20, "{} KiB", usage.ru_maxrss);
    println!(
        "{failed} of {} failed, {} KiB",
        expected.len(),
        usage.ru_maxrss
    );
}

#[test]
#[cfg(unix)]
fn folders_that_may_only_be_read_and_files_that_vanish() {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::PermissionsExt;
    let root = photos();
    let folder = root.path().join("photos");
    let allow = |mode| fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
    allow(0o555);
    let output = sconce(root.path(), &["classify", "photos", "--format", "jsonl"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(paths(&text(&output.stdout)).len(), 3);
    allow(0o755);
    // Listed, and gone when its turn comes.
    let mut child = Command::new(env!("CARGO_BIN_EXE_sconce"))
        .current_dir(root.path())
        .args(["classify", "--files-from", "-", "--format", "jsonl"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    writeln!(input, "photos/cat.png").unwrap();
    assert!(lines.next().unwrap().unwrap().contains("photos/cat.png"));
    fs::remove_file(folder.join("coffee.png")).unwrap();
    writeln!(input, "photos/coffee.png\nphotos/photographer.png").unwrap();
    drop(input);
    let error = lines.next().unwrap().unwrap();
    assert!(
        error.contains("photos/coffee.png") && error.contains("\"error\""),
        "{error}"
    );
    assert!(lines.next().unwrap().unwrap().contains("\"top\""));
    assert_eq!(child.wait().unwrap().code(), Some(1));
}
