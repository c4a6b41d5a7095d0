//! The binary as people and scripts use it: what it prints, what it returns.
#![cfg(feature = "embedded")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use common::{golden, photo, repository};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use tempfile::TempDir;

fn sconce() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    command.current_dir(repository("")).env_remove("NO_COLOR");
    command.env("HF_HUB_OFFLINE", "1");
    command
}

fn classify(arguments: &[&str]) -> Command {
    let mut command = sconce();
    command.arg("classify").args(arguments);
    command
}

/// The records that a `--format jsonl` run prints.
fn records(command: &mut Command) -> Vec<Value> {
    let output = command.args(["--format", "jsonl"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

fn label(record: &Value) -> &str {
    record["top"][0]["label"].as_str().unwrap()
}

/// A folder with copies of the coffee under these names.
fn folder(files: &[&str]) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for file in files {
        let path = root.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::copy(repository("assets/coffee.png"), path).unwrap();
    }
    root
}

#[test]
fn instruction_sets_are_known_by_name() {
    for name in ["", "vectors", "avx2", "portable"] {
        let mut command = classify(&["assets/coffee.png"]);
        command.env("SCONCE_ISA", name);
        let found = records(&mut command);
        assert_eq!(label(&found[0]), "espresso", "{name}");
    }
    let mut command = classify(&["assets/coffee.png"]);
    command
        .env("SCONCE_ISA", "avx9")
        .assert()
        .code(2)
        .stderr(contains(
            "SCONCE_ISA=avx9: no instruction set of that name; there are vectors, avx2, portable",
        ));
}

#[test]
fn a_photo_gets_labels_a_person_can_read() {
    let expected = "\
assets/coffee.png  600 x 400
   99.2 %  ███████████████████▉  espresso
    0.4 %  ▏                     consomme
";
    classify(&["assets/coffee.png", "-k", "2"])
        .assert()
        .success()
        .stdout(expected)
        .stderr("");
}

/// Where the allocator cannot have as many addresses as it asks for at first.
#[test]
#[cfg(target_os = "linux")]
fn few_addresses_are_enough() {
    let script = "ulimit -v 1000000; exec \"$0\" classify -j 1 assets/coffee.png";
    let output = Process::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_sconce")])
        .current_dir(repository(""))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(contains("espresso").eval(&String::from_utf8(output.stdout).unwrap()));
}

#[test]
fn probabilities_are_torchvisions() {
    let records = records(&mut classify(&[
        "assets/coffee.png",
        "assets/photographer.png",
    ]));
    for (record, (name, index, label, probability)) in records.iter().zip([
        ("assets/coffee.png", 967, "espresso", 0.9921),
        ("assets/photographer.png", 872, "tripod", 0.9780),
    ]) {
        assert_eq!(record["path"], name);
        let first = &record["top"][0];
        assert_eq!(
            (&first["index"], &first["label"]),
            (&index.into(), &label.into())
        );
        assert!((first["probability"].as_f64().unwrap() - probability).abs() < 0.005);
        assert_eq!(record["top"].as_array().unwrap().len(), 5);
    }
}

#[test]
fn every_format_says_the_same() {
    let run = |format: &str| {
        let arguments = [
            "assets/coffee.png",
            "missing.png",
            "-k",
            "2",
            "--format",
            format,
        ];
        let output = classify(&arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{format}");
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(errors.starts_with("sconce: missing.png: "), "{errors}");
        String::from_utf8(output.stdout).unwrap()
    };
    let array: Value = serde_json::from_str(&run("json")).unwrap();
    let lines: Vec<Value> = run("jsonl")
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(array.as_array().unwrap(), &lines);
    assert_eq!(
        (&lines[0]["width"], &lines[0]["height"]),
        (&600.into(), &400.into())
    );
    assert!(lines[1]["error"].is_string() && lines[1].get("top").is_none());
    let csv = run("csv");
    let rows: Vec<&str> = csv.lines().collect();
    assert_eq!(rows[0], "path,rank,index,label,probability,error");
    assert_eq!(rows.len(), 4);
    let cells: Vec<&str> = rows[1].split(',').collect();
    assert_eq!(cells[..4], ["assets/coffee.png", "1", "967", "espresso"]);
    let probability = lines[0]["top"][0]["probability"].as_f64().unwrap();
    assert!((cells[4].parse::<f64>().unwrap() - probability).abs() < 1e-12);
    assert!(rows[3].starts_with("missing.png,,,,,"));
    assert!(run("text").starts_with("assets/coffee.png"));
}

#[test]
fn logits_are_in_class_order_and_before_temperature() {
    let plain = records(&mut classify(&["assets/coffee.png", "--logits"]));
    let warm = records(&mut classify(&[
        "assets/coffee.png",
        "--logits",
        "--temperature",
        "4",
    ]));
    assert_eq!(plain[0]["logits"].as_array().unwrap().len(), 1000);
    assert_eq!(plain[0]["logits"], warm[0]["logits"]);
    // The golden's logits through a softmax at that temperature.
    let bytes = golden("photos.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, logits) = common::f32_tensor(&file, "embedded/coffee.png");
    let exp: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / 4.0).exp()).collect();
    let expected = exp[967] / exp.iter().sum::<f64>();
    let probability = warm[0]["top"][0]["probability"].as_f64().unwrap();
    assert!(
        (probability - expected).abs() < 1e-4,
        "{probability} {expected}"
    );
}

#[test]
fn improbable_classes_are_left_out() {
    let records = records(&mut classify(&[
        "assets/cat.png",
        "-k",
        "1000",
        "--min-probability",
        "0.1",
    ]));
    let top = records[0]["top"].as_array().unwrap();
    assert_eq!(top.len(), 3);
    classify(&["assets/cat.png", "--min-probability", "0.9"])
        .assert()
        .success()
        .stdout(contains("no class is probable enough"));
}

#[test]
fn top_k_beyond_the_classes_names_them_all() {
    let records = records(&mut classify(&["assets/cat.png", "--top-k", "5000"]));
    assert_eq!(records[0]["top"].as_array().unwrap().len(), 1000);
}

#[test]
fn a_mirrored_photo_has_the_same_logits_under_tta() {
    let root = tempfile::tempdir().unwrap();
    // A width that keeps the crop symmetric.
    let square = image::open(repository("assets/photographer.png")).unwrap();
    square
        .fliph()
        .save(root.path().join("mirrored.png"))
        .unwrap();
    let mirrored = root.path().join("mirrored.png");
    let logits = |path: &str, tta: bool| {
        let mut command = classify(&[path, "--logits"]);
        if tta {
            command.arg("--tta");
        }
        let record = records(&mut command).remove(0);
        let values = record["logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap());
        values.collect::<Vec<_>>()
    };
    let mirrored = mirrored.to_str().unwrap();
    let distance = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max)
    };
    let (plain, flipped) = (
        logits("assets/photographer.png", false),
        logits(mirrored, false),
    );
    let (averaged, other) = (
        logits("assets/photographer.png", true),
        logits(mirrored, true),
    );
    assert!(distance(&plain, &flipped) > 0.1);
    assert!(distance(&averaged, &other) < 1e-5);
    let mean: Vec<f64> = plain
        .iter()
        .zip(&flipped)
        .map(|(a, b)| (a + b) / 2.0)
        .collect();
    assert!(distance(&averaged, &mean) < 1e-4);
}

#[test]
fn folders_globs_and_lists_give_results_in_order() {
    let root = folder(&["b.png", "a/2.png", "a/1.png", ".hidden.png", "notes.txt"]);
    let at = |name: &str| root.path().join(name).display().to_string();
    let paths = |command: &mut Command| {
        let records = records(command);
        assert!(records.iter().all(|r| label(r) == "espresso"));
        let names = records
            .iter()
            .map(|r| r["path"].as_str().unwrap().to_string());
        names.collect::<Vec<_>>()
    };
    let whole = [at("a/1.png"), at("a/2.png"), at("b.png")];
    assert_eq!(
        paths(&mut classify(&[root.path().to_str().unwrap()])),
        whole
    );
    assert_eq!(paths(&mut classify(&[&at("a/*.png")])), whole[..2]);
    let list = root.path().join("notes.txt");
    fs::write(&list, format!("{}\n{}\n", at("b.png"), at("a/1.png"))).unwrap();
    let expected = [at("b.png"), at("a/1.png")];
    let list = list.to_str().unwrap();
    assert_eq!(paths(&mut classify(&["--files-from", list])), expected);
    let nul = format!("{}\0{}\0", at("b.png"), at("a/1.png"));
    let mut command = classify(&["--files-from", "-", "-0"]);
    assert_eq!(paths(command.write_stdin(nul)), expected);
}

#[test]
fn one_image_comes_on_standard_input() {
    let bytes = fs::read(repository("assets/coffee.png")).unwrap();
    let records = records(classify(&["-"]).write_stdin(bytes));
    assert_eq!(
        (records[0]["path"].as_str(), label(&records[0])),
        (Some("-"), "espresso")
    );
}

#[test]
fn results_do_not_depend_on_batch_or_threads() {
    let photos = [
        "assets/cat.png",
        "assets/coffee.png",
        "assets/photographer.png",
    ];
    let run = |options: &[&str]| {
        let mut command = classify(&photos);
        command.arg("--logits").args(options);
        records(&mut command)
    };
    let one = run(&["--batch-size", "1", "--threads", "1"]);
    assert_eq!(one, run(&["--batch-size", "2", "--threads", "2"]));
    assert_eq!(
        one,
        run(&["--batch-size", "64", "--threads", "7", "--exact"])
    );
}

/// A run whose standard input stays open.
fn with_open_input(arguments: &[&str]) -> Child {
    let mut command = Process::new(env!("CARGO_BIN_EXE_sconce"));
    command
        .arg("classify")
        .args(arguments)
        .current_dir(repository(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt;
        // A shell starts what runs in the background with interrupts ignored, and children inherit
        // that.
        let heed_interrupts = || {
            // SAFETY: sets a disposition, which is allowed between fork and exec.
            unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
            Ok(())
        };
        // SAFETY: the closure neither allocates nor locks.
        unsafe { command.pre_exec(heed_interrupts) };
    }
    command.spawn().unwrap()
}

#[test]
fn names_that_arrive_are_classified_before_the_next_one_comes() {
    let mut child = with_open_input(&["--files-from", "-", "--format", "jsonl"]);
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    for name in ["assets/coffee.png", "assets/cat.png"] {
        writeln!(input, "{name}").unwrap();
        // Were the line held back for a fuller batch, this would wait for ever.
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let record: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(record["path"], name);
    }
    drop(input);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = with_open_input(&["--files-from", "-", "--format", "jsonl", "-b", "1"]);
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "assets/coffee.png").unwrap();
    output.read_line(&mut String::new()).unwrap();
    drop(output);
    for _ in 0..3 {
        writeln!(input, "assets/coffee.png").unwrap();
    }
    drop(input);
    let mut errors = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    assert_eq!(errors, "");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
#[cfg(unix)]
fn an_interrupt_ends_the_run_as_shells_expect() {
    use std::os::unix::process::ExitStatusExt;

    let mut child = with_open_input(&["--files-from", "-", "--format", "jsonl"]);
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "assets/coffee.png").unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert!(line.contains("espresso"));
    let kill = Process::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(kill.success());
    let status = child.wait().unwrap();
    // A process that a signal ended: a shell reports 128 + 2.
    assert_eq!(status.signal(), Some(2));
}

#[test]
fn transparent_images_are_put_on_a_background_on_demand() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("clear.png");
    let mut image = image::open(repository("assets/coffee.png"))
        .unwrap()
        .to_rgba8();
    image.pixels_mut().for_each(|pixel| pixel.0[3] = 0);
    image.save(&path).unwrap();
    let path = path.to_str().unwrap();
    let run = |options: &[&str]| {
        let mut command = classify(&[path]);
        command.args(options);
        label(&records(&mut command)[0]).to_string()
    };
    // torchvision's loader drops transparency.
    assert_eq!(run(&[]), "espresso");
    let white = run(&["--background", "white"]);
    assert_ne!(white, "espresso");
    assert_eq!(white, run(&["--background", "#fff"]));
}

