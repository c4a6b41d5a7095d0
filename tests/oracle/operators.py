"""Goldens of each operator's gradients: small networks of random shapes around one operator, with
PyTorch's gradients in float64 and its own float32 error.

    python tests/oracle/operators.py
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional

import formula

GOLDEN = Path(__file__).parent.parent / "golden"
CASES_OF_A_KIND = 20
CLASSES = 5
PROJECTIONS = 4


class Network:
    """A list of nodes, each of an operator, its inputs by name, and settings."""

    def __init__(self, rng, number):
        self.rng, self.number = rng, number
        self.nodes = []
        self.count = rng.randint(2, 3)
        self.size = [rng.randint(6, 15), rng.randint(6, 15)]

    def add(self, op, *inputs, **settings):
        name = f"{self.number}.{len(self.nodes)}"
        self.nodes.append({"name": name, "op": op, "inputs": list(inputs)} | settings)
        return name

    def conv(self, x, ins, outs, kernel=1, **settings):
        defaults = dict(stride=1, padding=kernel // 2, groups=1, bias=False)
        return self.add("conv", x, ins=ins, outs=outs, kernel=kernel, **(defaults | settings))

    def act(self, kind, x):
        return self.add("activation", x, kind=kind)

    def stem(self, channels):
        """A map of so many channels that depends smoothly on a convolution's weights."""
        x = self.conv("x", 3, channels, self.rng.choice([1, 3]), bias=True)
        return self.act(self.rng.choice(["gelu", "hard_swish"]), x)

    def end(self, x, channels):
        """Makes gradients differ from pixel to pixel, and logits of a map."""
        x = self.act("gelu", x)
        x = self.add("flatten", self.add("global_pool", x))
        self.head(x, channels)

    def head(self, x, channels):
        self.add("linear", x, ins=channels, outs=CLASSES)

    def channels(self, multiple=1, most=40):
        return multiple * self.rng.randint(1, max(1, most // multiple))

    def padding(self, kernel):
        return self.rng.choice(["same", kernel // 2, self.rng.randint(0, kernel - 1)])


def dense(n):
    ins, outs, kernel = n.channels(), n.channels(), n.rng.randint(1, 5)
    settings = dict(stride=n.rng.randint(1, 3), padding=n.padding(kernel), bias=n.rng.random() < 0.5)
    n.end(n.conv(n.stem(ins), ins, outs, kernel, **settings), outs)


def winograd(n):
    """3x3, stride 1, many channels: what other algorithms than sums compute."""
    ins, outs = 32 + n.channels(16, 48), 16 + n.channels(16, 64)
    n.end(n.conv(n.stem(ins), ins, outs, 3, bias=n.rng.random() < 0.5), outs)


def grouped(n):
    groups = n.rng.choice([2, 3, 4, 8])
    ins, outs = groups * n.rng.choice([1, 2, 4, 5, 8]), groups * n.rng.choice([1, 2, 4, 7, 8])
    kernel = n.rng.randint(1, 4)
    settings = dict(stride=n.rng.randint(1, 3), padding=n.padding(kernel), groups=groups)
    n.end(n.conv(n.stem(ins), ins, outs, kernel, bias=n.rng.random() < 0.5, **settings), outs)


def depthwise(n):
    channels, kernel = n.channels() + 1, n.rng.randint(2, 5)
    settings = dict(stride=n.rng.randint(1, 3), padding=n.padding(kernel), groups=channels)
    x = n.conv(n.stem(channels), channels, channels, kernel, bias=n.rng.random() < 0.5, **settings)
    n.end(x, channels)


def batch_norm(n):
    ins, outs = n.channels(), n.channels()
    x = n.conv(n.stem(ins), ins, outs, n.rng.choice([1, 3]))
    n.end(n.add("batch_norm", x, channels=outs, eps=n.rng.choice([1e-5, 1e-3])), outs)


def activation(n):
    channels = n.channels()
    x = n.conv(n.stem(channels), channels, channels, 3, bias=True)
    kind = n.rng.choice(["relu", "relu6", "hard_sigmoid", "hard_swish", "gelu"])
    n.end(n.conv(n.act(kind, x), channels, channels), channels)


def pool(kind):
    def build(n):
        channels, kernel = n.channels(), n.rng.randint(2, 4)
        window = dict(kernel=kernel, stride=n.rng.randint(1, 3), padding=n.rng.randint(0, kernel // 2))
        n.end(n.add(kind, n.stem(channels), **window), channels)

    return build


def global_pool(n):
    channels = n.channels()
    x = n.conv(n.add("global_pool", n.stem(channels)), channels, channels, bias=True)
    n.end(x, channels)


def squeeze(n):
    channels, inner = n.channels(), n.channels()
    x = n.stem(channels)
    gate = n.conv(n.add("global_pool", x), channels, inner, bias=True)
    gate = n.conv(n.act("relu", gate), inner, channels, bias=True)
    n.end(n.add("multiply", x, n.act("hard_sigmoid", gate)), channels)


def residual(n):
    channels = n.channels()
    x = n.stem(channels)
    y = n.add("batch_norm", n.conv(x, channels, channels, 3), channels=channels, eps=1e-5)
    x = n.add("add", *n.rng.choice([(x, y), (y, x)]))
    n.end(n.conv(n.act("relu", x), channels, channels), channels)


def halves(n):
    half = n.channels(2, 20)
    x = n.stem(2 * half)
    left = n.add("slice", x, start=0, length=half)
    right = n.add("slice", x, start=half, length=half)
    right = n.conv(right, half, half, n.rng.choice([1, 3]), bias=True)
    x = n.add("concat", *n.rng.choice([(left, right), (right, left)]))
    x = n.add("shuffle", x, groups=2)
    n.end(n.conv(x, 2 * half, half, 3), half)


def concat(n):
    widths = [n.channels() for _ in range(n.rng.randint(2, 3))]
    x = n.stem(8)
    parts = [n.conv(x, 8, w, n.rng.choice([1, 3]), bias=True) for w in widths]
    n.end(n.conv(n.add("concat", *parts), sum(widths), 7), 7)


def shuffle(n):
    groups = n.rng.choice([2, 3, 4, 8])
    channels = groups * n.rng.randint(1, 6)
    x = n.add("shuffle", n.stem(channels), groups=groups)
    n.end(n.conv(x, channels, channels, 3, groups=groups), channels)


def tokens(n, dim, patch=2):
    """The sequence of patches, whose grid is that of the positions or another."""
    n.size = [patch * n.rng.randint(2, 5), patch * n.rng.randint(2, 5)]
    x = n.conv("x", 3, dim, patch, stride=patch, padding=0, bias=True)
    return n.add("tokens", x)


def attend(n, x, dim, heads):
    """So that gradients reach every token."""
    return n.add("attention", x, dim=dim, heads=heads)


def pick(n, x, dim):
    n.head(n.add("select", x, index=n.rng.randint(0, 3)), dim)


def width(n):
    heads = n.rng.randint(1, 4)
    return heads * n.rng.randint(1, 12), heads


def linear(n):
    dim, heads = width(n)
    hidden = n.channels()
    x = n.add("linear", tokens(n, dim), ins=dim, outs=hidden)
    x = n.add("linear", n.act("gelu", x), ins=hidden, outs=dim)
    pick(n, attend(n, x, dim, heads), dim)


def layer_norm(n):
    dim, heads = width(n)
    dim *= 3  # of one or two values little is left
    x = n.add("layer_norm", tokens(n, dim), dim=dim, eps=n.rng.choice([1e-6, 1e-5]))
    pick(n, attend(n, x, dim, heads), dim)


def attention(n):
    dim, heads = width(n)
    pick(n, attend(n, attend(n, tokens(n, dim), dim, heads), dim, heads), dim)


def positions(n):
    dim, heads = width(n)
    grid = n.rng.randint(2, 5)
    x = n.add("class_token", tokens(n, dim), dim=dim)
    if n.rng.random() < 0.5:
        n.size = [2 * grid, 2 * grid]
    kind = n.rng.choice(["aligned", "antialias"])
    x = n.add("positions", x, dim=dim, grid=grid, patch=2, kind=kind)
    pick(n, attend(n, x, dim, heads), dim)


KINDS = {
    "dense convolution": dense, "dense 3x3 convolution": winograd, "grouped convolution": grouped,
    "depthwise convolution": depthwise, "batch norm": batch_norm, "activation": activation,
    "max-pooling": pool("max_pool"), "average pooling": pool("average_pool"),
    "global pooling": global_pool, "squeeze-and-excitation": squeeze, "residual sum": residual,
    "split, concatenation and shuffle": halves, "concatenation": concat, "shuffle": shuffle,
    "linear layer": linear, "layer norm": layer_norm, "attention": attention,
    "class token and positions": positions,
}  # fmt: skip


def same_padding(x, kernel, stride):
    """TensorFlow's."""
    sides = []
    for size in reversed(x.shape[2:]):
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        sides += [total // 2, total - total // 2]
    return functional.pad(x, sides)


def resample(value, node, size):
    """Positions learned for one grid on another."""
    dim, grid = node["dim"], node["grid"]
    target = [side // node["patch"] for side in size]
    if target == [grid, grid]:
        return value
    head, body = value[:, :1], value[:, 1:].reshape(1, grid, grid, dim).permute(0, 3, 1, 2)
    options = dict(align_corners=True) if node["kind"] == "aligned" else dict(antialias=True)
    body = functional.interpolate(body, size=target, mode="bicubic", **options)
    return torch.cat([head, body.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def forward(network, images, parameter):
    """Logits; `parameter(name, shape)` gives a node's tensors."""
    values = {"x": images}
    for node in network.nodes:
        name, op = node["name"], node["op"]
        x, *others = [values[i] for i in node["inputs"]]
        at = lambda suffix, *shape: parameter(f"{name}.{suffix}", shape)
        if op == "conv":
            kernel, stride, padding = node["kernel"], node["stride"], node["padding"]
            weight = at("weight", node["outs"], node["ins"] // node["groups"], kernel, kernel)
            bias = at("bias", node["outs"]) if node["bias"] else None
            if padding == "same":
                x, padding = same_padding(x, kernel, stride), 0
            y = functional.conv2d(x, weight, bias, stride, padding, 1, node["groups"])
        elif op == "batch_norm":
            shape = [node["channels"]]
            y = functional.batch_norm(x, None, None, at("weight", *shape), at("bias", *shape),
                                      training=True, eps=node["eps"])  # fmt: skip
        elif op == "activation":
            kinds = dict(relu=functional.relu, relu6=functional.relu6, gelu=functional.gelu,
                         hard_sigmoid=functional.hardsigmoid, hard_swish=functional.hardswish)
            y = kinds[node["kind"]](x)
        elif op == "max_pool":
            y = functional.max_pool2d(x, node["kernel"], node["stride"], node["padding"])
        elif op == "average_pool":
            y = functional.avg_pool2d(x, node["kernel"], node["stride"], node["padding"])
        elif op == "global_pool":
            y = x.mean((2, 3), keepdim=True)
        elif op == "flatten":
            y = x.flatten(1)
        elif op == "multiply":
            y = x * others[0]
        elif op == "add":
            y = x + others[0]
        elif op == "concat":
            y = torch.cat([x, *others], 1)
        elif op == "slice":
            y = x[:, node["start"] : node["start"] + node["length"]]
        elif op == "shuffle":
            y = functional.channel_shuffle(x.contiguous(), node["groups"])
        elif op == "linear":
            y = functional.linear(x, at("weight", node["outs"], node["ins"]), at("bias", node["outs"]))
        elif op == "tokens":
            y = x.flatten(2).transpose(1, 2)
        elif op == "class_token":
            token = parameter(name, (1, 1, node["dim"]))
            y = torch.cat([token.expand(x.shape[0], 1, -1), x], 1)
        elif op == "positions":
            value = parameter(name, (1, 1 + node["grid"] ** 2, node["dim"]))
            y = x + resample(value, node, network.size)
        elif op == "layer_norm":
            shape = [node["dim"]]
            y = functional.layer_norm(x, shape, at("weight", *shape), at("bias", *shape), node["eps"])
        elif op == "attention":
            dim = node["dim"]
            y = functional.multi_head_attention_forward(
                *[x.transpose(0, 1)] * 3, dim, node["heads"],
                at("in_proj_weight", 3 * dim, dim), at("in_proj_bias", 3 * dim), None, None, False,
                0.0, at("out_proj.weight", dim, dim), at("out_proj.bias", dim), need_weights=False,
            )[0].transpose(0, 1)  # fmt: skip
        elif op == "select":
            y = x[:, node["index"]]
        values[name] = y
    return y


def gradients(network, dtype):
    parameters = {}

    def parameter(name, shape):
        value = torch.from_numpy(formula.parameter(name, shape)).to(dtype)
        return parameters.setdefault(name, value.requires_grad_())

    images = torch.from_numpy(formula.images(network.count, *network.size)).to(dtype)
    logits = forward(network, images, parameter)
    seed = formula.uniform("logits gradient", logits.numel()).reshape(logits.shape)
    logits.backward(torch.from_numpy(seed).to(dtype))
    return {name: value.grad.double() for name, value in parameters.items()}


def main():
    cases, rows = [], []
    for kind, build in KINDS.items():
        worst = 0.0
        for index in range(CASES_OF_A_KIND):
            # By the kind and the index, so that a kind more leaves the others as they are.
            rng = random.Random(f"{kind} {index}")
            network = Network(rng, f"{kind.split()[0]}{index}")
            build(network)
            exact, single = gradients(network, torch.float64), gradients(network, torch.float32)
            for name in sorted(exact):
                value, flat = exact[name], exact[name].flatten().numpy()
                norm = float(value.norm())
                error = float((single[name] - value).norm()) / norm if norm > 0 else 0.0
                products = [
                    flat @ formula.uniform(f"projection {i}", flat.size) for i in range(PROJECTIONS)
                ]
                rows.append([norm, *products, error])
            total = float(torch.stack([g.norm() for g in exact.values()]).norm())
            errors = [r[-1] for r in rows[-len(exact) :] if r[0] > 1e-6 * total]
            worst = max(worst, *errors)
            cases.append({"kind": kind, "count": network.count, "size": network.size, "nodes": network.nodes})
        print(f"{kind}: float32 error up to {worst:.1e}")
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    (GOLDEN / "operators.json").write_text(f"[\n{lines}\n]\n")
    save_file({"gradients": np.array(rows, np.float32)}, GOLDEN / "operators.safetensors")
    print(f"{len(cases)} cases, {len(rows)} gradients")


if __name__ == "__main__":
    main()
