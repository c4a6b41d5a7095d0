//! Training against PyTorch (tests/oracle/training.py): parameter gradients, optimisers, losses,
//! and whole curves.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{Device, Tensor, Var};
use common::{Formula, golden, images, repository, uniform};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sconce::data::{Decoder, normalize, resized_part};
use sconce::exec::cpu::Options;
use sconce::exec::params::Params;
use sconce::exec::{EagerStep, PlanStep, TrainingStep, Variables};
use sconce::graph::Graph;
use sconce::models::registry::{self, IMAGENET_CLASSES};
use sconce::models::{Interpolation, Preprocessing};
use sconce::train::{CrossEntropy, Group, Optimizer, Rule, Targets, Workers};

/// A network to train: its graph without dropout, and its variables by formula.
fn network(name: &str, classes: usize, device: &Device) -> (Graph, Variables) {
    let architecture = registry::find(name).unwrap().row.architecture;
    let graph = architecture.graph(classes).without_dropout();
    let vb = Params::new(Some(Formula::of(&graph)), 0).var_builder(device);
    let variables = Variables::new(&graph, &vb, &BTreeSet::new()).unwrap();
    (graph, variables)
}

/// Every way of training goes through the same tests.
#[derive(Clone, Copy)]
enum Way {
    Eager,
    /// As on Metal.
    Composed,
    Plan,
    /// On a device, or with its kernels on the CPU.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    Cuda,
}

impl Way {
    fn device(self) -> Device {
        match self {
            Way::Eager | Way::Composed | Way::Plan => Device::Cpu,
            #[cfg(any(feature = "cuda", feature = "emulated"))]
            Way::Cuda if cfg!(feature = "emulated") => Device::Cpu,
            #[cfg(any(feature = "cuda", feature = "emulated"))]
            Way::Cuda => Device::new_cuda(0).unwrap(),
        }
    }

    fn step(self, graph: Graph, variables: &Variables) -> Box<dyn TrainingStep> {
        match self {
            Way::Eager => Box::new(EagerStep::new(graph, variables).unwrap()),
            Way::Composed => Box::new(EagerStep::new(graph, variables).unwrap().composed()),
            Way::Plan => Box::new(PlanStep::new(graph, variables, Options::threads(2)).unwrap()),
            #[cfg(any(feature = "cuda", feature = "emulated"))]
            Way::Cuda => Box::new(
                sconce::exec::cuda::CudaStep::new(graph, variables, Default::default()).unwrap(),
            ),
        }
    }
}

