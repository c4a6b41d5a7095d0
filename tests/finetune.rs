//! `sconce finetune`, as people use it: data in every form, runs that are cut off, and what they
//! leave behind.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::repository;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sconce::exec::params::TensorSource;
use sconce::weights::Checkpoint;
use serde_json::Value;
use tempfile::TempDir;

fn sconce() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    command.env("HF_HUB_OFFLINE", "1");
    command
}

/// A folder with pieces of the photos, ten of each, in folders named after them.
fn photos() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for class in ["cat", "coffee", "photographer"] {
        let photo = image::open(repository("assets").join(format!("{class}.png"))).unwrap();
        fs::create_dir(root.path().join(class)).unwrap();
        for i in 0..10 {
            let (x, y) = (
                rng.random_range(0..photo.width() - 120),
                rng.random_range(0..photo.height() - 120),
            );
            let piece = photo.crop_imm(x, y, 120, 120).to_rgb8();
            let path = root.path().join(class).join(format!("{i}.png"));
            piece.save(path).unwrap();
        }
    }
    root
}

/// Arguments of a run from scratch that takes a second or two, with a bit of everything.
fn small(data: &Path, out: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let options = "-m shufflenet_v2_x0_5 --from-scratch --image-size 32 --epochs 3 -b 4 \
        --accumulate 2 --ema=0.9 --augment trivial --color-jitter 0.3 --hue-jitter 0.1 \
        --random-erasing 0.3 --mixup 0.2 --cutmix 1 --label-smoothing 0.1 --clip-norm 1 \
        --class-weights auto -j 2";
    let mut all = vec!["finetune".into(), text(data), "-o".into(), text(out)];
    all.extend(options.split_whitespace().map(String::from));
    all
}

/// Arguments of a run that trains only the head of the network in the binary, with its dropout.
fn head(data: &Path, out: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let options = "--freeze backbone --image-size 64 --epochs 10 -b 4 --optimizer sgd --nesterov";
    let mut all = vec!["finetune".into(), text(data), "-o".into(), text(out)];
    all.extend(options.split_whitespace().map(String::from));
    all
}

/// Arguments of a run that fits a head first and then trains all of the network.
fn recipe(data: &Path, out: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let options = "--image-size 64 --epochs 3 -b 8 --ema=0.9 -j 2";
    let mut all = vec!["finetune".into(), text(data), "-o".into(), text(out)];
    all.extend(options.split_whitespace().map(String::from));
    all
}

