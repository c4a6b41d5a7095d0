"""Goldens of weights files: what torchvision, timm, transformers and pytorchcv call the parameters
of a network, with the logits that the library computes; and small files in every form of
torch.save and safetensors.

    python tests/oracle/checkpoints.py          writes tests/golden/checkpoints
    python tests/oracle/checkpoints.py DIR      writes whole checkpoints of every network into DIR,
                                                for SCONCE_TEST_CHECKPOINTS=DIR
"""

import argparse
import json
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torchvision.models.vision_transformer import VisionTransformer

import formula
from networks import LAYOUTS, Pytorchcv, mobilenet_v1, relative_error

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoints"
CLASSES = 7
BATCH = 2


class Case:
    """A network of a library. `saved` gives its tensors as the library stores them."""

    def __init__(self, model, library, build, size=96, saved=lambda model: model.state_dict()):
        self.model, self.library, self.build = model, library, build
        self.size, self.saved = size, saved

    @torch.no_grad()
    def run(self):
        """The filled network, and the facts that a test needs."""
        model = self.build()
        # Filled under the names that are stored, which may not be those of the state dict.
        state = {}
        for name, tensor in self.saved(model).items():
            if not name.endswith("num_batches_tracked"):
                state[name] = torch.from_numpy(formula.parameter(name, tuple(tensor.shape)))
        self.fill(model, state)
        model.eval()
        images = torch.from_numpy(formula.images(BATCH, self.size, self.size))
        singles = [self.logits(model, images.to(memory_format=layout)) for layout in LAYOUTS]
        model.double()
        exact = self.logits(model, images.double())
        model.float()
        error = max(relative_error(single, exact) for single in singles)
        spread = relative_error(exact[1:].float(), exact[:-1])
        print(f"{self.model} {self.library}: error {error:.1e}, spread {spread:.2f}", flush=True)
        assert spread > 1e-3
        facts = {
            "model": self.model,
            "library": self.library,
            "size": self.size,
            "float32_error": error,
            "logits": exact.flatten().float().tolist(),
        }
        return model, state, facts

    def fill(self, model, state):
        counters = [k for k in model.state_dict() if k.endswith("num_batches_tracked")]
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert set(missing) <= set(counters) and not unexpected

    def logits(self, model, images):
        return model(images)


class Transformers(Case):
    """A network of transformers, filled through the files that it writes and reads."""

    def __init__(self, model, kind, size=96, **config):
        self.kind = getattr(transformers, f"{kind}ForImageClassification")
        config = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **config)
        super().__init__(model, "transformers", lambda: self.kind(config), size, self.stored)

    def stored(self, model):
        import tempfile

        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_file(f"{folder}/model.safetensors")

    def fill(self, model, state):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            counters = {
                k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")
            }
            save_file(state | counters, f"{folder}/model.safetensors", {"format": "pt"})
            filled = self.kind.from_pretrained(folder)
        model.load_state_dict(filled.state_dict())

    def logits(self, model, images):
        return model(pixel_values=images).logits


def tv(model, size=96, name=None, **options):
    build = lambda: getattr(torchvision.models, name or model)(num_classes=CLASSES, **options)
    return Case(model, "torchvision", build, size)


def tm(model, name=None, size=96, **options):
    build = lambda: timm.create_model(name or model, num_classes=CLASSES, **options)
    return Case(model, "timm", build, size)


def hf_resnet(model, layers, basic):
    widths = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
    kind = "basic" if basic else "bottleneck"
    return Transformers(model, "ResNet", depths=layers, hidden_sizes=widths, layer_type=kind)


def hf_vit(model, patch, dim, depth, heads):
    sizes = dict(patch_size=patch, hidden_size=dim, num_hidden_layers=depth)
    return Transformers(
        model, "ViT", 224, num_attention_heads=heads, intermediate_size=4 * dim, **sizes
    )


def transformer(dim, heads, old=False):
    """torchvision's Vision Transformer in a size that it has no name for."""
    build = lambda: VisionTransformer(224, 16, 12, heads, dim, 4 * dim, num_classes=CLASSES)

    def saved(model):
        state = model.state_dict()
        return {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
                for k, v in state.items()} if old else state  # fmt: skip

    case = Case("vit_tiny_patch16_224", "torchvision", build, 224, saved)
    if old:
        new = lambda k: k.replace("mlp.linear_1", "mlp.0").replace("mlp.linear_2", "mlp.3")
        case.fill = lambda model, state: model.load_state_dict({new(k): v for k, v in state.items()})
    return case


def qkv_of_version_5():
    """transformers' names of the network itself, as a plain torch.save of its state dict has."""
    case = hf_vit("vit_tiny_patch16_224", 16, 192, 12, 3)
    case.saved = lambda model: model.state_dict()
    case.fill = lambda model, state: model.load_state_dict(state)
    return case


def pytorchcv(model, groups, stem, width, released=False):
    def build():
        network = Pytorchcv(groups, stem, width, released).build(96, 96)
        features = network.output.in_features
        network.output = torch.nn.Linear(features, CLASSES, bias=not released)
        return network

    return Case(model, "pytorchcv", build)


