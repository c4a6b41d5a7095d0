//! What `sconce export` writes. tests/oracle/exports.py checks the same files in ONNX Runtime,
//! torchvision and timm.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sconce::exec::params::TensorSource;
use sconce::weights::{Checkpoint, DType, Dialect, Model, Request, WeightsChoice, resolve};

fn model(name: &str, weights: WeightsChoice) -> Model {
    resolve(&Request {
        model: name.into(),
        weights,
        labels: None,
        seed: 3,
        hub: sconce::hub::Hub::new().offline(),
    })
    .unwrap()
}

/// Number, and either value or bytes, of every field of a protocol buffer message.
fn fields(mut message: &[u8]) -> Vec<(u64, u64, &[u8])> {
    fn varint(message: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let (&byte, rest) = message.split_first().unwrap();
            *message = rest;
            value |= u64::from(byte & 127) << shift;
            shift += 7;
            if byte < 128 {
                return value;
            }
        }
    }
    let mut all = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let (value, length) = match key & 7 {
            0 => (varint(&mut message), 0),
            2 => (0, varint(&mut message) as usize),
            5 => (0, 4),
            other => panic!("wire type {other}"),
        };
        let (content, rest) = message.split_at(length);
        message = rest;
        all.push((key >> 3, value, content));
    }
    all
}

fn texts(message: &[u8], field: u64) -> Vec<String> {
    let all = fields(message).into_iter().filter(|f| f.0 == field);
    all.map(|f| String::from_utf8(f.2.to_vec()).unwrap())
        .collect()
}

/// Checks that a model holds together; gives its operators and metadata.
fn check_onnx(bytes: &[u8]) -> (HashMap<String, usize>, HashMap<String, String>) {
    let model = fields(bytes);
    let one = |field| model.iter().find(|f| f.0 == field).unwrap();
    assert_eq!(one(1).1, 8);
    assert_eq!(fields(one(8).2).iter().find(|f| f.0 == 2).unwrap().1, 17);
    let graph = one(7).2;
    let mut known: HashSet<String> = HashSet::new();
    let inputs = texts_of(graph, 11);
    assert_eq!(inputs, ["images"]);
    known.extend(inputs);
    for (_, _, tensor) in fields(graph).into_iter().filter(|f| f.0 == 5) {
        let parts = fields(tensor);
        let dims = parts.iter().filter(|p| p.0 == 1).map(|p| p.1);
        let size = match parts.iter().find(|p| p.0 == 2).unwrap().1 {
            1 => 4,
            7 => 8,
            10 => 2,
            other => panic!("data type {other}"),
        };
        let raw = parts.iter().find(|p| p.0 == 9).unwrap().2;
        assert_eq!(raw.len() as u64, dims.product::<u64>() * size);
        assert!(
            known.insert(texts(tensor, 8)[0].clone()),
            "{:?}",
            texts(tensor, 8)
        );
    }
    let mut operators = HashMap::new();
    let mut names = HashSet::new();
    for (_, _, node) in fields(graph).into_iter().filter(|f| f.0 == 1) {
        let [name] = &texts(node, 3)[..] else {
            panic!()
        };
        assert!(names.insert(name.clone()), "two nodes named {name}");
        for input in texts(node, 1) {
            assert!(
                known.contains(&input),
                "{name} reads {input} before it is there"
            );
        }
        for output in texts(node, 2) {
            assert!(known.insert(output.clone()), "{output} is written twice");
        }
        *operators.entry(texts(node, 4)[0].clone()).or_default() += 1;
    }
    assert_eq!(texts_of(graph, 12), ["logits"]);
    assert!(known.contains("logits"));
    let metadata = model.iter().filter(|f| f.0 == 14).map(|f| {
        let [key, value] = [1, 2].map(|field| texts(f.2, field)[0].clone());
        (key, value)
    });
    (operators, metadata.collect())
}

/// Names of a graph's inputs or outputs.
fn texts_of(graph: &[u8], field: u64) -> Vec<String> {
    let infos = fields(graph).into_iter().filter(|f| f.0 == field);
    infos.flat_map(|f| texts(f.2, 1)).collect()
}

