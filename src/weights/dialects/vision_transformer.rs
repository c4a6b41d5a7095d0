use super::{At, Dialect, Joined, Rows, Table};
use crate::models::Architecture;
use crate::models::vision_transformer::Config;

/// torchvision before 0.12 named the layers of an MLP; the rest was as it is.
const OLD: Rows = &[
    ("class_token", At("class_token")),
    ("conv_proj", At("conv_proj")),
    ("encoder.pos_embedding", At("encoder.pos_embedding")),
    ("encoder.ln", At("encoder.ln")),
    ("heads.head", At("heads.head")),
];

const OLD_BLOCK: Rows = &[
    ("ln_1", At("ln_1")),
    ("ln_2", At("ln_2")),
    ("self_attention", At("self_attention")),
    ("self_attention.out_proj", At("self_attention.out_proj")),
    ("mlp.0", At("mlp.linear_1")),
    ("mlp.3", At("mlp.linear_2")),
];

const TIMM: Rows = &[
    ("class_token", At("cls_token")),
    ("conv_proj", At("patch_embed.proj")),
    ("encoder.pos_embedding", At("pos_embed")),
    ("encoder.ln", At("norm")),
    ("heads.head", At("head")),
];

const TIMM_BLOCK: Rows = &[
    ("ln_1", At("norm1")),
    ("ln_2", At("norm2")),
    ("self_attention.in_proj_weight", At("attn.qkv.weight")),
    ("self_attention.in_proj_bias", At("attn.qkv.bias")),
    ("self_attention.out_proj", At("attn.proj")),
    ("mlp.0", At("mlp.fc1")),
    ("mlp.3", At("mlp.fc2")),
];

const TRANSFORMERS: Rows = &[
    ("class_token", At("embeddings.cls_token")),
    ("conv_proj", At("embeddings.patch_embeddings.projection")),
    (
        "encoder.pos_embedding",
        At("embeddings.position_embeddings"),
    ),
    ("encoder.ln", At("layernorm")),
    ("heads.head", At("classifier")),
];

/// Of transformers' files, and of its networks before version 5.
const TRANSFORMERS_BLOCK: Rows = &[
    ("ln_1", At("layernorm_before")),
    ("ln_2", At("layernorm_after")),
    (
        "self_attention.in_proj_weight",
        Joined([
            "attention.attention.query.weight",
            "attention.attention.key.weight",
            "attention.attention.value.weight",
        ]),
    ),
    (
        "self_attention.in_proj_bias",
        Joined([
            "attention.attention.query.bias",
            "attention.attention.key.bias",
            "attention.attention.value.bias",
        ]),
    ),
    ("self_attention.out_proj", At("attention.output.dense")),
    ("mlp.0", At("intermediate.dense")),
    ("mlp.3", At("output.dense")),
];

/// Of transformers' networks since version 5.
const TRANSFORMERS_5_BLOCK: Rows = &[
    ("ln_1", At("layernorm_before")),
    ("ln_2", At("layernorm_after")),
    (
        "self_attention.in_proj_weight",
        Joined([
            "attention.q_proj.weight",
            "attention.k_proj.weight",
            "attention.v_proj.weight",
        ]),
    ),
    (
        "self_attention.in_proj_bias",
        Joined([
            "attention.q_proj.bias",
            "attention.k_proj.bias",
            "attention.v_proj.bias",
        ]),
    ),
    ("self_attention.out_proj", At("attention.o_proj")),
    ("mlp.0", At("mlp.fc1")),
    ("mlp.3", At("mlp.fc2")),
];

/// Epsilon of the layer norms of transformers' networks, unless their config.json says otherwise.
pub const TRANSFORMERS_EPS: f64 = 1e-12;

pub(super) fn tables(config: &Config) -> Vec<Table> {
    let architecture = Architecture::VisionTransformer(*config);
    let transformers = Architecture::VisionTransformer(Config {
        layer_norm_eps: TRANSFORMERS_EPS,
        ..*config
    });
    let table = |dialect, architecture, outer: Rows, prefix: &str, rows: Rows| {
        let mut table = Table::new(dialect, architecture).outer(outer);
        for layer in 0..config.depth {
            let ours = format!("encoder.layers.encoder_layer_{layer}.");
            table = table.block(&ours, &format!("{prefix}{layer}."), rows);
        }
        table
    };
    vec![
        Table::ours(Dialect::Torchvision, architecture),
        table(
            Dialect::Torchvision,
            architecture,
            OLD,
            "encoder.layers.encoder_layer_",
            OLD_BLOCK,
        ),
        table(Dialect::Timm, architecture, TIMM, "blocks.", TIMM_BLOCK),
        table(
            Dialect::Transformers,
            transformers,
            TRANSFORMERS,
            "encoder.layer.",
            TRANSFORMERS_BLOCK,
        ),
        table(
            Dialect::Transformers,
            transformers,
            TRANSFORMERS,
            "layers.",
            TRANSFORMERS_5_BLOCK,
        ),
    ]
}
