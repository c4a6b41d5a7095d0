//! Every network by name, with its published weights, their preprocessing and their accuracy.

use super::Interpolation::{Bicubic, Bilinear};
use super::mobilenet_v3::Origin as V3;
use super::mobilenet_v3::Size::{Large as LARGE, Small as SMALL};
use super::resnet::{self, Block};
use super::shufflenet_v1::Origin;
use super::{
    Architecture, Preprocessing, efficientnet_lite, mobilenet_v1, mobilenet_v2, mobilenet_v3,
    shufflenet_v1, shufflenet_v2, vision_transformer,
};
use crate::graph::PositionInterpolation::{self, BicubicAlignCorners, BicubicAntialias};

/// One network.
#[derive(Clone, Copy, Debug)]
pub struct ModelRow {
    /// torchvision's name where it has one, else timm's.
    pub name: &'static str,
    /// timm's names for it.
    pub aliases: &'static [&'static str],
    pub architecture: Architecture,
    /// What has been published for it, the preferred row first.
    pub weights: &'static [Pretrained],
}

/// One published set of ImageNet-1k weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pretrained {
    /// `tv` and `tv2`: torchvision's IMAGENET1K_V1 and V2; else timm's tag.
    pub tag: &'static str,
    pub source: Source,
    /// Accuracy on ImageNet-1k's validation images with this preprocessing, percent.
    pub top1: f32,
    pub preprocessing: Preprocessing,
}

/// Where weights live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file of download.pytorch.org/models. Also compiled into the binary where `embedded`.
    Torchvision { file: &'static str, embedded: bool },
    /// A repository of the Hugging Face hub that holds a model.safetensors.
    Hub { repo: &'static str },
}

impl Pretrained {
    /// Whether this binary carries the weights.
    pub fn is_embedded(&self) -> bool {
        cfg!(feature = "embedded")
            && matches!(self.source, Source::Torchvision { embedded: true, .. })
    }
}

/// A network and one of its sets of weights, as a name like `resnet50.a1_in1k` chooses them.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub row: &'static ModelRow,
    /// None where nothing has been published for the network.
    pub weights: Option<&'static Pretrained>,
}

/// Classes of the weights that are published: what sizes and costs are counted with.
pub const IMAGENET_CLASSES: usize = 1000;

/// Input size of networks for which no preprocessing was published.
pub const DEFAULT_PREPROCESSING: Preprocessing = Preprocessing::torchvision(256, 224);

impl Choice {
    /// The preprocessing that goes with the weights.
    pub fn preprocessing(&self) -> Preprocessing {
        self.weights
            .map_or(DEFAULT_PREPROCESSING, |w| w.preprocessing)
    }

    /// The full name, `resnet50.tv2`.
    pub fn name(&self) -> String {
        match self.weights {
            Some(w) => format!("{}.{}", self.row.name, w.tag),
            None => self.row.name.to_string(),
        }
    }
}

/// A name that is not in the registry.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnknownModel {
    #[error("no network named {name}{}", suggest(.similar))]
    Name { name: String, similar: Vec<String> },
    #[error("{name} has no weights tagged {tag}{}", suggest(.tags))]
    Tag {
        name: String,
        tag: String,
        tags: Vec<String>,
    },
}

fn suggest(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!(" (there is {})", names.join(", ")),
    }
}

/// All networks.
pub fn all() -> &'static [ModelRow] {
    MODELS
}

/// The network of that name, `NAME` or `NAME.TAG`. Without a tag: the embedded weights where the
/// network has them, else the first row.
pub fn find(name: &str) -> Result<Choice, UnknownModel> {
    let (base, tag) = match name.split_once('.') {
        Some((base, tag)) => (base, Some(tag)),
        None => (name, None),
    };
    let Some(row) = MODELS
        .iter()
        .find(|row| row.name == base || row.aliases.contains(&base))
    else {
        return Err(UnknownModel::Name {
            name: name.to_string(),
            similar: similar(base),
        });
    };
    let weights =
        match tag {
            None => row
                .weights
                .iter()
                .find(|w| w.is_embedded())
                .or(row.weights.first()),
            Some(tag) => Some(row.weights.iter().find(|w| w.tag == tag).ok_or_else(|| {
                UnknownModel::Tag {
                    name: row.name.to_string(),
                    tag: tag.to_string(),
                    tags: row.weights.iter().map(|w| w.tag.to_string()).collect(),
                }
            })?),
        };
    Ok(Choice { row, weights })
}

