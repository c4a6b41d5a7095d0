//! What people look at: the page of a run and of an evaluation, the confusion matrix as a picture,
//! TensorBoard's events.
#![cfg(feature = "embedded")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::repository;
use serde_json::Value;
use tempfile::TempDir;

fn sconce(arguments: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_sconce"))
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    output
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Pieces of the photos, eight of each; one class has a name that HTML would read as a tag.
fn photos() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    for (photo, class) in [
        ("cat", "cat <b>&"),
        ("coffee", "coffee"),
        ("photographer", "photographer"),
    ] {
        let image = image::open(repository("assets").join(format!("{photo}.png"))).unwrap();
        fs::create_dir(root.path().join(class)).unwrap();
        for i in 0..8 {
            let piece = image.crop_imm(i * 30, i * 20, 120, 120).to_rgb8();
            let path = root.path().join(class).join(format!("{i}.png"));
            piece.save(path).unwrap();
        }
    }
    root
}

/// Arguments of a run of a head, with so many epochs.
fn finetune(data: &Path, out: &Path, more: &[&str]) {
    let options = "--freeze backbone --image-size 64 -b 4 --optimizer sgd --lr 0.01";
    let mut arguments = vec!["finetune", text(data), "-o", text(out)];
    arguments.extend(options.split_whitespace());
    arguments.extend(more);
    sconce(&arguments);
}

/// A page that needs nothing from elsewhere and says what it should.
fn check_page(html: &str, sections: &[&str]) {
    assert!(html.starts_with("<!DOCTYPE html>"));
    for outside in [
        "<script",
        "http:",
        "https:",
        "url(",
        "@import",
        "<link rel=\"style",
    ] {
        assert!(!html.contains(outside), "{outside}");
    }
    for attribute in ["src=\"", "href=\""] {
        let values = html.split(attribute).skip(1);
        for value in values {
            assert!(value.starts_with("data:"), "{}", &value[..60]);
        }
    }
    for section in sections {
        assert!(html.contains(&format!("<h2>{section}</h2>")), "{section}");
    }
    // Tables and figures are closed.
    for tag in ["section", "table", "figure", "svg", "div"] {
        let opened = html.matches(&format!("<{tag}")).count();
        assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

fn percent(value: &Value) -> String {
    format!("{:.1} %", 100.0 * value.as_f64().unwrap())
}

/// The figures of evaluate are on the page.
fn check_figures(html: &str, judged: &Value) {
    for key in ["accuracy", "macro_f1", "calibration_error"] {
        let tile = format!("<b>{}</b>", percent(&judged[key]));
        assert!(html.contains(&tile), "{key}: {tile}");
    }
    let loss = format!("<b>{:.4}</b>", judged["loss"].as_f64().unwrap());
    assert!(html.contains(&loss), "{loss}");
    for class in judged["classes"].as_array().unwrap() {
        if class["support"] == 0 {
            continue;
        }
        let label = class["label"].as_str().unwrap();
        let label = label
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
            .replace('"', "&quot;");
        let cells: Vec<String> = [
            label,
            class["support"].to_string(),
            percent(&class["precision"]),
            percent(&class["recall"]),
            percent(&class["specificity"]),
        ]
        .iter()
        .map(|cell| format!("<td>{cell}</td>"))
        .collect();
        assert!(html.contains(&cells.join("")), "{cells:?}");
    }
}

fn events(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| text(path).contains("events.out.tfevents."))
        .collect();
    files.sort();
    files
}

/// A field of a message: its number and what it holds.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (&byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            break;
        }
    }
    value
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            kind => {
                let length = match kind {
                    1 => 8,
                    5 => 4,
                    2 => varint(&mut bytes) as usize,
                    other => panic!("wire type {other}"),
                };
                let (content, rest) = bytes.split_at(length);
                bytes = rest;
                Field::Bytes(content)
            }
        };
        found.push((key >> 3, field));
    }
    found
}

/// Scalars by tag and step, and the tags of everything else.
fn read_events(files: &[PathBuf]) -> (BTreeMap<(String, u64), f32>, Vec<String>) {
    let (mut scalars, mut others) = (BTreeMap::new(), Vec::new());
    for file in files {
        let bytes = fs::read(file).unwrap();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let event = fields(&rest[12..12 + length]);
            rest = &rest[16 + length..];
            let step = event.iter().find_map(|field| match field {
                (2, Field::Number(step)) => Some(*step),
                _ => None,
            });
            let summaries = event.iter().filter_map(|field| match field {
                (5, Field::Bytes(summary)) => Some(fields(summary)),
                _ => None,
            });
            for (_, value) in summaries.flatten() {
                let Field::Bytes(value) = value else { panic!() };
                let value = fields(value);
                let tag = value.iter().find_map(|field| match field {
                    (1, Field::Bytes(tag)) => Some(String::from_utf8(tag.to_vec()).unwrap()),
                    _ => None,
                });
                let number = value.iter().find_map(|field| match field {
                    (2, Field::Bytes(b)) => Some(f32::from_le_bytes((*b).try_into().unwrap())),
                    _ => None,
                });
                match number {
                    Some(number) => {
                        let key = (tag.unwrap(), step.unwrap());
                        assert!(scalars.insert(key, number).is_none(), "told twice");
                    }
                    None => others.push(tag.unwrap()),
                }
            }
        }
    }
    (scalars, others)
}

