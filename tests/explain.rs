//! Looking inside a network: numbers against PyTorch and the package grad-cam
//! (tests/oracle/explain.py), and the commands through the binary.
#![cfg(feature = "embedded")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::Device;
use common::{channels_last, formula_model, golden, images, repository, uniform};
use sconce::explain::{
    Inside, Map, attention_maps, feature_maps, grad_cam, kernels, last_map, stage_maps,
};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    networks: BTreeMap<String, Network>,
    attention: Attention,
    statistics: BTreeMap<String, Statistics>,
}

#[derive(Deserialize)]
struct Network {
    /// Norm and eight projections.
    maps: BTreeMap<String, [f64; 9]>,
    cams: Vec<Cam>,
}

#[derive(Deserialize)]
struct Cam {
    node: String,
    class: Option<usize>,
    top: usize,
    heat: Vec<f32>,
}

#[derive(Deserialize)]
struct Attention {
    rollout: Vec<f32>,
    mean: Vec<f32>,
    /// By layer and head.
    heads: BTreeMap<String, Vec<f32>>,
}

#[derive(Deserialize)]
struct Statistics {
    mean: f64,
    std: f64,
    min: f64,
    max: f64,
    counts: Vec<u64>,
}

fn goldens() -> Golden {
    serde_json::from_slice(&golden("explain.json")).unwrap()
}

fn image() -> Vec<f32> {
    channels_last(&images(1, 224, 224), [1, 3, 224, 224])
}

fn correlation(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mean = |v: &[f32]| v.iter().map(|&v| f64::from(v)).sum::<f64>() / v.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let pairs = || {
        a.iter()
            .zip(b)
            .map(|(&a, &b)| (f64::from(a) - ma, f64::from(b) - mb))
    };
    let sum = |f: fn((f64, f64)) -> f64| pairs().map(f).sum::<f64>();
    sum(|(a, b)| a * b) / (sum(|(a, _)| a * a) * sum(|(_, b)| b * b)).sqrt()
}

fn close(found: &[f32], expected: &[f32], what: &str) {
    let error = common::relative_error(found, expected);
    assert!(error < 1e-4, "{what}: relative error {error:.1e}");
}

#[test]
fn feature_maps_are_pytorchs() {
    for (name, network) in goldens().networks {
        let inside = Inside::new(&formula_model(&name), &Device::Cpu).unwrap();
        for (node, expected) in network.maps {
            let id = inside.find(&node).unwrap();
            let maps = feature_maps(&inside, &image(), &[id]).unwrap().remove(0);
            assert_eq!(maps.name, node);
            let wide = || maps.values.iter().map(|&v| f64::from(v));
            let norm = wide().map(|v| v * v).sum::<f64>().sqrt();
            let along = |index: usize| {
                let along = uniform(&format!("{node}/{index}"), maps.values.len());
                wide()
                    .zip(along)
                    .map(|(v, a)| v * f64::from(a))
                    .sum::<f64>()
            };
            for (index, &expected_value) in expected.iter().enumerate() {
                let found = if index == 0 { norm } else { along(index - 1) };
                let error = (found - expected_value).abs() / expected[0];
                assert!(error < 1e-4, "{name} {node} {index}: {error:.1e}");
            }
        }
    }
}

#[test]
fn heat_maps_are_those_of_grad_cam() {
    for (name, network) in goldens().networks {
        let inside = Inside::new(&formula_model(&name), &Device::Cpu).unwrap();
        let last = &inside.graph().node(last_map(&inside).unwrap()).name;
        assert_eq!(*last, network.cams[0].node, "{name}");
        for cam in &network.cams {
            let node = inside.find(&cam.node).unwrap();
            let found = grad_cam(&inside, &image(), node, cam.class).unwrap();
            assert_eq!(found.class, cam.class.unwrap_or(cam.top));
            let heat = found.map.resized(224);
            let sampled: Vec<f32> = (0..14 * 14)
                .map(|i| heat.values[i / 14 * 16 * 224 + i % 14 * 16])
                .collect();
            let agreement = correlation(&sampled, &cam.heat);
            assert!(
                agreement > 0.999,
                "{name} at {} for {:?}: {agreement}",
                cam.node,
                cam.class
            );
        }
    }
}

