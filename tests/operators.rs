//! Gradients of each operator on small networks of random shapes (tests/oracle/operators.py), of
//! the training plan and of candle's way: against PyTorch in float64, and against central
//! differences of candle's forward pass in float64.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use candle_core::{DType, Device, Tensor};
use candle_nn::var_builder::VarBuilder;
use common::{Formula, golden, images, uniform};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sconce::exec::cpu::Options;
use sconce::exec::params::Params;
use sconce::exec::{EagerStep, PlanStep, TrainingStep, Variables};
use sconce::graph::{
    Activation, Builder, Conv2d, Graph, InitScheme, NodeId, Op, Padding, Pool2d,
    PositionInterpolation,
};

#[derive(serde::Deserialize)]
struct Case {
    kind: String,
    count: usize,
    size: [usize; 2],
    nodes: Vec<Described>,
}

#[derive(serde::Deserialize)]
struct Described {
    name: String,
    inputs: Vec<String>,
    #[serde(flatten)]
    op: Operator,
}

#[derive(serde::Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Operator {
    Conv {
        ins: usize,
        outs: usize,
        kernel: usize,
        stride: usize,
        padding: serde_json::Value,
        groups: usize,
        bias: bool,
    },
    BatchNorm {
        channels: usize,
        eps: f64,
    },
    Activation {
        kind: String,
    },
    MaxPool {
        kernel: usize,
        stride: usize,
        padding: usize,
    },
    AveragePool {
        kernel: usize,
        stride: usize,
        padding: usize,
    },
    GlobalPool,
    Flatten,
    Multiply,
    Add,
    Concat,
    Slice {
        start: usize,
        length: usize,
    },
    Shuffle {
        groups: usize,
    },
    Linear {
        ins: usize,
        outs: usize,
    },
    Tokens,
    ClassToken {
        dim: usize,
    },
    Positions {
        dim: usize,
        grid: usize,
        patch: usize,
        kind: String,
    },
    LayerNorm {
        dim: usize,
        eps: f64,
    },
    Attention {
        dim: usize,
        heads: usize,
    },
    Select {
        index: usize,
    },
    Dropout {
        p: f64,
    },
}

impl Operator {
    fn op(&self) -> Op {
        match *self {
            Operator::Conv {
                ins,
                outs,
                kernel,
                stride,
                ref padding,
                groups,
                bias,
            } => Op::Conv2d(Conv2d {
                stride,
                groups,
                bias,
                padding: match padding.as_u64() {
                    Some(amount) => Padding::Symmetric(amount as usize),
                    None => Padding::Same,
                },
                ..Conv2d::new(ins, outs, kernel)
            }),
            Operator::BatchNorm { channels, eps } => Op::BatchNorm {
                channels,
                eps,
                momentum: 0.1,
            },
            Operator::Activation { ref kind } => Op::Activation(match kind.as_str() {
                "relu" => Activation::Relu,
                "relu6" => Activation::Relu6,
                "hard_sigmoid" => Activation::HardSigmoid,
                "hard_swish" => Activation::HardSwish,
                "gelu" => Activation::Gelu,
                other => panic!("activation {other}"),
            }),
            Operator::MaxPool {
                kernel,
                stride,
                padding,
            } => Op::MaxPool(Pool2d {
                kernel,
                stride,
                padding,
            }),
            Operator::AveragePool {
                kernel,
                stride,
                padding,
            } => Op::AvgPool(Pool2d {
                kernel,
                stride,
                padding,
            }),
            Operator::GlobalPool => Op::GlobalAvgPool,
            Operator::Flatten => Op::Flatten,
            Operator::Multiply => Op::Multiply,
            Operator::Add => Op::Add,
            Operator::Concat => Op::Concat,
            Operator::Slice { start, length } => Op::Slice { start, length },
            Operator::Shuffle { groups } => Op::ChannelShuffle { groups },
            Operator::Linear { ins, outs } => Op::Linear {
                in_features: ins,
                out_features: outs,
                bias: true,
            },
            Operator::Tokens => Op::Tokens,
            Operator::ClassToken { dim } => Op::ClassToken { dim },
            Operator::Positions {
                dim,
                grid,
                patch,
                ref kind,
            } => Op::PositionEmbedding {
                dim,
                grid,
                prefix: 1,
                patch,
                interpolation: match kind.as_str() {
                    "aligned" => PositionInterpolation::BicubicAlignCorners,
                    _ => PositionInterpolation::BicubicAntialias,
                },
            },
            Operator::LayerNorm { dim, eps } => Op::LayerNorm { dim, eps },
            Operator::Attention { dim, heads } => Op::SelfAttention { dim, heads },
            Operator::Select { index } => Op::SelectToken { index },
            Operator::Dropout { p } => Op::Dropout { p },
        }
    }
}

