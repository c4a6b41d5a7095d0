//! Which nodes of a graph are computed in one pass.

use crate::graph::{Activation, Graph, NodeId, Op};

/// A node, with what is done to its output in the same pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    pub node: NodeId,
    /// Another tensor to be added.
    pub residual: Option<NodeId>,
    pub activation: Option<Activation>,
    /// Whose value the result is.
    pub output: NodeId,
}

/// The steps of a graph, in order. A norm, convolution, linear layer or sum takes with it the sum and the
/// activation behind it that nothing else reads.
pub(super) fn steps(graph: &Graph) -> Vec<Step> {
    let readers = graph.reader_counts();
    let mut taken = vec![false; readers.len()];
    let op = |id: NodeId| &graph.node(id).op;
    let inputs = |id: NodeId| &graph.node(id).inputs;
    let only_here = |id: NodeId| readers[id.index()] == 1;
    let mut steps = Vec::new();
    for output in graph.ids().rev() {
        if taken[output.index()] || matches!(op(output), Op::Input) {
            continue;
        }
        let mut step = Step {
            node: output,
            residual: None,
            activation: None,
            output,
        };
        if let Op::Activation(activation) = *op(output) {
            let before = inputs(output)[0];
            let takes = matches!(
                op(before),
                Op::BatchNorm { .. } | Op::Conv2d(_) | Op::Linear { .. } | Op::Add
            );
            if only_here(before) && takes {
                taken[before.index()] = true;
                step.node = before;
                step.activation = Some(activation);
            }
        }
        if let Op::Add = op(step.node) {
            let (a, b) = (inputs(step.node)[0], inputs(step.node)[1]);
            let is_norm = |id: NodeId| matches!(op(id), Op::BatchNorm { .. }) && only_here(id);
            let norm = [(a, b), (b, a)].into_iter().find(|(id, _)| is_norm(*id));
            if let Some((norm, other)) = norm.filter(|_| a != b) {
                taken[norm.index()] = true;
                step.node = norm;
                step.residual = Some(other);
            }
        }
        steps.push(step);
    }
    steps.reverse();
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::registry;

    fn steps_of(network: &str) -> (Graph, Vec<Step>) {
        let graph = registry::find(network).unwrap().row.architecture.graph(10);
        let steps = steps(&graph);
        (graph, steps)
    }

    #[test]
    fn norms_take_sums_and_activations_with_them() {
        let (graph, steps) = steps_of("resnet18");
        let is_norm = |step: &&Step| matches!(graph.node(step.node).op, Op::BatchNorm { .. });
        let norms: Vec<&Step> = steps.iter().filter(is_norm).collect();
        // One for each of the 20 convolutions; each block ends in a sum and a ReLU, and the three
        // convolutions beside a block have neither.
        assert_eq!(norms.len(), 20);
        let count = |kind: fn(&&&Step) -> bool| norms.iter().filter(kind).count();
        assert_eq!(count(|s| s.residual.is_some() && s.activation.is_some()), 8);
        assert_eq!(count(|s| s.residual.is_none() && s.activation.is_some()), 9);
        assert_eq!(count(|s| s.residual.is_none() && s.activation.is_none()), 3);
        // Convolutions, norms, max pool, mean, flatten, head: no sum or ReLU is left.
        assert_eq!(steps.len(), 20 + 20 + 4);
    }

    #[test]
    fn every_node_is_computed_once_and_after_what_it_reads() {
        for row in registry::all() {
            let (graph, steps) = steps_of(row.name);
            let mut known = vec![false; graph.nodes().len()];
            known[graph.input().index()] = true;
            for step in &steps {
                let inputs = graph.node(step.node).inputs.iter().chain(&step.residual);
                for input in inputs {
                    assert!(known[input.index()], "{}: {step:?}", row.name);
                }
                assert!(!known[step.output.index()], "{}: {step:?}", row.name);
                known[step.output.index()] = true;
            }
            assert!(known[graph.output().index()]);
            // What is not known is inside a step.
            let inside = steps.iter().map(|s| {
                let sum = usize::from(s.residual.is_some());
                let activation = usize::from(s.activation.is_some());
                let first = usize::from(s.node != s.output);
                // A sum alone and an activation alone are steps of their own.
                (sum + activation).max(first)
            });
            let unknown = known.iter().filter(|known| !**known).count();
            assert_eq!(inside.sum::<usize>(), unknown, "{}", row.name);
        }
    }
}
