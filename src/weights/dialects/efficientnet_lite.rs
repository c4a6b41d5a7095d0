use super::{At, Dialect, Rows, Table};
use crate::models::Architecture;
use crate::models::efficientnet_lite::{Config, STAGES};

/// The PyTorch ports that take over TensorFlow's names, with blocks numbered through; ours are
/// timm's.
const OUTER: Rows = &[
    ("conv_stem", At("_conv_stem")),
    ("bn1", At("_bn0")),
    ("conv_head", At("_conv_head")),
    ("bn2", At("_bn1")),
    ("classifier", At("_fc")),
];

/// The first block expands nothing, so that its names are shifted.
const FIRST: Rows = &[
    ("conv_dw", At("_depthwise_conv")),
    ("bn1", At("_bn1")),
    ("conv_pw", At("_project_conv")),
    ("bn2", At("_bn2")),
];

const BLOCK: Rows = &[
    ("conv_pw", At("_expand_conv")),
    ("bn1", At("_bn0")),
    ("conv_dw", At("_depthwise_conv")),
    ("bn2", At("_bn1")),
    ("conv_pwl", At("_project_conv")),
    ("bn3", At("_bn2")),
];

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = Architecture::EfficientNetLite(*config);
    let mut table = Table::new(Dialect::Authors, architecture).outer(OUTER);
    let mut index = 0;
    for (stage, &(_, _, _, blocks, _)) in STAGES.iter().enumerate() {
        for block in 0..blocks {
            let rows = if index == 0 { FIRST } else { BLOCK };
            let ours = format!("blocks.{stage}.{block}.");
            table = table.block(&ours, &format!("_blocks.{index}."), rows);
            index += 1;
        }
    }
    vec![Table::ours(Dialect::Timm, architecture), table]
}