def authors_lite0():
    """The names that ports of TensorFlow's EfficientNets take over."""
    import re

    case = tm("efficientnet_lite0", "tf_efficientnet_lite0", bn_eps=1e-3)
    blocks = [1, 2, 2, 3, 3, 4, 1]
    place = {(s, b): sum(blocks[:s]) + b for s, n in enumerate(blocks) for b in range(n)}

    def old(key):
        found = re.match(r"blocks\.(\d)\.(\d)\.(\w+)\.(.*)", key)
        if found:
            s, b, module, leaf = found.groups()
            first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv"}
            first |= {"bn2": "_bn2"}
            others = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv"}
            others |= {"bn2": "_bn1", "conv_pwl": "_project_conv", "bn3": "_bn2"}
            module = (first if s == "0" else others)[module]
            return f"_blocks.{place[int(s), int(b)]}.{module}.{leaf}"
        outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head"}
        outer |= {"bn2": "_bn1", "classifier": "_fc"}
        module, leaf = key.split(".")
        return f"{outer[module]}.{leaf}"

    case.library = "authors"
    case.saved = lambda model: {old(k): v for k, v in model.state_dict().items()}

    def fill(model, state):
        names = {old(k): k for k in model.state_dict()}
        model.load_state_dict({names[k]: v for k, v in state.items()}, strict=False)

    case.fill = fill
    return case


TIMM_V1 = dict(build=lambda: mobilenet_v1(num_classes=CLASSES, channel_multiplier=0.25))
FEW = [
    tv("resnet18"), tm("resnet18"), hf_resnet("resnet18", [2, 2, 2, 2], True),
    tm("resnet50"), hf_resnet("resnet50", [3, 4, 6, 3], False),
    tv("resnext50_32x4d"), tm("resnext50_32x4d"),
    Case("mobilenet_v1_025", "timm", TIMM_V1["build"]),
    Transformers("mobilenet_v1_025", "MobileNetV1", depth_multiplier=0.25),
    tv("mobilenet_v2"), tm("mobilenet_v2_050", "mobilenetv2_050"),
    tm("mobilenet_v2_140", "mobilenetv2_140"), Transformers("mobilenet_v2", "MobileNetV2"),
    Transformers("mobilenet_v2_050", "MobileNetV2", depth_multiplier=0.5),
    tv("mobilenet_v3_small"), tv("mobilenet_v3_large"), tm("mobilenetv3_small_100"),
    tm("mobilenetv3_small_075"), tm("mobilenetv3_large_100"), tm("tf_mobilenetv3_small_100"),
    pytorchcv("shufflenet_g3_w1", 3, 24, 240), tv("shufflenet_v2_x0_5"),
    transformer(192, 3), transformer(192, 3, old=True), tm("vit_tiny_patch16_224", size=224),
    hf_vit("vit_tiny_patch16_224", 16, 192, 12, 3), qkv_of_version_5(),
    tm("efficientnet_lite0", "tf_efficientnet_lite0"), authors_lite0(),
]  # fmt: skip

ALL = [tv(n) for n in """resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2
    wide_resnet101_2 resnext50_32x4d resnext101_32x8d resnext101_64x4d mobilenet_v2
    mobilenet_v3_large mobilenet_v3_small shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0""".split()]  # fmt: skip
ALL += [tv(n, 224) for n in "vit_b_16 vit_b_32 vit_l_16 vit_l_32".split()]
ALL += [tm(n) for n in """resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2
    wide_resnet101_2 resnext50_32x4d resnext101_32x8d resnext101_64x4d mobilenetv3_large_100
    mobilenetv3_small_100 mobilenetv3_small_075 mobilenetv3_small_050
    tf_mobilenetv3_small_100""".split()]  # fmt: skip
ALL += [tm(n, size=224) for n in """vit_tiny_patch16_224 vit_small_patch16_224
    vit_base_patch16_224 deit_tiny_patch16_224 deit_small_patch16_224
    deit_base_patch16_224""".split()]  # fmt: skip
ALL += [
    tm("mobilenet_v1_100", "mobilenetv1_100"), tm("mobilenet_v1_125", "mobilenetv1_125"),
    tm("mobilenet_v2", "mobilenetv2_100"), tm("mobilenet_v2_050", "mobilenetv2_050"),
    tm("mobilenet_v2_140", "mobilenetv2_140"),
    hf_resnet("resnet34", [3, 4, 6, 3], True), hf_resnet("resnet101", [3, 4, 23, 3], False),
    hf_resnet("resnet152", [3, 8, 36, 3], False),
    Transformers("tf_mobilenet_v1_100", "MobileNetV1"),
    Transformers("mobilenet_v1_075", "MobileNetV1", depth_multiplier=0.75),
    Transformers("tf_mobilenet_v2_100", "MobileNetV2"),
    Transformers("mobilenet_v2_140", "MobileNetV2", depth_multiplier=1.4),
    hf_vit("vit_b_16", 16, 768, 12, 12), hf_vit("vit_b_32", 32, 768, 12, 12),
    hf_vit("deit_tiny_patch16_224", 16, 192, 12, 3),
]  # fmt: skip


