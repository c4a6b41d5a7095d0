use super::{At, Dialect, Rows, Table};
use crate::models::Architecture;
use crate::models::resnet::{Block, Config};

/// transformers': stages and layers in the place of `layer1.0`, a convolution and its norm in one
/// module. torchvision and timm agree.
const OUTER: Rows = &[
    ("conv1", At("embedder.embedder.convolution")),
    ("bn1", At("embedder.embedder.normalization")),
    ("fc", At("classifier.1")),
];

const BLOCK: Rows = &[
    ("downsample.0", At("shortcut.convolution")),
    ("downsample.1", At("shortcut.normalization")),
    ("conv1", At("layer.0.convolution")),
    ("bn1", At("layer.0.normalization")),
    ("conv2", At("layer.1.convolution")),
    ("bn2", At("layer.1.normalization")),
    ("conv3", At("layer.2.convolution")),
    ("bn3", At("layer.2.normalization")),
];

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = Architecture::ResNet(*config);
    let mut tables = vec![
        Table::ours(Dialect::Torchvision, architecture),
        Table::ours(Dialect::Timm, architecture),
    ];
    // transformers has neither groups nor other widths.
    if (config.groups, config.width_per_group) == (1, 64) {
        let mut table = Table::new(Dialect::Transformers, architecture).outer(OUTER);
        // A basic block has no third convolution.
        let last = match config.block {
            Block::Basic => BLOCK.len() - 2,
            Block::Bottleneck => BLOCK.len(),
        };
        for (stage, &blocks) in config.layers.iter().enumerate() {
            for block in 0..blocks {
                table = table.block(
                    &format!("layer{}.{block}.", stage + 1),
                    &format!("encoder.stages.{stage}.layers.{block}."),
                    &BLOCK[..last],
                );
            }
        }
        tables.push(table);
    }
    tables
}
