"""Goldens of the networks: logits of the reference implementation in float64 on formula-filled
weights, its own float32 error, parameter counts and published multiply-adds.

    python tests/oracle/networks.py [NAME ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from safetensors.numpy import save_file

import formula

GOLDEN = Path(__file__).parent.parent / "golden" / "networks"
BATCH = 3
SIZES = [(224, 224), (161, 127), (96, 96)]


def from_torchvision(name, **options):
    def build():
        return getattr(torchvision.models, name)(**options), lambda key: key

    return build


def published_gmacs(name):
    """What torchvision publishes as GFLOPS, which are multiply-adds."""
    weights = torchvision.models.get_model_weights(name)
    return next(iter(weights)).meta["_ops"]


NETWORKS = {
    name: (from_torchvision(name), SIZES)
    for name in ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenet_v2"]
}
NETWORKS["mobilenet_v2_050"] = (from_torchvision("mobilenet_v2", width_mult=0.5), SIZES)
NETWORKS["mobilenet_v2_140"] = (from_torchvision("mobilenet_v2", width_mult=1.4), SIZES)


def fill(model, rename):
    """Sets every parameter and buffer to its formula, under our name for it."""
    state = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = tensor
        else:
            state[key] = torch.from_numpy(formula.parameter(rename(key), tuple(tensor.shape)))
    model.load_state_dict(state)


def relative_error(a, b):
    return float(torch.linalg.norm(a.double() - b) / torch.linalg.norm(b))


@torch.no_grad()
def golden(name):
    build, sizes = NETWORKS[name]
    model, rename = build()
    fill(model, rename)
    model.eval()
    tensors, errors = {}, {}
    for height, width in sizes:
        images = torch.from_numpy(formula.images(BATCH, height, width))
        single = model.float()(images)
        exact = model.double()(images.double())
        spread = relative_error(exact[1:].float(), exact[:-1])
        assert spread > 2e-3, f"{name}: the logits hardly depend on the image ({spread})"
        key = f"{height}x{width}"
        tensors[key] = exact.float().numpy()
        errors[key] = relative_error(single, exact)
        print(f"{name} {key}: float32 error {errors[key]:.1e}, spread {spread:.2f}")
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "float32_error": errors,
    }
    if hasattr(torchvision.models, name):
        facts["published_gmacs"] = published_gmacs(name)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    save_file(tensors, GOLDEN / f"{name}.safetensors", {"facts": json.dumps(facts)})


if __name__ == "__main__":
    torch.set_num_threads(2)
    for name in sys.argv[1:] or NETWORKS:
        golden(name)
