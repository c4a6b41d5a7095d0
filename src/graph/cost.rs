use super::{Graph, GraphError, Op, Shape};

/// What one node costs for one image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Learned values; running statistics do not count.
    pub parameters: usize,
    /// Multiply-adds of convolutions, linear layers and the two products of attention; what
    /// torchvision publishes as GFLOPS.
    pub macs: u64,
}

/// A network's costs, node by node.
#[derive(Clone, Debug)]
pub struct Costs {
    pub nodes: Vec<(Shape, Cost)>,
}

impl Costs {
    pub fn total(&self) -> Cost {
        self.nodes
            .iter()
            .fold(Cost::default(), |sum, (_, cost)| Cost {
                parameters: sum.parameters + cost.parameters,
                macs: sum.macs + cost.macs,
            })
    }
}

impl Graph {
    /// Output shape, parameters and multiply-adds of every node, for an image of that size.
    ///
    /// # Errors
    /// As [`Graph::shapes`].
    pub fn costs(&self, height: usize, width: usize) -> Result<Costs, GraphError> {
        let shapes = self.shapes(height, width)?;
        let nodes = self
            .nodes()
            .iter()
            .zip(&shapes)
            .map(|(node, &shape)| {
                let parameters = node
                    .parameters
                    .iter()
                    .filter(|p| !p.buffer)
                    .map(|p| p.num_elements())
                    .sum();
                let macs = match node.op {
                    Op::Conv2d(ref c) => {
                        let window = c.in_channels / c.groups * c.kernel[0] * c.kernel[1];
                        shape.num_elements() * window
                    }
                    Op::Linear { in_features, .. } => shape.num_elements() * in_features,
                    Op::SelfAttention { dim, .. } => {
                        let length = shape.num_elements() / dim;
                        4 * length * dim * dim + 2 * length * length * dim
                    }
                    _ => 0,
                };
                let macs = macs as u64;
                (shape, Cost { parameters, macs })
            })
            .collect();
        Ok(Costs { nodes })
    }
}
