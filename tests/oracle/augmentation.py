"""Goldens of augmentation: what torchvision makes of Pillow images, which operations its policies
hold, and how its random parameters are distributed.

    python tests/oracle/augmentation.py

writes tests/golden/augmentation.json.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, InterpolationMode, RandomErasing, RandomResizedCrop
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as F
from torchvision.transforms import v2

import formula

GOLDEN = Path(__file__).parent.parent / "golden" / "augmentation.json"
# Height and width.
SIZES = [(37, 53), (48, 48), (2, 5), (3, 3), (1, 1)]
FACTORS = [-1.0, -0.99, -0.5, -0.033, 0.0, 0.297, 0.9, 0.99, 2.5]
MAGNITUDES = {
    "Identity": [0.0],
    "ShearX": [0.3, -0.3, 0.99, -0.627, 0.033],
    "ShearY": [0.3, -0.3, 0.99, -0.627, 0.033],
    "TranslateX": [3.9, -3.9, 32.0, -14.0, 0.0],
    "TranslateY": [3.9, -3.9, 32.0, -14.0, 0.0],
    "Rotate": [30.0, -30.0, 135.0, -94.5, 4.5, 0.0, 90.0, -90.0, 180.0],
    "Brightness": FACTORS,
    "Color": FACTORS,
    "Contrast": FACTORS,
    "Sharpness": FACTORS,
    "Posterize": [8, 7, 4, 2, 1],
    "Solarize": [255.0, 127.5, 128.0, 8.5, 0.0],
    "AutoContrast": [0.0],
    "Equalize": [0.0],
}
HUES = [-0.5, -0.31, -0.1, 0.0, 0.05, 0.2, 0.5]
SAMPLES = 100_000


def checksum(image):
    """Every value times its place's odd-looking number, modulo 2^64."""
    values = np.asarray(image).reshape(-1).astype(np.uint64)
    places = np.arange(1, len(values) + 1, dtype=np.uint64)
    return f"{int((values * (places * np.uint64(0x9E3779B97F4A7C15))).sum()):016x}"


