//! Every network by name, with its published weights, their preprocessing and their accuracy.

use super::Interpolation::{Bicubic, Bilinear};
use super::resnet::{self, Block};
use super::{Architecture, Preprocessing, mobilenet_v2};

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
const RESIZE_232: Preprocessing = Preprocessing::torchvision(232, 224);
const BILINEAR_875: Preprocessing = Preprocessing::timm(224, 0.875, Bilinear);
const BILINEAR_965: Preprocessing = Preprocessing::timm(224, 0.965, Bilinear);
const BICUBIC_875: Preprocessing = Preprocessing::timm(224, 0.875, Bicubic);
const BICUBIC_950: Preprocessing = Preprocessing::timm(224, 0.95, Bicubic);

const fn resnet(block: Block, layers: [usize; 4]) -> Architecture {
    Architecture::ResNet(resnet::Config::new(block, layers))
}

const fn mobilenet_v2(width: f64) -> Architecture {
    Architecture::MobileNetV2(mobilenet_v2::Config { width })
}

/// Rows that have published weights list torchvision's V2 first, then its V1, then timm's.
static MODELS: &[ModelRow] = &[
    ModelRow {
        name: "resnet18",
        aliases: &[],
        architecture: resnet(Block::Basic, [2, 2, 2, 2]),
        weights: &[
            tv("resnet18-f37072fd.pth", 69.758, RESIZE_256),
            hub("tv_in1k", "timm/resnet18.tv_in1k", 69.752, BILINEAR_875),
            hub("a1_in1k", "timm/resnet18.a1_in1k", 71.504, BICUBIC_950),
        ],
    },
    ModelRow {
        name: "resnet34",
        aliases: &[],
        architecture: resnet(Block::Basic, [3, 4, 6, 3]),
        weights: &[
            tv("resnet34-b627a593.pth", 73.314, RESIZE_256),
            hub("tv_in1k", "timm/resnet34.tv_in1k", 73.298, BILINEAR_875),
            hub("a1_in1k", "timm/resnet34.a1_in1k", 76.420, BICUBIC_950),
        ],
    },
    ModelRow {
        name: "resnet50",
        aliases: &[],
        architecture: resnet(Block::Bottleneck, [3, 4, 6, 3]),
        weights: &[
            tv2("resnet50-11ad3fa6.pth", 80.858),
            tv("resnet50-0676ba61.pth", 76.130, RESIZE_256),
            hub("tv_in1k", "timm/resnet50.tv_in1k", 76.156, BILINEAR_875),
            hub("tv2_in1k", "timm/resnet50.tv2_in1k", 80.846, BILINEAR_965),
            hub("a1_in1k", "timm/resnet50.a1_in1k", 80.382, BICUBIC_950),
        ],
    },
    ModelRow {
        name: "resnet101",
        aliases: &[],
        architecture: resnet(Block::Bottleneck, [3, 4, 23, 3]),
        weights: &[
            tv2("resnet101-cd907fc2.pth", 81.886),
            tv("resnet101-63fe2227.pth", 77.374, RESIZE_256),
            hub("tv2_in1k", "timm/resnet101.tv2_in1k", 81.906, BILINEAR_965),
        ],
    },
    ModelRow {
        name: "resnet152",
        aliases: &[],
        architecture: resnet(Block::Bottleneck, [3, 8, 36, 3]),
        weights: &[
            tv2("resnet152-f82ba261.pth", 82.284),
            tv("resnet152-394f9c45.pth", 78.312, RESIZE_256),
            hub("tv2_in1k", "timm/resnet152.tv2_in1k", 82.294, BILINEAR_965),
        ],
    },
    ModelRow {
        name: "mobilenet_v2",
        aliases: &["mobilenetv2_100"],
        architecture: mobilenet_v2(1.0),
        weights: &[
            tv2("mobilenet_v2-7ebf99e0.pth", 72.154),
            embedded(tv("mobilenet_v2-b0353104.pth", 71.878, RESIZE_256)),
            hub(
                "ra_in1k",
                "timm/mobilenetv2_100.ra_in1k",
                72.910,
                BICUBIC_875,
            ),
        ],
    },
    ModelRow {
        name: "mobilenet_v2_050",
        aliases: &["mobilenetv2_050"],
        architecture: mobilenet_v2(0.5),
        weights: &[hub(
            "lamb_in1k",
            "timm/mobilenetv2_050.lamb_in1k",
            65.928,
            BICUBIC_875,
        )],
    },
    ModelRow {
        name: "mobilenet_v2_140",
        aliases: &["mobilenetv2_140"],
        architecture: mobilenet_v2(1.4),
        weights: &[hub(
            "ra_in1k",
            "timm/mobilenetv2_140.ra_in1k",
            76.528,
            BICUBIC_875,
        )],
    },
];