#[test]
fn exit_codes_tell_all_some_and_nothing() {
    classify(&["assets/coffee.png"]).assert().code(0);
    classify(&["assets/coffee.png", "missing.png"])
        .assert()
        .code(1);
    classify(&["missing.png"]).assert().code(2);
    classify(&[])
        .assert()
        .code(2)
        .stderr(contains("no images given"));
    let empty = tempfile::tempdir().unwrap();
    let path = empty.path().to_str().unwrap();
    classify(&[path])
        .assert()
        .code(2)
        .stderr(contains("no images in this folder"));
    classify(&["no*match.png"])
        .assert()
        .code(2)
        .stderr(contains("no file matches"));
}

#[test]
fn misuse_is_one_clear_error() {
    for (arguments, message) in [
        (&["--top-k", "0"][..], "--top-k"),
        (&["--temperature", "0"], "expected a number above 0"),
        (&["--temperature", "nan"], "expected a number above 0"),
        (&["--min-probability", "2"], "expected a number from 0 to 1"),
        (&["--background", "mauvish"], "expected white"),
        (&["--threads", "0"], "--threads"),
        (
            &["--device", "gpu"],
            "expected auto, cpu, cuda, cuda:N, cuda:N,N or metal",
        ),
        (&["--model", "resnet19"], "there is resnet18"),
        (&["--model", "resnet18"], "sconce download resnet18.tv"),
        (&["--model", "resnet18.v9"], "has no weights tagged v9"),
        (
            &[
                "--model",
                "mobilenet_v2.tv",
                "--weights",
                "missing.safetensors",
            ],
            "missing.safetensors",
        ),
        (&["--model", "missing.safetensors"], "missing.safetensors"),
        (
            &["--weights", "README.md"],
            "README.md: cannot be read as weights: ",
        ),
        (&["--weights", "assets"], "assets: "),
        (&["--labels", "missing.txt"], "missing.txt"),
        (&["--labels", "assets/coffee.png"], "coffee.png"),
        (&["--labels", ".gitignore"], "for a network of 1000 classes"),
        (
            &[
                "--model",
                "resnet18",
                "--weights",
                "weights/mobilenet_v2.safetensors",
            ],
            "leave -m NAME out",
        ),
        (
            &["--files-from", "missing.txt"],
            "--files-from: missing.txt",
        ),
        (&["--quiet", "--verbose"], "cannot be used with"),
        (&["--frobnicate"], "--frobnicate"),
    ] {
        let mut command = classify(&["assets/coffee.png"]);
        let assert = command.args(arguments).assert().code(2).stdout("");
        assert.stderr(predicate::str::starts_with("sconce: ").and(contains(message)));
    }
}

