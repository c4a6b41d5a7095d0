//! `sconce evaluate`: its figures are scikit-learn's, its temperature scipy's.
#![cfg(feature = "embedded")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{golden, repository, uniform};
use sconce::train::{Evaluation, best_temperature};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    formula: Figures,
    network: Network,
}

#[derive(Deserialize)]
struct Network {
    side: u32,
    /// Photo, left, top, class.
    pieces: Vec<(String, u32, u32, usize)>,
    #[serde(flatten)]
    figures: Figures,
}

#[derive(Deserialize)]
struct Figures {
    images: u64,
    accuracy: f64,
    top5: f64,
    macro_f1: f64,
    loss: f64,
    calibration_error: f64,
    temperature: f64,
    loss_calibrated: f64,
    calibration_error_calibrated: f64,
    /// Precision, recall, specificity, F1, support of the classes that are met.
    classes: BTreeMap<String, [f64; 5]>,
    /// True class, named class, images; where there are any.
    confusion: Vec<(usize, usize, u64)>,
}

fn figures() -> Golden {
    serde_json::from_slice(&golden("evaluation.json")).unwrap()
}

fn close(found: f64, expected: f64, tolerance: f64, what: &str) {
    assert!(
        (found - expected).abs() <= tolerance,
        "{what}: {found} for {expected}"
    );
}

#[test]
fn figures_on_predictions_by_formula_are_scikit_learns() {
    const CLASSES: usize = 7;
    let expected = figures().formula;
    let images = expected.images as usize;
    let labels = uniform("labels", images).map(|v| match ((v + 1.0) / 2.0 * 7.0) as usize {
        2 => 3,
        label => label,
    });
    let labels: Vec<usize> = labels.collect();
    let logits = uniform("predictions", images * CLASSES).enumerate();
    let logits = logits.map(|(i, v)| match i % CLASSES {
        5 => -9.0,
        class if class == labels[i / CLASSES] => 6.0 * v + 4.0,
        _ => 6.0 * v,
    });
    let logits: Vec<f32> = logits.collect();
    let samples: Vec<usize> = (0..images).collect();
    let evaluate = |temperature: f64| {
        let mut evaluation = Evaluation::new(CLASSES, temperature);
        // In batches that do not divide the images.
        let batches = labels.chunks(64).zip(samples.chunks(64));
        for (logits, (labels, samples)) in logits.chunks(64 * CLASSES).zip(batches) {
            evaluation.add(logits, labels, samples);
        }
        evaluation
    };
    let found = evaluate(1.0);
    assert_eq!(found.images(), expected.images);
    close(found.accuracy(), expected.accuracy, 1e-12, "accuracy");
    close(found.top5(), expected.top5, 1e-12, "top-5");
    close(found.macro_f1(), expected.macro_f1, 1e-12, "macro-F1");
    close(found.loss(), expected.loss, 1e-6, "loss");
    let error = found.reliability().error();
    close(error, expected.calibration_error, 1e-7, "calibration error");
    for (class, found) in found.classes().iter().enumerate() {
        let expected = expected.classes.get(&class.to_string());
        let expected = expected.copied().unwrap_or([0.0, 0.0, 1.0, 0.0, 0.0]);
        let found = [
            found.precision,
            found.recall,
            found.specificity,
            found.f1,
            found.support as f64,
        ];
        for (found, expected) in found.into_iter().zip(expected) {
            close(found, expected, 1e-12, &format!("class {class}"));
        }
    }
    let mut matrix = vec![vec![0; CLASSES]; CLASSES];
    for (label, named, count) in expected.confusion {
        matrix[label][named] = count;
    }
    assert_eq!(found.confusion().collect::<Vec<_>>(), matrix);
    let temperature = best_temperature(&logits, &labels).unwrap();
    close(temperature, expected.temperature, 1e-6, "temperature");
    let found = evaluate(temperature);
    close(found.loss(), expected.loss_calibrated, 1e-6, "loss");
    let error = found.reliability().error();
    close(
        error,
        expected.calibration_error_calibrated,
        1e-6,
        "calibration error",
    );
}

