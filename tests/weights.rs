//! Weights files of other libraries (tests/oracle/checkpoints.py): every format, every dialect,
//! and what is said of files that do not fit.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use common::{channels_last, images, relative_error, repository};
use sconce::exec::cpu::{Options, Plan};
use sconce::exec::params::{Params, TensorSource};
use sconce::models::registry;
use sconce::weights::{Checkpoint, FitError, Head, closest, fit};

/// A network as a library stores it, and the library's logits for a batch of two.
#[derive(serde::Deserialize)]
struct Case {
    model: String,
    library: String,
    size: usize,
    float32_error: f64,
    logits: Vec<f32>,
    /// `name 64x3x7x7`, filled by the formula under these names.
    #[serde(default)]
    tensors: Vec<String>,
    /// A whole checkpoint.
    #[serde(default)]
    file: String,
}

/// Tensors by formula, under any names.
struct Named(HashMap<String, Vec<usize>>);

impl Named {
    fn new(tensors: &[String]) -> Self {
        let parse = |tensor: &String| {
            let (name, shape) = tensor.rsplit_once(' ').unwrap();
            let shape = shape.split('x').map(|d| d.parse().unwrap()).collect();
            (name.to_string(), shape)
        };
        Self(tensors.iter().map(parse).collect())
    }

    /// Every name with something before it.
    fn prefixed(&self, prefix: &str) -> Arc<Prefixed> {
        let names = self.0.clone();
        Arc::new(Prefixed(prefix.into(), Named(names)))
    }
}

impl TensorSource for Named {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        Ok(common::parameter(name, &self.0[name]))
    }
}

struct Prefixed(String, Named);

impl TensorSource for Prefixed {
    fn names(&self) -> Vec<String> {
        let names = self.1.names().into_iter();
        names.map(|n| format!("{}{n}", self.0)).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.1.shape(name.strip_prefix(&self.0)?)
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        self.1.read(name.strip_prefix(&self.0).unwrap())
    }
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&common::golden("checkpoints/names.json")).unwrap()
}

fn case(model: &str, library: &str) -> Case {
    let mut cases = cases().into_iter();
    cases
        .find(|c| (&*c.model, &*c.library) == (model, library))
        .unwrap()
}

/// Loads the case's tensors into its network and compares logits.
fn check(case: &Case, source: Arc<dyn TensorSource>) {
    let Case {
        model,
        library,
        size,
        ..
    } = case;
    let row = registry::find(model).unwrap().row;
    let fitted = fit(source, &row.architecture, Head::FromFile)
        .unwrap_or_else(|e| panic!("{model} of {library}: {e}"));
    assert!(fitted.report.is_complete(), "{model} of {library}");
    assert!(
        fitted.report.unexpected.is_empty(),
        "{:?}",
        fitted.report.unexpected
    );
    assert_eq!(fitted.graph.num_classes(), 7);
    let params = Params::new(Some(fitted.source), 0);
    let vb = params.var_builder(&Device::Cpu);
    let outputs = [fitted.graph.output()];
    let options = Options::threads(2).exact(true);
    let mut plan = Plan::compile(&fitted.graph, &vb, [*size; 2], &outputs, options).unwrap();
    assert_eq!(params.report(), fitted.report);
    plan.run(
        &channels_last(&images(2, *size, *size), [2, 3, *size, *size]),
        2,
    );
    let error = relative_error(plan.output(0), &case.logits);
    // Twice what float32 costs the library itself, where that is more.
    let tolerance = (2.0 * case.float32_error).max(1e-5);
    println!("{model} of {library}: {error:.1e}, tolerated {tolerance:.1e}");
    assert!(error <= tolerance, "{model} of {library}: {error:e}");
}

#[test]
fn every_dialect_gives_the_logits_of_its_library() {
    for case in cases() {
        check(&case, Arc::new(Named::new(&case.tensors)));
    }
}