#[test]
#[cfg(not(feature = "cuda"))]
fn what_only_cuda_does_says_so() {
    let coffee = ["assets/coffee.png", "--precision", "bf16"];
    classify(&coffee)
        .assert()
        .code(2)
        .stderr(contains("--precision bf16").and(contains("CUDA")));
    classify(&["assets/coffee.png", "--device", "cuda:0,1"])
        .assert()
        .code(2)
        .stderr(contains("--device cuda:0,1").and(contains("finetune")));
    sconce()
        .args(["finetune", "assets", "--device", "cuda:0,1"])
        .assert()
        .code(2)
        .stderr(contains("2 devices").and(contains("--features nccl")));
}

#[test]
#[cfg(not(any(feature = "cuda", feature = "metal")))]
fn a_device_that_is_not_built_in_says_how_to_get_it() {
    for (device, feature) in [("cuda", "cuda"), ("cuda:1", "cuda"), ("metal", "metal")] {
        classify(&["assets/coffee.png", "--device", device])
            .assert()
            .code(2)
            .stderr(
                contains(format!("--device {device}: "))
                    .and(contains(format!("--features {feature}"))),
            );
    }
    classify(&["assets/coffee.png", "--device", "auto"])
        .assert()
        .success();
    classify(&["assets/coffee.png", "--device", "cpu"])
        .assert()
        .success();
}

