"""Makes mobilenet_v2.safetensors, the weights that are compiled into sconce.

    python weights/embed.py mobilenet_v2-b0353104.pth

needs torch, numpy and safetensors. The input is torchvision's file of that name; the letters in
its name are the start of its SHA-256, which is checked. Matrices are rounded to float16, vectors
stay float32. The result is a model file: its metadata say what network it is, its classes and its
preprocessing.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

HERE = Path(__file__).parent
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pth", type=Path)
    arguments = parser.parse_args()
    found = hashlib.sha256(arguments.pth.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{arguments.pth}: its SHA-256 is {found}, not {SHA256}")
    state = torch.load(arguments.pth, map_location="cpu", weights_only=True)
    tensors = {
        name: tensor.numpy().astype(np.float32)
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    halved = {n: t.astype(np.float16) if t.ndim > 1 else t for n, t in tensors.items()}
    labels = (HERE.parent / "assets" / "imagenet_labels.txt").read_text().splitlines()
    description = {
        "format_version": 1,
        "name": "mobilenet_v2.tv",
        "architecture": {"family": "mobilenet_v2", "width": 1.0},
        "labels": labels,
        "preprocessing": {
            "resize": 256,
            "crop": 224,
            "interpolation": "bilinear",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "temperature": 1.0,
    }
    out = HERE / "mobilenet_v2.safetensors"
    # One key: safetensors writes several in an order that changes from run to run.
    save_file(halved, out, {"sconce": json.dumps(description)})
    print(hashlib.sha256(out.read_bytes()).hexdigest(), out.name, out.stat().st_size)


if __name__ == "__main__":
    main()
