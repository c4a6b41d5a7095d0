"""Goldens of training: parameter gradients of every network on one batch in float64 with PyTorch's
own float32 error, and the losses of thirty steps on photos, several times, from images that differ by
no more than rounding.

    python tests/oracle/training.py gradients [NAME ...]
    python tests/oracle/training.py curves [NAME ...]
    python tests/oracle/training.py exact [NAME ...]
    python tests/oracle/training.py optimizers
    python tests/oracle/training.py losses
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional

import formula
import networks
from networks import LAYOUTS, NETWORKS, fill, projections, relative_error

GOLDEN = Path(__file__).parent.parent / "golden"
ASSETS = Path(__file__).parent.parent.parent / "assets"
SIDE = 96
BATCH = 4


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


# Images off by a last digit, to see what rounding does: behind a ReLU one value next to zero
# decides over a gradient, and a single float32 run may be lucky with it. In the networks named here six
# runs were lucky: in one of forty PyTorch's own gradients are off by a hundredth.
NUDGES = 6
LUCKY = dict.fromkeys(
    [
        "shufflenet_v1_x0_5_g3",
        "shufflenet_v1_x1_5_g8",
        "shufflenet_v1_x2_0_g8",
        "shufflenet_g1_w1",
        "shufflenet_g1_w3d4",
        "shufflenet_g1_wd4_stem12",
        "shufflenet_g3_w1",
        "shufflenet_g3_w3d4",
        "shufflenet_g8_w1",
        "shufflenet_g8_wd4_stem24",
    ],
    40,
)


def nudged(images, seed):
    if not seed:
        return images
    noise = formula.uniform(f"nudge {seed}", images.numel()).reshape(images.shape)
    return images * (1 + torch.from_numpy(noise) * 2.0**-23)


def gradients(name):
    """For each parameter in the order of names: its gradient's norm, eight projections, and the
    relative float32 error of PyTorch (the largest over memory layouts and nudged images), for a
    gradient at the logits that a formula gives."""
    network = NETWORKS[name]
    images = torch.from_numpy(formula.images(BATCH, SIDE, SIDE))
    runs = []
    kinds = [(torch.float64, LAYOUTS[0], 0)] + [(torch.float32, layout, 0) for layout in LAYOUTS]
    kinds += [(torch.float32, LAYOUTS[0], seed + 1) for seed in range(LUCKY.get(name, NUDGES))]
    for dtype, layout, nudge in kinds:
        model = network.build(SIDE, SIDE)
        fill(model, network, SIDE, SIDE)
        without_dropout(model).to(dtype)
        model.to(memory_format=layout)
        logits = model(nudged(images, nudge).to(dtype, memory_format=layout))
        seed = formula.uniform("logits gradient", logits.numel()).reshape(logits.shape)
        logits.backward(torch.from_numpy(seed).to(dtype))
        names = network.rename(model)
        found = {names[key]: p.grad for key, p in model.named_parameters()}
        for key in found:
            if key.endswith("pos_embedding"):
                found[key] = positions_gradient(model, network, key, found[key])
        runs.append(found)
    exact, *singles = runs
    rows = {}
    for key in sorted(exact):
        value = exact[key]
        norm = float(value.norm())
        error = max(relative_error(s[key], value) for s in singles) if norm > 0 else 0.0
        rows[key] = [norm, *projections(value), error]
    total = sum(row[0] ** 2 for row in rows.values()) ** 0.5
    worst = max(row[9] for row in rows.values() if row[0] >= 1e-6 * total)
    print(f"{name}: {len(rows)} gradients, norm {total:.3g}, float32 error up to {worst:.1e}", flush=True)
    table = np.array(list(rows.values()), dtype=np.float64)
    (GOLDEN / "gradients").mkdir(parents=True, exist_ok=True)
    save_file({"gradients": table}, GOLDEN / "gradients" / f"{name}.safetensors")


def positions_gradient(model, network, name, gradient):
    """From the gradient at the positions interpolated for this size to that at the parameter."""
    patch = model.patch_size if hasattr(model, "patch_size") else 16
    shape = (1, (224 // patch) ** 2 + 1, gradient.shape[2])
    value = torch.from_numpy(formula.parameter(name, shape)).to(gradient.dtype).requires_grad_()
    network.positions(value, SIDE, SIDE).backward(gradient)
    return value.grad


CURVES = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "vit_tiny_patch16_224"]
PHOTOS = ["cat.png", "coffee.png", "photographer.png"]
CLASSES = 12
STEPS = 30
CURVE_BATCH = 16
CURVE_NUDGES = 4


def crops():
    """Boxes of the photos by formula: photo, left, top, side, label (photo and quadrant)."""
    sizes = [Image.open(ASSETS / name).size for name in PHOTOS]
    count = STEPS * CURVE_BATCH
    draws = (formula.uniform("crops", 4 * count).astype(np.float64) + 1) / 2
    for photo, side, left, top in draws.reshape(count, 4):
        photo = int(photo * 3)
        width, height = sizes[photo]
        side = int(min(width, height) * (0.3 + 0.3 * side))
        left, top = int(left * (width - side + 1)), int(top * (height - side + 1))
        right_half, lower_half = 2 * left + side > width, 2 * top + side > height
        yield photo, left, top, side, 4 * photo + 2 * lower_half + right_half


def batches():
    photos = [Image.open(ASSETS / name).convert("RGB") for name in PHOTOS]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images, labels = [], []
    for photo, left, top, side, label in crops():
        crop = photos[photo].crop((left, top, left + side, top + side))
        pixels = np.asarray(crop.resize((224, 224), Image.BILINEAR))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255)
        images.append((image - mean) / std)
        labels.append(label)
    images = torch.stack(images).split(CURVE_BATCH)
    return list(zip(images, torch.tensor(labels).split(CURVE_BATCH)))


def curve(name, optimizer, layout, nudge, data, dtype=torch.float32):
    network = NETWORKS[name]
    build = network.build
    network = type(network).__new__(type(network))
    network.__dict__ |= NETWORKS[name].__dict__
    network.options = NETWORKS[name].options | {"num_classes": CLASSES}
    model = network.build(224, 224)
    fill(model, network, 224, 224)
    without_dropout(model).to(dtype, memory_format=layout)
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for images, labels in data:
        images = nudged(images, nudge).to(dtype, memory_format=layout)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def curves(names):
    """The losses of each network and optimiser, in PyTorch's two memory layouts and with nudged
    images. Training is chaotic: what rounding changes grows from step to step, and how far two runs
    get apart by luck differs by several times, so that two runs do not tell how far. Adds to what is
    there after each optimiser, since all of them take long."""
    data = batches()
    path = GOLDEN / "curves.json"
    kinds = [(layout, 0) for layout in LAYOUTS] + [(LAYOUTS[0], n + 1) for n in range(CURVE_NUDGES)]
    for name in names or CURVES:
        for optimizer in ["sgd", "adamw"]:
            runs = [curve(name, optimizer, layout, nudge, data) for layout, nudge in kinds]
            apart = [[abs(a - b) / a for a, b in zip(runs[0], other)] for other in runs[1:]]
            for other in apart:
                print(f"{name} {optimizer}: " + " ".join(f"{gap:.0e}" for gap in other), flush=True)
            result = json.loads(path.read_text()) if path.exists() else {}
            result.setdefault(name, {})[optimizer] = runs
            path.write_text(json.dumps(result) + "\n")


def exact(names):
    """How far the losses of float64 are from the first float32 run of curves.json: the largest distance
    over twice the gap between the two memory layouts (no less than a thousandth), by that of the whole
    curve and by the largest up to each step. Prints only."""
    data = batches()
    curves = json.loads((GOLDEN / "curves.json").read_text())
    for name in names or CURVES:
        for optimizer in ["sgd", "adamw"]:
            first, second = np.array(curves[name][optimizer][:2])
            losses = np.array(curve(name, optimizer, LAYOUTS[0], 0, data, torch.float64))
            gaps = np.maximum.accumulate(np.abs(first - second) / first)
            tolerances = np.maximum(2 * gaps, 1e-3)
            distances = np.abs(losses - first) / first
            whole, so_far = distances.max() / tolerances[-1], (distances / tolerances).max()
            print(f"{name} {optimizer}: {whole:.2f}, up to each step {so_far:.2f}", flush=True)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    "adamw_betas": (torch.optim.AdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
}  # fmt: skip


def optimizers():
    """A parameter after each of ten steps with gradients by formula and a rate that changes."""
    result = {}
    for name, (kind, options) in OPTIMIZERS.items():
        parameter = nn.Parameter(torch.from_numpy(formula.uniform("parameter", 7)))
        optimizer = kind([parameter], **options)
        values = []
        for step in range(10):
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * (1 - step / 20)
            parameter.grad = torch.from_numpy(formula.uniform(f"gradient {step}", 7))
            optimizer.step()
            values.append(parameter.detach().tolist())
        result[name] = values
    (GOLDEN / "optimizers.json").write_text(json.dumps(result) + "\n")


def losses():
    """Cross entropy and its gradient in float64, with smoothing, class weights and soft targets."""
    logits = torch.from_numpy(formula.uniform("logits", 5 * 4).reshape(5, 4) * 3).double()
    labels = torch.tensor([0, 3, 1, 1, 2])
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    soft = torch.from_numpy(formula.uniform("soft", 5 * 4).reshape(5, 4)).double().softmax(1)
    result = []
    for targets in ["hard", "soft"]:
        for smoothing in [0.0, 0.1]:
            for weighted in [False, True]:
                x = logits.clone().requires_grad_()
                loss = functional.cross_entropy(
                    x, labels if targets == "hard" else soft,
                    weight=weights if weighted else None, label_smoothing=smoothing,
                )  # fmt: skip
                loss.backward()
                case = {"targets": targets, "smoothing": smoothing, "weighted": weighted}
                result.append(case | {"loss": loss.item(), "gradient": x.grad.flatten().tolist()})
    (GOLDEN / "losses.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    command, *names = sys.argv[1:]
    if command == "gradients":
        for name in names or NETWORKS:
            gradients(name)
    elif command in ("curves", "exact"):
        {"curves": curves, "exact": exact}[command](names)
    else:
        {"optimizers": optimizers, "losses": losses}[command]()
