//! Every way of training against candle's through the same network, in float64: the plan, and the CUDA
//! device's steps with their kernels run on the CPU.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::var_builder::VarBuilder;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cpu::{Options, Plan};
use super::cuda::{CudaNetwork, CudaStep};
use super::eager::{Eager, Mode, Observed};
use super::params::Params;
use super::{EagerStep, Others, PlanStep, Precision, TrainingStep, Variables};
use crate::graph::{Activation, Builder, Conv2d, Graph, InitScheme, Norm, Op, Padding, Pool2d};
use crate::models::registry;
use crate::ranks::{Collectives, Messages, Ranks};

/// A way of training.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Plan,
    Cuda,
}

/// Where CUDA's kernels are tried: on a device where the build has them, else on the CPU.
fn cuda_device() -> Device {
    match cfg!(feature = "cuda") {
        true => Device::new_cuda(0).unwrap(),
        false => Device::Cpu,
    }
}

impl Way {
    fn device(self) -> Device {
        match self {
            Way::Plan => Device::Cpu,
            Way::Cuda => cuda_device(),
        }
    }

    fn step(self, graph: &Graph, variables: &Variables, threads: usize) -> Box<dyn TrainingStep> {
        let graph = graph.clone();
        match self {
            Way::Plan => {
                Box::new(PlanStep::new(graph, variables, Options::threads(threads)).unwrap())
            }
            Way::Cuda => Box::new(CudaStep::new(graph, variables, Precision::F32).unwrap()),
        }
    }
}

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Random values for everything, so that no norm is the identity and no head is zero.
fn variables(graph: &Graph, frozen: &BTreeSet<String>, seed: u64, device: &Device) -> Variables {
    let vb = Params::new(None, seed).var_builder(&Device::Cpu);
    let begun = Variables::new(graph, &vb, &BTreeSet::new()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut tensors = std::collections::HashMap::new();
    for (name, variable) in begun.parameters().iter().chain(begun.buffers()) {
        let mut value = variable.as_tensor().copy().unwrap();
        let noise = (random(&mut rng, variable.dims()) * 0.2).unwrap();
        if variable.rank() == 1 {
            value = (value + noise).unwrap();
        } else if name.contains("head") || name.contains("token") {
            value = noise;
        }
        tensors.insert(name.clone(), value);
    }
    let vb = VarBuilder::from_tensors(tensors, DType::F32, device);
    Variables::new(graph, &vb, frozen).unwrap()
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}

struct Pass {
    logits: Vec<f32>,
    gradients: BTreeMap<String, Vec<f32>>,
    buffers: BTreeMap<String, Vec<f32>>,
}

fn pass(step: &mut dyn TrainingStep, images: &Tensor, gradient: &Tensor) -> Result<Pass> {
    let names: Vec<String> = step.parameters().iter().map(|(n, _)| n.clone()).collect();
    let device = step.parameters()[0].1.device().clone();
    let [images, gradient] = [images.to_device(&device)?, gradient.to_device(&device)?];
    let logits = step.forward(&images, &mut ChaCha8Rng::seed_from_u64(5))?;
    let mut gradients = BTreeMap::new();
    step.backward(&gradient, &mut |index, tensor| {
        let old = gradients.insert(names[index].clone(), values(&tensor)?);
        assert!(old.is_none(), "{} comes twice", names[index]);
        Ok(())
    })?;
    assert_eq!(
        gradients.len(),
        names.len(),
        "every parameter has a gradient"
    );
    let named = |(name, var): &(String, Var)| Ok((name.clone(), values(var)?));
    Ok(Pass {
        logits: values(&logits)?,
        gradients,
        buffers: step.buffers().iter().map(named).collect::<Result<_>>()?,
    })
}

fn size_of(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|&v| f64::from(v).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let differences: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    size_of(&differences)
}

/// The largest relative error of a tensor, and its name. Norms make some gradients vanish (of a
/// bias or a scale before them): what rounding leaves of those is held against a hundredth of all.
fn worst(
    actual: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) -> (f64, String) {
    let squares = expected.values().map(|v| size_of(v).powi(2));
    let floor = 1e-2 * squares.sum::<f64>().sqrt();
    let error = |(name, expected): (&String, &Vec<f32>)| {
        let size = size_of(expected).max(floor);
        (distance(&actual[name], expected) / size, name.clone())
    };
    let errors = expected.iter().map(error);
    errors
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap_or_default()
}

fn compare(way: Way, name: &str, count: usize, size: [usize; 2], frozen: &[&str]) {
    let graph = registry::find(name).unwrap().row.architecture.graph(7);
    // Behind a ReLU, a digit can decide whether a value's gradient is there or not: with other
    // images the same networks are 1e-5 or 5e-2 off. Networks without corners are held to less in
    // `operations_of_random_shapes`.
    let gradients = 2e-2;
    let frozen = parameters_of(&graph, frozen);
    compare_graphs(way, name, &graph, count, size, &frozen, [1e-4, gradients]);
}

/// Names of the parameters that begin with one of these.
fn parameters_of(graph: &Graph, parts: &[&str]) -> BTreeSet<String> {
    let names = graph.parameters().map(|p| p.name.clone());
    names
        .filter(|n| parts.iter().any(|part| n.starts_with(part)))
        .collect()
}

/// Names of all that belongs to batch norms.
fn norms(graph: &Graph) -> BTreeSet<String> {
    let nodes = graph.nodes().iter();
    let norms = nodes.filter(|n| matches!(n.op, Op::BatchNorm { .. }));
    norms
        .flat_map(|n| n.parameters.iter().map(|p| p.name.clone()))
        .collect()
}

/// One pass against one of candle's in float64.
fn compare_graphs(
    way: Way,
    name: &str,
    graph: &Graph,
    count: usize,
    size: [usize; 2],
    frozen: &BTreeSet<String>,
    [forward, backward]: [f64; 2],
) {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let images = random(&mut rng, &[count, 3, size[0], size[1]]);
    let gradient = random(&mut rng, &[count, 7]);
    let eager = |dtype: DType| {
        let narrow = variables(graph, frozen, 1, &Device::Cpu);
        let wide =
            |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.to_dtype(dtype).unwrap());
        let tensors = narrow.tensors().iter().map(wide).collect();
        let vb = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
        let variables = Variables::new(graph, &vb, frozen).unwrap();
        let mut eager = EagerStep::new(graph.clone(), &variables).unwrap();
        let [images, gradient] = [&images, &gradient].map(|t| t.to_dtype(dtype).unwrap());
        pass(&mut eager, &images, &gradient).unwrap()
    };
    let expected = eager(DType::F64);
    let run = |threads: usize| {
        let variables = variables(graph, frozen, 1, &way.device());
        let mut step = way.step(graph, &variables, threads);
        pass(step.as_mut(), &images, &gradient).unwrap()
    };
    let actual = run(2);
    let logits = distance(&actual.logits, &expected.logits) / size_of(&expected.logits);
    let (error, worst_name) = worst(&actual.gradients, &expected.gradients);
    let (buffers, buffer_name) = worst(&actual.buffers, &expected.buffers);
    assert!(logits < forward, "{name}: logits {logits}");
    // The device sums as candle does, so it is held to candle's own error where that is the larger.
    let backward = if way == Way::Cuda && error > backward {
        2.0 * worst(&eager(DType::F32).gradients, &expected.gradients).0
    } else {
        backward
    };
    assert!(
        error < backward,
        "{name}: {worst_name} {error} > {backward}"
    );
    assert!(buffers < forward, "{name}: {buffer_name} {buffers}");
    let other = run(3);
    assert_eq!(actual.logits, other.logits, "{name}: other bits");
    assert_eq!(actual.gradients, other.gradients, "{name}: other bits");
}