#[test]
fn a_model_file_needs_no_other_flag() {
    let records = records(&mut classify(&[
        "assets/coffee.png",
        "-m",
        "weights/mobilenet_v2.safetensors",
    ]));
    assert_eq!(label(&records[0]), "espresso");
}

#[test]
fn the_head_takes_its_size_from_the_weights() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("three.safetensors");
    common::write_formula(&path, "resnet18", 3);
    let weights = path.to_str().unwrap();
    let labels = root.path().join("labels.json");
    fs::write(&labels, r#"{"0": "ant", "1": "bee", "2": "cat"}"#).unwrap();
    let arguments = ["assets/coffee.png", "-m", "resnet18", "--weights", weights];
    let plain = records(&mut classify(&arguments));
    assert_eq!(plain[0]["top"].as_array().unwrap().len(), 3);
    assert!(label(&plain[0]).starts_with("class "));
    let mut named = classify(&arguments);
    let named = records(named.args(["--labels", labels.to_str().unwrap()]));
    assert!(["ant", "bee", "cat"].contains(&label(&named[0])));
    // Another network's weights are refused, not completed at random.
    classify(&["assets/coffee.png", "-m", "resnet34", "--weights", weights])
        .assert()
        .code(2)
        .stderr(
            contains("does not fit resnet34")
                .and(contains("missing, first layer1.2.bn1.bias"))
                .and(contains("looks like resnet18")),
        );
}

