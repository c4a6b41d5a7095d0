"""Goldens of looking inside: feature maps, the vectors before the head, Grad-CAM by the package grad-cam, attention and its rollout
in plain PyTorch, statistics of weights, all on formula-filled networks and the formula's image.

    python tests/oracle/explain.py

A map of a network is stored as its norm and eight projections by formula, a heat map over the photo
(224 x 224) as every sixteenth pixel in both directions.
"""

import json
from pathlib import Path

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

import formula
import networks

GOLDEN = Path(__file__).parent.parent / "golden" / "explain.json"
SIZE = 224
# Nodes whose maps are compared; the module of torchvision whose output is explained, and our node.
NETWORKS = {
    "resnet18": (["conv1", "layer1.0.bn1", "layer3.1.conv2"],
                 {"layer4.1.relu_1": lambda m: m.layer4[-1], "layer2": lambda m: m.layer2[-1]}),
    "mobilenet_v2": (["features.0.0", "features.4.conv.1.2", "features.14.conv.3"],
                     {"features.18.2": lambda m: m.features[-1], "features.14": lambda m: m.features[14]}),
    "mobilenet_v3_small": (["features.0.2", "features.4.block.1.0", "features.9.block.3.1"],
                           {"features.12.2": lambda m: m.features[-1], "features.9": lambda m: m.features[9]}),
    "shufflenet_v2_x1_0": (["maxpool", "stage2.1.branch2.7", "conv5.2"],
                           {"conv5.2": lambda m: m.conv5, "stage3.7": lambda m: m.stage3[-1]}),
}  # fmt: skip
STATISTICS = ["conv1.weight", "bn1.bias", "layer3.0.conv1.weight", "layer4.1.bn2.running_var", "fc.weight"]
OTHERS = ["mobilenet_v1_100", "resnext50_32x4d", "shufflenet_v1_x1_0_g3", "vit_tiny_patch16_224"]
VIT = "vit_tiny_patch16_224"


def projections(name, values):
    """Norm, and inner products with eight vectors of the formula."""
    values = values.double().numpy().ravel()
    found = [float(np.linalg.norm(values))]
    for index in range(8):
        along = formula.uniform(f"{name}/{index}", values.size).astype(np.float64)
        found.append(float(values @ along))
    return found


def filled(name):
    network = networks.NETWORKS[name]
    model = network.build(SIZE, SIZE)
    networks.fill(model, network, SIZE, SIZE)
    return model.eval()


def convolutional(name, nodes, targets, image):
    model = filled(name)
    maps, exact = {}, filled(name).double()
    for node in nodes:
        # Copied: an activation that follows may work in place.
        hook = lambda m, inputs, output, node=node: maps.update({node: output.clone()})
        exact.get_submodule(node).register_forward_hook(hook)
    with torch.no_grad():
        exact(image.double())
    cams = []
    top = int(model(image).argmax())
    for node, module in targets.items():
        cam = GradCAM(model=model, target_layers=[module(model)])
        # Beside the most probable class the first other one that is seen anywhere.
        for labels in [[None], range(top + 123, top + 223)]:
            for label in labels:
                label = None if label is None else label % 1000
                wanted = None if label is None else [ClassifierOutputTarget(label)]
                heat = cam(input_tensor=image, targets=wanted)[0][::16, ::16]
                if heat.std() > 0.05:
                    found = {"node": node, "class": label, "top": top, "heat": heat.ravel().tolist()}
                    cams.append(found)
                    break
    return {"maps": {node: projections(node, value) for node, value in maps.items()}, "cams": cams}


def embedding(name, image):
    """What the last linear layer is given."""
    model, found = filled(name).double(), []
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    head.register_forward_pre_hook(lambda m, inputs: found.append(inputs[0].detach()))
    with torch.no_grad():
        model(image.double())
    return projections("embedding", found[0])


def attention(image):
    model = filled(VIT).double()
    layers = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, inputs, output: layers.append(output[0].detach()))
    with torch.no_grad():
        model(image.double())
    rollout = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    for weights in layers:
        mixed = 0.5 * weights.mean(0) + 0.5 * torch.eye(weights.shape[-1], dtype=torch.float64)
        rollout = (mixed / mixed.sum(-1, keepdim=True)) @ rollout
    heads = {f"{layer},{head}": layers[layer][head][0, 1:].tolist() for layer, head in [(0, 0), (5, 2), (11, 1)]}
    return {"rollout": rollout[0, 1:].tolist(), "heads": heads, "mean": layers[-1].mean(0)[0, 1:].tolist()}


def statistics():
    state = filled("resnet18").state_dict()
    found = {}
    for name in STATISTICS:
        values = state[name].double()
        counts = torch.histc(values, 24, float(values.min()), float(values.max()))
        found[name] = {
            "mean": float(values.mean()), "std": float(values.std()), "min": float(values.min()),
            "max": float(values.max()), "counts": [int(c) for c in counts],
        }  # fmt: skip
    return found


def main():
    torch.manual_seed(0)
    image = torch.from_numpy(formula.images(1, SIZE, SIZE))
    golden = {name: convolutional(name, *rest, image) for name, rest in NETWORKS.items()}
    GOLDEN.write_text(json.dumps({
        "networks": golden, "embeddings": {name: embedding(name, image) for name in [*NETWORKS, *OTHERS]},
        "attention": attention(image), "statistics": statistics(),
    }) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