macro_rules! networks {
    ($way:expr; $($test:ident: $name:literal, $count:literal, $size:expr;)*) => {
        $(#[test] fn $test() { compare($way, $name, $count, $size, &[]); })*
    };
}

macro_rules! tests_of {
    ($name:ident, $way:expr) => {
        mod $name {
            use super::*;

            const WAY: Way = $way;

            networks! {
                WAY;
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
            fn frozen_stages() {
                super::frozen_stages(WAY);
            }

            #[test]
            fn norms_on_stored_statistics() {
                super::norms_on_stored_statistics(WAY);
            }

            #[test]
            fn wide_convolutions() {
                super::wide_convolutions(WAY);
            }

            #[test]
            fn maps_smaller_than_kernels() {
                super::maps_smaller_than_kernels(WAY);
            }

            #[test]
            fn operations_of_random_shapes() {
                super::operations_of_random_shapes(WAY);
            }
        }
    };
}

tests_of!(plan, Way::Plan);
#[cfg(target_os = "linux")]
tests_of!(cuda, Way::Cuda);

/// Which the plan leaves to the one of inference.
fn frozen_stages(way: Way) {
    let stem = ["conv1", "bn1", "layer1", "layer2"];
    compare(way, "resnet18", 3, [64, 64], &stem);
    compare(way, "resnet18", 3, [64, 64], &["conv1", "bn1", "layer"]);
    // Norms alone, and a convolution in the middle.
    compare(
        way,
        "resnet18",
        3,
        [64, 64],
        &["bn1", "layer1.0.bn", "layer2.0.conv1"],
    );
    // Without corners, so that no digit decides over a gradient.
    let graph = registry::find("mobilenet_v2").unwrap();
    let graph = graph.row.architecture.graph(7);
    let graph = graph.with_activations(Activation::Gelu);
    let blocks: Vec<String> = (0..16).map(|i| format!("features.{i}.")).collect();
    let blocks: Vec<&str> = blocks.iter().map(String::as_str).collect();
    let frozen = parameters_of(&graph, &blocks);
    // Larger maps: norms over a dozen values lose digits.
    let size = [128, 96];
    compare_graphs(way, "mobilenet_v2", &graph, 4, size, &frozen, [1e-4, 2e-3]);
    let first = [
        "class_token",
        "conv_proj",
        "encoder.layers.encoder_layer_0",
        "encoder.pos",
    ];
    compare(way, "vit_tiny_patch16_224", 2, [32, 32], &first);
}

/// Which become part of the layers.
fn norms_on_stored_statistics(way: Way) {
    for (name, size) in [
        ("resnet18", [64, 48]),
        ("mobilenet_v2", [64, 64]),
        ("mobilenet_v3_small", [64, 64]),
        ("shufflenet_v1_x1_0_g3", [64, 64]),
        ("shufflenet_v2_x1_0", [64, 64]),
    ] {
        let graph = registry::find(name).unwrap().row.architecture.graph(7);
        compare_graphs(way, name, &graph, 3, size, &norms(&graph), [1e-4, 1e-3]);
    }
}

/// 3x3 convolutions of many channels over few pixels, each as `exec/train/conv/wide.rs` has it or just beyond.
fn wide_convolutions(way: Way) {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for case in 0..8 {
        let mut b = Builder::new(InitScheme::FanIn);
        let [first, second, third] = [(); 3].map(|()| 16 * rng.random_range(11..24));
        let x = b.input();
        let x = b.conv("first", Conv2d::new(3, first, 3), x);
        let x = b.activation("first.act", Activation::Gelu, x);
        let conv = Conv2d::new(first, second, 3);
        let x = match case % 2 {
            0 => b.conv_norm("second", "second.norm", conv, Norm::PYTORCH, x),
            _ => b.conv("second", conv.bias(), x),
        };
        let x = b.activation("second.act", Activation::HardSwish, x);
        let conv = Conv2d::new(second, third, 3);
        let x = b.conv_norm("third", "third.norm", conv, Norm::PYTORCH, x);
        let x = b.activation("third.act", Activation::Gelu, x);
        let x = b.add("pool", Op::GlobalAvgPool, &[x]);
        let x = b.add("flatten", Op::Flatten, &[x]);
        b.linear("head", third, 7, x);
        let graph = b.finish();
        let size = [rng.random_range(6..16), rng.random_range(6..16)];
        let count = rng.random_range(2..12);
        let name = format!("case {case}, {count} x {size:?}, {first}, {second}, {third}");
        let frozen = match case {
            0..4 => BTreeSet::new(),
            4 => norms(&graph),
            5 => parameters_of(&graph, &["second"]),
            6 => parameters_of(&graph, &["first", "third"]),
            _ => parameters_of(&graph, &["first", "second.weight"]),
        };
        compare_graphs(way, &name, &graph, count, size, &frozen, [1e-4, 3e-4]);
    }
}

fn maps_smaller_than_kernels(way: Way) {
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    for case in 0..40 {
        let (graph, size) = over_a_small_map(&mut rng);
        let count = rng.random_range(2..6);
        let name = format!("case {case}, {count} x {size:?}, {:?}", graph.nodes());
        let frozen = match case % 3 {
            0 => parameters_of(&graph, &["first"]),
            _ => BTreeSet::new(),
        };
        compare_graphs(way, &name, &graph, count, size, &frozen, [1e-4, 3e-4]);
    }
}

#[test]
fn inference_over_maps_smaller_than_kernels() {
    let mut rng = ChaCha8Rng::seed_from_u64(15);
    for case in 0..120 {
        let (graph, size) = over_a_small_map(&mut rng);
        let count = rng.random_range(1..6);
        let variables = variables(&graph, &BTreeSet::new(), 1, &Device::Cpu);
        let tensors = variables.tensors().clone().into_iter().collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let images = random(&mut rng, &[count, 3, size[0], size[1]]);
        let eager = Eager::new(graph.clone(), &vb).unwrap();
        let expected = values(&eager.forward(&images).unwrap()).unwrap();
        let options = Options::threads(2);
        let mut plan = Plan::compile(&graph, &vb, size, &[graph.output()], options).unwrap();
        let images = images.permute((0, 2, 3, 1)).unwrap();
        plan.run(&values(&images.contiguous().unwrap()).unwrap(), count);
        let error = distance(plan.output(0), &expected) / size_of(&expected);
        let name = format!("case {case}, {count} x {size:?}, {:?}", graph.nodes());
        assert!(error < 1e-5, "{name}: {error}");
    }
}

/// Convolutions of every kind one after another, and images of a few pixels.
fn over_a_small_map(rng: &mut ChaCha8Rng) -> (Graph, [usize; 2]) {
    let mut b = Builder::new(InitScheme::FanIn);
    let channels = [32, 48, 264][rng.random_range(0..3)];
    let x = b.input();
    let x = b.conv("first", Conv2d::new(3, channels, 3), x);
    let x = b.activation("first.act", Activation::Gelu, x);
    let kernel = rng.random_range(2..6);
    let conv = Conv2d {
        stride: rng.random_range(1..3),
        groups: [1, 4, channels / 8, channels][rng.random_range(0..4)],
        bias: rng.random(),
        padding: match rng.random() {
            true => Padding::Same,
            false => Padding::Symmetric(kernel / 2),
        },
        ..Conv2d::new(channels, channels, kernel)
    };
    let x = b.conv("second", conv, x);
    let x = b.activation("second.act", Activation::HardSwish, x);
    let x = b.conv("third", Conv2d::new(channels, channels, 3), x);
    let x = b.activation("third.act", Activation::Gelu, x);
    let x = b.add("pool", Op::GlobalAvgPool, &[x]);
    let x = b.add("flatten", Op::Flatten, &[x]);
    b.linear("head", channels, 7, x);
    (b.finish(), [0; 2].map(|_| rng.random_range(1..5)))
}

/// Networks of one operation after another, with shapes that nobody would choose. Activations are
/// smooth, so that no digit decides over a gradient.
fn operations_of_random_shapes(way: Way) {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for case in 0..60 {
        let graph = random_graph(&mut rng);
        let size = [rng.random_range(9..30), rng.random_range(9..30)];
        let count = rng.random_range(2..6);
        let ops: Vec<String> = graph
            .nodes()
            .iter()
            .map(|n| format!("{:?}", n.op))
            .collect();
        let name = format!("case {case}, {count} x {size:?}, {}", ops.join("; "));
        let frozen = match case % 3 {
            0 => norms(&graph),
            _ => BTreeSet::new(),
        };
        compare_graphs(way, &name, &graph, count, size, &frozen, [1e-4, 3e-4]);
    }
}

fn random_graph(rng: &mut ChaCha8Rng) -> Graph {
    let mut b = Builder::new(InitScheme::FanIn);
    let mut x = b.input();
    let mut channels = 3;
    for layer in 0..rng.random_range(1..4) {
        let activation = |rng: &mut ChaCha8Rng| {
            [Activation::HardSwish, Activation::Gelu][rng.random_range(0..2)]
        };
        let kernel = rng.random_range(1..5);
        let groups = [1, 2, 4, 8][rng.random_range(0..4)];
        let depthwise = layer > 0 && rng.random_range(0..3) == 0;
        let outputs = match depthwise {
            true => channels,
            false => 8 * rng.random_range(1..7),
        };
        let conv = Conv2d {
            stride: rng.random_range(1..3),
            groups: match (layer, depthwise) {
                (0, _) => 1,
                (_, true) => channels,
                (_, false) => groups,
            },
            bias: rng.random(),
            padding: match rng.random_range(0..3) {
                0 => Padding::Same,
                1 => Padding::Symmetric(kernel / 2),
                _ => Padding::Symmetric(rng.random_range(0..kernel)),
            },
            ..Conv2d::new(channels, outputs, kernel)
        };
        // Winograd's tiles.
        let conv = match rng.random_range(0..4) {
            0 if layer > 0 && channels % 16 == 0 && channels >= 32 => Conv2d::new(channels, 48, 3),
            _ => conv,
        };
        channels = conv.out_channels;
        let name = |part: &str| format!("{layer}.{part}");
        x = if rng.random() {
            // A bias that a norm takes away again has a gradient of nothing but rounding.
            let conv = Conv2d {
                bias: false,
                ..conv
            };
            b.conv_norm(name("conv"), name("norm"), conv, Norm::PYTORCH, x)
        } else {
            b.conv(name("conv"), conv, x)
        };
        if rng.random() {
            x = b.activation(name("act"), activation(rng), x);
        }
        match rng.random_range(0..7) {
            0 => {
                let pool = Pool2d {
                    kernel: 3,
                    stride: rng.random_range(1..3),
                    padding: rng.random_range(0..2),
                };
                let max: bool = rng.random();
                let op = if max {
                    Op::MaxPool(pool)
                } else {
                    Op::AvgPool(pool)
                };
                x = b.add(name("pool"), op, &[x]);
            }
            1 => {
                let conv = Conv2d::new(channels, channels, 3);
                let y = b.conv_norm(name("c"), name("n"), conv, Norm::PYTORCH, x);
                x = b.add(name("sum"), Op::Add, &[x, y]);
            }
            2 => {
                let gate = b.add(name("mean"), Op::GlobalAvgPool, &[x]);
                let gate = b.conv(name("fc"), Conv2d::new(channels, channels, 1).bias(), gate);
                let gate = b.activation(name("gate"), Activation::HardSigmoid, gate);
                x = b.add(name("scale"), Op::Multiply, &[x, gate]);
            }
            3 => {
                let half = channels / 2;
                let slice = |start, length| Op::Slice { start, length };
                let left = b.add(name("left"), slice(0, half), &[x]);
                let right = b.add(name("right"), slice(half, half), &[x]);
                let right = b.conv_norm(
                    name("c"),
                    name("n"),
                    Conv2d::new(half, half, 1),
                    Norm::PYTORCH,
                    right,
                );
                let both = b.add(name("both"), Op::Concat, &[left, right]);
                x = b.add(name("shuffle"), Op::ChannelShuffle { groups: 2 }, &[both]);
            }
            4 => x = b.add(name("shuffle"), Op::ChannelShuffle { groups: 4 }, &[x]),
            _ => {}
        }
    }
    // Else a norm and a mean would leave no gradient.
    x = b.activation("act", Activation::HardSwish, x);
    x = b.add("pool", Op::GlobalAvgPool, &[x]);
    x = b.add("flatten", Op::Flatten, &[x]);
    b.linear("head", channels, 7, x);
    b.finish()
}

#[cfg(target_os = "linux")]
#[test]
fn cuda_logits_of_convolutional_networks_are_candles() {
    check_cuda_logits(|family| family != "Vision Transformer");
}

#[cfg(target_os = "linux")]
#[test]
fn cuda_logits_of_vision_transformers_are_candles() {
    check_cuda_logits(|family| family == "Vision Transformer");
}

/// Every network's logits as candle's, in evaluation mode, with another size than its own.
#[cfg(target_os = "linux")]
fn check_cuda_logits(wanted: impl Fn(&str) -> bool) {
    let mut families = HashSet::new();
    let rows = registry::all().iter();
    for row in rows.filter(|row| wanted(row.architecture.family())) {
        let graph = row.architecture.graph(7);
        let variables = variables(&graph, &BTreeSet::new(), 2, &Device::Cpu);
        let tensors = variables.tensors().clone().into_iter().collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let images = random(&mut ChaCha8Rng::seed_from_u64(3), &[1, 3, 64, 96]);
        let eager = Eager::new(graph.clone(), &vb).unwrap();
        let mut largest = 0f32;
        let expected = eager
            .forward_observed(&images, Mode::Eval, &mut |_, observed| {
                if let Observed::Output(value) = observed {
                    let most: f32 = value.abs()?.flatten_all()?.max(0)?.to_scalar()?;
                    largest = largest.max(most);
                }
                Ok(())
            })
            .and_then(|logits| values(&logits))
            .unwrap();
        let images = images.permute((0, 2, 3, 1)).unwrap();
        for (precision, bound) in [
            (Precision::F32, 1e-5),
            (Precision::Bf16, 6e-2),
            (Precision::F16, 8e-3),
        ] {
            // Of a family one is enough, and random weights let the values of deep networks grow beyond
            // float16's.
            let family = !families.contains(row.architecture.family());
            if precision != Precision::F32 && (!family || largest > 3e4) {
                continue;
            }
            let there = variables.tensors().clone().into_iter().collect();
            let there = VarBuilder::from_tensors(there, DType::F32, &cuda_device());
            let network = CudaNetwork::new(graph.clone(), &there, precision).unwrap();
            let images = images.to_device(&cuda_device()).unwrap();
            let actual = values(&network.forward(&images).unwrap()).unwrap();
            let error = distance(&actual, &expected) / size_of(&expected);
            assert!(error < bound, "{} in {precision}: {error}", row.name);
        }
        families.insert(row.architecture.family());
    }
}

/// Gradients in fewer digits: as near as these allow, and float16's not lost at its ends.
#[cfg(target_os = "linux")]
#[test]
fn cuda_gradients_in_other_precisions() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for case in 0..12 {
        let graph = random_graph(&mut rng);
        let none = BTreeSet::new();
        let images = random(&mut rng, &[4, 3, 24, 20]);
        let gradient = random(&mut rng, &[4, 7]);
        let run = |precision: Precision, factor: f64| {
            let variables = variables(&graph, &none, 1, &cuda_device());
            let mut step = CudaStep::new(graph.clone(), &variables, precision).unwrap();
            let gradient = (&gradient * factor).unwrap();
            let mut pass = pass(&mut step, &images, &gradient).unwrap();
            let values = pass.gradients.values_mut().flatten();
            values.for_each(|v| *v = (f64::from(*v) / factor) as f32);
            pass
        };
        let expected = run(Precision::F32, 1.0);
        for (precision, factor, bound) in [
            (Precision::Bf16, 1.0, 1.5e-1),
            (Precision::F16, 1.0, 1e-2),
            // What the scale lifts out of the numbers that are too small, and what it has to give way to.
            (Precision::F16, 1e-6, 5e-2),
            (Precision::F16, 100.0, 1e-2),
        ] {
            let actual = run(precision, factor);
            let logits = distance(&actual.logits, &expected.logits) / size_of(&expected.logits);
            let (error, name) = worst(&actual.gradients, &expected.gradients);
            println!("{case} {precision} {factor}: {logits:.1e} {error:.1e}");
            assert!(logits < bound, "case {case}, {precision}: logits {logits}");
            assert!(
                error < bound,
                "case {case}, {precision} times {factor}: {name} {error}"
            );
        }
    }
}

/// A gradient that is not finite comes out of the way back, which does not go on for ever.
#[cfg(target_os = "linux")]
#[test]
fn cuda_hands_over_what_is_not_finite() {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let graph = random_graph(&mut rng);
    let variables = variables(&graph, &BTreeSet::new(), 1, &cuda_device());
    let mut step = CudaStep::new(graph, &variables, Precision::F16).unwrap();
    let images = random(&mut rng, &[2, 3, 24, 20]);
    let gradient = Tensor::full(f32::INFINITY, (2, 7), &Device::Cpu).unwrap();
    let pass = pass(&mut step, &images, &gradient).unwrap();
    assert!(pass.gradients.values().flatten().any(|v| !v.is_finite()));
    let again = step.backward(&gradient, &mut |_, _| Ok(()));
    assert!(again.unwrap_err().to_string().contains("forward"));
}

/// One of two ranks that are threads: what of [`Collectives`] a step asks for.
struct Pair {
    rank: usize,
    to: Sender<Vec<f64>>,
    from: Receiver<Vec<f64>>,
}

impl Collectives for Pair {
    fn place(&self) -> (usize, usize) {
        (self.rank, 2)
    }

    fn sum(&self, values: &mut [f64]) {
        self.to.send(values.to_vec()).unwrap();
        let other = self.from.recv().unwrap();
        values.iter_mut().zip(other).for_each(|(v, o)| *v += o);
    }

    fn begin_sum(&self, _: Tensor) -> Result<()> {
        unreachable!("a step asks for sums at once, and for nothing else")
    }

    fn progress(&self) {
        unreachable!("a step asks for sums at once, and for nothing else")
    }

    fn sums(&self) -> Result<Vec<Tensor>> {
        unreachable!("a step asks for sums at once, and for nothing else")
    }

    fn gather(&self, _: &[u8]) -> Vec<Vec<u8>> {
        unreachable!("a step asks for sums at once, and for nothing else")
    }

    fn broadcast(&self, _: &mut Vec<u8>) {
        unreachable!("a step asks for sums at once, and for nothing else")
    }

    fn messages(&self) -> Option<&dyn Messages> {
        None
    }

    fn abort(&self, _: i32) -> ! {
        unreachable!("a step asks for sums at once, and for nothing else")
    }
}

/// Two ranks with parts of a batch, whose norms share their statistics, are as one with all of it.
#[cfg(target_os = "linux")]
#[test]
fn cuda_norms_in_step_are_those_of_the_whole_batch() {
    let mut rng = ChaCha8Rng::seed_from_u64(19);
    for case in 0..8 {
        let graph = random_graph(&mut rng);
        let images = random(&mut rng, &[5, 3, 22, 18]);
        let gradient = random(&mut rng, &[5, 7]);
        let none = BTreeSet::new();
        // The second rank has three images, or none that count.
        let absent = case % 4 == 3;
        let whole = {
            let counted = if absent { 2 } else { 5 };
            let [images, gradient] = [&images, &gradient].map(|t| t.narrow(0, 0, counted).unwrap());
            let variables = variables(&graph, &none, 1, &cuda_device());
            let mut step = CudaStep::new(graph.clone(), &variables, Precision::F32).unwrap();
            pass(&mut step, &images, &gradient).unwrap()
        };
        let ([to_second, to_first], [from_first, from_second]) = {
            let ((a, b), (c, d)) = (channel(), channel());
            ([a, c], [b, d])
        };
        let ends = [(to_second, from_second), (to_first, from_first)];
        let parts = thread::scope(|scope| {
            let run = |(rank, (to, from)): (usize, (Sender<_>, Receiver<_>))| {
                let (graph, none) = (&graph, &none);
                let part = |t: &Tensor| t.narrow(0, 2 * rank, 2 + rank).unwrap().copy().unwrap();
                let (images, mut gradient) = (part(&images), part(&gradient));
                let absent = absent && rank == 1;
                if absent {
                    gradient = gradient.zeros_like().unwrap();
                }
                scope.spawn(move || {
                    let variables = variables(graph, none, 1, &cuda_device());
                    let mut step =
                        CudaStep::new(graph.clone(), &variables, Precision::F32).unwrap();
                    step.train_with(Others {
                        ranks: Ranks::by(Pair { rank, to, from }),
                        sync_norms: true,
                        absent,
                        ..Others::default()
                    })
                    .unwrap();
                    pass(&mut step, &images, &gradient).unwrap()
                })
            };
            let threads: Vec<_> = ends.into_iter().enumerate().map(run).collect();
            let parts = threads.into_iter().map(|thread| thread.join().unwrap());
            parts.collect::<Vec<Pass>>()
        });
        let mut logits = [&parts[0].logits[..], &parts[1].logits[..]].concat();
        logits.truncate(whole.logits.len());
        assert!(distance(&logits, &whole.logits) < 1e-4 * size_of(&whole.logits));
        let sums = parts[0].gradients.iter().map(|(name, values)| {
            let other = &parts[1].gradients[name];
            // Who is absent adds nothing.
            let other = other.iter().map(|v| if absent { 0.0 } else { *v });
            let sum = values.iter().zip(other).map(|(a, b)| a + b).collect();
            (name.clone(), sum)
        });
        let (error, name) = worst(&sums.collect(), &whole.gradients);
        assert!(error < 3e-4, "{name}: {error}");
        for part in &parts {
            let (error, name) = worst(&part.buffers, &whole.buffers);
            assert!(error < 1e-4, "{name}: {error}");
        }
    }
}
