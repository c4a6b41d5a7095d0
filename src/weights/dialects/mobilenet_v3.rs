use super::{At, Dialect, Pointwise, Rows, Table};
use crate::models::Architecture;
use crate::models::mobilenet_v3::{Config, Origin, Size};

/// timm's. Its blocks lie in stages, ours are numbered through.
const OUTER: Rows = &[
    ("features.0.0", At("conv_stem")),
    ("features.0.1", At("bn1")),
    ("classifier.0", Pointwise("conv_head")),
    ("classifier.3", At("classifier")),
];

/// The last convolution, a stage of its own.
const LAST: Rows = &[("0", At("conv")), ("1", At("bn1"))];

/// The first block expands nothing; in the small network it has a gate.
const FIRST: Rows = &[
    ("block.0.0", At("conv_dw")),
    ("block.0.1", At("bn1")),
    ("block.1.0", At("conv_pw")),
    ("block.1.1", At("bn2")),
];

const FIRST_GATED: Rows = &[
    ("block.0.0", At("conv_dw")),
    ("block.0.1", At("bn1")),
    ("block.1.fc1", At("se.conv_reduce")),
    ("block.1.fc2", At("se.conv_expand")),
    ("block.2.0", At("conv_pw")),
    ("block.2.1", At("bn2")),
];

const BLOCK: Rows = &[
    ("block.0.0", At("conv_pw")),
    ("block.0.1", At("bn1")),
    ("block.1.0", At("conv_dw")),
    ("block.1.1", At("bn2")),
    ("block.2.0", At("conv_pwl")),
    ("block.2.1", At("bn3")),
];

const GATED: Rows = &[
    ("block.0.0", At("conv_pw")),
    ("block.0.1", At("bn1")),
    ("block.1.0", At("conv_dw")),
    ("block.1.1", At("bn2")),
    ("block.2.fc1", At("se.conv_reduce")),
    ("block.2.fc2", At("se.conv_expand")),
    ("block.3.0", At("conv_pwl")),
    ("block.3.1", At("bn3")),
];

/// Blocks of each of timm's stages: how many, and whether they have gates.
const LARGE: [(usize, bool); 6] = [
    (1, false),
    (2, false),
    (3, true),
    (4, false),
    (2, true),
    (3, true),
];
const SMALL: [(usize, bool); 5] = [(1, true), (2, false), (3, true), (2, true), (3, true)];

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = |config| Architecture::MobileNetV3(config);
    // The libraries' networks differ in their epsilons, and under width 1 in their widths.
    let (ours, origin) = match config.origin {
        Origin::Torchvision => (Dialect::Torchvision, Origin::Timm),
        other => (Dialect::Sconce, other),
    };
    let named = architecture(Config { origin, ..*config });
    let mut timm = Table::new(Dialect::Timm, named).outer(OUTER);
    let stages: &[(usize, bool)] = match config.size {
        Size::Large => &LARGE,
        Size::Small => &SMALL,
    };
    let mut index = 1;
    for (stage, &(blocks, gated)) in stages.iter().enumerate() {
        for block in 0..blocks {
            let rows = match (index, gated) {
                (1, false) => FIRST,
                (1, true) => FIRST_GATED,
                (_, false) => BLOCK,
                (_, true) => GATED,
            };
            let theirs = format!("blocks.{stage}.{block}.");
            timm = timm.block(&format!("features.{index}."), &theirs, rows);
            index += 1;
        }
    }
    let theirs = format!("blocks.{}.0.", stages.len());
    timm = timm.block(&format!("features.{index}."), &theirs, LAST);
    vec![Table::ours(ours, architecture(*config)), timm]
}
