//! Several processes that do one job, on MPI: needs the cargo feature `mpi`, and mpirun.
//!
//! `cargo test --release --features mpi --test ranks`

#![cfg(feature = "mpi")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{golden, photos, repository, write_formula};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SCONCE: &str = env!("CARGO_BIN_EXE_sconce");

/// sconce in so many processes of one thread each; none means without mpirun.
fn sconce(processes: usize) -> Command {
    let mut command = if processes == 0 {
        Command::new(SCONCE)
    } else {
        let mut command = Command::new("mpirun");
        let count = processes.to_string();
        command.args(["-n", &count, "--oversubscribe", "--bind-to", "none", SCONCE]);
        command
    };
    command
        .env("HF_HUB_OFFLINE", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        // More processes than cores are to take turns.
        .env("OMPI_MCA_mpi_yield_when_idle", "1");
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("mpirun is there");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// The losses of every step that a run with -v tells.
fn losses(output: &Output) -> Vec<f64> {
    let told = String::from_utf8_lossy(&output.stderr);
    let loss = |line: &str| {
        let (_, rest) = line.split_once(": loss ")?;
        line.contains(", batch ")
            .then(|| rest.split(',').next()?.parse().ok())?
    };
    told.lines().filter_map(loss).collect()
}

/// How far PyTorch's own runs are apart at most, up to each step.
fn gaps(network: &str) -> Vec<f64> {
    type Curves = BTreeMap<String, BTreeMap<String, Vec<Vec<f64>>>>;
    let curves: Curves = serde_json::from_slice(&golden("curves.json")).unwrap();
    let [first, others @ ..] = &curves[network]["sgd"][..] else {
        panic!("no runs")
    };
    let mut gap: f64 = 0.0;
    (0..first.len())
        .map(|i| {
            for other in others {
                gap = gap.max((first[i] - other[i]).abs() / first[i]);
            }
            gap
        })
        .collect()
}

#[test]
fn several_learn_what_one_learns() {
    let data = photos(20);
    let scratch = tempfile::tempdir().unwrap();
    for network in ["resnet18", "mobilenet_v3_small"] {
        let weights = scratch.path().join(format!("{network}.safetensors"));
        write_formula(&weights, network, 3);
        for norms in [
            &["--norms", "batch", "--sync-bn"][..],
            &["--norms", "stored"],
        ] {
            let curve = |processes: usize| {
                let out = scratch.path().join("run");
                let mut command = sconce(processes);
                command.args([
                    "finetune",
                    text(data.path()),
                    "-m",
                    network,
                    "--force",
                    "-v",
                ]);
                command.args(["--weights", text(&weights), "-o", text(&out), "-j", "1"]);
                command.args([
                    "--freeze",
                    "none",
                    "--epochs",
                    "5",
                    "-b",
                    "8",
                    "--image-size",
                    "96",
                ]);
                command.args([
                    "--optimizer",
                    "sgd",
                    "--lr",
                    "0.001",
                    "--label-smoothing",
                    "0.1",
                ]);
                command.args(["--class-weights", "auto"]).args(norms);
                losses(&run(&mut command))
            };
            let alone = curve(0);
            assert_eq!(alone.len(), 30);
            for processes in [1, 2, 4] {
                let several = curve(processes);
                assert_eq!(several.len(), alone.len());
                let pairs = alone.iter().zip(&several).zip(gaps(network));
                for (step, ((one, other), gap)) in pairs.enumerate() {
                    let error = (one - other).abs() / one;
                    let most = match step {
                        0 => 1e-5,
                        _ => (2.0 * gap).max(1e-3),
                    };
                    println!(
                        "{network} {norms:?}, {processes} processes, step {step}: {error:.1e} of {most:.1e}"
                    );
                    assert!(
                        error <= most,
                        "{network} {norms:?} {processes} {step}: {error}"
                    );
                    assert!(processes > 1 || error == 0.0);
                }
            }
        }
    }
}

/// Parts of what the default recipe does are the same to the bit: the features, the head that is
/// fitted to them, and its validation.
#[test]
fn the_head_that_several_fit_is_that_of_one() {
    let data = photos(15);
    // Two that cannot be read, so that parts differ in size.
    fs::write(data.path().join("cat/broken.png"), "no picture").unwrap();
    fs::write(data.path().join("coffee/broken.png"), "").unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut models = Vec::new();
    for processes in [0, 2, 3] {
        let out = scratch.path().join(processes.to_string());
        let mut command = sconce(processes);
        command.args(["finetune", text(data.path()), "-o", text(&out), "-j", "1"]);
        command.args(["--freeze", "backbone", "--image-size", "64"]);
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert_eq!(told.matches("broken.png").count(), 2, "{told}");
        assert!(told.contains("left out as unreadable: 2"), "{told}");
        models.push(fs::read(out.join("model.safetensors")).unwrap());
    }
    assert!(models.iter().all(|model| *model == models[0]));
}

#[test]
fn several_classify_as_one() {
    let images = repository("tests/images");
    let list = tempfile::NamedTempFile::new().unwrap();
    fs::write(list.path(), "tests/images/444.jpg\nnot/there.jpg\n").unwrap();
    for format in ["jsonl", "json", "csv"] {
        let classify = |processes: usize| {
            let mut command = sconce(processes);
            command.current_dir(repository("."));
            command.args([
                "classify",
                text(&images),
                "assets",
                "--format",
                format,
                "-j",
                "1",
            ]);
            command.args(["--logits", "-b", "3"]);
            command.output().unwrap()
        };
        let alone = classify(0);
        assert!(!alone.stdout.is_empty());
        for processes in [1, 2, 4] {
            let several = classify(processes);
            assert!(several.stdout == alone.stdout, "{format}, {processes}");
            assert_eq!(several.status.code(), alone.status.code());
        }
        let listed = |processes: usize| {
            let mut command = sconce(processes);
            command.current_dir(repository("."));
            command.args([
                "classify",
                "--files-from",
                text(list.path()),
                "--format",
                format,
            ]);
            command.output().unwrap()
        };
        let (alone, several) = (listed(0), listed(2));
        assert!(several.stdout == alone.stdout, "{format}");
        assert_eq!(several.status.code(), Some(1));
    }
}

/// Results of all shards in the order of the index.
fn joined(folder: &Path) -> Vec<u8> {
    let index = fs::read_to_string(folder.join("index.jsonl")).unwrap();
    let run = |line: &str| {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap();
        let number = |key: &str| entry[key].as_u64().unwrap() as usize;
        let file = fs::read(folder.join(entry["file"].as_str().unwrap())).unwrap();
        file[number("offset")..][..number("bytes")].to_vec()
    };
    index.lines().flat_map(run).collect()
}

/// Results in a file a process, joined by the index, are those of one process; so are those of a job
/// that was killed and gone on with, in another order.
#[test]
fn shards_are_what_one_process_writes() {
    let scratch = tempfile::tempdir().unwrap();
    let data = photos(40);
    fs::write(data.path().join("cat/broken.png"), "no picture").unwrap();
    let classify = |processes: usize| {
        let mut command = sconce(processes);
        command.args(["classify", text(data.path()), "-j", "1"]);
        command
    };
    let one = classify(0).args(["--format", "jsonl"]).output().unwrap();
    assert_eq!(one.status.code(), Some(1));
    for processes in [0, 2, 3] {
        let folder = scratch.path().join(processes.to_string());
        let shards = |more: &[&str]| {
            let mut command = classify(processes);
            command.args(["--shards", text(&folder)]).args(more);
            command.output().unwrap()
        };
        let output = shards(&[]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(output.stdout.is_empty());
        assert_eq!(told.matches("broken.png").count(), 1, "{told}");
        assert!(joined(&folder) == one.stdout, "{processes} processes");
        let files = fs::read_dir(&folder).unwrap().count();
        assert_eq!(files, processes.max(1) + 1);
        // Another run may not mix with it; one that goes on has nothing left to do.
        let refused = shards(&[]);
        let told = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{told}");
        assert!(told.contains("--shards"), "{told}");
        assert_eq!(
            shards(&["--resume-from", text(&folder)]).status.code(),
            Some(0)
        );
        assert!(joined(&folder) == one.stdout);
    }
    let folder = scratch.path().join("killed");
    let shards = |processes: usize| {
        let mut command = classify(processes);
        command.args(["--shards", text(&folder)]);
        command
    };
    let mut child = shards(2).stderr(Stdio::null()).spawn().unwrap();
    let written = || fs::read(folder.join("results-0001.jsonl")).map_or(0, |file| file.len());
    while written() == 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let ranks = processes_with(text(&folder));
    let victim = ranks.last().unwrap().to_string();
    Command::new("kill").args(["-9", &victim]).status().unwrap();
    assert!(!child.wait().unwrap().success());
    let mut command = shards(3);
    command
        .args(["--resume-from", text(&folder)])
        .output()
        .unwrap();
    let sorted = |bytes: &[u8]| {
        let mut lines: Vec<_> = bytes.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
        lines.sort();
        lines
    };
    assert!(sorted(&joined(&folder)) == sorted(&one.stdout));
}

#[test]
fn several_evaluate_as_one() {
    let data = photos(25);
    fs::write(data.path().join("cat/broken.png"), "no picture").unwrap();
    let labels = data.path().join("labels");
    fs::write(&labels, "cat\ncoffee\nphotographer\n").unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let weights = scratch.path().join("weights.safetensors");
    write_formula(&weights, "mobilenet_v3_small", 3);
    let evaluate = |processes: usize, mistakes: &Path| {
        let mut command = sconce(processes);
        command.args([
            "evaluate",
            text(data.path()),
            "-m",
            "mobilenet_v3_small",
            "-j",
            "1",
        ]);
        command.args(["--weights", text(&weights), "--labels", text(&labels)]);
        command.args(["--format", "json", "--mistakes", text(mistakes)]);
        command.output().unwrap()
    };
    let files = ["one.csv", "several.csv"].map(|name| scratch.path().join(name));
    let alone = evaluate(0, &files[0]);
    let told = String::from_utf8_lossy(&alone.stderr);
    assert_eq!(alone.status.code(), Some(1), "{told}");
    for processes in [2, 3] {
        let several = evaluate(processes, &files[1]);
        let told = String::from_utf8_lossy(&several.stderr);
        assert_eq!(several.status.code(), Some(1), "{told}");
        assert_eq!(told.matches("broken.png").count(), 1, "{told}");
        let [one, other] = files.each_ref().map(|file| fs::read(file).unwrap());
        assert!(one == other, "{processes}");
        assert_eq!(
            String::from_utf8_lossy(&several.stdout),
            String::from_utf8_lossy(&alone.stdout)
        );
    }
}

#[test]
fn what_is_wrong_is_said_once_and_ends_all() {
    let missing = ["not/there"];
    for arguments in [&["finetune"][..], &["finetune", "--resume", "-o"]] {
        let output = sconce(3).args(arguments).args(missing).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert_eq!(told.matches("sconce: ").count(), 1, "{told}");
    }
    let output = sconce(2).args(["models"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    // The second sees one image more.
    let data = [photos(4), photos(5)];
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("run");
    for command in [&["evaluate"][..], &["finetune", "-o", text(&out)]] {
        let mut both = sconce(1);
        both.args(command).arg(text(data[0].path()));
        both.args([":", "-n", "1", SCONCE]).args(command);
        let output = both.arg(text(data[1].path())).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert_eq!(told.matches("do not all see the same").count(), 1, "{told}");
    }
}

/// Processes whose command line has that text in it.
fn processes_with(text: &str) -> Vec<u32> {
    let running = |entry: fs::DirEntry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line);
        (line.starts_with(SCONCE) && line.contains(text)).then_some(id)
    };
    let entries = fs::read_dir("/proc").unwrap();
    entries.flatten().filter_map(running).collect()
}

/// SCONCE_TEST_KILLS says how often.
#[test]
#[cfg(target_os = "linux")]
fn a_process_that_dies_ends_the_job_and_nothing_is_lost() {
    let kills = std::env::var("SCONCE_TEST_KILLS").map_or(3, |kills| kills.parse().unwrap());
    let data = photos(20);
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("run");
    let arguments = [
        "finetune",
        text(data.path()),
        "-m",
        "mobilenet_v3_small",
        "--from-scratch",
        "--image-size",
        "64",
        "--epochs",
        "400",
        "-b",
        "8",
        "-o",
        text(&out),
        "--checkpoint-every",
        "0",
        "-j",
        "1",
    ];
    let mut rng = ChaCha8Rng::seed_from_u64(kills);
    for kill in 0..kills {
        // Another number of processes each time.
        let count = 2 + kill as usize % 2;
        let again = out.join("last.checkpoint").exists();
        let mut command = sconce(count);
        command
            .args(arguments)
            .arg(if again { "--resume" } else { "--force" });
        let child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn();
        let child = child.unwrap();
        while processes_with(text(&out)).len() < count {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(100..4_000)));
        let ranks = processes_with(text(&out));
        let victim = ranks[rng.random_range(0..ranks.len())];
        Command::new("kill")
            .args(["-9", &victim.to_string()])
            .status()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(told.contains("signal 9"), "{told}");
        let left = processes_with(text(&out));
        assert!(left.is_empty(), "{left:?} are left");
    }
    // Whatever was saved last is whole, for one process too.
    let mut command = sconce(0);
    command
        .args(arguments)
        .arg("--resume")
        .env("RUST_BACKTRACE", "0");
    let mut child = command
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(2));
    Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let status = child.wait().unwrap();
    assert!([Some(0), Some(130)].contains(&status.code()), "{status}");
}