fn evaluate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sconce"))
        .arg("evaluate")
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(output)))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The pieces of photos that the golden is about, in a folder for each class.
fn pieces(network: &Network, class_folder: impl Fn(usize) -> String) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (index, (photo, x, y, label)) in network.pieces.iter().enumerate() {
        let path = repository("assets").join(format!("{photo}.png"));
        let photo = image::open(path).unwrap().to_rgb8();
        let piece =
            image::imageops::crop_imm(&photo, *x, *y, network.side, network.side).to_image();
        let folder = root.path().join(class_folder(*label));
        fs::create_dir_all(&folder).unwrap();
        piece.save(folder.join(format!("{index}.png"))).unwrap();
    }
    root
}

fn wordnet_id(class: usize) -> String {
    let ids = fs::read_to_string(repository("assets/imagenet_wordnet_ids.txt")).unwrap();
    ids.lines().nth(class).unwrap().to_string()
}

#[test]
fn the_binarys_figures_are_scikit_learns_on_torchvisions_predictions() {
    let network = figures().network;
    let data = pieces(&network, wordnet_id);
    let output = evaluate(&[text(data.path()), "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let found = json(&output);
    let expected = &network.figures;
    let number = |key: &str| found[key].as_f64().unwrap();
    assert_eq!(found["images"], expected.images);
    assert_eq!(found["unreadable"], 0);
    for (key, expected, tolerance) in [
        ("accuracy", expected.accuracy, 1e-12),
        ("top5", expected.top5, 1e-12),
        ("macro_f1", expected.macro_f1, 1e-12),
        ("loss", expected.loss, 1e-4),
        ("calibration_error", expected.calibration_error, 1e-4),
        ("temperature", 1.0, 0.0),
    ] {
        close(number(key), expected, tolerance, key);
    }
    let (classes, confusion) = (&found["classes"], &found["confusion"]);
    assert_eq!(classes.as_array().unwrap().len(), 1000);
    for (class, row) in &expected.classes {
        let found = &classes[class.parse::<usize>().unwrap()];
        let keys = ["precision", "recall", "specificity", "f1", "support"];
        for (key, expected) in keys.iter().zip(row) {
            let what = format!("{key} of {}", found["label"]);
            close(found[key].as_f64().unwrap(), *expected, 1e-12, &what);
        }
    }
    assert_eq!(classes[281]["label"], "tabby");
    let mut filled = Vec::new();
    for (label, row) in confusion.as_array().unwrap().iter().enumerate() {
        let row = row.as_array().unwrap();
        assert_eq!(row.len(), 1000);
        let counts = row.iter().map(|count| count.as_u64().unwrap()).enumerate();
        filled.extend(
            counts
                .filter(|&(_, n)| n > 0)
                .map(|(named, n)| (label, named, n)),
        );
    }
    assert_eq!(filled, expected.confusion);
    // Labels and indices say the same as WordNet ids.
    let labels = fs::read_to_string(repository("assets/imagenet_labels.txt")).unwrap();
    let labels: Vec<&str> = labels.lines().collect();
    let by_label = pieces(&network, |class| labels[class].replace(' ', "_"));
    let by_index = pieces(&network, |class| class.to_string());
    for data in [by_label, by_index] {
        let output = evaluate(&[text(data.path()), "--format", "json"]);
        let again = json(&output);
        assert_eq!(again["confusion"], found["confusion"]);
        assert_eq!(again["classes"], found["classes"]);
    }
}

#[test]
fn calibration_is_written_into_the_model_file_and_heeded() {
    let network = figures().network;
    let data = pieces(&network, |class| class.to_string());
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    fs::copy(repository("weights/mobilenet_v2.safetensors"), &model).unwrap();
    let before = fs::read(&model).unwrap();
    let run = |more: &[&str]| {
        let arguments = [text(data.path()), "-m", text(&model), "--format", "json"];
        let output = evaluate(&[&arguments, more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        json(&output)
    };
    let plain = run(&[]);
    let found = run(&["--calibrate"]);
    let expected = &network.figures;
    let calibration = &found["calibration"];
    let number = |value: &Value| value.as_f64().unwrap();
    close(
        number(&calibration["temperature_before"]),
        1.0,
        0.0,
        "before",
    );
    close(
        number(&calibration["temperature"]),
        expected.temperature,
        1e-3,
        "temperature",
    );
    assert_eq!(calibration["loss_before"], plain["loss"]);
    assert_eq!(
        calibration["calibration_error_before"],
        plain["calibration_error"]
    );
    close(
        number(&calibration["loss"]),
        expected.loss_calibrated,
        1e-4,
        "loss",
    );
    close(
        number(&calibration["calibration_error"]),
        expected.calibration_error_calibrated,
        1e-3,
        "calibration error",
    );
    assert_eq!(calibration["temperature"], found["temperature"]);
    assert_eq!(found["confusion"], plain["confusion"]);
    // From now on the file's temperature counts, for evaluate and for classify.
    let after = run(&[]);
    assert_eq!(after["temperature"], found["temperature"]);
    assert_eq!(after["loss"], found["loss"]);
    assert!(after.get("calibration").is_none());
    assert_eq!(run(&["-T", "1"])["loss"], plain["loss"]);
    let classify = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_sconce"))
            .args(["classify", "--format", "jsonl", "-m", text(&model)])
            .arg(repository("assets/cat.png"))
            .args(more)
            .output()
            .unwrap();
        json(&output)["top"][0]["probability"].clone()
    };
    let temperature = found["temperature"].to_string();
    assert_eq!(classify(&[]), classify(&["-T", &temperature]));
    assert_ne!(classify(&[]), classify(&["-T", "1"]));
    // All the rest is there as it was.
    let bytes = fs::read(&model).unwrap();
    assert!(bytes != before);
    let values = |bytes: &[u8]| {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let mut tensors: Vec<_> = file
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                (
                    name,
                    view.dtype(),
                    view.shape().to_vec(),
                    view.data().to_vec(),
                )
            })
            .collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors
    };
    assert!(values(&bytes) == values(&before));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// As a full disk: files may not grow beyond a limit.
#[test]
#[cfg(unix)]
fn a_temperature_that_cannot_be_written_leaves_the_model_whole() {
    let network = figures().network;
    let data = pieces(&network, |class| class.to_string());
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    fs::copy(repository("weights/mobilenet_v2.safetensors"), &model).unwrap();
    let before = fs::read(&model).unwrap();
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_sconce")])
        .args(["evaluate", text(data.path()), "-m", text(&model)])
        .arg("--calibrate")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("is as it was"),
        "{}",
        stderr(&output)
    );
    assert!(fs::read(&model).unwrap() == before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn mistakes_are_listed_and_unreadable_images_named_and_counted() {
    let network = figures().network;
    let data = pieces(&network, wordnet_id);
    fs::write(data.path().join(wordnet_id(281)).join("broken.png"), "x").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("new/mistakes.csv");
    let arguments = [text(data.path()), "--mistakes", text(&csv)];
    let output = evaluate(&[&arguments[..], &["--format", "json"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches("broken.png").count(), 1);
    let found = json(&output);
    assert_eq!(found["unreadable"], 1);
    assert_eq!(found["images"], network.figures.images);
    let mut rows = csv::Reader::from_path(&csv).unwrap();
    assert_eq!(
        rows.headers().unwrap(),
        vec![
            "path",
            "label",
            "predicted",
            "probability",
            "label_probability"
        ]
    );
    let rows: Vec<csv::StringRecord> = rows.records().map(Result::unwrap).collect();
    let wrong = found["images"].as_f64().unwrap() * (1.0 - found["accuracy"].as_f64().unwrap());
    assert_eq!(rows.len(), wrong.round() as usize);
    let probability = |row: &csv::StringRecord, at: usize| row[at].parse::<f64>().unwrap();
    assert!(rows.is_sorted_by_key(|row| probability(row, 4)));
    for row in &rows {
        assert!(Path::new(&row[0]).is_file());
        assert!(row[1] != row[2] && probability(row, 3) >= probability(row, 4));
    }
    // For people: the same, in words.
    let output = evaluate(&arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("36 images of 8 classes, 1 more could not be read\n"),
        "{text}"
    );
    for part in [
        "accuracy",
        "macro-F1",
        "tabby",
        "most often confused",
        "worst mistakes",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(text.contains(&rows[0][0]), "{text}");
}

#[test]
fn parts_of_data_are_chosen_as_finetune_would() {
    let network = figures().network;
    let heap = pieces(&network, |class| class.to_string());
    let images = |arguments: &[&str]| {
        let output = evaluate(&[arguments, &["--format", "json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        json(&output)["images"].as_u64().unwrap()
    };
    let at = text(heap.path());
    assert_eq!(images(&[at]), 36);
    let (train, val) = (
        images(&[at, "--split", "train"]),
        images(&[at, "--split", "val"]),
    );
    assert_eq!(train + val, 36);
    assert_eq!(images(&[at, "--split", "val", "--val-split", "0.5"]), 18);
    let output = evaluate(&[at, "--split", "test"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no images for --split test"));
    // Divided data: to validate on, unless something else is asked for.
    let divided = tempfile::tempdir().unwrap();
    for (part, class) in [("train", "281"), ("val", "967"), ("test", "872")] {
        let folder = divided.path().join(part);
        fs::create_dir(&folder).unwrap();
        fs::rename(heap.path().join(class), folder.join(class)).unwrap();
    }
    let at = text(divided.path());
    assert_eq!(images(&[at]), 4);
    assert_eq!(images(&[at, "--split", "test"]), 6);
    assert_eq!(images(&[at, "--split", "all"]), 14);
    let list = divided.path().join("list.csv");
    let rows = "path,label,split\nval/967/12.png,espresso,val\nval/967/15.png,espresso,train\n";
    fs::write(&list, rows).unwrap();
    assert_eq!(images(&[text(&list)]), 1);
    assert_eq!(images(&[text(&list), "--split", "all"]), 2);
}

#[test]
fn what_cannot_be_evaluated_is_one_clear_error() {
    let network = figures().network;
    let data = pieces(&network, |class| format!("thing {class}"));
    let at = text(data.path());
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain.safetensors");
    fs::write(&plain, "x").unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&[at], "class thing 281: is no label of the network"),
        (&["nowhere"], "no such folder or file"),
        (
            &[at, "--calibrate"],
            "no model file to write the temperature",
        ),
        (&[at, "-m", text(&plain)], "plain.safetensors"),
        (&[at, "--val-split", "1"], "--val-split"),
        (&[at, "--calibrate", "-T", "2"], "--temperature"),
    ];
    for (arguments, expected) in cases {
        let output = evaluate(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let error = stderr(&output);
        assert!(
            error.starts_with("sconce: ") && error.contains(expected),
            "{error}"
        );
    }
    // One folder with another kind of name.
    fs::rename(data.path().join("thing 281"), data.path().join("tabby")).unwrap();
    let error = stderr(&evaluate(&[at]));
    assert!(
        error.contains("class thing ") && error.contains("as class tabby is"),
        "{error}"
    );
    // Nothing that could be read.
    let broken = tempfile::tempdir().unwrap();
    fs::create_dir(broken.path().join("tabby")).unwrap();
    fs::write(broken.path().join("tabby/1.png"), "x").unwrap();
    assert_eq!(evaluate(&[text(broken.path())]).status.code(), Some(2));
}