def names():
    """Which names and shapes every library stores, and its logits."""
    cases = []
    for case in FEW:
        _, state, facts = case.run()
        facts["tensors"] = [f"{k} {'x'.join(map(str, v.shape))}" for k, v in state.items()]
        cases.append(facts)
    lines = ",\n".join(json.dumps(case) for case in cases)
    (GOLDEN / "names.json").write_text(f"[\n{lines}\n]\n")


def whole(folder):
    """Checkpoints as files, in turn in each of the forms that people meet."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for index, case in enumerate(FEW + ALL):
        model, state, facts = case.run()
        stem = f"{index:02}-{case.model}-{case.library}"
        if case.library == "transformers" and case.saved == getattr(case, "stored", None):
            model.save_pretrained(folder / stem, max_shard_size="40MB")
            index_file = folder / stem / "model.safetensors.index.json"
            single = folder / stem / "model.safetensors"
            facts["file"] = str((index_file if index_file.exists() else single).relative_to(folder))
        else:
            form = index % 4
            if form == 0:
                facts["file"] = stem + ".pth"
                torch.save(state, folder / facts["file"])
            elif form == 1:
                facts["file"] = stem + ".pth"
                torch.save(state, folder / facts["file"], _use_new_zipfile_serialization=False)
            elif form == 2:
                facts["file"] = stem + ".safetensors"
                save_file(state, folder / facts["file"])
            else:
                facts["file"] = stem + ".pt"
                arguments = argparse.Namespace(lr=0.1, model=case.model)
                prefixed = OrderedDict((f"module.{k}", v) for k, v in state.items())
                checkpoint = {"epoch": 3, "args": arguments, "state_dict": prefixed}
                torch.save(checkpoint, folder / facts["file"])
        cases.append(facts)
    (folder / "cases.json").write_text(json.dumps(cases))


def small_files():
    """A few tensors in every form; what they hold is in formats.json."""
    def value(name, shape, dtype=torch.float32):
        return torch.from_numpy(formula.uniform(name, int(np.prod(shape))).reshape(shape)).to(dtype)

    state = OrderedDict()
    state["f32"] = value("f32", (2, 3, 2))
    state["f16"] = value("f16", (5,), torch.float16)
    state["bf16"] = value("bf16", (3, 1), torch.bfloat16)
    state["f64"] = value("f64", (2, 2), torch.float64)
    state["scalar"] = torch.tensor(0.5)
    state["empty"] = torch.zeros(0, 4)
    whole = value("whole", (4, 6))
    state["transposed"] = whole.T
    state["column"] = whole[1:, 2]
    state["parameter"] = torch.nn.Parameter(value("parameter", (3,)))
    state["counter"] = torch.tensor(7, dtype=torch.int64)
    nested = {
        "epoch": 12,
        "best": 0.75,
        "arguments": argparse.Namespace(rate=0.1, name="x"),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "model": state,
    }
    torch.save(state, GOLDEN / "zip.pth")
    torch.save(state, GOLDEN / "stream.pth", _use_new_zipfile_serialization=False)
    torch.save(nested, GOLDEN / "nested.pt")
    torch.save(nested, GOLDEN / "nested-stream.pt", _use_new_zipfile_serialization=False)
    torch.save(state, GOLDEN / "protocol4.pth", pickle_protocol=4)
    torch.save(state, GOLDEN / "protocol5-stream.pth", pickle_protocol=5,
               _use_new_zipfile_serialization=False)  # fmt: skip
    plain = {k: v.detach().contiguous() for k, v in state.items()}
    save_file(plain, GOLDEN / "plain.safetensors")
    names = list(plain)
    weight_map = {}
    for part, chosen in enumerate([names[:4], names[4:]]):
        file = f"part-{part + 1}-of-2.safetensors"
        save_file({k: plain[k] for k in chosen}, GOLDEN / file)
        weight_map |= {k: file for k in chosen}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (GOLDEN / "sharded.safetensors.index.json").write_text(json.dumps(index, indent=1))
    torch.save(torch.nn.Linear(2, 2), GOLDEN / "whole-module.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(GOLDEN / "torchscript.pt")
    quantized = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    torch.save({"weight": quantized, "bias": torch.ones(2)}, GOLDEN / "quantized.pth")
    torch.save([1, 2, 3], GOLDEN / "list.pth")
    expected = {k: v.float().flatten().tolist() for k, v in plain.items() if k != "counter"}
    shapes = {k: list(v.shape) for k, v in plain.items()}
    (GOLDEN / "formats.json").write_text(json.dumps({"shapes": shapes, "values": expected}))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    if len(sys.argv) > 1:
        whole(Path(sys.argv[1]))
    else:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        small_files()
        names()