#[test]
fn random_weights_follow_the_seed() {
    let run = |seed: &str| {
        let arguments = [
            "assets/coffee.png",
            "-m",
            "resnet18",
            "--weights",
            "none",
            "--seed",
            seed,
            "--logits",
        ];
        records(&mut classify(&arguments)).remove(0)
    };
    assert_eq!(run("1"), run("1"));
    assert_ne!(run("1")["logits"], run("2")["logits"]);
}

#[test]
fn colors_are_for_terminals_or_on_demand() {
    let ansi = || contains("\u{1b}[");
    classify(&["assets/coffee.png"])
        .assert()
        .stdout(ansi().not());
    classify(&["assets/coffee.png", "--color", "always"])
        .assert()
        .stdout(ansi());
    classify(&["assets/coffee.png", "--color", "never"])
        .assert()
        .stdout(ansi().not());
}

#[test]
fn verbose_says_what_is_done_and_quiet_does_not() {
    classify(&["assets/coffee.png", "-v"])
        .assert()
        .stderr(contains("mobilenet_v2.tv").and(contains("1 done in")));
    classify(&["assets/coffee.png", "-q"]).assert().stderr("");
}

#[test]
fn networks_are_listed_and_drawn() {
    sconce().arg("models").assert().success().stdout(
        contains("11.69 M     1.814    224")
            .and(contains("vit_b_16"))
            .and(contains("tv (embedded)")),
    );
    let output = sconce()
        .args(["models", "--format", "json"])
        .output()
        .unwrap();
    let models: Value = serde_json::from_slice(&output.stdout).unwrap();
    for model in models.as_array().unwrap() {
        // The layers' sums are those of the list.
        let name = model["name"].as_str().unwrap();
        let layers = sconce()
            .args(["models", name, "--format", "json"])
            .output()
            .unwrap();
        let layers: Vec<Value> = serde_json::from_slice(&layers.stdout).unwrap();
        for key in ["parameters", "macs"] {
            let sum: u64 = layers.iter().map(|l| l[key].as_u64().unwrap()).sum();
            assert_eq!(model[key], sum, "{name}");
        }
    }
    let million = |macs: &Value| format!("{:.3} million", macs.as_f64().unwrap() / 1e6);
    let resnet18 = &models[0];
    sconce()
        .args(["models", "resnet18"])
        .assert()
        .success()
        .stdout(
            contains("layer4.1.add")
                .and(contains("512 x 7 x 7"))
                .and(contains(format!("{} parameters", resnet18["parameters"])))
                .and(contains(million(&resnet18["macs"]))),
        );
    sconce()
        .args(["models", "resnet8"])
        .assert()
        .code(2)
        .stderr(contains("no network named resnet8"));
}