#[test]
#[ignore = "wants checkpoints of gigabytes: python tests/oracle/checkpoints.py DIR, then SCONCE_TEST_CHECKPOINTS=DIR"]
fn whole_checkpoints_give_the_logits_of_their_library() {
    let folder = std::env::var_os("SCONCE_TEST_CHECKPOINTS").expect("SCONCE_TEST_CHECKPOINTS");
    let folder = Path::new(&folder);
    let cases = std::fs::read(folder.join("cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_slice(&cases).unwrap();
    for case in cases {
        print!("{}: ", case.file);
        check(
            &case,
            Arc::new(Checkpoint::open(&folder.join(&case.file)).unwrap()),
        );
    }
}

#[test]
fn names_may_begin_with_a_prefix() {
    let case = case("mobilenetv3_small_100", "timm");
    for prefix in [
        "module.",
        "model.",
        "_orig_mod.module.",
        "timm_model.",
        "net.0.",
    ] {
        check(&case, Named::new(&case.tensors).prefixed(prefix));
    }
}

#[derive(serde::Deserialize)]
struct Formats {
    shapes: BTreeMap<String, Vec<usize>>,
    values: BTreeMap<String, Vec<f32>>,
}

fn checkpoint(name: &str) -> std::path::PathBuf {
    repository("tests/golden/checkpoints").join(name)
}

#[test]
fn every_format_gives_the_same_tensors() {
    let expected: Formats =
        serde_json::from_slice(&common::golden("checkpoints/formats.json")).unwrap();
    for file in [
        "plain.safetensors",
        "sharded.safetensors.index.json",
        "zip.pth",
        "stream.pth",
        "protocol4.pth",
        "protocol5-stream.pth",
        "nested.pt",
        "nested-stream.pt",
    ] {
        let read = Checkpoint::open(&checkpoint(file)).unwrap_or_else(|e| panic!("{e}"));
        let shapes: BTreeMap<String, Vec<usize>> = read
            .names()
            .into_iter()
            .map(|name| (name.clone(), read.shape(&name).unwrap()))
            .collect();
        assert_eq!(shapes, expected.shapes, "{file}");
        for (name, values) in &expected.values {
            assert_eq!(&read.read(name).unwrap(), values, "{file}: {name}");
        }
        let error = read.read("counter").unwrap_err().to_string();
        assert!(
            error.contains("counter") && error.contains("I64"),
            "{error}"
        );
    }
}

#[test]
fn what_is_no_state_dict_is_named() {
    let complaint = |file: &Path| Checkpoint::open(file).err().unwrap().to_string();
    for (file, expected) in [
        (
            "whole-module.pth",
            "class torch.nn.modules.linear.Linear, which is not run",
        ),
        ("torchscript.pt", "TorchScript"),
        (
            "quantized.pth",
            "tensor weight: tensors made by torch._utils._rebuild_qtensor",
        ),
        ("list.pth", "no dict of tensors"),
    ] {
        let complaint = complaint(&checkpoint(file));
        assert!(
            complaint.contains(expected) && complaint.contains(file),
            "{complaint}"
        );
    }
    let root = tempfile::tempdir().unwrap();
    for (content, expected) in [
        (&b""[..], "it is empty"),
        (b"<html>404</html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"\x80\x04N.", "a pickle"),
        (
            br#"{"weight_map": {"a": "../other.safetensors"}}"#,
            "not a file beside it",
        ),
        (
            br#"{"weight_map": {"a": "absent.safetensors"}}"#,
            "absent.safetensors: ",
        ),
        (br#"{"config": 1}"#, "weight_map"),
    ] {
        let file = root.path().join("file");
        std::fs::write(&file, content).unwrap();
        let complaint = complaint(&file);
        assert!(complaint.contains(expected), "{complaint}");
    }
}

#[test]
fn an_index_that_names_an_index_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("a.index.json");
    std::fs::write(&file, r#"{"weight_map": {"a": "a.index.json"}}"#).unwrap();
    assert!(Checkpoint::open(&file).is_err());
}

#[test]
fn heads_are_kept_dropped_or_started_afresh() {
    let case = case("resnet18", "timm");
    let architecture = registry::find("resnet18").unwrap().row.architecture;
    let fitted = |head| fit(Arc::new(Named::new(&case.tensors)), &architecture, head).unwrap();
    let kept = fitted(Head::Classes {
        count: 7,
        reset: false,
    });
    assert!(kept.report.is_complete());
    let other = fitted(Head::Classes {
        count: 3,
        reset: false,
    });
    assert_eq!(other.graph.num_classes(), 3);
    assert_eq!(
        other.report.mismatched["fc.weight"],
        (vec![3, 512], vec![7, 512])
    );
    assert_eq!(other.report.mismatched.len(), 2);
    assert!(other.report.missing.is_empty() && other.report.unexpected.is_empty());
    let reset = fitted(Head::Classes {
        count: 7,
        reset: true,
    });
    let head = ["fc.bias", "fc.weight"].map(String::from);
    assert!(reset.report.missing.iter().eq(&head) && reset.report.unexpected.iter().eq(&head));
    assert_eq!(reset.source.shape("fc.weight"), None);
    // Whoever builds the network sees the same, and gets a fresh head from the seed.
    for fitted in [kept, other, reset] {
        let params = Params::trainable(Some(fitted.source), 0);
        let vb = params.var_builder(&Device::Cpu);
        sconce::exec::eager::Eager::new(fitted.graph, &vb).unwrap();
        assert_eq!(params.report(), fitted.report);
    }
}

/// People replace heads in several ways.
#[test]
fn a_head_is_found_where_others_put_it() {
    let case = case("mobilenet_v2", "torchvision");
    let architecture = registry::find("mobilenet_v2").unwrap().row.architecture;
    let renamed = |new: &[(&str, &str)]| {
        let mut tensors = Named::new(&case.tensors);
        for (module, to) in new {
            for leaf in ["weight", "bias"] {
                if let Some(shape) = tensors.0.remove(&format!("{module}.{leaf}")) {
                    tensors.0.insert(format!("{to}.{leaf}"), shape);
                }
            }
        }
        fit(Arc::new(tensors), &architecture, Head::FromFile)
    };
    for place in ["classifier", "classifier.3", "classifier.1.1"] {
        let fitted = renamed(&[("classifier.1", place)]).unwrap();
        assert_eq!(fitted.graph.num_classes(), 7, "{place}");
        assert!(fitted.report.is_complete() && fitted.report.unexpected.is_empty());
    }
    let error = renamed(&[("classifier.1", "embedding.0")]).err().unwrap();
    assert!(matches!(error, FitError::NoHead { .. }), "{error}");
    let error = error.to_string();
    assert!(error.contains("classifier.1.weight"), "{error}");
}

#[test]
fn the_closest_network_is_named() {
    for case in cases() {
        let tensors = Named::new(&case.tensors);
        let name = closest(&tensors).unwrap();
        // Networks that differ in what no tensor shows share a name.
        let expected: &[&str] = match (&*case.model, &*case.library) {
            ("mobilenet_v1_025" | "mobilenet_v2_050", "transformers") => &[&case.model],
            ("mobilenet_v2", "transformers") => &["tf_mobilenet_v2_100"],
            ("tf_mobilenetv3_small_100", _) => &["mobilenetv3_small_100"],
            ("vit_tiny_patch16_224", _) => &["vit_tiny_patch16_224", "deit_tiny_patch16_224"],
            (model, _) => &[model],
        };
        assert!(
            expected.contains(&name),
            "{} of {}: {name}",
            case.model,
            case.library
        );
        let other = registry::find("shufflenet_v2_x1_5")
            .unwrap()
            .row
            .architecture;
        let error = fit(Arc::new(tensors), &other, Head::FromFile)
            .err()
            .unwrap();
        assert!(error.to_string().contains(name), "{error}");
    }
    let nothing = Named::new(&["layer.weight 3x3".into()]);
    assert_eq!(closest(&nothing), None);
}

#[test]
fn positions_of_another_image_size_are_followed() {
    let mut case = case("vit_tiny_patch16_224", "timm");
    let position = case
        .tensors
        .iter_mut()
        .find(|t| t.starts_with("pos_embed"))
        .unwrap();
    *position = "pos_embed 1x577x192".into();
    let architecture = registry::find("vit_tiny_patch16_224")
        .unwrap()
        .row
        .architecture;
    let tensors = Arc::new(Named::new(&case.tensors));
    let fitted = fit(tensors, &architecture, Head::FromFile).unwrap();
    assert!(fitted.report.is_complete());
    let sconce::models::Architecture::VisionTransformer(config) = fitted.architecture else {
        panic!("another family");
    };
    assert_eq!(config.image_size, 384);
}