def pictures():
    """By formula, with little contrast, and of one colour."""
    for height, width in SIZES:
        pixels = formula.photo("augmented", height, width, 3)
        pixels = np.asarray(pixels, dtype=np.uint8).reshape(height, width, 3)
        for kind, values in [
            ("photo", pixels),
            ("pale", pixels // 4 + 100),
            ("plain", np.full_like(pixels, 77)),
        ]:
            yield kind, height, width, Image.fromarray(values)


def outputs(picture):
    """Operation, magnitude and checksum of the result."""
    for operation, magnitudes in MAGNITUDES.items():
        for magnitude in magnitudes:
            result = autoaugment._apply_op(
                picture, operation, magnitude, InterpolationMode.BILINEAR, None
            )
            yield operation, float(magnitude), checksum(result)
    for hue in HUES:
        yield "Hue", hue, checksum(F.adjust_hue(picture, hue))


def cube():
    """All colours, red the slowest."""
    values = np.arange(256, dtype=np.uint8)
    grid = np.stack(np.meshgrid(values, values, values, indexing="ij"), -1)
    return Image.fromarray(grid.reshape(4096, 4096, 3))


def space(policy, *arguments):
    """All operations with all magnitudes that a policy may draw."""
    for name, (magnitudes, signed) in policy._augmentation_space(31, *arguments).items():
        if magnitudes.ndim == 0:
            magnitudes = [0.0]
        elif isinstance(policy, autoaugment.RandAugment):
            magnitudes = [magnitudes[policy.magnitude].item()]
        else:
            magnitudes = [m.item() for m in magnitudes]
        signs = [1.0, -1.0] if signed else [1.0]
        yield name, [float(m) * s for m in magnitudes for s in signs]


def distribution(name, samples):
    """Values, and the share of samples that are not above each."""
    samples = np.sort(np.asarray(samples, dtype=np.float64))
    values = np.unique(np.quantile(samples, np.linspace(0.05, 0.95, 10), method="lower"))
    # Between two possible values, so that rounding does not matter.
    points = []
    for value in values:
        above = samples[np.searchsorted(samples, value, "right") :]
        middle = (value + above[0]) / 2 if len(above) else value
        points.append([middle, float(np.mean(samples <= middle))])
    return {"name": name, "samples": len(samples), "points": points}


def distributions():
    for height, width in [(375, 500), (120, 40)]:
        image = Image.new("RGB", (width, height))
        drawn = [
            RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
            for _ in range(SAMPLES)
        ]
        top, left, h, w = np.array(drawn).T
        label = f"crop {width} {height}"
        yield distribution(f"{label} share", h * w / (height * width))
        yield distribution(f"{label} ratio", np.log(w / h))
        yield distribution(f"{label} left", left)
        yield distribution(f"{label} top", top)
    image = torch.zeros(3, 60, 90)
    drawn = [
        RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4]
        for _ in range(SAMPLES)
    ]
    top, left, h, w = np.array(drawn).T
    kept = h < 60
    yield distribution("erased share", (h * w / 5400)[kept])
    yield distribution("erased ratio", np.log(w / h)[kept])
    yield distribution("erased left", left[kept])
    yield distribution("erased top", top[kept])
    images = torch.zeros(1, 3, 60, 90)
    for alpha in [0.2, 1.0, 4.0]:
        mixup = v2.MixUp(alpha=alpha, num_classes=2)
        own = [mixup.make_params([images])["lam"] for _ in range(SAMPLES)]
        yield distribution(f"mixup {alpha}", own)
        cutmix = v2.CutMix(alpha=alpha, num_classes=2)
        drawn = [cutmix.make_params([images]) for _ in range(SAMPLES)]
        yield distribution(f"cutmix {alpha}", [d["lam_adjusted"] for d in drawn])
        for index, side in enumerate(["left", "top", "right", "bottom"]):
            values = [float(d["box"][index]) for d in drawn]
            yield distribution(f"cutmix {alpha} {side}", values)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    drawn = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(SAMPLES)
    ]
    for index, name in enumerate(["Brightness", "Contrast", "Color", "Hue"]):
        yield distribution(f"jitter {name}", [d[index + 1] for d in drawn])
        yield distribution(f"jitter {name} place", [d[0].tolist().index(index) for d in drawn])


def mixes():
    """MixUp and CutMix of a small batch with fixed parameters."""
    values = torch.tensor(list(formula.uniform("mixed", 3 * 3 * 4 * 5)), dtype=torch.float32)
    images = values.reshape(3, 4, 5, 3).permute(0, 3, 1, 2)
    labels = torch.tensor([2, 0, 2])
    mixup = v2.MixUp(alpha=1.0, num_classes=3)
    mixup.make_params = lambda flat: {"lam": 0.3217}
    cutmix = v2.CutMix(alpha=1.0, num_classes=3)
    share = 1.0 - 3 * 2 / 20
    cutmix.make_params = lambda flat: {"box": (1, 0, 4, 2), "lam_adjusted": share}
    for transform in [mixup, cutmix]:
        mixed, targets = transform(images, labels)
        mixed = mixed.permute(0, 2, 3, 1).reshape(-1)
        # Every float32 is a float64, and JSON keeps those.
        yield {"pixels": mixed.tolist(), "targets": targets.reshape(-1).tolist()}


def main():
    torch.manual_seed(0)
    colours = cube()
    mixup, cutmix = mixes()
    golden = {
        "pictures": [
            {"kind": kind, "height": height, "width": width, "results": list(outputs(picture))}
            for kind, height, width, picture in pictures()
        ],
        "cube": [
            {"hue": hue, "checksum": checksum(F.adjust_hue(colours, hue))} for hue in HUES
        ],
        "trivial": dict(space(autoaugment.TrivialAugmentWide())),
        "rand": [
            {
                "width": width,
                "height": height,
                "space": dict(space(autoaugment.RandAugment(), (height, width))),
            }
            for width, height in [(224, 224), (160, 97)]
        ],
        "mixup": mixup,
        "cutmix": cutmix,
        "distributions": list(distributions()),
    }
    assert all(math.isfinite(p) for d in golden["distributions"] for q in d["points"] for p in q)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