#[test]
fn bench_times_any_network_without_weights() {
    let arguments = [
        "bench",
        "-m",
        "resnet18",
        "-b",
        "2",
        "--image-size",
        "64",
        "-j",
        "2",
    ];
    let run = |more: &[&str]| {
        let mut command = sconce();
        command
            .args(arguments)
            .args(["--seconds", "0.05", "--device", "cpu"])
            .args(more);
        command.assert().success().get_output().stdout.clone()
    };
    let report: Value = serde_json::from_slice(&run(&["--format", "json"])).unwrap();
    for (key, expected) in [("batch_size", 2), ("threads", 2)] {
        assert_eq!(report[key], expected);
    }
    assert_eq!(
        (&report["device"], &report["train"]),
        (&"cpu".into(), &false.into())
    );
    let number = |key: &str| report[key].as_f64().unwrap();
    assert!(number("min_ms") > 0.0 && number("min_ms") <= number("median_ms"));
    let rate = 2.0 / number("median_ms") * 1e3;
    assert!((number("images_per_second") / rate - 1.0).abs() < 1e-6);
    assert!(number("peak_memory_mb") > 10.0);
    let text = String::from_utf8(run(&["--exact"])).unwrap();
    assert!(
        text.starts_with("resnet18.tv, 64 x 64, batch 2, 2 threads: median "),
        "{text}"
    );
    sconce()
        .args(["bench", "--image-size", "8", "-m", "vit_b_16"])
        .assert()
        .code(2)
        .stderr(contains("layer conv_proj"));
}

#[test]
fn help_has_examples_and_shells_get_completions() {
    sconce()
        .arg("--help")
        .assert()
        .success()
        .stdout(contains("Examples:"));
    for command in ["classify", "models", "bench", "completions"] {
        let mut help = sconce();
        help.args([command, "--help"])
            .assert()
            .success()
            .stdout(contains("Example"));
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        sconce()
            .args(["completions", shell])
            .assert()
            .success()
            .stdout(contains("classify"));
    }
    sconce()
        .arg("--version")
        .assert()
        .success()
        .stdout(contains(env!("CARGO_PKG_VERSION")));
    sconce().assert().code(2);
}

#[test]
fn broken_and_foreign_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(root.path().join(name), bytes).unwrap();
    let jpeg = fs::read(repository("tests/images/444.jpg")).unwrap();
    let png = fs::read(repository("tests/images/rgb.png")).unwrap();
    write("empty.jpg", b"");
    write("text.jpg", b"not an image at all");
    write("short.jpg", &jpeg[..jpeg.len() / 2]);
    write("header.jpg", &jpeg[..20]);
    write("short.png", &png[..png.len() / 2]);
    write("photo.avif", b"\0\0\0\x20ftypavif\0\0\0\0");
    write("photo.heic", b"\0\0\0\x20ftypheic\0\0\0\0");
    write("huge.png", &enormous_png());
    let mut errors = std::collections::BTreeMap::new();
    for record in records(&mut classify(&[root.path().to_str().unwrap()])) {
        let path = Path::new(record["path"].as_str().unwrap());
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        errors.insert(name, record["error"].as_str().unwrap().to_string());
    }
    for (name, message) in [
        ("empty.jpg", "an empty file"),
        ("text.jpg", "not an image"),
        ("short.jpg", "cut short"),
        ("header.jpg", ""),
        ("short.png", ""),
        ("photo.avif", "AVIF images are not read (convert it"),
        ("photo.heic", "HEIC images are not read (convert it"),
        (
            "huge.png",
            "60000 x 60000 pixels are more than 100000000 (raise --max-pixels",
        ),
    ] {
        let error = errors.remove(name).unwrap();
        assert!(
            error.contains(message) && error.lines().count() == 1,
            "{name}: {error}"
        );
    }
    assert!(errors.is_empty());
    classify(&["assets/coffee.png", "--max-pixels", "1000"])
        .assert()
        .code(2)
        .stderr(contains("600 x 400 pixels are more than 1000"));
}

