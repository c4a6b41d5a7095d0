use super::{At, Dialect, Rows, Table};
use crate::models::Architecture;
use crate::models::mobilenet_v2::{Config, STAGES};

const TIMM: Rows = &[
    ("features.0.0", At("conv_stem")),
    ("features.0.1", At("bn1")),
    ("features.18.0", At("conv_head")),
    ("features.18.1", At("bn2")),
    ("classifier.1", At("classifier")),
];

/// The first block, which expands nothing.
const TIMM_FIRST: Rows = &[
    ("conv.0.0", At("conv_dw")),
    ("conv.0.1", At("bn1")),
    ("conv.1", At("conv_pw")),
    ("conv.2", At("bn2")),
];

const TIMM_BLOCK: Rows = &[
    ("conv.0.0", At("conv_pw")),
    ("conv.0.1", At("bn1")),
    ("conv.1.0", At("conv_dw")),
    ("conv.1.1", At("bn2")),
    ("conv.2", At("conv_pwl")),
    ("conv.3", At("bn3")),
];

/// The first block belongs to transformers' stem.
const TRANSFORMERS: Rows = &[
    ("features.0.0", At("conv_stem.first_conv.convolution")),
    ("features.0.1", At("conv_stem.first_conv.normalization")),
    ("features.1.conv.0.0", At("conv_stem.conv_3x3.convolution")),
    (
        "features.1.conv.0.1",
        At("conv_stem.conv_3x3.normalization"),
    ),
    ("features.1.conv.1", At("conv_stem.reduce_1x1.convolution")),
    (
        "features.1.conv.2",
        At("conv_stem.reduce_1x1.normalization"),
    ),
    ("features.18.0", At("conv_1x1.convolution")),
    ("features.18.1", At("conv_1x1.normalization")),
    ("classifier.1", At("classifier")),
];

const TRANSFORMERS_BLOCK: Rows = &[
    ("conv.0.0", At("expand_1x1.convolution")),
    ("conv.0.1", At("expand_1x1.normalization")),
    ("conv.1.0", At("conv_3x3.convolution")),
    ("conv.1.1", At("conv_3x3.normalization")),
    ("conv.2", At("reduce_1x1.convolution")),
    ("conv.3", At("reduce_1x1.normalization")),
];

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = |config| Architecture::MobileNetV2(config);
    let mut timm = Table::new(Dialect::Timm, architecture(*config)).outer(TIMM);
    // transformers' networks are TensorFlow's.
    let tensorflow = architecture(Config {
        tensorflow: true,
        ..*config
    });
    let mut transformers = Table::new(Dialect::Transformers, tensorflow).outer(TRANSFORMERS);
    let mut index = 0;
    for (stage, &(_, _, blocks, _)) in STAGES.iter().enumerate() {
        for block in 0..blocks {
            let ours = format!("features.{}.", index + 1);
            let rows = if index == 0 { TIMM_FIRST } else { TIMM_BLOCK };
            timm = timm.block(&ours, &format!("blocks.{stage}.{block}."), rows);
            if index > 0 {
                let theirs = format!("layer.{}.", index - 1);
                transformers = transformers.block(&ours, &theirs, TRANSFORMERS_BLOCK);
            }
            index += 1;
        }
    }
    let ours = match config.tensorflow {
        true => Dialect::Sconce,
        false => Dialect::Torchvision,
    };
    vec![Table::ours(ours, architecture(*config)), timm, transformers]
}
