//! The Vision Transformer (Dosovitskiy et al. 2020, <https://arxiv.org/abs/2010.11929>) and DeiT
//! (Touvron et al. 2020, <https://arxiv.org/abs/2012.12877>), under torchvision's names.

use serde::{Deserialize, Serialize};

use crate::graph::{
    Activation, Builder, Conv2d, Graph, InitScheme, NodeId, Op, Padding, PositionInterpolation,
};

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Height and width of a patch, in pixels.
    pub patch: usize,
    /// Features of a token.
    pub dim: usize,
    /// Encoder layers.
    pub depth: usize,
    pub heads: usize,
    /// Features between the two layers of each MLP.
    pub mlp: usize,
    /// Height and width of the images that the positions were learned on, in pixels.
    pub image_size: usize,
    /// How positions follow images of another size.
    pub interpolation: PositionInterpolation,
    /// Of the layer norms: 1e-6 in torchvision and timm.
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
}

const DEFAULT_EPS: f64 = 1e-6;

fn default_eps() -> f64 {
    DEFAULT_EPS
}

impl Config {
    /// Trained at 224, with an MLP of four times the token's features.
    pub const fn new(
        patch: usize,
        dim: usize,
        depth: usize,
        heads: usize,
        interpolation: PositionInterpolation,
    ) -> Self {
        Self {
            patch,
            dim,
            depth,
            heads,
            mlp: 4 * dim,
            image_size: 224,
            interpolation,
            layer_norm_eps: DEFAULT_EPS,
        }
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let within = |n: usize, most: usize| (1..=most).contains(&n);
        if !(within(self.patch, 256)
            && within(self.dim, 1 << 13)
            && within(self.depth, 200)
            && within(self.heads, self.dim)
            && within(self.mlp, 1 << 15)
            && within(self.image_size, 1 << 13))
        {
            return Err("Vision Transformer: a size is out of range".into());
        }
        if !(self.layer_norm_eps > 0.0 && self.layer_norm_eps <= 1.0) {
            return Err("Vision Transformer: layer_norm_eps is out of range".into());
        }
        if !self.dim.is_multiple_of(self.heads) || !self.image_size.is_multiple_of(self.patch) {
            return Err(
                "Vision Transformer: heads must divide dim, and patch the image's size".into(),
            );
        }
        Ok(())
    }
}

/// Builds the network.
pub fn graph(config: &Config, num_classes: usize) -> Graph {
    let &Config { patch, dim, .. } = config;
    let mut b = Builder::new(InitScheme::Transformer);
    let image = b.input();
    let patches = Conv2d::new(3, dim, patch)
        .stride(patch)
        .padding(Padding::Symmetric(0))
        .bias();
    let x = b.conv("conv_proj", patches, image);
    let x = b.add("permute", Op::Tokens, &[x]);
    let x = b.add("class_token", Op::ClassToken { dim }, &[x]);
    let positions = Op::PositionEmbedding {
        dim,
        grid: config.image_size / patch,
        prefix: 1,
        patch,
        interpolation: config.interpolation,
    };
    let mut x = b.add("encoder.pos_embedding", positions, &[x]);
    for index in 0..config.depth {
        let name = format!("encoder.layers.encoder_layer_{index}");
        x = encoder_layer(&mut b, config, &name, x);
    }
    let x = b.add("encoder.ln", layer_norm(config), &[x]);
    let x = b.add("getitem", Op::SelectToken { index: 0 }, &[x]);
    b.linear("heads.head", dim, num_classes, x);
    b.finish()
}

/// Attention, then an MLP, each on a normalised input and added to it.
fn encoder_layer(b: &mut Builder, config: &Config, name: &str, input: NodeId) -> NodeId {
    let &Config {
        dim, heads, mlp, ..
    } = config;
    let x = b.add(format!("{name}.ln_1"), layer_norm(config), &[input]);
    let attention = Op::SelfAttention { dim, heads };
    let x = b.add(format!("{name}.self_attention"), attention, &[x]);
    let input = b.add(format!("{name}.add"), Op::Add, &[x, input]);
    let x = b.add(format!("{name}.ln_2"), layer_norm(config), &[input]);
    let x = b.linear(format!("{name}.mlp.0"), dim, mlp, x);
    let x = b.activation(format!("{name}.mlp.1"), Activation::Gelu, x);
    let x = b.linear(format!("{name}.mlp.3"), mlp, dim, x);
    b.add(format!("{name}.add_1"), Op::Add, &[input, x])
}

fn layer_norm(config: &Config) -> Op {
    Op::LayerNorm {
        dim: config.dim,
        eps: config.layer_norm_eps,
    }
}
