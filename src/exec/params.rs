//! Parameters by name, through candle's `VarBuilder`.
//!
//! [`Params`] is the backend: it looks a name up in the weights, initialises what they lack from
//! the seeded generator, makes plain tensors (frozen) or variables (trained), and keeps the report
//! of what was loaded, missing and unexpected.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, DType, Device, Shape, Storage, Tensor, Var, bail};
use candle_nn::Init;
use candle_nn::init::{NonLinearity, NormalOrUniform};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::graph;

/// Named float32 tensors from anywhere: a file, the binary, a test's formula.
pub trait TensorSource: Send + Sync {
    /// Names of all tensors.
    fn names(&self) -> Vec<String>;

    /// Shape of a tensor, or None where there is none of that name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The values in row-major order, widened to float32.
    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>>;
}

/// Tensors in memory.
#[derive(Default)]
pub struct TensorMap(pub BTreeMap<String, Tensor>);

impl TensorSource for TensorMap {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|t| t.dims().to_vec())
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        match self.0.get(name) {
            Some(tensor) => tensor.flatten_all()?.to_vec1(),
            None => Err(candle_core::Error::CannotFindTensor { path: name.into() }),
        }
    }
}

/// How the names that a network asked for met the names that the weights hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    pub loaded: BTreeSet<String>,
    /// Asked for, not in the weights: initialised.
    pub missing: BTreeSet<String>,
    /// Asked for, in the weights with another shape: initialised. Name, shape asked, shape held.
    pub mismatched: BTreeMap<String, (Vec<usize>, Vec<usize>)>,
    /// In the weights, never asked for.
    pub unexpected: BTreeSet<String>,
}

impl LoadReport {
    /// Whether every tensor that the network needs came from the weights.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.mismatched.is_empty()
    }
}

/// The parameters of one network.
pub struct Params {
    source: Option<Arc<dyn TensorSource>>,
    seed: u64,
    trainable: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    loaded: BTreeSet<String>,
    missing: BTreeSet<String>,
    mismatched: BTreeMap<String, (Vec<usize>, Vec<usize>)>,
    variables: BTreeMap<String, Var>,
}

impl Params {
    /// Takes parameters from `source`, and initialises with `seed` what it lacks.
    pub fn new(source: Option<Arc<dyn TensorSource>>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            source,
            seed,
            trainable: false,
            state: Mutex::default(),
        })
    }

    /// The same, with every parameter a variable that gradients reach.
    pub fn trainable(source: Option<Arc<dyn TensorSource>>, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            source,
            seed,
            trainable: true,
            state: Mutex::default(),
        })
    }

    /// A builder over these parameters.
    pub fn var_builder(self: &Arc<Self>, device: &Device) -> VarBuilder<'static> {
        let backend = Box::new(Backend(self.clone()));
        VarBuilder::from_backend(backend, DType::F32, device.clone())
    }

    /// What has been asked for so far, against what the weights hold.
    pub fn report(&self) -> LoadReport {
        let state = self.lock();
        let known = |name: &String| {
            state.loaded.contains(name)
                || state.mismatched.contains_key(name)
                // A counter that PyTorch keeps and nothing needs.
                || name.ends_with(".num_batches_tracked")
        };
        let names = self.source.as_ref().map(|s| s.names()).unwrap_or_default();
        LoadReport {
            loaded: state.loaded.clone(),
            missing: state.missing.clone(),
            mismatched: state.mismatched.clone(),
            unexpected: names.into_iter().filter(|name| !known(name)).collect(),
        }
    }

    /// The variables made so far, by name; none unless the parameters are trainable.
    pub fn variables(&self) -> BTreeMap<String, Var> {
        self.lock().variables.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn values(&self, name: &str, shape: &Shape, init: Init) -> candle_core::Result<Vec<f32>> {
        if let Some(source) = &self.source {
            match source.shape(name) {
                Some(held) if held == shape.dims() => {
                    self.lock().loaded.insert(name.to_string());
                    return source.read(name);
                }
                Some(held) => {
                    let shapes = (shape.dims().to_vec(), held);
                    self.lock().mismatched.insert(name.to_string(), shapes);
                }
                None => {
                    self.lock().missing.insert(name.to_string());
                }
            }
        }
        Ok(initial_values(init, shape, &mut generator(self.seed, name)))
    }
}

/// The handle that `VarBuilder` owns.
struct Backend(Arc<Params>);

