"""Goldens of `sconce evaluate`: scikit-learn's classification report and confusion matrix, a plain
calibration error and scipy's best temperature, for logits that a formula gives and for torchvision's
MobileNetV2 with the embedded weights on pieces of the photos in assets/.

    python tests/oracle/evaluation.py

writes tests/golden/evaluation.json.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.numpy import load_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import classification_report, confusion_matrix, log_loss, top_k_accuracy_score

import formula

ROOT = Path(__file__).parent.parent.parent
BINS = 15


def calibration_error(logits, labels):
    """Fifteen bins (i / 15, (i + 1) / 15]."""
    probabilities = np.exp(log_softmax(logits, axis=1))
    named, top = probabilities.argmax(1), probabilities.max(1)
    edges = np.linspace(0, 1, BINS + 1)
    total = 0.0
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (top > low) & (top <= high)
        if inside.any():
            right = (named[inside] == labels[inside]).mean()
            total += inside.mean() * abs(right - top[inside].mean())
    return float(total)


def loss(logits, labels):
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def judge(logits, labels):
    logits = logits.astype(np.float64)
    classes = logits.shape[1]
    every = list(range(classes))
    named = logits.argmax(1)
    report = classification_report(labels, named, labels=every, output_dict=True, zero_division=0)
    met = classification_report(labels, named, output_dict=True, zero_division=0)
    confusion = confusion_matrix(labels, named, labels=every)
    rows = []
    for c in every:
        row = report[str(c)]
        others = confusion.sum() - confusion[c].sum()
        specificity = (others - (confusion[:, c].sum() - confusion[c, c])) / others
        rows.append([row["precision"], row["recall"], float(specificity), row["f1-score"], int(row["support"])])
    probabilities = np.exp(log_softmax(logits, axis=1))
    assert abs(log_loss(labels, probabilities, labels=every) - loss(logits, labels)) < 1e-9
    found = minimize_scalar(
        lambda log: loss(logits / np.exp(log), labels), bounds=(np.log(0.01), np.log(100)),
        method="bounded", options={"xatol": 1e-12},
    )  # fmt: skip
    temperature = float(np.exp(found.x))
    return {
        "images": len(labels),
        "accuracy": float((named == labels).mean()),
        "top5": float(top_k_accuracy_score(labels, logits, k=5, labels=every)),
        "macro_f1": met["macro avg"]["f1-score"],
        "loss": loss(logits, labels),
        "calibration_error": calibration_error(logits, labels),
        "temperature": temperature,
        "loss_calibrated": loss(logits / temperature, labels),
        "calibration_error_calibrated": calibration_error(logits / temperature, labels),
        # Classes that are there or were named, of which others are all zero.
        "classes": {c: row for c, row in zip(every, rows) if row[4] or confusion[:, c].any()},
        "confusion": [[int(a), int(b), int(confusion[a, b])] for a, b in np.argwhere(confusion)],
    }


def by_formula(images, classes):
    """Class 2 has no image, class 5 is never named."""
    label = (formula.uniform("labels", images) + 1) / 2 * classes
    labels = label.astype(int)
    labels[labels == 2] = 3
    logits = 6 * formula.uniform("predictions", images * classes).reshape(images, classes)
    logits[np.arange(images), labels] += 4
    logits[:, 5] = -9
    return logits.astype(np.float32), labels


def load_mobilenet():
    state = load_file(ROOT / "weights" / "mobilenet_v2.safetensors")
    state = {name: torch.from_numpy(t.astype(np.float32)) for name, t in state.items()}
    model = torchvision.models.mobilenet_v2().eval()
    model.load_state_dict(state, strict=False)
    return model


# Classes that the photos are said to show: some of them rightly.
CLAIMS = {
    "cat": [281, 282, 285],
    "coffee": [967, 968, 504],
    "photographer": [872, 447],
}
PIECES = 12
SIDE = 180


@torch.no_grad()
def by_network():
    model = load_mobilenet()
    transforms = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    pieces, logits, labels = [], [], []
    for name, claims in CLAIMS.items():
        photo = Image.open(ROOT / "assets" / f"{name}.png").convert("RGB")
        places = (formula.uniform(name, 2 * PIECES) + 1) / 2
        for i, (x, y) in enumerate(places.reshape(-1, 2)):
            x, y = int(x * (photo.width - SIDE)), int(y * (photo.height - SIDE))
            piece = photo.crop((x, y, x + SIDE, y + SIDE))
            label = claims[i % len(claims)]
            pieces.append([name, x, y, label])
            logits.append(model(transforms(piece)[None])[0].numpy())
            labels.append(label)
    return pieces, np.stack(logits), np.array(labels)


def main():
    logits, labels = by_formula(500, 7)
    golden = {"formula": judge(logits, labels)}
    pieces, logits, labels = by_network()
    golden["network"] = {"side": SIDE, "pieces": pieces, **judge(logits, labels)}
    for name, judged in golden.items():
        print(name, {k: v for k, v in judged.items() if not isinstance(v, (list, dict))})
    path = ROOT / "tests" / "golden" / "evaluation.json"
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


main()