impl Case {
    fn graph(&self) -> Graph {
        let mut b = Builder::new(InitScheme::FanIn);
        let mut ids: HashMap<&str, NodeId> = HashMap::from([("x", b.input())]);
        for node in &self.nodes {
            let inputs: Vec<NodeId> = node.inputs.iter().map(|i| ids[i.as_str()]).collect();
            ids.insert(&node.name, b.add(node.name.as_str(), node.op.op(), &inputs));
        }
        b.finish()
    }

    fn images(&self) -> Tensor {
        let [h, w] = self.size;
        let values = images(self.count, h, w);
        Tensor::from_vec(values, (self.count, 3, h, w), &Device::Cpu).unwrap()
    }

    fn logits(&self) -> usize {
        self.count * CLASSES
    }
}

const CLASSES: usize = 5;

/// The gradients of a step, by name.
fn gradients(step: &mut dyn TrainingStep, case: &Case) -> BTreeMap<String, Vec<f32>> {
    let names: Vec<String> = step.parameters().iter().map(|(n, _)| n.clone()).collect();
    let logits = step.forward(&case.images(), &mut generator()).unwrap();
    let at_logits: Vec<f32> = uniform("logits gradient", case.logits()).collect();
    let at_logits = Tensor::from_vec(at_logits, logits.shape(), &Device::Cpu).unwrap();
    let mut found = BTreeMap::new();
    step.backward(&at_logits, &mut |index, gradient| {
        let values = gradient.flatten_all()?.to_vec1::<f32>()?;
        assert!(found.insert(names[index].clone(), values).is_none());
        Ok(())
    })
    .unwrap();
    found
}

fn generator() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(3)
}

