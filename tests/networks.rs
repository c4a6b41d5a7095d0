//! Every network of the registry against its reference implementation (tests/oracle/networks.py),
//! through both executors.

mod common;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use common::{Formula, channels_last, f32_tensor, golden, images, relative_error};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sconce::exec::cpu::{Options, Plan};
use sconce::exec::eager::{Eager, Mode, Observed, Training};
use sconce::exec::params::Params;
use sconce::models::registry::{self, ModelRow};

#[derive(serde::Deserialize)]
struct Facts {
    parameters: usize,
    float32_error: BTreeMap<String, f64>,
    published_gmacs: Option<f64>,
    training_float32_error: f64,
}

struct Golden {
    facts: Facts,
    /// In evaluation mode.
    cases: Vec<Case>,
    training: TrainingCase,
}

/// One forward pass in training mode.
struct TrainingCase {
    count: usize,
    logits: Vec<f32>,
    /// For each running mean and variance in the order of names: norm, eight projections, and the
    /// reference's own float32 error.
    statistics: Vec<[f32; 10]>,
}

/// The reference's logits for a batch of images of one size.
struct Case {
    height: usize,
    width: usize,
    count: usize,
    classes: usize,
    logits: Vec<f32>,
    /// Relative error.
    tolerance: f64,
}

fn load(row: &ModelRow) -> Golden {
    let bytes = golden(&format!("networks/{}.safetensors", row.name));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let facts = &header.metadata().as_ref().unwrap()["facts"];
    let facts: Facts = serde_json::from_str(facts).unwrap();
    let cases = file
        .names()
        .into_iter()
        .filter(|name| name.contains('x'))
        .map(|name| {
            let (height, width) = name.split_once('x').unwrap();
            let (shape, values) = f32_tensor(&file, name);
            // Twice what float32 itself costs the reference, where that is more.
            let tolerance = (2.0 * facts.float32_error[name]).max(1e-5);
            Case {
                height: height.parse().unwrap(),
                width: width.parse().unwrap(),
                count: shape[0],
                classes: shape[1],
                logits: values,
                tolerance,
            }
        })
        .collect();
    let (shape, logits) = f32_tensor(&file, "training");
    let statistics = match file.tensor("statistics") {
        Ok(_) => f32_tensor(&file, "statistics").1,
        Err(_) => Vec::new(),
    };
    let training = TrainingCase {
        count: shape[0],
        logits,
        statistics: statistics.as_chunks().0.to_vec(),
    };
    Golden {
        facts,
        cases,
        training,
    }
}

/// Checks the rows of one family, so that families run side by side.
fn check_family(family: &str) {
    check_rows(|row| row.architecture.family() == family);
}

fn check_rows(wanted: impl Fn(&ModelRow) -> bool) {
    let mut checked = 0;
    for row in registry::all().iter().filter(|row| wanted(row)) {
        check(row);
        checked += 1;
    }
    assert!(checked > 0, "no such network");
}

fn check(row: &ModelRow) {
    let golden = load(row);
    let classes = golden.cases[0].classes;
    let graph = row.architecture.graph(classes);

    let costs = graph.costs(224, 224).unwrap().total();
    assert_eq!(
        costs.parameters, golden.facts.parameters,
        "{}: parameters",
        row.name
    );
    if let Some(published) = golden.facts.published_gmacs {
        let gmacs = (costs.macs as f64 / 1e6).round() / 1e3;
        assert_eq!(gmacs, published, "{}: multiply-adds", row.name);
    }

    let params = Params::new(Some(Formula::of(&graph)), 0);
    let vb = params.var_builder(&Device::Cpu);
    let eager = Eager::new(graph.clone(), &vb).unwrap();
    assert!(params.report().is_complete() && params.report().unexpected.is_empty());
    check_training(row, &eager, &golden);
    let composed = Eager::new(graph.clone(), &vb).unwrap().composed();
    for (index, case) in golden.cases.iter().enumerate() {
        let Case {
            height,
            width,
            count,
            tolerance,
            ..
        } = *case;
        let nchw = images(count, height, width);
        let nhwc = channels_last(&nchw, [count, 3, height, width]);

        let batch = Tensor::from_vec(nchw, (count, 3, height, width), &Device::Cpu).unwrap();
        let logits = eager.forward(&batch).unwrap();
        let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let eager_error = relative_error(&logits, &case.logits);
        // As on Metal; one size is enough.
        let composed_error = (index == 0).then(|| {
            let logits = composed.forward(&batch).unwrap();
            let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            relative_error(&logits, &case.logits)
        });

        let plan_error = |exact: bool| {
            let options = Options::threads(2).exact(exact);
            let outputs = [graph.output()];
            let mut plan = Plan::compile(&graph, &vb, [height, width], &outputs, options).unwrap();
            plan.run(&nhwc, count);
            let batched = plan.output(0).to_vec();
            plan.run(&nhwc[..height * width * 3], 1);
            assert_eq!(
                plan.output(0),
                &batched[..classes],
                "{}: an image's logits depend on its batch",
                row.name
            );
            relative_error(&batched, &case.logits)
        };
        let (exact_error, fast_error) = (plan_error(true), plan_error(false));
        println!(
            "{} {height}x{width}: eager {eager_error:.1e}, plan {exact_error:.1e}, tolerated {tolerance:.1e}; fast {fast_error:.1e}",
            row.name
        );
        let check = |what: &str, error: f64, tolerance: f64| {
            assert!(error <= tolerance, "{}: {what} {error:e}", row.name);
        };
        check("eager", eager_error, tolerance);
        check("composed", composed_error.unwrap_or_default(), tolerance);
        check("exact plan", exact_error, tolerance);
        // Winograd's algorithm costs digits.
        check("plan", fast_error, tolerance.max(1e-4));
    }
}

