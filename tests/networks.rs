//! Every network of the registry against its reference implementation (tests/oracle/networks.py),
//! through both executors.

mod common;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use common::{Formula, channels_last, f32_tensor, golden, images, relative_error};
use sconce::exec::cpu::Plan;
use sconce::exec::eager::Eager;
use sconce::exec::params::Params;
use sconce::models::registry::{self, ModelRow};

#[derive(serde::Deserialize)]
struct Facts {
    parameters: usize,
    float32_error: BTreeMap<String, f64>,
    published_gmacs: Option<f64>,
}

struct Golden {
    facts: Facts,
    cases: Vec<Case>,
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
    Golden { facts, cases }
}

/// Checks the rows of one family, so that families run side by side.
fn check_family(family: &str) {
    let rows = registry::all()
        .iter()
        .filter(|r| r.architecture.family() == family);
    let mut checked = 0;
    for row in rows {
        check(row);
        checked += 1;
    }
    assert!(checked > 0, "no network of family {family}");
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
    for case in &golden.cases {
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

        let mut plan = Plan::compile(&graph, &vb, [height, width], &[graph.output()], 2).unwrap();
        plan.run(&nhwc, count);
        let plan_error = relative_error(plan.output(0, count), &case.logits);
        let batched = plan.output(0, count)[..classes].to_vec();
        plan.run(&nhwc[..height * width * 3], 1);
        assert_eq!(
            plan.output(0, 1),
            batched,
            "{}: an image's logits depend on its batch",
            row.name
        );

        println!(
            "{} {height}x{width}: eager {eager_error:.1e}, plan {plan_error:.1e}, tolerated {tolerance:.1e}",
            row.name
        );
        assert!(
            eager_error <= tolerance,
            "{}: eager {eager_error:e}",
            row.name
        );
        assert!(plan_error <= tolerance, "{}: plan {plan_error:e}", row.name);
    }
}

#[test]
fn resnet() {
    check_family("ResNet");
}

#[test]
fn mobilenet_v2() {
    check_family("MobileNetV2");
}