impl SimpleBackend for Backend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let values = self.0.values(name, &shape, init)?;
        let tensor = Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?;
        if !self.0.trainable {
            return Ok(tensor);
        }
        let variable = Var::from_tensor(&tensor)?;
        let tensor = variable.as_tensor().clone();
        self.0.lock().variables.insert(name.to_string(), variable);
        Ok(tensor)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let shape = self.0.source.as_ref().and_then(|s| s.shape(name));
        match shape {
            Some(shape) => self.get(shape.into(), name, Init::Const(0.0), dtype, device),
            None => Err(candle_core::Error::CannotFindTensor { path: name.into() }),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let source = self.0.source.as_ref();
        source.is_some_and(|s| s.shape(name).is_some())
    }
}

/// Fetches a graph's parameter.
pub(crate) fn fetch(vb: &VarBuilder, parameter: &graph::Parameter) -> candle_core::Result<Tensor> {
    let init = match parameter.init {
        graph::Init::Constant(value) => Init::Const(value),
        graph::Init::Normal { std } => Init::Randn {
            mean: 0.0,
            stdev: std,
        },
        graph::Init::Uniform { bound } => Init::Uniform {
            lo: -bound,
            up: bound,
        },
    };
    vb.get_with_hints(parameter.shape.as_slice(), &parameter.name, init)
}

/// Calls `f` with the values of a contiguous float32 tensor on the CPU.
pub(crate) fn with_values<R>(
    tensor: &Tensor,
    f: impl FnOnce(&[f32]) -> R,
) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) =
        (&*storage, layout.contiguous_offsets())
    else {
        bail!("plans take contiguous float32 tensors on the CPU");
    };
    Ok(f(&values[start..end]))
}

/// A generator for one tensor: the same seed and name give the same values, whatever the order in
/// which tensors are asked for.
fn generator(seed: u64, name: &str) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(name));
    rng
}

/// The 64-bit FNV-1a hash.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn initial_values(init: Init, shape: &Shape, rng: &mut impl Rng) -> Vec<f32> {
    let count = shape.elem_count();
    let uniform = |rng: &mut dyn FnMut() -> f64, lo: f64, up: f64| -> Vec<f32> {
        (0..count)
            .map(|_| (lo + (up - lo) * rng()) as f32)
            .collect()
    };
    let normal = |rng: &mut dyn FnMut() -> f64, mean: f64, std: f64| -> Vec<f32> {
        // Box-Muller; 1 - u is never zero.
        let mut draw = || {
            let radius = (-2.0 * (1.0 - rng()).ln()).sqrt();
            radius * (std::f64::consts::TAU * rng()).cos()
        };
        (0..count).map(|_| (mean + std * draw()) as f32).collect()
    };
    let mut unit = || rng.random::<f64>();
    match init {
        Init::Const(value) => vec![value as f32; count],
        Init::Randn { mean, stdev } => normal(&mut unit, mean, stdev),
        Init::Uniform { lo, up } => uniform(&mut unit, lo, up),
        Init::Kaiming {
            dist,
            fan,
            non_linearity,
        } => {
            let non_linearity: NonLinearity = non_linearity;
            let std = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => normal(&mut unit, 0.0, std),
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * std;
                    uniform(&mut unit, -bound, bound)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_name_give_the_same_values_in_any_order() -> candle_core::Result<()> {
        let init = Init::Uniform { lo: -1.0, up: 1.0 };
        let values = |names: &[&str]| -> candle_core::Result<Vec<Vec<f32>>> {
            let vb = Params::new(None, 7).var_builder(&Device::Cpu);
            let get = |name: &&str| vb.get_with_hints(5, name, init)?.to_vec1::<f32>();
            names.iter().map(get).collect()
        };
        let forward = values(&["a.weight", "b.weight"])?;
        let backward = values(&["b.weight", "a.weight"])?;
        assert_eq!(forward[0], backward[1]);
        assert_eq!(forward[1], backward[0]);
        assert_ne!(forward[0], forward[1]);
        Ok(())
    }

    #[test]
    fn normal_values_have_the_mean_and_deviation_asked_for() {
        let init = Init::Randn {
            mean: 1.0,
            stdev: 0.5,
        };
        let values = initial_values(init, &Shape::from(40_000), &mut generator(0, "w"));
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values
            .iter()
            .map(|&v| (f64::from(v) - mean).powi(2))
            .sum::<f64>()
            / n;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!((variance.sqrt() - 0.5).abs() < 0.01, "{variance}");
    }
}
