//! The plan against candle's own way through the same network.

use std::collections::{BTreeMap, BTreeSet};

use rand::{RngExt, SeedableRng};

use super::*;
use crate::exec::EagerStep;
use crate::exec::params::Params;
use crate::models::registry;

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Random values for everything, so that no norm is the identity and no head is zero.
fn variables(graph: &Graph, frozen: &BTreeSet<String>, seed: u64) -> Variables {
    let vb = Params::new(None, seed).var_builder(&Device::Cpu);
    let variables = Variables::new(graph, &vb, frozen).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for (name, variable) in variables.parameters() {
        let noise = (random(&mut rng, variable.dims()) * 0.2).unwrap();
        let value = if variable.rank() == 1 {
            (variable.as_tensor() + noise).unwrap()
        } else if name.contains("head") || name.contains("token") {
            noise
        } else {
            continue;
        };
        variable.set(&value).unwrap();
    }
    variables
}

struct Pass {
    logits: Vec<f32>,
    gradients: BTreeMap<String, Vec<f32>>,
    buffers: BTreeMap<String, Vec<f32>>,
}

fn pass(step: &mut dyn TrainingStep, images: &Tensor, gradient: &Tensor) -> Result<Pass> {
    let names: Vec<String> = step.parameters().iter().map(|(n, _)| n.clone()).collect();
    let logits = step.forward(images, &mut ChaCha8Rng::seed_from_u64(5))?;
    let mut gradients = BTreeMap::new();
    step.backward(gradient, &mut |index, tensor| {
        let old = gradients.insert(names[index].clone(), tensor.flatten_all()?.to_vec1()?);
        assert!(old.is_none(), "{} comes twice", names[index]);
        Ok(())
    })?;
    assert_eq!(
        gradients.len(),
        names.len(),
        "every parameter has a gradient"
    );
    let values = |(name, var): &(String, Var)| Ok((name.clone(), var.to_vec1()?));
    Ok(Pass {
        logits: logits.flatten_all()?.to_vec1()?,
        gradients,
        buffers: step.buffers().iter().map(values).collect::<Result<_>>()?,
    })
}

fn norm(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|&v| f64::from(v).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let differences: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    norm(&differences)
}

/// The largest relative error of a tensor, and its name.
fn worst(
    actual: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) -> (f64, String) {
    let total = expected
        .values()
        .map(|v| norm(v).powi(2))
        .sum::<f64>()
        .sqrt();
    let error = |(name, expected): (&String, &Vec<f32>)| {
        let size = norm(expected);
        if size < 1e-6 * total {
            return (0.0, name.clone());
        }
        (distance(&actual[name], expected) / size, name.clone())
    };
    let errors = expected.iter().map(error);
    errors
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap_or_default()
}

fn compare(name: &str, count: usize, size: [usize; 2], frozen: &[&str], tolerance: f64) {
    let graph = registry::find(name).unwrap().row.architecture.graph(7);
    let frozen: BTreeSet<String> = graph
        .parameters()
        .map(|p| p.name.clone())
        .filter(|n| frozen.iter().any(|f| n.starts_with(f)))
        .collect();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let images = random(&mut rng, &[count, 3, size[0], size[1]]);
    let gradient = random(&mut rng, &[count, 7]);
    let expected = {
        let variables = variables(&graph, &frozen, 1);
        let mut eager = EagerStep::new(graph.clone(), &variables).unwrap();
        pass(&mut eager, &images, &gradient).unwrap()
    };
    let variables = variables(&graph, &frozen, 1);
    let options = Options::threads(2);
    let mut plan = PlanStep::new(graph.clone(), &variables, options).unwrap();
    let actual = pass(&mut plan, &images, &gradient).unwrap();
    let logits = distance(&actual.logits, &expected.logits) / norm(&expected.logits);
    let (error, worst_name) = worst(&actual.gradients, &expected.gradients);
    let (buffers, buffer_name) = worst(&actual.buffers, &expected.buffers);
    println!(
        "{name}: logits {logits:.1e}, gradients {error:.1e} ({worst_name}), buffers {buffers:.1e} ({buffer_name})"
    );
    assert!(logits < 1e-4, "{name}: logits {logits}");
    assert!(error < tolerance, "{name}: {worst_name} {error}");
    assert!(buffers < 1e-4, "{name}: {buffer_name} {buffers}");
}

macro_rules! networks {
    ($($test:ident: $name:literal, $count:literal, $size:expr;)*) => {
        $(#[test] fn $test() { compare($name, $count, $size, &[], 2e-2); })*
    };
}

networks! {
    resnet18: "resnet18", 3, [64, 48];
    resnext50: "resnext50_32x4d", 4, [128, 96];
    mobilenet_v1: "mobilenet_v1_100", 3, [64, 64];
    mobilenet_v2: "mobilenet_v2", 4, [128, 96];
    mobilenet_v3: "mobilenet_v3_small", 3, [64, 64];
    shufflenet_v1: "shufflenet_v1_x1_0_g3", 3, [64, 64];
    shufflenet_v2: "shufflenet_v2_x1_0", 3, [64, 64];
    efficientnet_lite: "efficientnet_lite0", 3, [64, 64];
    vit: "vit_tiny_patch16_224", 3, [64, 48];
}

#[test]
#[ignore]
fn speed() {
    let name = std::env::var("NET").unwrap();
    let count: usize = std::env::var("BATCH").map_or(16, |v| v.parse().unwrap());
    let threads: usize = std::env::var("THREADS").map_or(2, |v| v.parse().unwrap());
    let graph = registry::find(&name).unwrap().row.architecture.graph(1000);
    let variables = variables(&graph, &BTreeSet::new(), 1);
    let mut plan = PlanStep::new(graph.clone(), &variables, Options::threads(threads)).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let images = random(&mut rng, &[count, 3, 224, 224]);
    let gradient = random(&mut rng, &[count, 1000]);
    let mut times = Vec::new();
    let mut g = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..4 {
        let s = Instant::now();
        plan.forward(&images, &mut g).unwrap();
        let f = s.elapsed();
        plan.backward(&gradient, &mut |_, _| Ok(())).unwrap();
        times.push((s.elapsed().as_secs_f64() * 1e3, f.as_secs_f64() * 1e3));
    }
    println!(
        "{name}: {times:.1?} arena {} MB",
        plan.plans[0]
            .1
            .lowered
            .places
            .iter()
            .map(|(a, b)| a + b)
            .max()
            .unwrap()
            * 4
            >> 20
    );
    let mut by: BTreeMap<&str, f64> = BTreeMap::new();
    let verbose = std::env::var("V").is_ok();
    for (n, label, t) in plan.timings() {
        *by.entry(label).or_default() += t.as_secs_f64() * 250.0;
        if verbose && t.as_secs_f64() * 250.0 > 1.0 {
            println!("  {n:40} {label:30} {:.2}", t.as_secs_f64() * 250.0);
        }
    }
    for (label, t) in by {
        println!("  {label:32} {t:8.1}");
    }
}