/// Up to three names that a person may have meant.
fn similar(name: &str) -> Vec<String> {
    let simplify = |s: &str| -> Vec<u8> {
        let letters = s.bytes().filter(u8::is_ascii_alphanumeric);
        letters.map(|b| b.to_ascii_lowercase()).collect()
    };
    let wanted = simplify(name);
    let mut near: Vec<(usize, &str)> = MODELS
        .iter()
        .map(|row| (edit_distance(&wanted, &simplify(row.name)), row.name))
        .filter(|(distance, row)| *distance <= 2 + row.len() / 4)
        .collect();
    near.sort();
    near.iter().take(3).map(|(_, n)| n.to_string()).collect()
}

/// Levenshtein's distance.
fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

const fn tv(file: &'static str, top1: f32, preprocessing: Preprocessing) -> Pretrained {
    torchvision("tv", file, top1, preprocessing)
}

const fn tv2(file: &'static str, top1: f32) -> Pretrained {
    torchvision("tv2", file, top1, RESIZE_232)
}

const fn torchvision(
    tag: &'static str,
    file: &'static str,
    top1: f32,
    preprocessing: Preprocessing,
) -> Pretrained {
    let source = Source::Torchvision {
        file,
        embedded: false,
    };
    Pretrained {
        tag,
        source,
        top1,
        preprocessing,
    }
}

/// Weights that the binary carries when it is built with its default features.
const fn embedded(weights: Pretrained) -> Pretrained {
    match weights.source {
        Source::Torchvision { file, .. } => Pretrained {
            source: Source::Torchvision {
                file,
                embedded: true,
            },
            ..weights
        },
        Source::Hub { .. } => weights,
    }
}

const fn hub(
    tag: &'static str,
    repo: &'static str,
    top1: f32,
    preprocessing: Preprocessing,
) -> Pretrained {
    Pretrained {
        tag,
        source: Source::Hub { repo },
        top1,
        preprocessing,
    }
}

const RESIZE_256: Preprocessing = Preprocessing::torchvision(256, 224);
const RESIZE_242: Preprocessing = Preprocessing::torchvision(242, 224);
const RESIZE_232: Preprocessing = Preprocessing::torchvision(232, 224);
const BILINEAR_875: Preprocessing = Preprocessing::timm(224, 0.875, Bilinear);
const BILINEAR_965: Preprocessing = Preprocessing::timm(224, 0.965, Bilinear);
const BICUBIC_875: Preprocessing = Preprocessing::timm(224, 0.875, Bicubic);
const BICUBIC_900: Preprocessing = Preprocessing::timm(224, 0.9, Bicubic);
const BICUBIC_950: Preprocessing = Preprocessing::timm(224, 0.95, Bicubic);

const fn row(
    name: &'static str,
    architecture: Architecture,
    weights: &'static [Pretrained],
) -> ModelRow {
    ModelRow {
        name,
        aliases: &[],
        architecture,
        weights,
    }
}

const fn alias(aliases: &'static [&'static str], row: ModelRow) -> ModelRow {
    ModelRow { aliases, ..row }
}

const fn resnet(block: Block, layers: [usize; 4]) -> Architecture {
    Architecture::ResNet(resnet::Config::new(block, layers))
}

/// Bottlenecks of another cardinality and width per group.
const fn resnext(layers: [usize; 4], groups: usize, width_per_group: usize) -> Architecture {
    let config = resnet::Config::new(Block::Bottleneck, layers);
    Architecture::ResNet(config.groups(groups, width_per_group))
}

const fn mobilenet_v1(width: f64, tensorflow: bool) -> Architecture {
    Architecture::MobileNetV1(mobilenet_v1::Config { width, tensorflow })
}

const fn mobilenet_v2(width: f64, tensorflow: bool) -> Architecture {
    Architecture::MobileNetV2(mobilenet_v2::Config { width, tensorflow })
}

const fn mobilenet_v3(
    size: mobilenet_v3::Size,
    width: f64,
    origin: mobilenet_v3::Origin,
) -> Architecture {
    Architecture::MobileNetV3(mobilenet_v3::Config {
        size,
        width,
        origin,
    })
}