#[test]
fn a_plan_gives_the_same_bits_with_any_number_of_threads() {
    for name in [
        "resnet18",
        "mobilenet_v1_025",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_g3_w1",
        "vit_tiny_patch16_224",
    ] {
        let graph = registry::find(name).unwrap().row.architecture.graph(10);
        let vb = Params::new(Some(Formula::of(&graph)), 0).var_builder(&Device::Cpu);
        let nhwc = channels_last(&images(5, 96, 96), [5, 3, 96, 96]);
        let run = |threads: usize| {
            let options = Options::threads(threads);
            let outputs = [graph.output()];
            let mut plan = Plan::compile(&graph, &vb, [96, 96], &outputs, options).unwrap();
            plan.run(&nhwc, 5);
            plan.output(0).to_vec()
        };
        let one = run(1);
        for threads in [2, 3, 8] {
            assert_eq!(one, run(threads), "{name}, {threads} threads");
        }
    }
}

/// A training-mode forward pass without dropout: logits and every running statistic.
fn check_training(row: &ModelRow, eager: &Eager, golden: &Golden) {
    const SIDE: usize = 96;
    let TrainingCase {
        count,
        logits: expected,
        statistics,
    } = &golden.training;
    let batch = images(*count, SIDE, SIDE);
    let batch = Tensor::from_vec(batch, (*count, 3, SIDE, SIDE), &Device::Cpu).unwrap();
    let mut training = Training::new(ChaCha8Rng::seed_from_u64(0));
    training.dropout = false;
    let mode = Mode::Train(&mut training);
    let logits = eager
        .forward_observed(&batch, mode, &mut |_, _| Ok(()))
        .unwrap();
    let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let error = relative_error(&logits, expected);
    let tolerance = (2.0 * golden.facts.training_float32_error).max(1e-4);
    assert!(error <= tolerance, "{}: training {error:e}", row.name);
    // A map sorted by name, as the golden's rows are.
    assert_eq!(training.running.len(), statistics.len(), "{}", row.name);
    let mut worst: f64 = 0.0;
    for ((name, value), golden) in training.running.iter().zip(statistics) {
        let value = value.to_vec1::<f32>().unwrap();
        let norm = value
            .iter()
            .map(|&v| f64::from(v).powi(2))
            .sum::<f64>()
            .sqrt();
        let [expected_norm, projections @ .., own_error] = golden.map(f64::from);
        let tolerance = (2.0 * own_error).max(1e-5);
        let mut check = |actual: f64, expected: f64| {
            let error = (actual - expected).abs() / expected_norm;
            worst = worst.max(error / tolerance);
            assert!(error <= tolerance, "{}: {name}: {error:e}", row.name);
        };
        check(norm, expected_norm);
        for (i, expected) in projections.into_iter().enumerate() {
            check(projection(&value, i), expected);
        }
    }
    println!(
        "{} training: {error:.1e}, tolerated {tolerance:.1e}; statistics at most {worst:.2} of what is tolerated",
        row.name
    );
}

/// The product with the `index`th of the vectors that stand for a large tensor.
fn projection(values: &[f32], index: usize) -> f64 {
    let vector = common::uniform(&format!("projection {index}"), values.len());
    let products = values.iter().zip(vector);
    products.map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
}