#[test]
fn attention_is_pytorchs() {
    let golden = goldens().attention;
    let inside = Inside::new(&formula_model("vit_tiny_patch16_224"), &Device::Cpu).unwrap();
    let maps = attention_maps(&inside, &image()).unwrap();
    let rollout = maps.rollout().unwrap();
    assert_eq!((rollout.height, rollout.width), (14, 14));
    close(&rollout.values, &golden.rollout, "rollout");
    let mean = maps.layer(None, None).unwrap();
    close(&mean.values, &golden.mean, "mean of the last layer");
    for (place, expected) in golden.heads {
        let (layer, head) = place.split_once(',').unwrap();
        let name = format!("encoder.layers.encoder_layer_{layer}");
        let head = head.parse().unwrap();
        let map = maps.layer(Some(&name), Some(head)).unwrap();
        close(&map.values, &expected, &place);
    }
}

#[test]
fn statistics_of_weights_are_pytorchs() {
    let kernels = kernels(&formula_model("resnet18")).unwrap();
    assert!(
        kernels
            .iter()
            .all(|k| !k.name.ends_with("num_batches_tracked"))
    );
    for (name, expected) in goldens().statistics {
        let kernel = kernels.iter().find(|k| k.name == name).unwrap();
        let found = &kernel.statistics;
        let std = found.std.unwrap();
        for (found, expected) in [
            (found.mean, expected.mean),
            (std, expected.std),
            (found.min.into(), expected.min),
            (found.max.into(), expected.max),
        ] {
            // A mean near zero is as exact as the values it is of.
            assert!(
                (found - expected).abs() < 1e-6 * std,
                "{name}: {found} for {expected}"
            );
        }
        // A value on the edge of two bins may fall into either.
        let moved: u64 = found
            .histogram
            .counts
            .iter()
            .zip(&expected.counts)
            .map(|(a, b)| a.abs_diff(*b))
            .sum();
        assert!(moved <= 2, "{name}: {moved} values in other bins");
    }
}

#[test]
fn maps_are_resized_between_the_centres_of_values() {
    let map = Map {
        height: 1,
        width: 2,
        values: vec![0.0, 1.0],
    };
    let resized = map.resized(4);
    assert_eq!(resized.values[..4], [0.0, 0.25, 0.75, 1.0]);
}

#[test]
fn every_network_shows_a_map_of_each_stage() {
    for name in [
        "resnet18",
        "mobilenet_v3_small",
        "shufflenet_g3_w1",
        "vit_tiny_patch16_224",
    ] {
        let inside = Inside::new(&formula_model(name), &Device::Cpu).unwrap();
        let nodes = stage_maps(&inside);
        assert!(nodes.len() > 3, "{name}");
        let maps = feature_maps(&inside, &image(), &nodes).unwrap();
        assert_eq!(maps.len(), nodes.len());
        for maps in maps {
            let count = maps.channels * maps.height * maps.width;
            assert_eq!(maps.values.len(), count, "{name} {}", maps.name);
        }
    }
}

fn sconce(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sconce"));
    command.current_dir(folder).args(arguments);
    command.output().unwrap()
}

fn coffee() -> String {
    repository("assets/coffee.png").display().to_string()
}

