//! The config.json of timm and transformers: architecture, class names and preprocessing.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::graph::PositionInterpolation;
use crate::models::resnet::Block;
use crate::models::{
    Architecture, Interpolation, Preprocessing, mobilenet_v1, mobilenet_v2, registry, resnet,
    vision_transformer,
};

/// What the files beside the weights say.
#[derive(Clone, Debug, PartialEq)]
pub struct Configuration {
    pub name: String,
    pub architecture: Architecture,
    /// Empty where they name none.
    pub labels: Vec<String>,
    pub preprocessing: Preprocessing,
}

/// Reads a config.json and the preprocessor_config.json beside it.
///
/// # Errors
/// What is wrong, in words.
pub fn configuration(config: &[u8], preprocessor: Option<&[u8]>) -> Result<Configuration, String> {
    let config: Value = serde_json::from_slice(config).map_err(|e| format!("config.json: {e}"))?;
    let result = match config.get("architecture") {
        Some(Value::String(_)) => timm(config),
        _ => transformers(config, preprocessor),
    }?;
    result.architecture.check()?;
    result.preprocessing.check()?;
    Ok(result)
}

/// What timm writes; also inside transformers' wrapper of its networks.
#[derive(Deserialize)]
struct Timm {
    architecture: String,
    #[serde(default)]
    num_classes: Option<usize>,
    #[serde(default)]
    label_names: Vec<String>,
    #[serde(default)]
    label_descriptions: BTreeMap<String, String>,
    #[serde(default)]
    id2label: BTreeMap<String, String>,
    #[serde(default)]
    pretrained_cfg: TimmPretrained,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TimmPretrained {
    input_size: Option<[usize; 3]>,
    interpolation: Option<String>,
    crop_pct: Option<f64>,
    crop_mode: Option<String>,
    mean: Option<[f32; 3]>,
    std: Option<[f32; 3]>,
}

fn timm(config: Value) -> Result<Configuration, String> {
    let config: Timm = parse(config, "config.json")?;
    let base = config.architecture.split('.').next().unwrap_or_default();
    let row = registry::find(base).map(|choice| choice.row);
    let row = row.map_err(|_| format!("sconce does not have timm's {base}"))?;
    let TimmPretrained {
        input_size,
        interpolation,
        crop_pct,
        crop_mode,
        mean,
        std,
    } = config.pretrained_cfg;
    let [channels, height, width] = input_size.unwrap_or([3, 224, 224]);
    if channels != 3 || height != width {
        return Err(format!(
            "inputs of {channels} x {height} x {width} are not taken"
        ));
    }
    let interpolation = match interpolation.as_deref() {
        // Chosen at random in training; timm itself takes bilinear then.
        Some("bilinear" | "random") => Interpolation::Bilinear,
        None | Some("bicubic" | "") => Interpolation::Bicubic,
        Some(other) => return Err(format!("interpolation {other} is not known")),
    };
    let crop_pct = crop_pct.unwrap_or(0.875);
    if !(0.1..=1.0).contains(&crop_pct) {
        return Err(format!("crop_pct {crop_pct} is not within 0.1 to 1"));
    }
    let squash = match crop_mode.as_deref() {
        None | Some("center" | "") => false,
        Some("squash") => true,
        Some(other) => return Err(format!("crop_mode {other} is not known")),
    };
    let preprocessing = Preprocessing {
        squash,
        ..Preprocessing::timm(height, crop_pct, interpolation)
    };
    let preprocessing = preprocessing.normalized(
        mean.unwrap_or(preprocessing.mean),
        std.unwrap_or(preprocessing.std),
    );
    let described = |name: &String| config.label_descriptions.get(name).unwrap_or(name).clone();
    let mut labels: Vec<String> = config.label_names.iter().map(described).collect();
    if labels.is_empty() {
        labels = in_order(&config.id2label)?;
    }
    if config.num_classes.is_some_and(|n| n != labels.len()) {
        labels.clear();
    }
    Ok(Configuration {
        name: config.architecture,
        architecture: row.architecture,
        labels,
        preprocessing,
    })
}

/// The names of `id2label` by index.
fn in_order(names: &BTreeMap<String, String>) -> Result<Vec<String>, String> {
    let mut ordered = BTreeMap::new();
    for (index, name) in names {
        let index: usize = index
            .parse()
            .map_err(|_| format!("id2label: {index:?} is no index"))?;
        ordered.insert(index, name.clone());
    }
    match (0..ordered.len()).find(|i| !ordered.contains_key(i)) {
        Some(gap) => Err(format!("id2label: index {gap} has no name")),
        None => Ok(ordered.into_values().collect()),
    }
}

fn parse<T: serde::de::DeserializeOwned>(value: Value, file: &str) -> Result<T, String> {
    serde_json::from_value(value).map_err(|e| format!("{file}: {e}"))
}

#[derive(Deserialize)]
struct Transformers {
    model_type: Option<String>,
    #[serde(default)]
    id2label: BTreeMap<String, String>,
}

fn transformers(config: Value, preprocessor: Option<&[u8]>) -> Result<Configuration, String> {
    let common: Transformers = parse(config.clone(), "config.json")?;
    let Some(kind) = common.model_type else {
        return Err("config.json names neither timm's architecture nor a model_type".into());
    };
    let (architecture, default) = match kind.as_str() {
        "resnet" => (resnet(config)?, convnext(224)),
        "vit" => vit(config)?,
        "mobilenet_v1" => (mobilenet(config, 1)?, MOBILENET),
        "mobilenet_v2" => (mobilenet(config, 2)?, MOBILENET),
        other => {
            return Err(format!(
                "sconce does not have transformers' model_type {other}"
            ));
        }
    };
    let preprocessing = match preprocessor {
        None => default,
        Some(bytes) => {
            let value = serde_json::from_slice(bytes)
                .map_err(|e| format!("preprocessor_config.json: {e}"))?;
            preprocessing(value, default)?
        }
    };
    Ok(Configuration {
        name: kind,
        architecture,
        labels: in_order(&common.id2label)?,
        preprocessing,
    })
}

/// Refuses what no network of ours does.
fn only<T: PartialEq + std::fmt::Debug>(name: &str, value: T, wanted: &[T]) -> Result<(), String> {
    if wanted.contains(&value) {
        Ok(())
    } else {
        Err(format!("{name} {value:?} is not known, only {wanted:?}"))
    }
}

/// Missing entries have transformers' defaults.
#[derive(Deserialize)]
#[serde(default)]
struct ResNet {
    num_channels: usize,
    embedding_size: usize,
    hidden_sizes: Vec<usize>,
    depths: Vec<usize>,
    layer_type: String,
    hidden_act: String,
    downsample_in_first_stage: bool,
    downsample_in_bottleneck: bool,
}

impl Default for ResNet {
    fn default() -> Self {
        Self {
            num_channels: 3,
            embedding_size: 64,
            hidden_sizes: vec![256, 512, 1024, 2048],
            depths: vec![3, 4, 6, 3],
            layer_type: "bottleneck".into(),
            hidden_act: "relu".into(),
            downsample_in_first_stage: false,
            downsample_in_bottleneck: false,
        }
    }
}

fn resnet(config: Value) -> Result<Architecture, String> {
    let c: ResNet = parse(config, "config.json")?;
    let (block, widths) = match c.layer_type.as_str() {
        "basic" => (Block::Basic, [64, 128, 256, 512]),
        "bottleneck" => (Block::Bottleneck, [256, 512, 1024, 2048]),
        other => return Err(format!("layer_type {other} is not known")),
    };
    only("num_channels", c.num_channels, &[3])?;
    only("embedding_size", c.embedding_size, &[64])?;
    only("hidden_sizes", c.hidden_sizes, &[widths.to_vec()])?;
    only("hidden_act", &*c.hidden_act, &["relu"])?;
    let moved = c.downsample_in_first_stage || c.downsample_in_bottleneck;
    only(
        "downsample_in_bottleneck or downsample_in_first_stage",
        moved,
        &[false],
    )?;
    let layers = c.depths[..].try_into();
    let layers = layers.map_err(|_| format!("{} stages are not four", c.depths.len()))?;
    Ok(Architecture::ResNet(resnet::Config::new(block, layers)))
}

#[derive(Deserialize)]
#[serde(default)]
struct Vit {
    num_channels: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: String,
    patch_size: usize,
    image_size: usize,
    qkv_bias: bool,
    layer_norm_eps: f64,
}

impl Default for Vit {
    fn default() -> Self {
        Self {
            num_channels: 3,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            patch_size: 16,
            image_size: 224,
            qkv_bias: true,
            layer_norm_eps: super::dialects::TRANSFORMERS_EPS,
        }
    }
}

fn vit(config: Value) -> Result<(Architecture, Preprocessing), String> {
    let c: Vit = parse(config, "config.json")?;
    only("num_channels", c.num_channels, &[3])?;
    only("hidden_act", &*c.hidden_act, &["gelu"])?;
    only("qkv_bias", c.qkv_bias, &[true])?;
    let architecture = Architecture::VisionTransformer(vision_transformer::Config {
        patch: c.patch_size,
        dim: c.hidden_size,
        depth: c.num_hidden_layers,
        heads: c.num_attention_heads,
        mlp: c.intermediate_size,
        image_size: c.image_size,
        interpolation: PositionInterpolation::BicubicAlignCorners,
        layer_norm_eps: c.layer_norm_eps,
    });
    let preprocessing = Preprocessing {
        squash: true,
        ..Preprocessing::torchvision(c.image_size, c.image_size).half()
    };
    Ok((architecture, preprocessing))
}

#[derive(Deserialize)]
#[serde(default)]
struct MobileNet {
    num_channels: usize,
    depth_multiplier: f64,
    depth_divisible_by: usize,
    min_depth: usize,
    expand_ratio: f64,
    output_stride: usize,
    first_layer_is_expansion: bool,
    finegrained_output: bool,
    hidden_act: String,
    tf_padding: bool,
    layer_norm_eps: f64,
}

impl Default for MobileNet {
    fn default() -> Self {
        Self {
            num_channels: 3,
            depth_multiplier: 1.0,
            depth_divisible_by: 8,
            min_depth: 8,
            expand_ratio: 6.0,
            output_stride: 32,
            first_layer_is_expansion: true,
            finegrained_output: true,
            hidden_act: "relu6".into(),
            tf_padding: true,
            layer_norm_eps: 1e-3,
        }
    }
}

fn mobilenet(config: Value, version: usize) -> Result<Architecture, String> {
    let c: MobileNet = parse(config, "config.json")?;
    only("num_channels", c.num_channels, &[3])?;
    only("depth_divisible_by", c.depth_divisible_by, &[8])?;
    only("min_depth", c.min_depth, &[8])?;
    only("expand_ratio", c.expand_ratio, &[6.0])?;
    only("output_stride", c.output_stride, &[32])?;
    only(
        "first_layer_is_expansion",
        c.first_layer_is_expansion,
        &[true],
    )?;
    only("finegrained_output", c.finegrained_output, &[true])?;
    only("hidden_act", &*c.hidden_act, &["relu6"])?;
    only("tf_padding", c.tf_padding, &[true])?;
    only("layer_norm_eps", c.layer_norm_eps, &[1e-3])?;
    let width = c.depth_multiplier;
    Ok(match version {
        1 => Architecture::MobileNetV1(mobilenet_v1::Config {
            width,
            tensorflow: true,
        }),
        _ => Architecture::MobileNetV2(mobilenet_v2::Config {
            width,
            tensorflow: true,
        }),
    })
}

const MOBILENET: Preprocessing = Preprocessing::torchvision(256, 224).half();

/// Of ResNet in transformers.
fn convnext(size: usize) -> Preprocessing {
    Preprocessing::timm(size, 224.0 / 256.0, Interpolation::Bicubic)
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Preprocessor {
    do_resize: Option<bool>,
    do_center_crop: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    size: Option<Size>,
    crop_size: Option<Size>,
    crop_pct: Option<f64>,
    resample: Option<u8>,
    rescale_factor: Option<f64>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
}

/// A number alone meant a square, or the short side, before sizes had names.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Size {
    Short { shortest_edge: usize },
    Exact { height: usize, width: usize },
    Number(usize),
}

fn preprocessing(value: Value, default: Preprocessing) -> Result<Preprocessing, String> {
    let p: Preprocessor = parse(value, "preprocessor_config.json")?;
    let processor = p.image_processor_type.or(p.feature_extractor_type);
    let processor = processor.unwrap_or_default();
    let interpolation = match p.resample {
        None => default.interpolation,
        Some(2) => Interpolation::Bilinear,
        Some(3) => Interpolation::Bicubic,
        Some(other) => return Err(format!("resample {other} is neither bilinear nor bicubic")),
    };
    only("do_resize", p.do_resize.unwrap_or(true), &[true])?;
    only("do_rescale", p.do_rescale.unwrap_or(true), &[true])?;
    let factor = p.rescale_factor.unwrap_or(1.0 / 255.0) * 255.0;
    only(
        "rescale_factor times 255 is 1:",
        (factor - 1.0).abs() < 1e-6,
        &[true],
    )?;
    let side = |size: Size| match size {
        Size::Number(side)
        | Size::Short {
            shortest_edge: side,
        } => Ok(side),
        Size::Exact { height, width } if height == width => Ok(height),
        Size::Exact { height, width } => Err(format!("{height} x {width} is no square")),
    };
    let resized = p.size.map(side).transpose()?;
    let (resize, crop, squash) = if processor.starts_with("ConvNext") {
        let size = resized.unwrap_or(384);
        // Large images are squeezed, small ones cropped from something larger.
        if size >= 384 {
            (size, size, true)
        } else {
            let crop_pct = p.crop_pct.unwrap_or(224.0 / 256.0);
            if !(0.1..=1.0).contains(&crop_pct) {
                return Err(format!("crop_pct {crop_pct} is not within 0.1 to 1"));
            }
            ((size as f64 / crop_pct) as usize, size, false)
        }
    } else {
        let resize = resized.unwrap_or(default.resize);
        let cropped = p.do_center_crop.unwrap_or(p.crop_size.is_some());
        let short = match p.size {
            Some(Size::Short { .. }) => true,
            Some(Size::Exact { .. }) => false,
            Some(Size::Number(_)) => cropped,
            None => !default.squash,
        };
        let crop = match p.crop_size {
            Some(size) if cropped => side(size)?,
            None if cropped => default.crop,
            _ if short => {
                return Err("images are resized and not cropped, so that no two agree".into());
            }
            _ => resize,
        };
        (resize, crop, !short)
    };
    let (mean, std) = match p.do_normalize {
        Some(false) => ([0.0; 3], [1.0; 3]),
        _ => (
            p.image_mean.unwrap_or(default.mean),
            p.image_std.unwrap_or(default.std),
        ),
    };
    Ok(Preprocessing {
        resize,
        crop,
        squash,
        interpolation,
        mean,
        std,
    })
}
