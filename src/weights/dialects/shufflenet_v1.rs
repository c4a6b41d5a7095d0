use super::{At, Dialect, Rows, Table};
use crate::models::Architecture;
use crate::models::shufflenet_v1::{BLOCKS, Config};

/// pytorchcv's; ours are those of the authors' code.
const OUTER: Rows = &[
    ("first_conv.0", At("features.init_block.conv")),
    ("first_conv.1", At("features.init_block.bn")),
    ("classifier.0", At("output")),
];

const UNIT: Rows = &[
    ("branch_main_1.0", At("compress_conv1")),
    ("branch_main_1.1", At("compress_bn1")),
    ("branch_main_1.3", At("dw_conv2")),
    ("branch_main_1.4", At("dw_bn2")),
    ("branch_main_2.0", At("expand_conv3")),
    ("branch_main_2.1", At("expand_bn3")),
];

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = Architecture::ShuffleNetV1(*config);
    let mut table = Table::new(Dialect::Pytorchcv, architecture).outer(OUTER);
    let mut index = 0;
    for (stage, units) in BLOCKS.into_iter().enumerate() {
        for unit in 0..units {
            let theirs = format!("features.stage{}.unit{}.", stage + 1, unit + 1);
            table = table.block(&format!("features.{index}."), &theirs, UNIT);
            index += 1;
        }
    }
    vec![Table::ours(Dialect::Authors, architecture), table]
}