/// Standard output of a command that does all.
fn done(folder: &Path, arguments: &[&str]) -> String {
    let output = sconce(folder, arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn features_are_pictures_or_numbers() {
    let folder = TempDir::new().unwrap();
    let arguments = ["features", &coffee(), "--layer", "features.0", "features.7"];
    let out = done(folder.path(), &arguments);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(
        lines,
        [
            "features/features.0.2.png  32 x 112 x 112",
            "features/features.7.conv.3.png  64 x 14 x 14"
        ]
    );
    let picture = image::open(folder.path().join("features/features.0.2.png")).unwrap();
    assert!(picture.width() > 600 && picture.height() > 400);
    let mut numbers = arguments.to_vec();
    numbers.extend(["--format", "npy", "-o", "numbers"]);
    done(folder.path(), &numbers);
    let tensor =
        candle_core::Tensor::read_npy(folder.path().join("numbers/features.0.2.npy")).unwrap();
    assert_eq!(tensor.dims(), [32, 112, 112]);
    // One node a stage where none is named.
    let out = done(folder.path(), &["features", &coffee(), "--order", "energy"]);
    assert_eq!(out.lines().count(), 19);
}

#[test]
fn kernels_are_text_json_and_pictures() {
    let folder = TempDir::new().unwrap();
    let text = done(folder.path(), &["kernels", "--layer", "features.0"]);
    let row = text.lines().find(|l| l.starts_with("features.0.0.weight"));
    assert!(row.unwrap().contains("  32 x 3 x 3 x 3  "), "{text}");
    let pictures = ["--plot", "plot.png", "--filters", "filters.png"];
    let mut arguments = vec!["kernels", "--format", "json"];
    arguments.extend(pictures);
    let json: Value = serde_json::from_str(&done(folder.path(), &arguments)).unwrap();
    let tensors = json.as_array().unwrap();
    // 52 convolutions with four tensors of a norm each, and the head.
    assert_eq!(tensors.len(), 52 * 5 + 2);
    for key in [
        "name",
        "shape",
        "mean",
        "std",
        "min",
        "max",
        "sparsity",
        "histogram",
    ] {
        assert!(tensors[0].get(key).is_some(), "{key}");
    }
    for file in ["plot.png", "filters.png"] {
        image::open(folder.path().join(file)).unwrap();
    }
    let same = done(
        folder.path(),
        &["kernels", "--diff", "mobilenet_v2", "--format", "json"],
    );
    let same: Value = serde_json::from_str(&same).unwrap();
    assert!(same["others"].as_array().unwrap().is_empty());
    let moved = |d: &Value| d["relative"].as_f64().unwrap();
    assert!(
        same["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .all(|d| moved(d) == 0.0)
    );
}

#[test]
fn explain_draws_one_photo_or_a_sheet() {
    let folder = TempDir::new().unwrap();
    let out = done(folder.path(), &["explain", &coffee(), "--raw", "map.npy"]);
    assert!(out.contains("espresso  99."), "{out}");
    let single = image::open(folder.path().join("explain.png")).unwrap();
    let map = candle_core::Tensor::read_npy(folder.path().join("map.npy")).unwrap();
    assert_eq!(map.dims(), [7, 7]);
    let assets = repository("assets/*.png").display().to_string();
    let out = done(
        folder.path(),
        &["explain", &assets, "-o", "sheet.png", "--class", "tabby"],
    );
    assert_eq!(out.lines().filter(|l| l.contains("  tabby  ")).count(), 3);
    let sheet = image::open(folder.path().join("sheet.png")).unwrap();
    assert!(sheet.width() >= 2 * single.width());
}

#[test]
fn what_cannot_be_done_is_said_in_a_line() {
    let folder = TempDir::new().unwrap();
    std::fs::write(
        folder.path().join("broken.png"),
        b"\x89PNG\r\n\x1a\nnothing",
    )
    .unwrap();
    let coffee = coffee();
    let vit = ["-m", "vit_tiny_patch16_224", "--weights", "none"];
    for (arguments, code, expected) in [
        (vec!["features", "broken.png"], 2, "broken.png: "),
        (vec!["features", "gone.png"], 2, "gone.png: "),
        (
            vec!["features", &coffee, "--layer", "featurs.3.conv.3"],
            2,
            "--layer: the network has no node named featurs.3.conv.3 (near it: features.3.conv.3",
        ),
        (
            vec!["features", &coffee, "--layer", "classifier.1"],
            2,
            "classifier.1 gives 1000, which is no feature map",
        ),
        (
            vec!["kernels", "--layer", "feature.0"],
            2,
            "(near it: features.",
        ),
        (
            vec!["kernels", "--diff", "gone"],
            2,
            "--diff: -m no network named gone",
        ),
        (vec!["explain", "broken.png"], 2, "broken.png: "),
        (vec!["explain", "broken.png", &coffee], 1, "broken.png: "),
        (
            vec!["explain", &coffee, "--class", "teapots"],
            2,
            "--class: class teapots",
        ),
        (
            vec!["explain", &coffee, "--class", "1000"],
            2,
            "--class: class 1000",
        ),
        (
            vec!["explain", &coffee, "--method", "attention"],
            2,
            "--method attention: mobilenet_v2.tv has no attention",
        ),
        (
            vec!["explain", &coffee, "--head", "3"],
            2,
            "--head: Grad-CAM has no heads",
        ),
        (
            [&["explain", &coffee], &vit[..], &["--method", "grad-cam"]].concat(),
            2,
            "no feature maps to weigh",
        ),
        (
            [&["explain", &coffee], &vit[..], &["--head", "9"]].concat(),
            2,
            "head 9 is not there",
        ),
        (
            [&["explain", &coffee], &vit[..], &["--layer", "encoder.ln"]].concat(),
            2,
            "encoder.ln is no attention node",
        ),
    ] {
        let output = sconce(folder.path(), &arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {errors}");
        assert!(errors.contains(expected), "{arguments:?}: {errors}");
        let said: Vec<&str> = errors
            .lines()
            .filter(|l| !l.ends_with(": written"))
            .collect();
        assert_eq!(said.len(), 1, "{arguments:?}: {errors}");
    }
}
