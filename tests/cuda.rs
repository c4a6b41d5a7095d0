//! On a CUDA device: `cargo test --release --features cudnn -- cuda` runs these, and every other test whose
//! name says that it is about CUDA.
#![cfg(feature = "cuda")]

mod common;

use assert_cmd::Command;
use candle_core::Device;
use common::{Formula, images, relative_error, repository};
use sconce::exec::cpu::Options;
use sconce::exec::params::Params;
use sconce::exec::{Precision, Runner};
use sconce::models::registry::{self, IMAGENET_CLASSES, ModelRow};

const SIDE: usize = 224;
const BATCH: usize = 3;

/// A network's logits of a few images.
fn logits(row: &ModelRow, device: &Device, options: Options) -> Vec<f32> {
    let graph = row.architecture.graph(IMAGENET_CLASSES);
    let params = Params::new(Some(Formula::of(&graph)), 0);
    let output = graph.output();
    let vb = params.var_builder(device);
    let mut runner = Runner::new(graph, &vb, [SIDE; 2], output, options).unwrap();
    let images = common::channels_last(&images(BATCH, SIDE, SIDE), [BATCH, 3, SIDE, SIDE]);
    runner.run(&images, BATCH).unwrap()
}

#[test]
fn cuda_logits_are_the_cpus() {
    let device = Device::new_cuda(0).unwrap();
    let mut failed = Vec::new();
    for row in registry::all() {
        let expected = logits(row, &Device::Cpu, Options::threads(8).exact(true));
        for (precision, bound) in [
            (Precision::F32, 1e-3),
            (Precision::Tf32, 3e-2),
            (Precision::Bf16, 1e-1),
        ] {
            let actual = logits(row, &device, Options::threads(1).precision(precision));
            let error = relative_error(&actual, &expected);
            println!("{} {precision}: {error:.1e}", row.name);
            if error.is_nan() || error > bound {
                failed.push(format!("{} {precision}: {error:.1e}", row.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// The same photo and the same training, by the program itself.
#[test]
fn cuda_classifies_and_trains() {
    let mut classify = Command::cargo_bin("sconce").unwrap();
    let photo = repository("assets/coffee.png");
    let done = classify
        .arg("classify")
        .arg(&photo)
        .args(["--device", "cuda"]);
    let said = done.args(["--format", "jsonl"]).assert().success();
    let said = String::from_utf8_lossy(&said.get_output().stdout).to_string();
    assert!(said.contains("espresso"), "{said}");
    for precision in ["f32", "tf32", "bf16", "f16"] {
        let mut bench = Command::cargo_bin("sconce").unwrap();
        bench
            .args([
                "bench",
                "-m",
                "mobilenet_v3_small",
                "--weights",
                "none",
                "--train",
            ])
            .args(["--device", "cuda", "--precision", precision, "-b", "8"])
            .args(["--seconds", "0.1"])
            .assert()
            .success();
    }
}

/// Too large a batch is answered with one that fits.
#[test]
fn cuda_says_what_fits() {
    let mut bench = Command::cargo_bin("sconce").unwrap();
    let assert = bench
        .args(["bench", "-m", "vit_l_16", "--weights", "none", "--train"])
        .args(["--device", "cuda", "-b", "4096", "--seconds", "0.1"])
        .assert()
        .failure();
    assert.stderr(predicates::str::contains("--batch-size"));
}

/// Two devices learn what one learns, where the machine has two.
#[cfg(feature = "nccl")]
#[test]
fn cuda_devices_learn_what_one_learns() {
    if Device::new_cuda(1).is_err() {
        println!("not run: there is one device");
        return;
    }
    let data = common::photos(16);
    let scratch = tempfile::tempdir().unwrap();
    let weights = scratch.path().join("weights.safetensors");
    common::write_formula(&weights, "resnet18", 3);
    let loss = |device: &str| {
        let out = scratch.path().join(device.replace([':', ','], "-"));
        let mut finetune = Command::cargo_bin("sconce").unwrap();
        finetune
            .arg("finetune")
            .arg(data.path())
            .args(["-m", "resnet18", "--weights"])
            .arg(&weights)
            .args([
                "--freeze",
                "none",
                "--norms",
                "batch",
                "--sync-bn",
                "--augment",
                "none",
            ])
            .args(["--epochs", "1", "-b", "16", "--device", device, "-o"])
            .arg(&out)
            .assert()
            .success();
        let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let epoch: serde_json::Value =
            serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        epoch["train_loss"].as_f64().unwrap()
    };
    let (one, two) = (loss("cuda:0"), loss("cuda:0,1"));
    assert!((one - two).abs() < 1e-3 * one, "{one} and {two}");
}
