//! What the mobile networks are made of.

use crate::graph::{Activation, Builder, Conv2d, NodeId, Norm, Padding};

/// Convolution and batch norm, with a framework's habits.
#[derive(Clone, Copy)]
pub(super) struct Layers {
    /// SAME in place of a convolution's own padding.
    same_padding: bool,
    norm: Norm,
}

impl Layers {
    pub const PYTORCH: Self = Self {
        same_padding: false,
        norm: Norm::PYTORCH,
    };
    pub const TENSORFLOW: Self = Self {
        same_padding: true,
        norm: Norm::TENSORFLOW,
    };

    pub fn new(tensorflow: bool) -> Self {
        if tensorflow {
            Self::TENSORFLOW
        } else {
            Self::PYTORCH
        }
    }

    pub fn conv_norm(
        self,
        b: &mut Builder,
        prefix: &str,
        names: [&str; 2],
        conv: Conv2d,
        x: NodeId,
    ) -> NodeId {
        let [conv_name, norm_name] = names.map(|name| format!("{prefix}{name}"));
        let conv = if self.same_padding {
            conv.padding(Padding::Same)
        } else {
            conv
        };
        b.conv_norm(conv_name, norm_name, conv, self.norm, x)
    }

    pub fn conv_norm_relu6(
        self,
        b: &mut Builder,
        prefix: &str,
        [conv_name, norm_name, activation_name]: [&str; 3],
        conv: Conv2d,
        x: NodeId,
    ) -> NodeId {
        let x = self.conv_norm(b, prefix, [conv_name, norm_name], conv, x);
        b.activation(format!("{prefix}{activation_name}"), Activation::Relu6, x)
    }
}
