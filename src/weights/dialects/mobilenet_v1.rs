use super::{At, Dialect, Rows, Table};
use crate::models::Architecture;
use crate::models::mobilenet_v1::{Config, STAGES};

/// transformers': depthwise and pointwise convolutions numbered through.
const OUTER: Rows = &[
    ("conv_stem", At("conv_stem.convolution")),
    ("bn1", At("conv_stem.normalization")),
    ("classifier", At("classifier")),
];

const DEPTHWISE: Rows = &[("conv_dw", At("convolution")), ("bn1", At("normalization"))];

const POINTWISE: Rows = &[("conv_pw", At("convolution")), ("bn2", At("normalization"))];

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = |config| Architecture::MobileNetV1(config);
    // transformers' networks are TensorFlow's.
    let tensorflow = architecture(Config {
        tensorflow: true,
        ..*config
    });
    let mut table = Table::new(Dialect::Transformers, tensorflow).outer(OUTER);
    let mut layer = 0;
    for (stage, &(_, blocks, _)) in STAGES.iter().enumerate() {
        for block in 0..blocks {
            let ours = format!("blocks.{stage}.{block}.");
            for rows in [DEPTHWISE, POINTWISE] {
                table = table.block(&ours, &format!("layer.{layer}."), rows);
                layer += 1;
            }
        }
    }
    vec![Table::ours(Dialect::Timm, architecture(*config)), table]
}