fn output(arguments: &[String]) -> Output {
    sconce().args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs to the end.
fn done(arguments: &[String]) -> Output {
    let output = output(arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

/// Runs into an error, and gives its last line.
fn refused(arguments: &[String]) -> String {
    let output = output(arguments);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let text = stderr(&output);
    text.lines().last().unwrap_or_default().to_string()
}

fn and(arguments: &[String], more: &[&str]) -> Vec<String> {
    let more = more.iter().map(|a| a.to_string());
    arguments.iter().cloned().chain(more).collect()
}

fn model(out: &Path) -> Vec<u8> {
    fs::read(out.join("model.safetensors")).unwrap()
}

/// The lines of metrics.jsonl, without what depends on the clock.
fn metrics(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for clock in ["seconds", "images_per_second"] {
            assert!(value[clock].as_f64().unwrap() >= 0.0);
            value[clock] = Value::Null;
        }
        value
    };
    text.lines().map(line).collect()
}

/// Kills a run at random moments and goes on with it each time, until it is through.
fn torture(arguments: &[String], undisturbed: &Path, disturbed: &Path, kills: usize, seed: u64) {
    // Long enough for all of them.
    let epochs = (2 * kills).to_string();
    let mut arguments = and(arguments, &["--checkpoint-every", "0"]);
    let at = arguments.iter().position(|a| a == "--epochs").unwrap();
    arguments[at + 1] = epochs;
    let began = Instant::now();
    done(&arguments);
    let share = began.elapsed().div_f64(kills as f64);
    let place = |a: &String| Path::new(a) == undisturbed;
    let at = arguments.iter().position(place).unwrap();
    arguments[at] = disturbed.to_str().unwrap().into();
    let again = |arguments: &[String]| {
        let resume = disturbed.join("last.checkpoint").exists();
        and(arguments, &[if resume { "--resume" } else { "--force" }])
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut killed = 0;
    while killed < kills {
        let mut child = quiet(&again(&arguments));
        std::thread::sleep(share.mul_f64(rng.random_range(0.1..1.2)));
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed += 1;
    }
    println!("killed {killed} times");
    assert!(killed > 0);
    done(&again(&arguments));
    assert!(model(undisturbed) == model(disturbed), "the models differ");
    assert_eq!(metrics(undisturbed), metrics(disturbed));
}

fn quiet(arguments: &[String]) -> Child {
    sconce()
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// How often the tests kill a run; more for a run by hand.
fn kills() -> usize {
    let given = std::env::var("SCONCE_TEST_KILLS");
    given.map_or(3, |text| text.parse().unwrap())
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let (whole, cut) = (runs.path().join("whole"), runs.path().join("cut"));
    torture(&small(data.path(), &whole), &whole, &cut, kills(), 1);
}

#[test]
fn a_killed_run_of_a_head_goes_on_to_the_same_bytes() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let (whole, cut) = (runs.path().join("whole"), runs.path().join("cut"));
    torture(&head(data.path(), &whole), &whole, &cut, kills(), 2);
}

#[test]
fn a_killed_run_of_the_recipe_goes_on_to_the_same_bytes() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let (whole, cut) = (runs.path().join("whole"), runs.path().join("cut"));
    torture(&recipe(data.path(), &whole), &whole, &cut, kills(), 3);
}

#[test]
fn first_the_head_then_all_of_the_network() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("run");
    let output = done(&and(&recipe(data.path(), &out), &["--format", "json"]));
    let notes = stderr(&output);
    assert!(
        notes.contains("for 24 images: first the head on the frozen network; then all of it"),
        "{notes}"
    );
    assert!(
        notes.contains("head fitted to 24 images and their mirror images")
            && notes.contains("5-fold cross-validation"),
        "{notes}"
    );
    let lines = metrics(&out);
    let epochs: Vec<u64> = lines.iter().map(|l| l["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [0, 1, 2, 3]);
    assert_eq!(lines[0]["learning_rate"], 0.0);
    for key in ["train_loss", "val_loss", "val_accuracy", "val_macro_f1"] {
        assert!(lines[0][key].is_number(), "{key}");
    }
    // What is kept is the best of all, the head alone included.
    let accuracy = |line: &Value| line["val_accuracy"].as_f64().unwrap();
    let best = lines.iter().map(accuracy).fold(0.0, f64::max);
    let text = String::from_utf8(output.stdout).unwrap();
    let summary: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(summary["val_accuracy"].as_f64().unwrap(), best);
    assert_eq!(
        accuracy(&lines[summary["best_epoch"].as_u64().unwrap() as usize]),
        best
    );
    // Norms stay as they came: statistics, weights and biases.
    let before = Checkpoint::open(&repository("weights/mobilenet_v2.safetensors")).unwrap();
    let after = Checkpoint::open(&out.join("last.checkpoint")).unwrap();
    let mut trained = 0;
    for name in before
        .names()
        .iter()
        .filter(|n| !n.starts_with("classifier"))
    {
        let kept = before.read(name).unwrap() == after.read(&format!("weights.{name}")).unwrap();
        let is_norm = before.shape(name).unwrap().len() == 1;
        assert_eq!(kept, is_norm, "{name}");
        trained += usize::from(!kept);
    }
    assert_eq!(trained, 52);
    let config = fs::read_to_string(out.join("config.toml")).unwrap();
    for line in ["freeze = \"auto\"", "head = \"fit\"", "norms = \"stored\""] {
        assert!(config.contains(line), "{config}");
    }
}

#[test]
fn a_frozen_backbone_needs_no_epochs() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        let out = runs.path().join(name);
        let text = |path: &Path| path.to_str().unwrap().to_string();
        let base = ["finetune", &text(data.path()), "-o", &text(&out)].map(String::from);
        let more = [&["--freeze", "backbone", "--image-size", "64"], more].concat();
        (done(&and(&base, &more)), out)
    };
    let (_, one) = run("one", &["-j", "1"]);
    let (output, three) = run("three", &["-j", "3", "--format", "json"]);
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["best_epoch"], 0);
    assert!(summary["val_accuracy"].as_f64().unwrap() > 0.8, "{summary}");
    assert_eq!(metrics(&one).len(), 1);
    assert!(model(&one) == model(&three), "another number of threads");
    // Through already.
    let again = ["finetune", "-o", one.to_str().unwrap(), "--resume"].map(String::from);
    done(&again);
    // Settings of steps are for those who want steps.
    let (_, steps) = run("steps", &["--epochs", "2"]);
    let epochs: Vec<Value> = metrics(&steps).iter().map(|l| l["epoch"].clone()).collect();
    assert_eq!(epochs, [1, 2]);
    let (_, both) = run("both", &["--head", "fit", "--epochs", "1"]);
    assert_eq!(metrics(&both).len(), 2);
}

