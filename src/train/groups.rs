use std::collections::{BTreeMap, BTreeSet};

use super::optimizer::Group;
use crate::graph::{Graph, Op};

/// Names of the tensors that `--freeze` keeps as they are: `none` and `auto` nothing, `backbone` all
/// but the head, or everything up to and including a stage or a module.
///
/// # Errors
/// What can be given instead, where there is no stage or module of that name before the head.
pub fn frozen_names(graph: &Graph, freeze: &str) -> Result<BTreeSet<String>, String> {
    let head = graph.find(&graph.head().name).map_or(0, |id| id.index());
    let end = match freeze {
        "none" | "auto" => 0,
        "backbone" => head,
        module => {
            let stages = graph.stages();
            let stage = stages.iter().find(|s| s.name == module);
            let end = stage
                .map(|s| s.nodes.end)
                .or_else(|| graph.find(module).map(|id| id.index() + 1));
            match end {
                Some(end) if end <= head => end,
                _ => {
                    let before = stages.iter().filter(|s| s.nodes.end <= head);
                    let names: Vec<&str> = before.map(|s| s.name.as_str()).collect();
                    return Err(format!(
                        "auto, none, backbone, or one of {}",
                        names.join(", ")
                    ));
                }
            }
        }
    };
    let frozen = graph.nodes()[..end].iter().flat_map(|n| &n.parameters);
    Ok(frozen.map(|p| p.name.clone()).collect())
}

/// Names of all that belongs to batch norms.
pub fn norm_names(graph: &Graph) -> impl Iterator<Item = String> {
    let norms = graph.nodes().iter();
    let norms = norms.filter(|n| matches!(n.op, Op::BatchNorm { .. }));
    norms.flat_map(|n| n.parameters.iter().map(|p| p.name.clone()))
}

/// A group for each of the named parameters: norms, biases, class tokens and positions do not
/// decay, and the rate falls by `layer_decay` with every stage away from the head.
pub fn groups<'a>(
    graph: &Graph,
    names: impl Iterator<Item = &'a str>,
    weight_decay: f64,
    layer_decay: f64,
) -> Vec<Group> {
    let stages = graph.stages();
    let mut by_name = BTreeMap::new();
    for (depth, stage) in stages.iter().rev().enumerate() {
        let rate_scale = layer_decay.powi(depth as i32);
        for parameter in graph.nodes()[stage.nodes.clone()]
            .iter()
            .flat_map(|n| &n.parameters)
        {
            let decays = matches!(parameter.shape.len(), 2 | 4);
            let group = Group {
                rate_scale,
                weight_decay: if decays { weight_decay } else { 0.0 },
            };
            by_name.insert(parameter.name.as_str(), group);
        }
    }
    let plain = Group {
        rate_scale: 1.0,
        weight_decay,
    };
    names
        .map(|name| by_name.get(name).copied().unwrap_or(plain))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::registry;

    fn graph(model: &str) -> Graph {
        registry::find(model).unwrap().row.architecture.graph(10)
    }

    #[test]
    fn parts_are_frozen_up_to_a_stage() {
        let graph = graph("resnet18");
        assert!(frozen_names(&graph, "none").unwrap().is_empty());
        let backbone = frozen_names(&graph, "backbone").unwrap();
        assert_eq!(backbone.len(), graph.parameters().count() - 2);
        assert!(!backbone.contains("fc.weight"));
        let stage = frozen_names(&graph, "layer2").unwrap();
        assert!(stage.contains("conv1.weight") && stage.contains("layer2.1.bn2.running_var"));
        assert!(!stage.contains("layer3.0.conv1.weight"));
        let block = frozen_names(&graph, "layer2.0").unwrap();
        assert!(block.contains("layer2.0.bn2.bias") && !block.contains("layer2.1.bn2.bias"));
        for wrong in ["layer9", "fc"] {
            let hint = frozen_names(&graph, wrong).unwrap_err();
            assert!(
                hint.contains("conv1, layer1, layer2, layer3, layer4"),
                "{hint}"
            );
        }
    }

    #[test]
    fn norms_and_biases_do_not_decay_and_rates_fall_towards_the_image() {
        let graph = graph("vit_b_16");
        let names = [
            "conv_proj.weight",
            "class_token",
            "encoder.layers.encoder_layer_11.mlp.0.weight",
            "encoder.layers.encoder_layer_11.ln_1.weight",
            "heads.head.weight",
            "heads.head.bias",
        ];
        let groups = groups(&graph, names.into_iter(), 0.05, 0.5);
        let depth = (graph.stages().len() - 1) as i32;
        assert_eq!(groups[0].rate_scale, 0.5f64.powi(depth));
        assert_eq!(groups[2].rate_scale, 0.5);
        assert_eq!(groups[4].rate_scale, 1.0);
        let decays: Vec<f64> = groups.iter().map(|g| g.weight_decay).collect();
        assert_eq!(decays, [0.05, 0.0, 0.05, 0.0, 0.05, 0.0]);
    }
}