/// The plan's gradients, and those of candle's way.
fn both(case: &Case, graph: &Graph) -> [(&'static str, BTreeMap<String, Vec<f32>>); 2] {
    let vb = Params::new(Some(Formula::of(graph)), 0).var_builder(&Device::Cpu);
    let variables = Variables::new(graph, &vb, &BTreeSet::new()).unwrap();
    let mut plan = PlanStep::new(graph.clone(), &variables, Options::threads(2)).unwrap();
    let mut eager = EagerStep::new(graph.clone(), &variables).unwrap();
    [
        ("the plan", gradients(&mut plan, case)),
        ("candle", gradients(&mut eager, case)),
    ]
}

/// The sum of the logits times the gradient at them, in float64, for parameters that change.
struct Loss {
    step: EagerStep,
    variables: Variables,
    images: Tensor,
    at_logits: Vec<f64>,
}

impl Loss {
    fn new(case: &Case, graph: &Graph) -> Self {
        let tensor = |p: &sconce::graph::Parameter| {
            let values = common::parameter(&p.name, &p.shape);
            let tensor = Tensor::from_vec(values, p.shape.as_slice(), &Device::Cpu).unwrap();
            (p.name.clone(), tensor.to_dtype(DType::F64).unwrap())
        };
        let tensors = graph.parameters().map(tensor).collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
        let variables = Variables::new(graph, &vb, &BTreeSet::new()).unwrap();
        Self {
            step: EagerStep::new(graph.clone(), &variables).unwrap(),
            variables,
            images: case.images().to_dtype(DType::F64).unwrap(),
            at_logits: uniform("logits gradient", case.logits())
                .map(f64::from)
                .collect(),
        }
    }

    fn value(&mut self) -> f64 {
        let logits = self.step.forward(&self.images, &mut generator()).unwrap();
        let logits = logits.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        logits.iter().zip(&self.at_logits).map(|(a, b)| a * b).sum()
    }

    /// The slope along a direction by central differences; None where the two sides are further
    /// apart than `tolerance` at every distance: a ReLU or a maximum changes sides there.
    fn slope(&mut self, parameter: usize, direction: &[f64], tolerance: f64) -> Option<f64> {
        let variable = self.variables.parameters()[parameter].1.clone();
        let value = variable.as_tensor().copy().unwrap();
        let direction = Tensor::from_slice(direction, value.shape(), &Device::Cpu).unwrap();
        let mut at = |step: f64| {
            let moved = (&value + (&direction * step).unwrap()).unwrap();
            variable.set(&moved).unwrap();
            self.value()
        };
        let here = at(0.0);
        // Long steps for gradients that rounding would drown, short ones next to kinks.
        let slope = [1e-6, 1e-5, 1e-4, 1e-8].into_iter().find_map(|step| {
            let [ahead, behind] = [(at(step) - here) / step, (here - at(-step)) / step];
            ((ahead - behind).abs() <= tolerance).then_some((ahead + behind) / 2.0)
        });
        variable.set(&value).unwrap();
        slope
    }
}

fn dot(a: &[f32], b: impl Iterator<Item = f64>) -> f64 {
    a.iter().zip(b).map(|(&a, b)| f64::from(a) * b).sum()
}

/// What float32 computes is asked to be as near as this to the exact gradient, each tensor's
/// difference against its norm; or within twice PyTorch's own float32 error.
const TOLERANCE: f64 = 1e-4;

/// Tensors of so small a part of the gradient are left out: before a batch norm, for instance, a
/// bias has no gradient but what rounding leaves.
const SMALLEST: f64 = 1e-6;

/// Root mean square of differences of projections, as an estimate of a difference's norm.
fn spread(differences: &[f64], square_of_a_factor: f64) -> f64 {
    let squares = differences.iter().map(|d| d * d).sum::<f64>();
    (squares / differences.len() as f64 / square_of_a_factor).sqrt()
}

/// Central differences of the loss against gradients, along random directions of every parameter.
/// Gives how many directions there were, and how many of them met a kink.
fn check_differences(
    case: &Case,
    graph: &Graph,
    found: &[(&str, BTreeMap<String, Vec<f32>>)],
    tolerance: impl Fn(&str) -> f64,
) -> [usize; 2] {
    const DIRECTIONS: usize = 2;
    let mut loss = Loss::new(case, graph);
    let names: Vec<String> = loss.step.parameters().iter().map(|p| p.0.clone()).collect();
    let norm = |name: &String| {
        let (_, gradients) = &found[1];
        gradients[name]
            .iter()
            .map(|&v| f64::from(v).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let total = names.iter().map(|n| norm(n).powi(2)).sum::<f64>().sqrt();
    let (mut all, mut kinks) = (0, 0);
    for (parameter, name) in names.iter().enumerate() {
        let norm = norm(name);
        if norm < SMALLEST * total {
            continue;
        }
        let mut differences = vec![Vec::new(); found.len()];
        for number in 0..DIRECTIONS {
            let sign = |v: f32| if v < 0.0 { -1.0 } else { 1.0 };
            let values = uniform(&format!("direction {number}"), found[0].1[name].len());
            let direction: Vec<f64> = values.map(sign).collect();
            all += 1;
            let Some(slope) = loss.slope(parameter, &direction, 0.5 * TOLERANCE * norm) else {
                kinks += 1;
                continue;
            };
            for ((_, gradients), differences) in found.iter().zip(&mut differences) {
                differences.push(dot(&gradients[name], direction.iter().copied()) - slope);
            }
        }
        for ((who, _), differences) in found.iter().zip(&differences) {
            let (error, tolerance) = (spread(differences, 1.0) / norm, tolerance(name));
            assert!(
                differences.is_empty() || error <= tolerance,
                "{}, {name}: {who} is {error:.1e} from central differences, {tolerance:.1e} are tolerated",
                case.kind
            );
        }
    }
    [all, kinks]
}

#[test]
fn gradients_of_every_operator_are_pytorchs_and_those_of_central_differences() {
    let cases: Vec<Case> = serde_json::from_slice(&golden("operators.json")).unwrap();
    let bytes = golden("operators.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (shape, table) = common::f32_tensor(&file, "gradients");
    assert_eq!(shape[1], 6);
    let (rows, _) = table.as_chunks::<6>();
    let mut rows = rows.iter().map(|row| row.map(f64::from));
    let mut worst: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    let (mut directions, mut kinks) = (0, 0);
    for case in &cases {
        let graph = case.graph();
        let found = both(case, &graph);
        let rows: Vec<[f64; 6]> = rows.by_ref().take(found[0].1.len()).collect();
        let total = rows.iter().map(|r| r[0] * r[0]).sum::<f64>().sqrt();
        let tolerance = |row: &[f64; 6]| TOLERANCE.max(2.0 * row[5]);
        let names = found[0].1.keys().map(String::as_str);
        let tolerances: HashMap<&str, f64> = names.zip(rows.iter().map(tolerance)).collect();
        for (who, gradients) in &found {
            for ((name, values), row) in gradients.iter().zip(&rows) {
                let [norm, projections @ .., _] = row;
                if *norm < SMALLEST * total {
                    continue;
                }
                let differences = projections.iter().enumerate().map(|(i, expected)| {
                    let vector = uniform(&format!("projection {i}"), values.len());
                    dot(values, vector.map(f64::from)) - expected
                });
                // Values in ±1 at random: their squares are a third on average.
                let error = spread(&differences.collect::<Vec<_>>(), 1.0 / 3.0) / norm;
                let tolerance = tolerances[name.as_str()];
                assert!(
                    error <= tolerance,
                    "{}, {name}: {who} is {error:.1e} from PyTorch, {tolerance:.1e} are tolerated",
                    case.kind
                );
                let worst = worst.entry((&case.kind, who)).or_default();
                *worst = worst.max(error);
            }
        }
        let counts = check_differences(case, &graph, &found, |name| tolerances[name]);
        directions += counts[0];
        kinks += counts[1];
    }
    assert!(rows.next().is_none());
    for ((kind, who), error) in worst {
        println!("{kind}: {who} at most {error:.1e} from PyTorch");
    }
    println!(
        "{} cases, {directions} directions, {kinks} at a kink",
        cases.len()
    );
    assert!(cases.len() >= 300 && kinks * 100 <= directions);
}

/// PyTorch draws other zeros: central differences alone, with the same generator.
#[test]
fn gradients_behind_dropout_are_those_of_central_differences() {
    for number in 0..20 {
        let (channels, p) = (5 + number, 0.1 + 0.04 * number as f64);
        let node = |name: &str, input: &str, op| Described {
            name: name.into(),
            inputs: vec![input.into()],
            op,
        };
        let linear = |ins, outs| Operator::Linear { ins, outs };
        let conv = Operator::Conv {
            ins: 3,
            outs: channels,
            kernel: 3,
            stride: 2,
            padding: 1.into(),
            groups: 1,
            bias: true,
        };
        let gelu = || Operator::Activation {
            kind: "gelu".into(),
        };
        let case = Case {
            kind: format!("dropout {number}"),
            count: 3,
            size: [7, 8],
            nodes: vec![
                node("conv", "x", conv),
                node("a", "conv", gelu()),
                node("pool", "a", Operator::GlobalPool),
                node("flat", "pool", Operator::Flatten),
                node("first", "flat", Operator::Dropout { p }),
                node("hidden", "first", linear(channels, 30)),
                node("b", "hidden", gelu()),
                node("second", "b", Operator::Dropout { p }),
                node("head", "second", linear(30, CLASSES)),
            ],
        };
        let graph = case.graph();
        let counts = check_differences(&case, &graph, &both(&case, &graph), |_| TOLERANCE);
        assert_eq!(counts, [12, 0]);
    }
}