#[test]
fn a_config_repeats_what_was_found_and_planned() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = |name: &str| runs.path().join(name);
    let mut arguments = recipe(data.path(), &out("first"));
    let epochs = arguments.iter().position(|a| a == "--epochs").unwrap();
    arguments.drain(epochs..epochs + 2);
    let began = Instant::now();
    let arguments = and(&arguments, &["--lr", "auto", "--time", "20s"]);
    let output = done(&arguments);
    let notes = stderr(&output);
    assert!(notes.contains("learning rate "), "{notes}");
    assert!(notes.contains("in 20 s: "), "{notes}");
    // Room for a machine that is busy with other tests.
    assert!(began.elapsed() < Duration::from_secs(40), "{notes}");
    let config = out("first").join("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let table: toml::Table = text.parse().unwrap();
    assert!(table["learning_rate"].as_float().unwrap() > 0.0);
    assert!(table["steps"].as_integer().is_some(), "{text}");
    // To go on with a run that is through changes nothing, whatever was found.
    done(&and(&arguments, &["--resume"]));
    let again = ["finetune", "--config", config.to_str().unwrap(), "-o"].map(String::from);
    done(&and(&again, &[out("second").to_str().unwrap(), "-j", "1"]));
    assert!(model(&out("first")) == model(&out("second")));
    assert_eq!(metrics(&out("first")), metrics(&out("second")));
    assert!(fs::read(&config).unwrap() == fs::read(out("second").join("config.toml")).unwrap());
}

#[test]
#[cfg(unix)]
fn an_interrupt_saves_and_says_so() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let (whole, cut) = (runs.path().join("whole"), runs.path().join("cut"));
    // Long enough to be interrupted.
    let long = |out: &Path| {
        let mut arguments = small(data.path(), out);
        let at = arguments.iter().position(|a| a == "--epochs").unwrap();
        arguments[at + 1] = "40".into();
        arguments
    };
    done(&long(&whole));
    let arguments = long(&cut);
    let child = sconce()
        .args(&arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !cut.join("last.checkpoint").exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(100));
    let kill = |signal: &str| {
        let id = child.id().to_string();
        Command::new("kill").args([signal, &id]).status().unwrap()
    };
    assert!(kill("-INT").success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
    // Within an epoch: only the interrupt has saved there.
    let saved = Checkpoint::open(&cut.join("last.checkpoint")).unwrap();
    let header: Value = serde_json::from_str(saved.description().unwrap()).unwrap();
    let progress = &header["training"]["progress"];
    assert!(progress["batch"].as_u64().unwrap() > 0 || progress["epoch"].as_u64().unwrap() > 1);
    // The folder alone is enough to go on, also with another number of threads.
    let out = cut.to_str().unwrap().to_string();
    let rest = ["finetune", "-o", &out, "--resume", "-j", "1"].map(String::from);
    done(&rest);
    assert!(model(&whole) == model(&cut), "the models differ");
    assert_eq!(metrics(&whole), metrics(&cut));
    assert!(
        fs::read(whole.join("config.toml")).unwrap() == fs::read(cut.join("config.toml")).unwrap()
    );
}