/// Compares every parameter's gradient on one batch with PyTorch's in float64, for each network.
fn check_gradients<'a>(names: impl IntoIterator<Item = &'a str>, way: Way) {
    let failed: Vec<String> = names
        .into_iter()
        .flat_map(|n| far_gradients(n, way))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// The parameters of a network whose gradients are too far from PyTorch's.
fn far_gradients(name: &str, way: Way) -> Vec<String> {
    const SIDE: usize = 96;
    const BATCH: usize = 4;
    // TensorFlow's have a class for the background.
    let background =
        usize::from(name.starts_with("tf_mobilenet_v1") || name.starts_with("tf_mobilenet_v2"));
    let classes = IMAGENET_CLASSES + background;
    let device = way.device();
    let (graph, variables) = network(name, classes, &device);
    let mut step = way.step(graph, &variables);
    let batch = Tensor::from_vec(images(BATCH, SIDE, SIDE), (BATCH, 3, SIDE, SIDE), &device);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let logits = step.forward(&batch.unwrap(), &mut rng).unwrap();
    let at_logits = uniform("logits gradient", BATCH * classes).collect::<Vec<_>>();
    let at_logits = Tensor::from_vec(at_logits, logits.shape(), &device).unwrap();
    let names: Vec<String> = step.parameters().iter().map(|(n, _)| n.clone()).collect();
    let mut gradients = BTreeMap::new();
    step.backward(&at_logits, &mut |index, gradient| {
        let values = gradient.flatten_all()?.to_vec1::<f32>()?;
        assert!(gradients.insert(names[index].clone(), values).is_none());
        Ok(())
    })
    .unwrap();

    let bytes = golden(&format!("gradients/{name}.safetensors"));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let table = file.tensor("gradients").unwrap();
    let numbers: Vec<f64> = table
        .data()
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let (rows, _) = numbers.as_chunks::<10>();
    assert_eq!(rows.len(), gradients.len(), "{name}");
    let total = rows.iter().map(|r| r[0] * r[0]).sum::<f64>().sqrt();
    // Values of ±1 at random: a product with them is, on average, a third of the square.
    let longest = gradients.values().map(Vec::len).max().unwrap();
    let vectors = [0, 1, 2, 3, 4, 5, 6, 7]
        .map(|i| uniform(&format!("projection {i}"), longest).collect::<Vec<_>>());
    let (mut worst, mut failed) = ((0.0, String::new()), Vec::new());
    for ((parameter, values), row) in gradients.iter().zip(rows) {
        let [norm, projections @ .., own_error] = row;
        if *norm < 1e-6 * total {
            continue;
        }
        let squares = projections.iter().zip(&vectors).map(|(expected, vector)| {
            let products = values.iter().zip(vector);
            let product: f64 = products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            (product - expected).powi(2)
        });
        let error = (3.0 * squares.sum::<f64>() / projections.len() as f64).sqrt() / norm;
        // No float32 result is asked to be nearer than a few units in the last place.
        let ratio = error / (2.0 * own_error).max(5e-7);
        if ratio > worst.0 {
            worst = (ratio, parameter.clone());
        }
        if ratio > 1.0 {
            failed.push(format!(
                "{name} {parameter}: {error:.1e}, PyTorch {own_error:.1e}"
            ));
        }
    }
    println!(
        "{name}: at most {:.2} of what is tolerated ({})",
        worst.0, worst.1
    );
    failed
}

#[test]
fn the_plans_gradients_are_pytorchs() {
    check_gradients(registry::all().iter().map(|row| row.name), Way::Plan);
}

#[test]
fn candles_gradients_are_pytorchs() {
    check_gradients(registry::all().iter().map(|row| row.name), Way::Eager);
}

#[test]
fn composed_gradients_are_pytorchs() {
    let one_of_each = [
        "resnet18",
        "resnext50_32x4d",
        "mobilenet_v1_100",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_v1_x1_0_g3",
        "shufflenet_v2_x1_0",
        "efficientnet_lite0",
        "vit_tiny_patch16_224",
    ];
    check_gradients(one_of_each, Way::Composed);
}

#[test]
#[ignore = "takes five minutes"]
fn all_composed_gradients_are_pytorchs() {
    check_gradients(registry::all().iter().map(|row| row.name), Way::Composed);
}

#[cfg(any(feature = "cuda", feature = "emulated"))]
#[test]
fn cuda_gradients_are_pytorchs() {
    check_gradients(registry::all().iter().map(|row| row.name), Way::Cuda);
}

/// Batches of real photos, as the oracle cuts them.
fn photo_batches(steps: usize) -> Vec<(Tensor, Vec<usize>)> {
    const BATCH: usize = 16;
    const ALL_STEPS: usize = 30;
    let decoder = Decoder {
        max_pixels: 1 << 24,
        background: None,
        exact: false,
    };
    let photos = ["cat.png", "coffee.png", "photographer.png"]
        .map(|name| std::fs::read(repository("assets").join(name)).unwrap())
        .map(|bytes| decoder.decode(&bytes).unwrap());
    let preprocessing = Preprocessing::torchvision(256, 224);
    let draws: Vec<f64> = uniform("crops", 4 * ALL_STEPS * BATCH)
        .map(|v| (f64::from(v) + 1.0) / 2.0)
        .collect();
    let (draws, _) = draws.as_chunks::<4>();
    let batch = |draws: &[[f64; 4]]| {
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for [photo, side, left, top] in draws {
            let photo = (photo * 3.0) as usize;
            let image = &photos[photo];
            let side = (image.width.min(image.height) as f64 * (0.3 + 0.3 * side)) as usize;
            let left = (left * (image.width - side + 1) as f64) as usize;
            let top = (top * (image.height - side + 1) as f64) as usize;
            let right_half = usize::from(2 * left + side > image.width);
            let lower_half = usize::from(2 * top + side > image.height);
            let (columns, rows) = (left..left + side, top..top + side);
            let part = resized_part(image, columns, rows, 224, Interpolation::Bilinear);
            pixels.extend(normalize(&part, &preprocessing));
            labels.push(4 * photo + 2 * lower_half + right_half);
        }
        let images = Tensor::from_vec(pixels, (draws.len(), 224, 224, 3), &Device::Cpu);
        (images.unwrap().permute((0, 3, 1, 2)).unwrap(), labels)
    };
    draws.chunks(BATCH).take(steps).map(batch).collect()
}

/// Follows PyTorch's losses for so many steps of 16 photos: within twice the gap between its two memory
/// layouts, the largest of the curve. That gap is small by luck at single steps, where exact arithmetic would
/// not be within it (`exact` in tests/oracle/training.py), so that what is asked of each step is twice the
/// largest gap so far between six runs, of which four have images that differ in their last digits. Never
/// asked below a thousandth.
fn check_curve(name: &str, optimizer: &str, steps: usize, way: Way) {
    const CLASSES: usize = 12;
    type Curves = BTreeMap<String, BTreeMap<String, Vec<Vec<f64>>>>;
    let curves: Curves = serde_json::from_slice(&golden("curves.json")).unwrap();
    let [first, others @ ..] = &curves[name][optimizer][..] else {
        panic!("no runs")
    };
    let tolerance = |gap: f64| (2.0 * gap).max(1e-3);
    let device = way.device();
    let (graph, variables) = network(name, CLASSES, &device);
    let mut step = way.step(graph, &variables);
    let (rule, rate, weight_decay) = match optimizer {
        "sgd" => {
            let (momentum, nesterov) = (0.9, false);
            (Rule::Sgd { momentum, nesterov }, 0.01, 0.0)
        }
        _ => {
            let (betas, eps) = ((0.9, 0.999), 1e-8);
            (Rule::AdamW { betas, eps }, 1e-3, 0.05)
        }
    };
    let group = Group {
        rate_scale: 1.0,
        weight_decay,
    };
    let groups = vec![group; step.parameters().len()];
    let mut optimizer_state = Optimizer::new(rule, step.parameters(), groups).unwrap();
    let workers = Workers::new(2).unwrap();
    let (mut gap, mut layouts, mut largest): (f64, f64, f64) = (0.0, 0.0, 0.0);
    for (i, (images, labels)) in photo_batches(steps).iter().enumerate() {
        let logits = step
            .forward(
                &images.to_device(&device).unwrap(),
                &mut ChaCha8Rng::seed_from_u64(0),
            )
            .unwrap();
        let targets = Targets::Classes(labels);
        let (loss, at_logits) = CrossEntropy::default().loss(&logits, targets).unwrap();
        let mut gradients = vec![None; step.parameters().len()];
        step.backward(&at_logits, &mut |index, gradient| {
            gradients[index] = Some(gradient);
            Ok(())
        })
        .unwrap();
        let gradients: Vec<Tensor> = gradients.into_iter().map(Option::unwrap).collect();
        optimizer_state
            .step(step.parameters(), &gradients, rate, 1.0, &workers)
            .unwrap();
        let expected = first[i];
        let distance = |loss: f64| (loss - expected).abs() / expected;
        layouts = layouts.max(distance(others[0][i]));
        gap = others.iter().map(|o| distance(o[i])).fold(gap, f64::max);
        let error = distance(loss);
        largest = largest.max(error);
        let most = tolerance(gap);
        println!("{name} {optimizer} {i}: {loss:.5}, {expected:.5}, {error:.1e} of {most:.1e}");
        assert!(error <= most, "{name} {optimizer}, step {i}: {error:e}");
    }
    let most = tolerance(layouts);
    println!("{name} {optimizer}: {largest:.1e} of {most:.1e}");
    assert!(largest <= most, "{name} {optimizer}: {largest:e}");
}

const CURVES: [&str; 4] = [
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "vit_tiny_patch16_224",
];

#[test]
#[ignore = "takes an hour: candle's convolutions are slow backwards"]
fn candles_losses_are_pytorchs_for_thirty_steps() {
    for name in CURVES {
        for optimizer in ["sgd", "adamw"] {
            check_curve(name, optimizer, 30, Way::Eager);
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulated"))]
#[test]
#[cfg_attr(feature = "emulated", ignore = "takes hours on a CPU")]
fn cuda_losses_are_pytorchs_for_thirty_steps() {
    for name in CURVES {
        for optimizer in ["sgd", "adamw"] {
            check_curve(name, optimizer, 30, Way::Cuda);
        }
    }
}

#[test]
fn the_plans_losses_are_pytorchs_for_thirty_steps() {
    for name in CURVES {
        for optimizer in ["sgd", "adamw"] {
            check_curve(name, optimizer, 30, Way::Plan);
        }
    }
}

#[test]
fn optimizers_are_pytorchs() {
    let values: BTreeMap<String, Vec<Vec<f64>>> =
        serde_json::from_slice(&golden("optimizers.json")).unwrap();
    let sgd = |momentum, nesterov| Rule::Sgd { momentum, nesterov };
    let adamw = |betas, eps| Rule::AdamW { betas, eps };
    let cases = [
        ("sgd", sgd(0.0, false), 0.1, 0.0),
        ("momentum", sgd(0.9, false), 0.1, 0.01),
        ("nesterov", sgd(0.9, true), 0.1, 0.01),
        ("adamw", adamw((0.9, 0.999), 1e-8), 0.01, 0.05),
        ("adamw_betas", adamw((0.8, 0.95), 1e-6), 0.02, 0.1),
    ];
    for (name, rule, rate, weight_decay) in cases {
        let tensor = |name: &str| {
            let values: Vec<f32> = uniform(name, 7).collect();
            Tensor::new(values, &Device::Cpu).unwrap()
        };
        let parameter = Var::from_tensor(&tensor("parameter")).unwrap();
        let parameters = [("p".to_string(), parameter)];
        let group = Group {
            rate_scale: 0.5,
            weight_decay,
        };
        let workers = Workers::new(3).unwrap();
        let mut optimizer = Optimizer::new(rule, &parameters, vec![group]).unwrap();
        for (step, expected) in values[name].iter().enumerate() {
            if step == 4 {
                // As a resumed run would.
                let state = optimizer.state();
                optimizer = Optimizer::new(rule, &parameters, vec![group]).unwrap();
                let read = |name: &str, _: &Tensor| state[name].copy();
                optimizer.restore(4, read).unwrap();
            }
            // The rate of twice the size makes up for the group's scale, and so does the
            // gradient's.
            let rate = 2.0 * rate * (1.0 - step as f64 / 20.0);
            let gradient = (tensor(&format!("gradient {step}")) * 4.0).unwrap();
            optimizer
                .step(&parameters, &[gradient], rate, 0.25, &workers)
                .unwrap();
            let actual = parameters[0].1.to_vec1::<f32>().unwrap();
            for (a, e) in actual.iter().zip(expected) {
                let error = (f64::from(*a) - e).abs();
                assert!(error <= 5e-7, "{name}, step {step}: {a} {e}");
            }
        }
    }
}

#[derive(serde::Deserialize)]
struct LossCase {
    targets: String,
    smoothing: f64,
    weighted: bool,
    loss: f64,
    gradient: Vec<f64>,
}

#[test]
fn losses_are_pytorchs() {
    let cases: Vec<LossCase> = serde_json::from_slice(&golden("losses.json")).unwrap();
    assert_eq!(cases.len(), 8);
    let logits: Vec<f32> = uniform("logits", 20).map(|v| v * 3.0).collect();
    let logits = Tensor::from_vec(logits, (5, 4), &Device::Cpu).unwrap();
    let labels = [0, 3, 1, 1, 2];
    let soft: Vec<f32> = uniform("soft", 20)
        .collect::<Vec<_>>()
        .chunks(4)
        .flat_map(|row| {
            let sum: f32 = row.iter().map(|v| v.exp()).sum();
            row.iter().map(move |v| v.exp() / sum).collect::<Vec<_>>()
        })
        .collect();
    for case in cases {
        let loss = CrossEntropy {
            label_smoothing: case.smoothing,
            class_weights: case.weighted.then(|| vec![0.5, 2.0, 1.0, 0.25]),
        };
        let targets = match case.targets.as_str() {
            "hard" => Targets::Classes(&labels),
            _ => Targets::Distributions(&soft),
        };
        let (value, gradient) = loss.loss(&logits, targets).unwrap();
        let what = format!("{} {} {}", case.targets, case.smoothing, case.weighted);
        assert!(
            (value - case.loss).abs() < 1e-6 * case.loss,
            "{what}: {value}"
        );
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (a, e) in gradient.iter().zip(&case.gradient) {
            assert!((f64::from(*a) - e).abs() < 1e-7, "{what}: {a} {e}");
        }
    }
}
