//! A network as data: named nodes in topological order, with nothing about layout or device.
//!
//! Every executor, the cost table and the exports read the same [`Graph`]. Parameters carry
//! torchvision's names, and nodes the names that torchvision's feature extraction gives them
//! (`layer1.0.conv1`, `layer1.0.relu_1`, `flatten`), so that knowledge carries over.

mod builder;
mod cost;
mod op;
mod shape;
mod stages;

pub use builder::{Builder, InitScheme, Norm};
pub use cost::{Cost, Costs};
pub use op::{Activation, Conv2d, Init, Op, Padding, Parameter, Pool2d, PositionInterpolation};
pub use shape::Shape;
pub use stages::Stage;

/// Index of a node in its [`Graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) usize);

impl NodeId {
    /// Position in [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0
    }
}

/// One operation of a network.
#[derive(Clone, Debug)]
pub struct Node {
    /// torchvision's feature-extraction name, unique in the graph.
    pub name: String,
    pub op: Op,
    /// The nodes whose outputs this one reads; all come earlier in the graph.
    pub inputs: Vec<NodeId>,
    /// Learned tensors and buffers, in the order that the operation expects them.
    pub parameters: Vec<Parameter>,
}

/// A network: nodes in topological order, from one image `[3, H, W]` to logits.
#[derive(Clone, Debug)]
pub struct Graph {
    nodes: Vec<Node>,
}

impl Graph {
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// All node ids, inputs before their readers.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).map(NodeId)
    }

    /// The node that receives the image.
    pub fn input(&self) -> NodeId {
        NodeId(0)
    }

    /// The nodes up to and with `last`, which becomes the output.
    pub fn until(&self, last: NodeId) -> Self {
        Self {
            nodes: self.nodes[..=last.0].to_vec(),
        }
    }

    /// The node that gives the logits.
    pub fn output(&self) -> NodeId {
        NodeId(self.nodes.len() - 1)
    }

    /// The node of that name, or the last node inside the module of that name (`layer1`,
    /// `features.0`), as torchvision's feature extraction reads a shortened name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        let inside = |n: &Node| {
            n.name
                .strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        self.nodes
            .iter()
            .position(|n| n.name == name)
            .or_else(|| self.nodes.iter().rposition(inside))
            .map(NodeId)
    }

    /// The classification head: the last linear layer.
    pub fn head(&self) -> &Node {
        self.nodes
            .iter()
            .rfind(|n| matches!(n.op, Op::Linear { .. }))
            .expect("every network ends in a linear layer")
    }

    /// The node whose value the head classifies, and the rate of the dropout between them.
    pub fn features(&self) -> (NodeId, f64) {
        let mut node = self.head();
        let mut rate = 0.0;
        loop {
            let input = node.inputs[0];
            node = self.node(input);
            match node.op {
                Op::Dropout { p } => rate = 1.0 - (1.0 - rate) * (1.0 - p),
                _ => return (input, rate),
            }
        }
    }

    /// The same network, of which training leaves nothing out.
    pub fn without_dropout(mut self) -> Self {
        for node in &mut self.nodes {
            if let Op::Dropout { p } = &mut node.op {
                *p = 0.0;
            }
        }
        self
    }

    /// The same with another activation in the place of each.
    #[cfg(test)]
    pub fn with_activations(mut self, activation: Activation) -> Self {
        for node in &mut self.nodes {
            if let Op::Activation(of) = &mut node.op {
                *of = activation;
            }
        }
        self
    }

    /// Number of classes that the head tells apart.
    pub fn num_classes(&self) -> usize {
        match self.head().op {
            Op::Linear { out_features, .. } => out_features,
            _ => unreachable!("head() returns a linear node"),
        }
    }

    /// Every parameter and buffer of the network, in graph order.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.nodes.iter().flat_map(|n| &n.parameters)
    }

    /// How many nodes read each node's output.
    pub fn reader_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.nodes.len()];
        for node in &self.nodes {
            for input in &node.inputs {
                counts[input.0] += 1;
            }
        }
        counts
    }
}

/// What can be wrong between a network and the input it is asked to take.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    #[error(
        "layer {node}: its input of {height}x{width} is smaller than the window it needs (use larger images)"
    )]
    InputTooSmall {
        node: String,
        height: usize,
        width: usize,
    },
    #[error("layer {node}: expects {expected}, gets {actual}")]
    Mismatch {
        node: String,
        expected: String,
        actual: Shape,
    },
}