#[test]
fn the_same_settings_give_the_same_bytes() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = |name: &str| runs.path().join(name);
    let arguments = small(data.path(), &out("first"));
    done(&arguments);
    let config = out("first").join("config.toml");
    let again = |name: &str, more: &[&str]| {
        let (config, out) = (config.to_str().unwrap(), out(name));
        let base = ["finetune", "--config", config, "-o", out.to_str().unwrap()];
        let base: Vec<String> = base.map(String::from).into();
        done(&and(&base, more));
    };
    again("second", &["-j", "3"]);
    assert!(
        model(&out("first")) == model(&out("second")),
        "another number of threads"
    );
    again("third", &["--seed", "1"]);
    assert!(model(&out("first")) != model(&out("third")), "another seed");
}

/// As a full disk: files may not grow beyond a limit.
#[test]
#[cfg(unix)]
fn what_cannot_be_saved_leaves_the_last_good_checkpoint() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let (whole, cut) = (runs.path().join("whole"), runs.path().join("cut"));
    done(&small(data.path(), &whole));
    let arguments = small(data.path(), &cut);
    let mut child = quiet(&arguments);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !cut.join("last.checkpoint").exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let good = fs::read(cut.join("last.checkpoint")).unwrap();
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_sconce")])
        .args(and(&arguments, &["--resume"]))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(
        text.contains("is whole") && text.contains("--resume"),
        "{text}"
    );
    assert!(fs::read(cut.join("last.checkpoint")).unwrap() == good);
    let names: Vec<PathBuf> = fs::read_dir(&cut)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert!(
        !names
            .iter()
            .any(|n| n.ends_with(".last.checkpoint.partial")),
        "{names:?}"
    );
    done(&and(&arguments, &["--resume"]));
    assert!(model(&whole) == model(&cut), "the models differ");
}