fn check_events(out: &Path) {
    let (scalars, others) = read_events(&events(out));
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let mut count = 0;
    for line in metrics.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let step = line["epoch"].as_u64().unwrap();
        for (tag, key) in [
            ("loss/train", "train_loss"),
            ("loss/val", "val_loss"),
            ("accuracy/train", "train_accuracy"),
            ("accuracy/val", "val_accuracy"),
            ("accuracy/val_top5", "val_top5"),
            ("macro_f1/val", "val_macro_f1"),
            ("learning_rate", "learning_rate"),
            ("images_per_second", "images_per_second"),
            ("seconds", "seconds"),
        ] {
            let found = scalars[&(tag.to_string(), step)];
            assert_eq!(found, line[key].as_f64().unwrap() as f32, "{tag}");
            count += 1;
        }
    }
    assert_eq!(count, scalars.len());
    for tag in [
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "confusion_matrix",
        "probability/true_class",
    ] {
        assert!(others.iter().any(|other| other == tag), "{tag}: {others:?}");
    }
}

#[test]
fn a_run_leaves_a_page_a_matrix_and_events() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("run");
    finetune(data.path(), &out, &["--epochs", "4"]);
    let html = fs::read_to_string(out.join("report.html")).unwrap();
    let sections = [
        "Use it",
        "Curves",
        "Confusion matrix",
        "Can its probabilities be believed?",
        "Classes",
        "Worst mistakes",
        "Rightly named",
        "Class balance",
        "Time and speed",
        "Settings",
    ];
    check_page(&html, &sections);
    let model = out.join("model.safetensors");
    assert!(html.contains(&format!("sconce classify -m {} photo.jpg", text(&model))));
    let arguments = ["evaluate", text(data.path()), "-m", text(&model)];
    let more = ["--split", "val", "--format", "json"];
    let judged = sconce(&[&arguments[..], &more].concat());
    check_figures(&html, &serde_json::from_slice(&judged.stdout).unwrap());
    let matrix = image::open(out.join("confusion_matrix.png"))
        .unwrap()
        .to_rgb8();
    assert!(matrix.width() > 200 && matrix.height() > 200);
    // Cells are shaded, and text is drawn.
    let has = |what: fn(&image::Rgb<u8>) -> bool| matrix.pixels().any(what);
    assert!(has(|p| p.0[2] > 150 && p.0[0] < 100) && has(|p| p.0 == [0, 0, 0]));
    check_events(&out);
    // Replaced, the run's events are those of the new one alone.
    finetune(data.path(), &out, &["--epochs", "2", "--force"]);
    assert_eq!(events(&out).len(), 1);
    check_events(&out);
}

#[test]
fn a_run_that_goes_on_tells_each_epoch_once() {
    let data = photos();
    let runs = tempfile::tempdir().unwrap();
    let out = runs.path().join("out");
    finetune(data.path(), &out, &["--epochs", "3"]);
    // As if the process had ended before it told of the last epoch: its record is torn.
    let file = events(&out).remove(0);
    let bytes = fs::read(&file).unwrap();
    let records = {
        let mut ends = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            at += 16 + u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            ends.push(at);
        }
        ends
    };
    // Version, three epochs, end.
    assert_eq!(records.len(), 5);
    fs::write(&file, &bytes[..records[2]]).unwrap();
    let (scalars, _) = read_events(&events(&out));
    assert_eq!(scalars.keys().map(|(_, step)| step).max(), Some(&2));
    let mut torn = bytes[..records[3] - 5].to_vec();
    fs::write(&file, &torn).unwrap();
    sconce(&["finetune", "-o", text(&out), "--resume"]);
    torn.truncate(records[2]);
    fs::write(&file, &torn).unwrap();
    assert_eq!(events(&out).len(), 2);
    check_events(&out);
}

#[test]
fn an_evaluation_has_its_page_and_matrix_too() {
    let data = photos();
    let folder = tempfile::tempdir().unwrap();
    let labels = tempfile::tempdir().unwrap();
    // ImageNet's classes, with names that HTML would read as tags.
    for (from, to) in [
        ("cat <b>&", "285"),
        ("coffee", "967"),
        ("photographer", "872"),
    ] {
        fs::rename(data.path().join(from), data.path().join(to)).unwrap();
    }
    let names = fs::read_to_string(repository("assets/imagenet_labels.txt")).unwrap();
    let file = labels.path().join("labels.txt");
    fs::write(&file, names.replace("Egyptian cat", "<i>cat & \"co\"")).unwrap();
    let (page, matrix) = (
        folder.path().join("a/page.html"),
        folder.path().join("m.png"),
    );
    let output = sconce(&[
        "evaluate",
        text(data.path()),
        "--labels",
        text(&file),
        "--report",
        text(&page),
        "--confusion",
        text(&matrix),
        "--format",
        "json",
    ]);
    let html = fs::read_to_string(&page).unwrap();
    let sections = [
        "Use it",
        "Classes",
        "Class balance",
        "Time and speed",
        "Settings",
    ];
    check_page(&html, &sections);
    assert!(!html.contains("<i>cat") && html.contains("&lt;i&gt;cat &amp;"));
    check_figures(&html, &serde_json::from_slice(&output.stdout).unwrap());
    assert!(image::open(&matrix).unwrap().width() > 200);
}