#[test]
fn every_family_becomes_a_sound_onnx_file() {
    let root = tempfile::tempdir().unwrap();
    for name in [
        "resnet18",
        "resnext50_32x4d",
        "tf_mobilenet_v1_100",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_g3_w1",
        "shufflenet_v2_x0_5",
        "vit_tiny_patch16_224",
        "efficientnet_lite0",
    ] {
        let model = model(name, WeightsChoice::None);
        for dtype in [DType::F32, DType::F16] {
            let file = root.path().join("model.onnx");
            model.export_onnx(&file, dtype).unwrap();
            let bytes = std::fs::read(&file).unwrap();
            let (operators, metadata) = check_onnx(&bytes);
            let convolutions = model.graph.nodes().iter();
            let convolutions = convolutions
                .filter(|n| n.op.label().contains("conv"))
                .count();
            assert_eq!(operators["Conv"], convolutions, "{name}");
            assert_eq!(operators.contains_key("Cast"), dtype == DType::F16);
            let labels: Vec<String> = serde_json::from_str(&metadata["labels"]).unwrap();
            assert_eq!(labels, model.labels);
            let preprocessing = serde_json::from_str(&metadata["preprocessing"]).unwrap();
            assert_eq!(model.preprocessing, preprocessing);
        }
    }
}

fn tensors(file: &Checkpoint) -> HashMap<String, Vec<f32>> {
    let names = file.names().into_iter();
    names.map(|n| (n.clone(), file.read(&n).unwrap())).collect()
}

#[test]
fn an_exported_model_file_is_the_same_network() {
    let root = tempfile::tempdir().unwrap();
    for (name, dialect) in [
        ("mobilenet_v3_small", None),
        ("mobilenet_v3_small", Some(Dialect::Torchvision)),
        ("mobilenetv3_small_050", Some(Dialect::Timm)),
        ("vit_tiny_patch16_224", Some(Dialect::Timm)),
    ] {
        let original = model(name, WeightsChoice::None);
        let [own, other] = ["own", "other"].map(|f| root.path().join(format!("{f}.safetensors")));
        original.export_safetensors(&own, DType::F32, None).unwrap();
        original
            .export_safetensors(&other, DType::F32, dialect)
            .unwrap();
        let back = model(other.to_str().unwrap(), WeightsChoice::Published);
        assert_eq!(back.description(), original.description());
        assert!(back.report.as_ref().unwrap().unexpected.is_empty());
        let own = tensors(&Checkpoint::open(&own).unwrap());
        let source = back.source.unwrap();
        assert_eq!(own.len(), source.names().len());
        for (tensor, values) in own {
            assert_eq!(source.read(&tensor).unwrap(), values, "{name} {tensor}");
        }
    }
}

#[test]
fn float16_rounds_matrices_and_refuses_what_is_beyond_it() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("half.safetensors");
    let original = model("mobilenet_v2", WeightsChoice::Published);
    original
        .export_safetensors(&file, DType::F16, None)
        .unwrap();
    // The embedded weights are stored so, and nothing is rounded twice.
    let half = tensors(&Checkpoint::open(&file).unwrap());
    let source = original.source.clone().unwrap();
    assert!(
        half.iter()
            .all(|(name, values)| &source.read(name).unwrap() == values)
    );
    assert!(std::fs::metadata(&file).unwrap().len() < 7_500_000);

    let mut large = original;
    large.source = Some(Arc::new(TooLarge));
    let onnx = large.export_onnx(&root.path().join("a.onnx"), DType::F16);
    let path = root.path().join("a.safetensors");
    let safetensors = large.export_safetensors(&path, DType::F16, None);
    for error in [onnx.unwrap_err(), safetensors.unwrap_err()].map(|e| e.to_string()) {
        assert!(
            error.contains("classifier.1.weight") && error.contains("float16"),
            "{error}"
        );
    }
    // Nothing half-written is left behind.
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 1);
}

/// A weight that float16 cannot hold.
struct TooLarge;

impl TensorSource for TooLarge {
    fn names(&self) -> Vec<String> {
        vec!["classifier.1.weight".into()]
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        (name == "classifier.1.weight").then(|| vec![1000, 1280])
    }

    fn read(&self, _: &str) -> candle_core::Result<Vec<f32>> {
        Ok(vec![1e5; 1_280_000])
    }
}

#[test]
fn a_dialect_without_the_network_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("x.safetensors");
    for (name, dialect) in [
        ("mobilenet_v3_small", Dialect::Timm),
        ("mobilenetv3_small_100", Dialect::Torchvision),
        ("tf_mobilenet_v2_100", Dialect::Torchvision),
        ("mobilenet_v1_100", Dialect::Torchvision),
        ("shufflenet_v2_x1_0", Dialect::Timm),
    ] {
        let model = model(name, WeightsChoice::None);
        let error = model
            .export_safetensors(&file, DType::F32, Some(dialect))
            .unwrap_err();
        assert!(error.to_string().contains("no such network"), "{error}");
        assert!(!file.exists());
    }
}