#[test]
fn a_head_learns_and_classify_takes_the_model() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("run");
    let arguments = and(&head(data.path(), &out), &["--format", "json"]);
    let output = done(&arguments);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let summary: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(
        (&summary["classes"], &summary["train_images"]),
        (&3.into(), &24.into())
    );
    assert_eq!(summary["val_images"], 6);
    assert!(summary["val_accuracy"].as_f64().unwrap() > 0.8, "{summary}");
    for key in ["out", "model", "best_epoch", "val_macro_f1", "seconds"] {
        assert!(!summary[key].is_null(), "{key}");
    }
    let notes = stderr(&output);
    assert!(
        notes.contains("260 tensors loaded, 0 missing, 2 of another shape"),
        "{notes}"
    );
    assert!(notes.contains("classifier.1.weight"), "{notes}");
    let path = out.join("model.safetensors");
    let classify = |model: &Path| {
        let output = sconce()
            .args(["classify", "--format", "jsonl", "-m"])
            .args([model, &repository("assets/coffee.png")])
            .output()
            .unwrap();
        (output.status.code(), output)
    };
    let (code, output) = classify(&path);
    assert_eq!(code, Some(0), "{}", stderr(&output));
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(record["top"][0]["label"], "coffee");
    // The backbone is the one that the program has, to the last bit.
    let begun = Checkpoint::open(&repository("weights/mobilenet_v2.safetensors")).unwrap();
    let trained = Checkpoint::open(&path).unwrap();
    for name in trained.names() {
        let same = begun.shape(&name) == trained.shape(&name)
            && begun.read(&name).unwrap() == trained.read(&name).unwrap();
        assert_eq!(same, !name.starts_with("classifier."), "{name}");
    }
    // A file of tomorrow is refused, and so is a checkpoint.
    let bytes = fs::read(&path).unwrap();
    let text = String::from_utf8_lossy(&bytes[..4096]).into_owned();
    let version = r#"\"format_version\":1"#;
    let at = text.find(version).unwrap() + version.len() - 1;
    let mut tomorrow = bytes;
    tomorrow[at] = b'7';
    let other = runs.path().join("tomorrow.safetensors");
    fs::write(&other, tomorrow).unwrap();
    let (code, output) = classify(&other);
    assert_eq!(code, Some(2));
    assert!(
        stderr(&output).contains("format version 7"),
        "{}",
        stderr(&output)
    );
    let (code, output) = classify(&out.join("last.checkpoint"));
    assert_eq!(code, Some(2));
    assert!(
        stderr(&output).contains("checkpoint of training"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_folder_that_holds_a_run_is_refused_and_changes_are_too() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("run");
    let arguments = head(data.path(), &out);
    let error = refused(&and(&arguments, &["--resume"]));
    assert!(error.contains("last.checkpoint"), "{error}");
    done(&arguments);
    let first = model(&out);
    let error = refused(&arguments);
    assert!(
        error.contains("holds a run") && error.contains("--resume"),
        "{error}"
    );
    let error = refused(&and(&arguments, &["--resume", "--momentum", "0.5"]));
    assert!(error.contains("momentum is 0.5"), "{error}");
    let run = out.to_str().unwrap();
    let error = refused(&["finetune", run, "--resume"].map(String::from));
    let advice = format!("{run} is a run and no data (go on with -o {run} --resume)");
    assert!(error.contains(&advice), "{error}");
    // Through already: nothing changes.
    done(&and(&arguments, &["--resume"]));
    assert!(model(&out) == first);
    fs::remove_file(data.path().join("cat/3.png")).unwrap();
    let error = refused(&and(&arguments, &["--resume"]));
    assert!(
        error.contains("not those that the run was started with"),
        "{error}"
    );
    done(&and(&arguments, &["--force"]));
}

#[test]
fn frozen_stages_stay_as_they_are() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let begin = runs.path().join("begin.safetensors");
    common::write_formula(&begin, "shufflenet_v2_x0_5", 3);
    let run = |name: &str, more: &[&str]| {
        let out = runs.path().join(name);
        let options = "-m shufflenet_v2_x0_5 --image-size 32 --epochs 1 -b 8 --weights";
        let mut arguments = vec!["finetune".to_string(), data.path().to_str().unwrap().into()];
        arguments.extend(options.split_whitespace().map(String::from));
        arguments.push(begin.to_str().unwrap().into());
        arguments.extend(["-o".to_string(), out.to_str().unwrap().into()]);
        (done(&and(&arguments, more)), out)
    };
    let (_, out) = run("frozen", &["--freeze", "stage3"]);
    let before = Checkpoint::open(&begin).unwrap();
    let after = Checkpoint::open(&out.join("model.safetensors")).unwrap();
    for name in after.names() {
        let same = before.read(&name).unwrap() == after.read(&name).unwrap();
        let frozen = ["conv1.", "stage2.", "stage3."]
            .iter()
            .any(|s| name.starts_with(s));
        assert_eq!(same, frozen, "{name}");
    }
    // A head of the right size is kept, unless it is to be dropped.
    let (output, _) = run("kept", &["--freeze", "stage4"]);
    assert!(stderr(&output).contains("0 missing, 0 of another shape"));
    let (output, _) = run("reset", &["--freeze", "stage4", "--reset-head"]);
    assert!(
        stderr(&output).contains("fc.bias, fc.weight"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn mistakes_are_one_clear_error() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("run");
    let base = head(data.path(), &out);
    let cases: [(&[&str], &str); 8] = [
        (&["--lr", "0"], "--lr: expected a number above 0"),
        (&["--val-split", "1"], "--val-split: expected"),
        (&["--label-smoothing", "1"], "--label-smoothing: expected"),
        (&["--ema=2"], "--ema: expected"),
        (&["--mixup=-1"], "--mixup: expected"),
        (&["--hue-jitter", "0.6"], "--hue-jitter: expected 0 to 0.5"),
        (&["--lr", "1e36"], "--warmup"),
        (
            &["-m", "resnet18"],
            "not on this machine, and HF_HUB_OFFLINE is set",
        ),
    ];
    for (more, expected) in cases {
        let error = refused(&and(&base, &[more, &["--force"]].concat()));
        assert!(error.contains(expected), "{error}");
    }
    let text = |path: &Path| path.to_str().unwrap().to_string();
    let stage = [
        "finetune",
        &text(data.path()),
        "-o",
        &text(&out),
        "--freeze",
        "layer9",
    ];
    let error = refused(&and(&stage.map(String::from), &["--force"]));
    assert!(error.contains("features.17"), "{error}");
    // Another network's weights are no starting point.
    let other = runs.path().join("other.safetensors");
    common::write_formula(&other, "shufflenet_v2_x0_5", 3);
    let error = refused(&and(&base, &["--weights", &text(&other), "--force"]));
    assert!(error.contains("shufflenet_v2_x0_5"), "{error}");
    let config = runs.path().join("config.toml");
    fs::write(&config, "epoch = 3\ndata = \"x\"\n").unwrap();
    let arguments = ["finetune", "--config", &text(&config)].map(String::from);
    let error = refused(&arguments);
    assert!(
        error.contains("config.toml") && error.contains("epoch"),
        "{error}"
    );
}

#[test]
fn unreadable_images_are_named_once_and_left_out() {
    let data = photos();
    fs::write(data.path().join("cat/broken.png"), "no image").unwrap();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("run");
    let output = output(&small(data.path(), &out));
    // Some inputs failed, the others were done.
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = stderr(&output);
    assert_eq!(text.matches("broken.png").count(), 1, "{text}");
    assert!(text.contains("left out as unreadable: 1"), "{text}");
    for class in ["cat", "coffee", "photographer"] {
        for entry in fs::read_dir(data.path().join(class)).unwrap() {
            fs::write(entry.unwrap().path(), "no image").unwrap();
        }
    }
    let error = refused(&and(&small(data.path(), &out), &["--force"]));
    assert!(
        error.contains("none of the images could be read"),
        "{error}"
    );
}

#[test]
fn lists_and_digits_are_data_too() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let list = data.path().join("list.csv");
    let mut text = String::from("path,label,split\n");
    for class in ["cat", "coffee"] {
        for i in 0..6 {
            let split = if i < 4 { "train" } else { "val" };
            text += &format!("{class}/{i}.png,a {class},{split}\n");
        }
    }
    fs::write(&list, text).unwrap();
    let json = |arguments: &[String]| -> Value {
        let output = done(&and(arguments, &["--format", "json"]));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let summary = json(&head(&list, &runs.path().join("list")));
    assert_eq!(
        (&summary["train_images"], &summary["val_images"]),
        (&8.into(), &4.into())
    );

    // Digits: a bright square whose place is the class.
    let digits = tempfile::tempdir().unwrap();
    for (prefix, count) in [("train", 40u32), ("t10k", 20)] {
        let mut images = vec![0, 0, 8, 3];
        images.extend([count, 28, 28].iter().flat_map(|n| n.to_be_bytes()));
        let mut labels = vec![0, 0, 8, 1];
        labels.extend(count.to_be_bytes());
        for i in 0..count {
            let digit = (i % 10) as usize;
            labels.push(digit as u8);
            let (left, top) = (digit % 5 * 5, digit / 5 * 14);
            images.extend((0..784).map(|p| {
                let (x, y) = (p % 28, p / 28);
                let inside = (left..left + 5).contains(&x) && (top..top + 9).contains(&y);
                if inside { 255u8 } else { 0 }
            }));
        }
        let write = |kind: &str, bytes: &[u8]| {
            fs::write(digits.path().join(format!("{prefix}-{kind}-ubyte")), bytes).unwrap();
        };
        write("images-idx3", &images);
        write("labels-idx1", &labels);
    }
    let out = runs.path().join("digits");
    let name = format!("mnist:{}", digits.path().display());
    let mut arguments = small(Path::new(&name), &out);
    let light = arguments.iter().position(|a| a == "--augment").unwrap();
    arguments.drain(light..light + 2);
    let summary = json(&arguments);
    assert_eq!(
        (&summary["classes"], &summary["train_images"]),
        (&10.into(), &40.into())
    );
    assert_eq!(summary["val_images"], 20);
    let config = fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.contains("augment = \"none\""), "{config}");
}