const fn shufflenet_v1(
    groups: usize,
    stem: usize,
    stages: [usize; 3],
    origin: Origin,
) -> Architecture {
    Architecture::ShuffleNetV1(shufflenet_v1::Config {
        groups,
        stem,
        stages,
        origin,
    })
}

const fn shufflenet_v2(stages: [usize; 3], last: usize) -> Architecture {
    Architecture::ShuffleNetV2(shufflenet_v2::Config { stages, last })
}

/// Patch, features, layers, heads.
const fn vit(
    [patch, dim, depth, heads]: [usize; 4],
    interpolation: PositionInterpolation,
) -> Architecture {
    let config = vision_transformer::Config::new(patch, dim, depth, heads, interpolation);
    Architecture::VisionTransformer(config)
}

/// Where torchvision has weights, its V2 come first, then its V1, then timm's.
#[rustfmt::skip] // a table reads best as one
static MODELS: &[ModelRow] = &[
    // ResNet
    row("resnet18", resnet(Block::Basic, [2, 2, 2, 2]), &[
        tv("resnet18-f37072fd.pth", 69.758, RESIZE_256),
        hub("tv_in1k", "timm/resnet18.tv_in1k", 69.752, BILINEAR_875),
        hub("a1_in1k", "timm/resnet18.a1_in1k", 71.504, BICUBIC_950),
    ]),
    row("resnet34", resnet(Block::Basic, [3, 4, 6, 3]), &[
        tv("resnet34-b627a593.pth", 73.314, RESIZE_256),
        hub("tv_in1k", "timm/resnet34.tv_in1k", 73.298, BILINEAR_875),
        hub("a1_in1k", "timm/resnet34.a1_in1k", 76.420, BICUBIC_950),
    ]),
    row("resnet50", resnet(Block::Bottleneck, [3, 4, 6, 3]), &[
        tv2("resnet50-11ad3fa6.pth", 80.858),
        tv("resnet50-0676ba61.pth", 76.130, RESIZE_256),
        hub("tv_in1k", "timm/resnet50.tv_in1k", 76.156, BILINEAR_875),
        hub("tv2_in1k", "timm/resnet50.tv2_in1k", 80.846, BILINEAR_965),
        hub("a1_in1k", "timm/resnet50.a1_in1k", 80.382, BICUBIC_950),
    ]),
    row("resnet101", resnet(Block::Bottleneck, [3, 4, 23, 3]), &[
        tv2("resnet101-cd907fc2.pth", 81.886),
        tv("resnet101-63fe2227.pth", 77.374, RESIZE_256),
        hub("tv2_in1k", "timm/resnet101.tv2_in1k", 81.906, BILINEAR_965),
    ]),
    row("resnet152", resnet(Block::Bottleneck, [3, 8, 36, 3]), &[
        tv2("resnet152-f82ba261.pth", 82.284),
        tv("resnet152-394f9c45.pth", 78.312, RESIZE_256),
        hub("tv2_in1k", "timm/resnet152.tv2_in1k", 82.294, BILINEAR_965),
    ]),
    row("wide_resnet50_2", resnext([3, 4, 6, 3], 1, 128), &[
        tv2("wide_resnet50_2-9ba9bcbe.pth", 81.602),
        tv("wide_resnet50_2-95faca4d.pth", 78.468, RESIZE_256),
    ]),
    row("wide_resnet101_2", resnext([3, 4, 23, 3], 1, 128), &[
        tv2("wide_resnet101_2-d733dc28.pth", 82.510),
        tv("wide_resnet101_2-32ee1156.pth", 78.848, RESIZE_256),
    ]),
    // ResNeXt
    row("resnext50_32x4d", resnext([3, 4, 6, 3], 32, 4), &[
        tv2("resnext50_32x4d-1a0047aa.pth", 81.198),
        tv("resnext50_32x4d-7cdf4587.pth", 77.618, RESIZE_256),
        hub("tv_in1k", "timm/resnext50_32x4d.tv_in1k", 77.632, BILINEAR_875),
        hub("tv2_in1k", "timm/resnext50_32x4d.tv2_in1k", 81.190, BILINEAR_965),
        hub("a1_in1k", "timm/resnext50_32x4d.a1_in1k", 80.526, BICUBIC_950),
    ]),
    row("resnext101_32x8d", resnext([3, 4, 23, 3], 32, 8), &[
        tv2("resnext101_32x8d-110c445d.pth", 82.834),
        tv("resnext101_32x8d-8ba56ff5.pth", 79.312, RESIZE_256),
        hub("tv_in1k", "timm/resnext101_32x8d.tv_in1k", 79.308, BILINEAR_875),
        hub("tv2_in1k", "timm/resnext101_32x8d.tv2_in1k", 82.832, BILINEAR_965),
    ]),
    row("resnext101_64x4d", resnext([3, 4, 23, 3], 64, 4), &[
        tv("resnext101_64x4d-173b62eb.pth", 83.246, RESIZE_232),
        hub("tv_in1k", "timm/resnext101_64x4d.tv_in1k", 82.978, BILINEAR_875),
    ]),
    // MobileNetV1
    row("mobilenet_v1_025", mobilenet_v1(0.25, false), &[]),
    row("mobilenet_v1_050", mobilenet_v1(0.5, false), &[]),
    row("mobilenet_v1_075", mobilenet_v1(0.75, false), &[]),
    alias(&["mobilenetv1_100"], row("mobilenet_v1_100", mobilenet_v1(1.0, false), &[
        hub(
            "ra4_e3600_r224_in1k",
            "timm/mobilenetv1_100.ra4_e3600_r224_in1k",
            75.388,
            BICUBIC_875.half(),
        ),
    ])),
    alias(&["mobilenetv1_125"], row("mobilenet_v1_125", mobilenet_v1(1.25, false), &[
        hub(
            "ra4_e3600_r224_in1k",
            "timm/mobilenetv1_125.ra4_e3600_r224_in1k",
            76.920,
            BICUBIC_900.half(),
        ),
    ])),
    row("tf_mobilenet_v1_100", mobilenet_v1(1.0, true), &[
        hub("google", "google/mobilenet_v1_1.0_224", 70.9, RESIZE_256.half()),
    ]),
    // MobileNetV2
    alias(&["mobilenetv2_100"], row("mobilenet_v2", mobilenet_v2(1.0, false), &[
        tv2("mobilenet_v2-7ebf99e0.pth", 72.154),
        embedded(tv("mobilenet_v2-b0353104.pth", 71.878, RESIZE_256)),
        hub("ra_in1k", "timm/mobilenetv2_100.ra_in1k", 72.910, BICUBIC_875),
    ])),
    alias(&["mobilenetv2_050"], row("mobilenet_v2_050", mobilenet_v2(0.5, false), &[
        hub("lamb_in1k", "timm/mobilenetv2_050.lamb_in1k", 65.928, BICUBIC_875),
    ])),
    alias(&["mobilenetv2_140"], row("mobilenet_v2_140", mobilenet_v2(1.4, false), &[
        hub("ra_in1k", "timm/mobilenetv2_140.ra_in1k", 76.528, BICUBIC_875),
    ])),
    row("tf_mobilenet_v2_100", mobilenet_v2(1.0, true), &[
        hub("google", "google/mobilenet_v2_1.0_224", 71.8, RESIZE_256.half()),
    ]),
    // MobileNetV3; timm's differ in the epsilon of batch norm, so they are rows of their own.
    row("mobilenet_v3_large", mobilenet_v3(LARGE, 1.0, V3::Torchvision), &[
        tv2("mobilenet_v3_large-5c1a4163.pth", 75.274),
        tv("mobilenet_v3_large-8738ca79.pth", 74.042, RESIZE_256),
    ]),
    row("mobilenet_v3_small", mobilenet_v3(SMALL, 1.0, V3::Torchvision), &[
        tv("mobilenet_v3_small-047dcff4.pth", 67.668, RESIZE_256),
    ]),
    row("mobilenetv3_large_100", mobilenet_v3(LARGE, 1.0, V3::Timm), &[
        hub("ra_in1k", "timm/mobilenetv3_large_100.ra_in1k", 75.784, BICUBIC_875),
        hub(
            "miil_in21k_ft_in1k",
            "timm/mobilenetv3_large_100.miil_in21k_ft_in1k",
            77.920,
            BILINEAR_875.normalized([0.0; 3], [1.0; 3]),
        ),
    ]),
    row("mobilenetv3_small_100", mobilenet_v3(SMALL, 1.0, V3::Timm), &[
        hub("lamb_in1k", "timm/mobilenetv3_small_100.lamb_in1k", 67.636, BICUBIC_875),
    ]),
    row("mobilenetv3_small_075", mobilenet_v3(SMALL, 0.75, V3::Timm), &[
        hub("lamb_in1k", "timm/mobilenetv3_small_075.lamb_in1k", 65.284, BICUBIC_875),
    ]),
    row("mobilenetv3_small_050", mobilenet_v3(SMALL, 0.5, V3::Timm), &[
        hub("lamb_in1k", "timm/mobilenetv3_small_050.lamb_in1k", 57.918, BICUBIC_875),
    ]),
    row("tf_mobilenetv3_small_100", mobilenet_v3(SMALL, 1.0, V3::TensorFlow), &[
        hub("in1k", "timm/tf_mobilenetv3_small_100.in1k", 67.922, BILINEAR_875.half()),
    ]),
    // ShuffleNetV1 as its authors released it: nothing that can be downloaded.
    row("shufflenet_v1_x0_5_g3", shufflenet_v1(3, 12, [120, 240, 480], Origin::Released), &[]),
    row("shufflenet_v1_x1_0_g3", shufflenet_v1(3, 24, [240, 480, 960], Origin::Released), &[]),
    row("shufflenet_v1_x1_5_g3", shufflenet_v1(3, 24, [360, 720, 1440], Origin::Released), &[]),
    row("shufflenet_v1_x2_0_g3", shufflenet_v1(3, 48, [480, 960, 1920], Origin::Released), &[]),
    row("shufflenet_v1_x0_5_g8", shufflenet_v1(8, 16, [192, 384, 768], Origin::Released), &[]),
    row("shufflenet_v1_x1_0_g8", shufflenet_v1(8, 24, [384, 768, 1536], Origin::Released), &[]),
    row("shufflenet_v1_x1_5_g8", shufflenet_v1(8, 24, [576, 1152, 2304], Origin::Released), &[]),
    row("shufflenet_v1_x2_0_g8", shufflenet_v1(8, 48, [768, 1536, 3072], Origin::Released), &[]),
    // ShuffleNetV1 of the paper, under pytorchcv's names: groups, then width 1, 3/4, 1/2, 1/4.
    row("shufflenet_g1_w1", shufflenet_v1(1, 24, [144, 288, 576], Origin::Paper), &[]),
    row("shufflenet_g2_w1", shufflenet_v1(2, 24, [200, 400, 800], Origin::Paper), &[]),
    row("shufflenet_g3_w1", shufflenet_v1(3, 24, [240, 480, 960], Origin::Paper), &[]),
    row("shufflenet_g4_w1", shufflenet_v1(4, 24, [272, 544, 1088], Origin::Paper), &[]),
    row("shufflenet_g8_w1", shufflenet_v1(8, 24, [384, 768, 1536], Origin::Paper), &[]),
    row("shufflenet_g1_w3d4", shufflenet_v1(1, 18, [108, 216, 432], Origin::Paper), &[]),
    row("shufflenet_g3_w3d4", shufflenet_v1(3, 18, [180, 360, 720], Origin::Paper), &[]),
    row("shufflenet_g1_wd2", shufflenet_v1(1, 12, [72, 144, 288], Origin::Paper), &[]),
    row("shufflenet_g3_wd2", shufflenet_v1(3, 12, [120, 240, 480], Origin::Paper), &[]),
    row("shufflenet_g1_wd4", shufflenet_v1(1, 6, [36, 72, 144], Origin::Paper), &[]),
    row("shufflenet_g3_wd4", shufflenet_v1(3, 6, [60, 120, 240], Origin::Paper), &[]),
    // Other stems: 12 channels give the cost that the paper states for a quarter of the width; 24
    // are those of the full width.
    row("shufflenet_g1_wd4_stem12", shufflenet_v1(1, 12, [36, 72, 144], Origin::Paper), &[]),
    row("shufflenet_g3_wd4_stem12", shufflenet_v1(3, 12, [60, 120, 240], Origin::Paper), &[]),
    row("shufflenet_g1_wd2_stem24", shufflenet_v1(1, 24, [72, 144, 288], Origin::Paper), &[]),
    row("shufflenet_g3_wd2_stem24", shufflenet_v1(3, 24, [120, 240, 480], Origin::Paper), &[]),
    row("shufflenet_g8_wd2_stem24", shufflenet_v1(8, 24, [192, 384, 768], Origin::Paper), &[]),
    row("shufflenet_g1_wd4_stem24", shufflenet_v1(1, 24, [36, 72, 144], Origin::Paper), &[]),
    row("shufflenet_g3_wd4_stem24", shufflenet_v1(3, 24, [60, 120, 240], Origin::Paper), &[]),
    row("shufflenet_g8_wd4_stem24", shufflenet_v1(8, 24, [96, 192, 384], Origin::Paper), &[]),
    // ShuffleNetV2
    row("shufflenet_v2_x0_5", shufflenet_v2([48, 96, 192], 1024), &[
        tv("shufflenetv2_x0.5-f707e7126e.pth", 60.552, RESIZE_256),
    ]),
    row("shufflenet_v2_x1_0", shufflenet_v2([116, 232, 464], 1024), &[
        tv("shufflenetv2_x1-5666bf0f80.pth", 69.362, RESIZE_256),
    ]),
    row("shufflenet_v2_x1_5", shufflenet_v2([176, 352, 704], 1024), &[
        tv("shufflenetv2_x1_5-3c479a10.pth", 72.996, RESIZE_232),
    ]),
    row("shufflenet_v2_x2_0", shufflenet_v2([244, 488, 976], 2048), &[
        tv("shufflenetv2_x2_0-8be3c8ee.pth", 76.230, RESIZE_232),
    ]),
    // Vision Transformers
    row("vit_b_16", vit([16, 768, 12, 12], BicubicAlignCorners), &[
        tv("vit_b_16-c867db91.pth", 81.072, RESIZE_256),
    ]),
    row("vit_b_32", vit([32, 768, 12, 12], BicubicAlignCorners), &[
        tv("vit_b_32-d86f8d99.pth", 75.912, RESIZE_256),
    ]),
    row("vit_l_16", vit([16, 1024, 24, 16], BicubicAlignCorners), &[
        tv("vit_l_16-852ce7e3.pth", 79.662, RESIZE_242),
    ]),
    row("vit_l_32", vit([32, 1024, 24, 16], BicubicAlignCorners), &[
        tv("vit_l_32-c7638314.pth", 76.972, RESIZE_256),
    ]),
    row("vit_tiny_patch16_224", vit([16, 192, 12, 3], BicubicAntialias), &[
        hub(
            "augreg_in21k_ft_in1k",
            "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            75.452,
            BICUBIC_900.half(),
        ),
    ]),
    row("vit_small_patch16_224", vit([16, 384, 12, 6], BicubicAntialias), &[
        hub(
            "augreg_in21k_ft_in1k",
            "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
            81.402,
            BICUBIC_900.half(),
        ),
    ]),
    row("vit_base_patch16_224", vit([16, 768, 12, 12], BicubicAntialias), &[
        hub(
            "augreg2_in21k_ft_in1k",
            "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
            85.108,
            BICUBIC_900.half(),
        ),
    ]),
    row("vit_large_patch16_224", vit([16, 1024, 24, 16], BicubicAntialias), &[]),
    row("deit_tiny_patch16_224", vit([16, 192, 12, 3], BicubicAntialias), &[
        hub("fb_in1k", "timm/deit_tiny_patch16_224.fb_in1k", 72.190, BICUBIC_900),
    ]),
    row("deit_small_patch16_224", vit([16, 384, 12, 6], BicubicAntialias), &[
        hub("fb_in1k", "timm/deit_small_patch16_224.fb_in1k", 79.856, BICUBIC_900),
    ]),
    row("deit_base_patch16_224", vit([16, 768, 12, 12], BicubicAntialias), &[
        hub("fb_in1k", "timm/deit_base_patch16_224.fb_in1k", 81.980, BICUBIC_900),
    ]),
    // EfficientNet-Lite
    alias(&["tf_efficientnet_lite0"], row(
        "efficientnet_lite0",
        Architecture::EfficientNetLite(efficientnet_lite::Config {}),
        &[hub("in1k", "timm/tf_efficientnet_lite0.in1k", 75.1, BICUBIC_875.half())],
    )),
];
