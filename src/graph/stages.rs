use std::ops::Range;

use super::Graph;

/// A part of a network between the image and the head: a stem, a stage, a block, the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The module's name; of several modules without parts of their own, that of the first which
    /// has parameters.
    pub name: String,
    /// Its nodes.
    pub nodes: Range<usize>,
}

/// Modules that only hold others.
const CONTAINERS: [&str; 6] = [
    "features",
    "blocks",
    "encoder.layers",
    "encoder",
    "classifier",
    "heads",
];

impl Graph {
    /// The network's modules in order: `layer1` of a ResNet, `features.3` of a MobileNet,
    /// `encoder.layers.encoder_layer_0` of a transformer. Every node is in one of them.
    pub fn stages(&self) -> Vec<Stage> {
        let mut stages: Vec<Stage> = Vec::new();
        // Whether the last stage is a run of single nodes (`conv1`, `bn1`, `relu`), and named
        // after one without parameters.
        let (mut loose, mut unnamed) = (true, true);
        for (index, node) in self.nodes().iter().enumerate() {
            let name = module(&node.name);
            let single = name == node.name;
            match stages.last_mut() {
                Some(last) if last.name == name || loose && (single || index == 1) => {
                    if unnamed && (!single || !node.parameters.is_empty()) {
                        last.name = name.to_string();
                        unnamed = false;
                    }
                    last.nodes.end = index + 1;
                    loose = single;
                }
                _ => {
                    stages.push(Stage {
                        name: name.to_string(),
                        nodes: index..index + 1,
                    });
                    loose = single;
                    unnamed = single && node.parameters.is_empty();
                }
            }
        }
        stages
    }
}

/// The module that a node belongs to.
fn module(node: &str) -> &str {
    let container = CONTAINERS
        .iter()
        .find(|c| node.strip_prefix(**c).is_some_and(|r| r.starts_with('.')));
    let start = container.map_or(0, |c| c.len() + 1);
    let end = node[start..].find('.').map_or(node.len(), |at| start + at);
    &node[..end]
}

#[cfg(test)]
mod tests {
    use crate::models::registry;

    #[test]
    fn stages_are_the_modules_that_people_know() {
        let stages = |model: &str| {
            let graph = registry::find(model).unwrap().row.architecture.graph(10);
            let stages = graph.stages();
            assert_eq!(stages[0].nodes.start, 0);
            assert_eq!(stages[stages.len() - 1].nodes.end, graph.nodes().len());
            for pair in stages.windows(2) {
                assert_eq!(pair[0].nodes.end, pair[1].nodes.start);
            }
            stages.into_iter().map(|s| s.name).collect::<Vec<_>>()
        };
        let resnet = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"];
        assert_eq!(stages("resnet18"), resnet);
        let mobilenet = stages("mobilenet_v2");
        assert_eq!(mobilenet[..2], ["features.0", "features.1"]);
        assert_eq!(mobilenet[18..], ["features.18", "classifier.1"]);
        let shufflenet = stages("shufflenet_v2_x1_0");
        let expected = [
            "conv1", "maxpool", "stage2", "stage3", "stage4", "conv5", "fc",
        ];
        assert_eq!(shufflenet, expected);
        let transformer = stages("vit_b_16");
        assert_eq!(transformer[0], "conv_proj");
        assert_eq!(transformer[1], "encoder.layers.encoder_layer_0");
        assert_eq!(transformer[13], "encoder.ln");
        assert_eq!(transformer.len(), 14);
    }
}
