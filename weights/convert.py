"""Brings a frozen TensorFlow graph of MobileNetV1 1.0, with its 1001-class head, to safetensors.

    python weights/convert.py FROZEN_GRAPH.pb OUT.safetensors

needs numpy and safetensors. Then

    sconce classify -m tf_mobilenet_v1_100 --weights OUT.safetensors photo.jpg
"""

import re
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def mobilenet_v1(path):
    """Constants of a frozen graph, with kernels from [h, w, in, out] to [out, in, h, w]."""
    stages = [1, 2, 2, 6, 2]
    place = [f"blocks.{s}.{b}" for s, count in enumerate(stages) for b in range(count)]
    norms = {
        "gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }  # fmt: skip
    tensors = {}
    for name, value in constants(path.read_bytes()):
        found = re.match(r"MobilenetV1/(Conv2d_(\d+)(_depthwise|_pointwise)?|Logits)/(.*)", name)
        if not found:
            continue
        layer, index, kind, rest = found.groups()
        rest = rest.split("/")
        if layer == "Logits":
            if rest == ["Conv2d_1c_1x1", "weights"]:
                tensors["classifier.weight"] = value[0, 0].T
            elif rest == ["Conv2d_1c_1x1", "biases"]:
                tensors["classifier.bias"] = value
            continue
        prefix = "" if index == "0" else place[int(index) - 1] + "."
        conv, norm = {
            None: ("conv_stem", "bn1"),
            "_depthwise": ("conv_dw", "bn1"),
            "_pointwise": ("conv_pw", "bn2"),
        }[kind]
        if rest[0] in ("weights", "depthwise_weights"):
            axes = (2, 3, 0, 1) if kind == "_depthwise" else (3, 2, 0, 1)
            tensors[f"{prefix}{conv}.weight"] = value.transpose(axes)
        elif rest[0] == "BatchNorm":
            tensors[f"{prefix}{norm}.{norms[rest[1]]}"] = value
    return tensors


def constants(graph):
    """Name and value of every float32 constant of a GraphDef."""
    for field, node in fields(graph):
        if field != 1:
            continue
        name, operation, tensor = "", "", None
        for field, value in fields(node):
            if field == 1:
                name = value.decode()
            elif field == 2:
                operation = value.decode()
            elif field == 5:
                entry = dict(fields(value))
                if entry[1] == b"value":
                    tensor = dict(fields(entry[2])).get(8)
        if operation == "Const" and tensor is not None:
            value = float_tensor(tensor)
            if value is not None:
                yield name, value


def float_tensor(message):
    """A TensorProto of float32 values with a shape, else None."""
    content = dict(fields(message))
    if content.get(1) != 1 or 4 not in content:
        return None
    sizes = [dict(fields(size)).get(1, 0) for field, size in fields(content[2]) if field == 2]
    return np.frombuffer(content[4], np.float32).reshape(sizes)


def fields(message):
    """Number and value of every field of a protocol buffer message."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value = varint()
        else:
            length = {1: 8, 5: 4}.get(key & 7) or varint()
            value = message[at : at + length]
            at += length
        yield key >> 3, value


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    tensors = mobilenet_v1(Path(sys.argv[1]))
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, sys.argv[2])
    print(f"{sys.argv[2]}: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