/// A PNG whose header claims 60,000 x 60,000 pixels.
fn enormous_png() -> Vec<u8> {
    let mut bytes = fs::read(repository("tests/images/grey.png")).unwrap();
    bytes[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    // The header's checksum, so that only the claim is wrong.
    let crc = bytes[12..29].iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    });
    bytes[29..33].copy_from_slice(&(!crc).to_be_bytes());
    bytes
}

#[test]
#[cfg(target_os = "linux")]
fn a_folder_of_500_images_some_of_them_bad_is_done_in_bounded_memory() {
    use std::os::unix::fs::PermissionsExt;

    let root = tempfile::tempdir().unwrap();
    let images = root.path().join("images");
    fs::create_dir_all(images.join("locked")).unwrap();
    for index in 0..495 {
        let name = images.join(format!("{index:03}.jpg"));
        if index < 12 {
            // Large photographs, to fill the memory that there is.
            let pixels = photo("large", 3000, 4000, 3);
            let large = image::RgbImage::from_raw(4000, 3000, pixels).unwrap();
            large.save(name).unwrap();
        } else {
            fs::copy(repository("tests/images/420.jpg"), name).unwrap();
        }
    }
    let jpeg = fs::read(repository("tests/images/444.jpg")).unwrap();
    fs::write(images.join("x-text.jpg"), "hello").unwrap();
    fs::write(images.join("x-short.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    fs::write(images.join("x-empty.jpg"), "").unwrap();
    fs::write(images.join("x-huge.png"), enormous_png()).unwrap();
    fs::write(images.join("locked/inside.jpg"), &jpeg).unwrap();
    fs::set_permissions(images.join("locked"), fs::Permissions::from_mode(0o000)).unwrap();

    // Permissions do not hold root back: run as nobody then.
    let root_user = Process::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    let binary = root.path().join("sconce");
    fs::copy(env!("CARGO_BIN_EXE_sconce"), &binary).unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = if root_user {
        let mut command = Process::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&binary);
        command
    } else {
        Process::new(&binary)
    };
    let mut child = command
        .args(["classify", "--format", "jsonl", "-j", "2"])
        .arg(&images)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut output = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    });
    let mut errors = child.stderr.take().unwrap();
    let error_reader = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).unwrap();
        text
    });
    let (mut peak_kib, started) = (0, Instant::now());
    let exit = loop {
        // The high-water mark, as the kernel keeps it.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mark = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = mark.and_then(|m| m.split_whitespace().next()?.parse::<u64>().ok());
        peak_kib = peak_kib.max(kib.unwrap_or(0));
        if let Some(exit) = child.try_wait().unwrap() {
            break exit;
        }
        assert!(started.elapsed() < Duration::from_secs(300), "stalled");
        std::thread::sleep(Duration::from_millis(2));
    };
    fs::set_permissions(images.join("locked"), fs::Permissions::from_mode(0o755)).unwrap();
    let (output, errors) = (reader.join().unwrap(), error_reader.join().unwrap());
    let records: Vec<Value> = output
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let good = records.iter().filter(|r| r["top"].is_array()).count();
    println!(
        "peak {} MiB in {:.1} s",
        peak_kib / 1024,
        started.elapsed().as_secs_f64()
    );
    assert_eq!(good, 495);
    for name in [
        "x-text.jpg",
        "x-short.jpg",
        "x-empty.jpg",
        "x-huge.png",
        "locked",
    ] {
        let naming = errors.lines().filter(|line| {
            line.starts_with("sconce: ") && line.contains(&format!("/images/{name}: "))
        });
        assert_eq!(naming.count(), 1, "{name}: {errors}");
    }
    assert_eq!(errors.lines().count(), 5);
    assert_eq!(exit.code(), Some(1));
    assert!(peak_kib > 10_000 && peak_kib < 600 * 1024, "{peak_kib} KiB");
}
