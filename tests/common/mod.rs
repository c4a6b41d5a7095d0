//! What the integration tests share: weights and images by the formula of tests/oracle/formula.py,
//! and access to the goldens.

#![allow(dead_code)] // each test binary uses a part

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sconce::exec::params::TensorSource;
use sconce::graph::Graph;
use sconce::hub::Hub;
use sconce::weights::{Model, Request, WeightsChoice, resolve};

/// Values in [-1, 1) that depend on the name and the index alone.
pub fn uniform(name: &str, count: usize) -> impl Iterator<Item = f32> + use<> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (1..=count as u64).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 40) as f32 / (1 << 24) as f32 * 2.0 - 1.0
    })
}

/// A network's parameter.
pub fn parameter(name: &str, shape: &[usize]) -> Vec<f32> {
    let (offset, scale) = if name.ends_with("running_mean") {
        (0.0, 0.1)
    } else if name.ends_with("running_var") {
        (1.0, 0.5)
    } else if shape.len() == 3 {
        (0.0, 0.5)
    } else if shape.len() >= 2 {
        let fan_in: usize = shape[1..].iter().product();
        // Squeeze-and-excitation's gates would else be shut or open, and nothing between.
        let gated = [".fc1.", ".fc2.", ".se."].iter().any(|g| name.contains(g));
        let gain = if gated { 0.1 } else { 1.0 };
        (0.0, (gain * (6.0 / fan_in as f64).sqrt()) as f32)
    } else if name.ends_with("weight") {
        (1.0, 0.25)
    } else {
        (0.0, 0.1)
    };
    let values = uniform(name, shape.iter().product());
    values.map(|v| offset + scale * v).collect()
}

/// A batch `[count, 3, height, width]`: noise on a coarse grid of patches.
pub fn images(count: usize, height: usize, width: usize) -> Vec<f32> {
    let patches: Vec<f32> = uniform("patches", count * 3 * 8 * 8).collect();
    let noise = uniform("images", count * 3 * height * width);
    noise
        .enumerate()
        .map(|(i, noise)| {
            let (plane, y, x) = (i / (height * width), i / width % height, i % width);
            noise + 3.0 * patches[(plane * 8 + y * 8 / height) * 8 + x * 8 / width]
        })
        .collect()
}

/// An 8-bit picture `[height, width, channels]`.
pub fn photo(name: &str, height: usize, width: usize, channels: usize) -> Vec<u8> {
    let noise = uniform(name, height * width * channels);
    noise
        .enumerate()
        .map(|(i, noise)| {
            let (pixel, c) = (i / channels, i % channels);
            let (y, x) = (pixel / width, pixel % width);
            let ramp = (x * (3 + c) + y * (7 - c) + (x * y / 16) * (c + 1)) % 512;
            let wave = if ramp < 256 { ramp } else { 511 - ramp };
            let noise = ((noise + 1.0) * 32.0) as usize;
            (wave * 3 / 4 + noise).min(255) as u8
        })
        .collect()
}

/// `[N, C, H, W]` as `[N, H, W, C]`.
pub fn channels_last(values: &[f32], [n, c, h, w]: [usize; 4]) -> Vec<f32> {
    let mut result = Vec::with_capacity(values.len());
    for image in 0..n {
        for pixel in 0..h * w {
            result.extend((0..c).map(|channel| values[(image * c + channel) * h * w + pixel]));
        }
    }
    result
}

/// Every parameter of a network, by formula.
pub struct Formula(HashMap<String, Vec<usize>>);

impl Formula {
    pub fn of(graph: &Graph) -> Arc<Self> {
        let parameters = graph.parameters();
        Arc::new(Self(
            parameters
                .map(|p| (p.name.clone(), p.shape.clone()))
                .collect(),
        ))
    }
}

impl TensorSource for Formula {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).cloned()
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        Ok(parameter(name, &self.0[name]))
    }
}

/// A network of the registry with the formula's weights.
pub fn formula_model(name: &str) -> Model {
    let request = Request {
        model: name.into(),
        weights: WeightsChoice::None,
        labels: None,
        seed: 0,
        hub: Hub::new(),
    };
    let mut model = resolve(&request).unwrap();
    model.source = Some(Formula::of(&model.graph));
    model
}

/// A file of this repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A golden file's bytes.
pub fn golden(path: &str) -> Vec<u8> {
    let path = repository("tests/golden").join(path);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A float32 tensor of a safetensors file.
pub fn f32_tensor(file: &safetensors::SafeTensors, name: &str) -> (Vec<usize>, Vec<f32>) {
    let view = file.tensor(name).unwrap();
    let values = view.data().chunks_exact(4);
    let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (view.shape().to_vec(), values.collect())
}

/// ‖a − b‖ / ‖b‖
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(&mut { difference }) / norm(&mut b.iter().map(|&v| f64::from(v)))
}

/// Writes a network's formula-filled weights as a safetensors file.
pub fn write_formula(path: &Path, model: &str, classes: usize) {
    let graph = sconce::models::registry::find(model)
        .unwrap()
        .row
        .architecture
        .graph(classes);
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = graph
        .parameters()
        .map(|p| {
            let values = parameter(&p.name, &p.shape);
            let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            (p.name.clone(), p.shape.clone(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name, view.unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Pieces of the photos in folders named after them.
pub fn photos(each: usize) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for class in ["cat", "coffee", "photographer"] {
        let photo = image::open(repository("assets").join(format!("{class}.png"))).unwrap();
        std::fs::create_dir(root.path().join(class)).unwrap();
        for i in 0..each {
            let x = rng.random_range(0..photo.width() - 120);
            let y = rng.random_range(0..photo.height() - 120);
            let piece = photo.crop_imm(x, y, 120, 120).to_rgb8();
            let path = root.path().join(class).join(format!("{i}.png"));
            piece.save(path).unwrap();
        }
    }
    root
}