#[test]
fn attention_weights_can_be_read_out() {
    let row: Vec<f64> = serde_json::from_slice(&golden("attention.json")).unwrap();
    let (shape, norms) = row.split_at(4);
    let graph = registry::find("vit_b_32")
        .unwrap()
        .row
        .architecture
        .graph(1000);
    let layer = graph
        .find("encoder.layers.encoder_layer_3.self_attention")
        .unwrap();
    let vb = Params::new(Some(Formula::of(&graph)), 0).var_builder(&Device::Cpu);
    let eager = Eager::new(graph, &vb).unwrap();
    let batch = Tensor::from_vec(images(1, 224, 224), (1, 3, 224, 224), &Device::Cpu).unwrap();
    let mut weights = None;
    let mut observe = |id, observed: Observed| {
        if let (true, Observed::Attention(tensor)) = (id == layer, observed) {
            weights = Some(tensor.clone());
        }
        Ok(())
    };
    eager
        .forward_observed(&batch, Mode::Eval, &mut observe)
        .unwrap();
    let weights = weights.unwrap();
    let dims: Vec<f64> = weights.dims().iter().map(|&d| d as f64).collect();
    assert_eq!(dims, shape);
    let values = weights.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (i, expected) in norms[1..].iter().enumerate() {
        let error = (projection(&values, i) - expected).abs() / norms[0];
        assert!(error < 1e-5, "{error:e}");
    }
}

#[test]
fn resnet() {
    check_family("ResNet");
}

#[test]
fn resnext() {
    check_family("ResNeXt");
}

#[test]
fn mobilenet_v1() {
    check_family("MobileNetV1");
}

#[test]
fn mobilenet_v2() {
    check_family("MobileNetV2");
}

#[test]
fn mobilenet_v3() {
    check_family("MobileNetV3");
}

#[test]
fn shufflenet_v1() {
    check_family("ShuffleNetV1");
}

#[test]
fn shufflenet_v2() {
    check_family("ShuffleNetV2");
}

/// Half of the time goes into these: side by side they take half as long.
#[test]
fn vision_transformer_base() {
    check_rows(|row| is_transformer(row) && !is_large(row));
}

#[test]
fn vision_transformer_large() {
    check_rows(|row| is_transformer(row) && is_large(row));
}

fn is_transformer(row: &ModelRow) -> bool {
    row.architecture.family() == "Vision Transformer"
}

fn is_large(row: &ModelRow) -> bool {
    row.name.starts_with("vit_l")
}

#[test]
fn efficientnet_lite() {
    check_family("EfficientNet-Lite");
}

#[test]
fn every_family_has_its_test() {
    let tested = [
        "ResNet",
        "ResNeXt",
        "MobileNetV1",
        "MobileNetV2",
        "MobileNetV3",
        "ShuffleNetV1",
        "ShuffleNetV2",
        "Vision Transformer",
        "EfficientNet-Lite",
    ];
    for row in registry::all() {
        let family = row.architecture.family();
        assert!(tested.contains(&family), "{}: {family}", row.name);
    }
}

/// Multiply-adds as the papers (MobileNetV1, table 6; ShuffleNet, tables 1, 2 and 4) and the
/// authors' release of ShuffleNet give them, in millions.
#[test]
fn costs_are_those_of_the_papers() {
    for (name, published) in [
        ("mobilenet_v1_100", 569.0),
        ("mobilenet_v1_075", 325.0),
        ("mobilenet_v1_050", 149.0),
        ("mobilenet_v1_025", 41.0),
        ("shufflenet_g1_w1", 143.0),
        ("shufflenet_g2_w1", 140.0),
        ("shufflenet_g3_w1", 137.0),
        ("shufflenet_g4_w1", 133.0),
        ("shufflenet_g8_w1", 137.0),
        ("shufflenet_g1_wd2", 38.0),
        ("shufflenet_g3_wd2", 38.0),
        ("shufflenet_g1_wd4_stem12", 13.0),
        ("shufflenet_g3_wd4_stem12", 13.0),
        ("shufflenet_v1_x0_5_g3", 38.0),
        ("shufflenet_v1_x1_0_g3", 138.0),
        ("shufflenet_v1_x1_5_g3", 292.0),
        ("shufflenet_v1_x2_0_g3", 524.0),
        ("shufflenet_v1_x0_5_g8", 40.0),
        ("shufflenet_v1_x1_0_g8", 138.0),
        ("shufflenet_v1_x1_5_g8", 290.0),
        ("shufflenet_v1_x2_0_g8", 522.0),
    ] {
        let graph = registry::find(name).unwrap().row.architecture.graph(1000);
        let macs = graph.costs(224, 224).unwrap().total().macs as f64 / 1e6;
        println!("{name}: {macs:.1} million, published {published}");
        // Two percent, or what rounding to whole millions hides.
        let tolerance = f64::max(0.02 * published, 0.5);
        assert!((macs - published).abs() < tolerance, "{name}: {macs}");
    }
}
