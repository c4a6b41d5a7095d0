"""Goldens of the networks: logits of the reference implementation in float64 on formula-filled
weights, in evaluation and in training mode, running statistics, its own float32 error, parameter
counts and published multiply-adds.

    python tests/oracle/networks.py [NAME ...]
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytorchcv.models.shufflenet as pytorchcv_shufflenet
import timm
import torch
import torchvision
from safetensors.numpy import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

import formula

GOLDEN = Path(__file__).parent.parent / "golden" / "networks"
BATCH = 3
TRAINING_BATCH = 4
# PyTorch's float32 error is the larger of those in its two memory layouts.
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SIZES = [(224, 224), (161, 127), (96, 96)]
TRANSFORMER_SIZES = [(224, 224), (96, 96), (256, 256)]


class Torchvision:
    """A network of torchvision: its names are ours."""

    def __init__(self, name, **options):
        self.sizes = TRANSFORMER_SIZES if name.startswith("vit") else SIZES
        self.name = name
        self.options = options

    def build(self, height, width):
        options = dict(self.options)
        if self.name.startswith("vit"):
            options["image_size"] = height
        return getattr(torchvision.models, self.name)(**options)

    def rename(self, model):
        return {key: key for key in model.state_dict()}

    def positions(self, value, height, width):
        """Positions learned at 224 for another size."""
        patch = int(self.name.split("_")[-1])
        state = {"encoder.pos_embedding": value}
        return interpolate_embeddings(height, patch, state)["encoder.pos_embedding"]

    def published_gmacs(self):
        """What torchvision publishes as GFLOPS, which are multiply-adds."""
        if self.options:
            return None
        weights = torchvision.models.get_model_weights(self.name)
        return next(iter(weights)).meta["_ops"]


class Timm:
    """A network of timm; `rename` maps its state dict's keys to ours."""

    def __init__(self, name, rename=lambda model: {k: k for k in model.state_dict()}, **options):
        self.transformer = name.startswith(("vit", "deit"))
        self.sizes = TRANSFORMER_SIZES if self.transformer else SIZES
        self.name = name
        self.rename = rename
        self.options = options

    def build(self, height, width):
        size = {"img_size": (height, width)} if self.transformer else {}
        return timm.create_model(self.name, **self.options, **size)

    def positions(self, value, height, width):
        return resample_abs_pos_embed(value, [height // 16, width // 16])

    def published_gmacs(self):
        return None


class Pytorchcv:
    """ShuffleNetV1 of pytorchcv, with its pooling made to follow the image's size."""

    sizes = SIZES

    def __init__(self, groups, stem, width, released=False):
        self.groups, self.stem, self.width, self.released = groups, stem, width, released

    def build(self, height, width):
        channels = [[self.width << s] * n for s, n in enumerate([4, 8, 4])]
        model = pytorchcv_shufflenet.ShuffleNet(channels, self.stem, self.groups)
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)
        if self.released:
            model.output = nn.Linear(channels[-1][0], 1000, bias=False)
            for module in model.modules():
                if isinstance(module, pytorchcv_shufflenet.ShuffleUnit):
                    module.forward = released_forward.__get__(module)
        return model

    def rename(self, model):
        """To the names of the authors' released code."""
        starts = {"1": 0, "2": 4, "3": 12}
        parts = {
            "compress_conv1": "branch_main_1.0", "compress_bn1": "branch_main_1.1",
            "dw_conv2": "branch_main_1.3", "dw_bn2": "branch_main_1.4",
            "expand_conv3": "branch_main_2.0", "expand_bn3": "branch_main_2.1",
        }  # fmt: skip

        def ours(key):
            key = key.replace("features.init_block.conv.", "first_conv.0.")
            key = key.replace("features.init_block.bn.", "first_conv.1.")
            key = key.replace("output.", "classifier.0.")
            found = re.match(r"features\.stage(\d)\.unit(\d+)\.(\w+)\.(.*)", key)
            if found:
                stage, unit, part, rest = found.groups()
                key = f"features.{starts[stage] + int(unit) - 1}.{parts[part]}.{rest}"
            return key

        return {key: ours(key) for key in model.state_dict()}

    def published_gmacs(self):
        return None


def released_forward(unit, x):
    """A unit as the authors' code computes it."""
    identity = x
    x = unit.activ(unit.compress_bn1(unit.compress_conv1(x)))
    x = unit.dw_bn2(unit.dw_conv2(x))
    n, c, h, w = x.shape
    groups = unit.expand_conv3.groups
    x = x.reshape(n, c // groups, groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
    x = unit.expand_bn3(unit.expand_conv3(x))
    if unit.downsample:
        return torch.cat((unit.avgpool(identity), unit.activ(x)), 1)
    return unit.activ(x + identity)


def rename_mobilenet_v3(model):
    """timm's MobileNetV3 to torchvision's names."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    index = 1
    for s, stage in enumerate(model.blocks):
        for b, block in enumerate(stage):
            prefix = f"blocks.{s}.{b}."
            if s == len(model.blocks) - 1:  # the last convolution
                names[prefix + "conv"] = f"features.{index}.0"
                names[prefix + "bn1"] = f"features.{index}.1"
                continue
            if hasattr(block, "conv_pwl"):
                parts = [("conv_pw", "bn1"), ("conv_dw", "bn2"), "se", ("conv_pwl", "bn3")]
            else:
                parts = [("conv_dw", "bn1"), "se", ("conv_pw", "bn2")]
            if isinstance(block.se, nn.Identity):
                parts.remove("se")
            for p, part in enumerate(parts):
                target = f"features.{index}.block.{p}"
                if part == "se":
                    names[prefix + "se.conv_reduce"] = target + ".fc1"
                    names[prefix + "se.conv_expand"] = target + ".fc2"
                else:
                    names[prefix + part[0]] = target + ".0"
                    names[prefix + part[1]] = target + ".1"
            index += 1
    names |= {"conv_head": "classifier.0", "classifier": "classifier.3"}
    split = ((key, *key.rsplit(".", 1)) for key in model.state_dict())
    return {key: f"{names[module]}.{leaf}" for key, module, leaf in split}


def rename_mobilenet_v2(model):
    """timm's MobileNetV2 to torchvision's names."""
    names = {
        "conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.18.0",
        "bn2": "features.18.1", "classifier": "classifier.1",
    }  # fmt: skip
    blocks = [(s, b) for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    for index, (s, b) in enumerate(blocks):
        if index == 0:
            parts = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
        else:
            parts = {
                "conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2",
                "bn3": "3",
            }  # fmt: skip
        for theirs, ours in parts.items():
            names[f"blocks.{s}.{b}.{theirs}"] = f"features.{index + 1}.conv.{ours}"
    split = ((key, *key.rsplit(".", 1)) for key in model.state_dict())
    return {key: f"{names[module]}.{leaf}" for key, module, leaf in split}


def rename_transformer(model):
    """timm's Vision Transformer to torchvision's names."""
    names = [
        ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"),
        ("patch_embed.proj", "conv_proj"), ("head.", "heads.head."),
    ]  # fmt: skip
    parts = [
        ("norm1", "ln_1"), ("attn.qkv.", "self_attention.in_proj_"),
        ("attn.proj", "self_attention.out_proj"), ("norm2", "ln_2"),
        ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"),
    ]  # fmt: skip

    def ours(key):
        found = re.match(r"blocks\.(\d+)\.(.*)", key)
        if found:
            rest = found.group(2)
            for theirs, name in parts:
                rest = rest.replace(theirs, name)
            return f"encoder.layers.encoder_layer_{found.group(1)}.{rest}"
        for theirs, name in names:
            if key.startswith(theirs):
                return key.replace(theirs, name, 1)
        return f"encoder.ln.{key.split('.')[1]}" if key.startswith("norm.") else key

    return {key: ours(key) for key in model.state_dict()}


NETWORKS = {
    name: Torchvision(name)
    for name in """
        resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2
        resnext50_32x4d resnext101_32x8d resnext101_64x4d mobilenet_v2
        mobilenet_v3_large mobilenet_v3_small
        shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
        vit_b_16 vit_b_32 vit_l_16 vit_l_32
    """.split()
}
NETWORKS |= {
    "mobilenet_v2_050": Torchvision("mobilenet_v2", width_mult=0.5),
    "mobilenet_v2_140": Torchvision("mobilenet_v2", width_mult=1.4),
    "efficientnet_lite0": Timm("tf_efficientnet_lite0", bn_momentum=0.01),
    "tf_mobilenet_v2_100": Timm(
        "mobilenetv2_100", rename_mobilenet_v2, pad_type="same", bn_eps=1e-3, bn_momentum=0.01,
        num_classes=1001,
    ),
    "tf_mobilenet_v1_100": Timm(
        "mobilenetv1_100", pad_type="same", bn_eps=1e-3, bn_momentum=0.01, num_classes=1001
    ),
}
for percent in ["025", "050", "075", "100", "125"]:
    name = f"mobilenet_v1_{percent}"
    multiplier = {"channel_multiplier": int(percent) / 100}
    if percent in ["100", "125"]:
        NETWORKS[name] = Timm(f"mobilenetv1_{percent}")
    else:
        NETWORKS[name] = Timm(f"mobilenetv1_100")
        NETWORKS[name].build = lambda height, width, options=multiplier: mobilenet_v1(**options)
for name in [
    "mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv3_small_075",
    "mobilenetv3_small_050", "tf_mobilenetv3_small_100",
]:  # fmt: skip
    NETWORKS[name] = Timm(name, rename_mobilenet_v3)
for size in ["tiny", "small", "base", "large"]:
    name = f"vit_{size}_patch16_224"
    NETWORKS[name] = Timm(name, rename_transformer)
    if size != "large":
        name = f"deit_{size}_patch16_224"
        NETWORKS[name] = Timm(name, rename_transformer)
for groups, factor, stem, width in [
    (3, "0_5", 12, 120), (3, "1_0", 24, 240), (3, "1_5", 24, 360), (3, "2_0", 48, 480),
    (8, "0_5", 16, 192), (8, "1_0", 24, 384), (8, "1_5", 24, 576), (8, "2_0", 48, 768),
]:  # fmt: skip
    name = f"shufflenet_v1_x{factor}_g{groups}"
    NETWORKS[name] = Pytorchcv(groups, stem, width, released=True)
for name, groups, stem, width in [
    ("g1_w1", 1, 24, 144), ("g2_w1", 2, 24, 200), ("g3_w1", 3, 24, 240), ("g4_w1", 4, 24, 272),
    ("g8_w1", 8, 24, 384), ("g1_w3d4", 1, 18, 108), ("g3_w3d4", 3, 18, 180),
    ("g1_wd2", 1, 12, 72), ("g3_wd2", 3, 12, 120), ("g1_wd4", 1, 6, 36), ("g3_wd4", 3, 6, 60),
    ("g1_wd2_stem24", 1, 24, 72), ("g3_wd2_stem24", 3, 24, 120), ("g8_wd2_stem24", 8, 24, 192),
    ("g1_wd4_stem12", 1, 12, 36), ("g3_wd4_stem12", 3, 12, 60),
    ("g1_wd4_stem24", 1, 24, 36), ("g3_wd4_stem24", 3, 24, 60), ("g8_wd4_stem24", 8, 24, 96),
]:  # fmt: skip
    NETWORKS[f"shufflenet_{name}"] = Pytorchcv(groups, stem, width)


def mobilenet_v1(**options):
    """timm's MobileNetV1 at a width for which it has no name."""
    from timm.models.efficientnet import _gen_mobilenet_v1

    return _gen_mobilenet_v1("mobilenetv1_100", **options)


def fill(model, network, height, width):
    """Sets every parameter and buffer to its formula, under our name for it."""
    names = network.rename(model)
    state = {}
    for key, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if key.endswith("num_batches_tracked"):
            state[key] = tensor
        elif names[key].endswith("pos_embedding"):
            patch = model.patch_size if hasattr(model, "patch_size") else 16
            trained = (1, (224 // patch) ** 2 + 1, shape[2])
            value = torch.from_numpy(formula.parameter(names[key], trained))
            state[key] = network.positions(value, height, width) if shape != trained else value
        else:
            state[key] = torch.from_numpy(formula.parameter(names[key], shape))
    model.load_state_dict(state)


def relative_error(a, b):
    return float(torch.linalg.norm(a.double() - b) / torch.linalg.norm(b))


@torch.no_grad()
def evaluation(network, name):
    """Logits in evaluation mode for every size; the facts that go with them."""
    tensors, errors = {}, {}
    for height, width in network.sizes:
        model = network.build(height, width)
        fill(model, network, height, width)
        model.eval()
        if (height, width) == (224, 224):
            parameters = sum(p.numel() for p in model.parameters())
        images = torch.from_numpy(formula.images(BATCH, height, width))
        singles = [model(images.to(memory_format=layout)) for layout in LAYOUTS]
        exact = model.double()(images.double())
        spread = relative_error(exact[1:].float(), exact[:-1])
        assert spread > 2e-3, f"{name}: the logits hardly depend on the image ({spread})"
        key = f"{height}x{width}"
        tensors[key] = exact.float().numpy()
        errors[key] = max(relative_error(single, exact) for single in singles)
        print(f"{name} {key}: float32 error {errors[key]:.1e}, spread {spread:.2f}", flush=True)
    facts = {"parameters": parameters, "float32_error": errors}
    if network.published_gmacs():
        facts["published_gmacs"] = network.published_gmacs()
    return tensors, facts


@torch.no_grad()
def training(network, name):
    """One forward pass in training mode, without dropout: logits, and for every running mean and
    variance, by name, its norm, eight projections and PyTorch's own float32 error."""
    side = 96
    images = torch.from_numpy(formula.images(TRAINING_BATCH, side, side))
    runs = []
    layouts = [(torch.float64, LAYOUTS[0])] + [(torch.float32, layout) for layout in LAYOUTS]
    for dtype, layout in layouts:
        model = network.build(side, side)
        fill(model, network, side, side)
        model.to(dtype).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        logits = model(images.to(dtype, memory_format=layout))
        names = network.rename(model)
        state = {names[k]: v for k, v in model.state_dict().items() if "running" in k}
        runs.append((logits, state))
    (exact, statistics), *singles = runs
    rows = []
    for key in sorted(statistics):
        value = statistics[key]
        error = max(relative_error(state[key], value) for _, state in singles)
        rows.append([float(value.norm()), *projections(value), error])
    error = max(relative_error(single, exact) for single, _ in singles)
    print(f"{name} training: float32 error {error:.1e}, {len(rows)} statistics", flush=True)
    tensors = {"training": exact.float().numpy()}
    if rows:
        tensors["statistics"] = np.array(rows, dtype=np.float32)
    return tensors, {"training_float32_error": error}


def projections(value):
    """A tensor's products with eight vectors that a formula gives."""
    flat = value.flatten().double().numpy()
    return [float(flat @ formula.uniform(f"projection {i}", flat.size)) for i in range(8)]


@torch.no_grad()
def attention():
    """Attention weights of one layer of vit_b_32, for the first image of a batch."""
    network = NETWORKS["vit_b_32"]
    model = network.build(224, 224)
    fill(model, network, 224, 224)
    model.double().eval()
    layer = model.encoder.layers.encoder_layer_3.self_attention
    inputs = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(torch.from_numpy(formula.images(1, 224, 224)).double())
    x = inputs[0]
    weights = layer(x, x, x, need_weights=True, average_attn_weights=False)[1]
    row = [*weights.shape, float(weights.norm()), *projections(weights)]
    (GOLDEN.parent / "attention.json").write_text(json.dumps(row) + "\n")


def golden(name):
    network = NETWORKS[name]
    tensors, facts = evaluation(network, name)
    more_tensors, more_facts = training(network, name)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    facts = json.dumps(facts | more_facts)
    save_file(tensors | more_tensors, GOLDEN / f"{name}.safetensors", {"facts": facts})


if __name__ == "__main__":
    torch.set_num_threads(2)
    for name in sys.argv[1:] or NETWORKS:
        golden(name)
    attention()
