#!/usr/bin/env python3
"""Fine-tuning over the folds of a stratified cross-validation, beside a linear probe on the same
features.

    pip install torch torchvision safetensors scikit-learn pillow
    cargo build --release
    python benches/finetune.py FOLDER [--folds N] [--probe] [-- FINETUNE'S OPTIONS]

Divides a folder of class folders into five folds, each image validated once, and runs
`sconce finetune` on each: accuracy of what it keeps, of the head on the frozen network (epoch 0), of
the last epoch, and seconds, by the clock and of the processor. `--probe` adds scikit-learn's
StandardScaler and LogisticRegression (C = 1, its default) on the features of torchvision's
mobilenet_v2 (IMAGENET1K_V1) for the same folds; `--probe-cv` C as LogisticRegressionCV chooses it.
"""

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCONCE = ROOT / "target/release/sconce"
WEIGHTS = ROOT / "weights/mobilenet_v2.safetensors"
FOLDS = 5


def assign(folder):
    """Path, class and fold of each image: each class's images spread over the folds."""
    rng, rows = random.Random(0), []
    for place in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = sorted(place.iterdir())
        rng.shuffle(files)
        rows += [(str(file.resolve()), place.name) for file in files]
    return sorted((path, label, index % FOLDS) for index, (path, label) in enumerate(rows))


def write_fold(rows, fold, path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        writer.writerows([p, l, "val" if f == fold else "train"] for p, l, f in rows)


def sconce(data, out, options):
    """The summary, the lines of metrics, and seconds of the clock and of the processor."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [SCONCE, "finetune", data, "-o", out, "--force", "--format", "json", "-q", *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads(result.stdout.splitlines()[-1]), lines, time.perf_counter() - began, cpu


def load(path):
    """An image as torchvision's weights want it."""
    from PIL import Image
    from torchvision.models import MobileNet_V2_Weights
    return MobileNet_V2_Weights.IMAGENET1K_V1.transforms()(Image.open(path).convert("RGB"))


def network():
    import torchvision
    from safetensors.torch import load_file
    model = torchvision.models.mobilenet_v2(weights=None)
    model.load_state_dict(load_file(WEIGHTS), strict=False)
    return model


def probe(rows, cache, chosen):
    """Accuracy for each fold, with the default C and perhaps with one that is chosen."""
    import numpy
    import torch
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    if cache and cache.exists():
        features = numpy.load(cache)
    else:
        torch.set_num_threads(2)
        model = network().eval()
        model.classifier = torch.nn.Identity()
        with torch.inference_mode():
            parts = [torch.stack([load(path) for path, _, _ in rows[i:i + 16]])
                     for i in range(0, len(rows), 16)]
            features = torch.cat([model(part) for part in parts]).numpy()
        if cache:
            numpy.save(cache, features)
    labels = numpy.array([label for _, label, _ in rows])
    folds = numpy.array([fold for _, _, fold in rows])
    ways = {"C = 1": LogisticRegression(max_iter=2000)}
    if chosen:
        ways["C chosen"] = LogisticRegressionCV(Cs=[1e-4, 1e-3, 1e-2, 1e-1, 1], max_iter=500)
    found = {name: [] for name in ways}
    for fold in range(FOLDS):
        train, val = folds != fold, folds == fold
        for name, regression in ways.items():
            model = make_pipeline(StandardScaler(), regression).fit(features[train], labels[train])
            found[name].append((model.score(features[val], labels[val]), int(val.sum())))
    return found


def over_folds(pairs):
    return sum(a * n for a, n in pairs) / sum(n for _, n in pairs)


def folds(arguments):
    rows = assign(arguments.folder)
    kept, first, last, walls, cpus = [], [], [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        for fold in range(arguments.folds):
            data = Path(temporary) / f"{fold}.csv"
            write_fold(rows, fold, data)
            summary, lines, wall, cpu = sconce(data, Path(temporary) / "run", arguments.options)
            count = summary["val_images"]
            kept.append((summary["val_accuracy"], count))
            first.append((lines[0]["val_accuracy"], count))
            last.append((lines[-1]["val_accuracy"], count))
            walls.append(wall)
            cpus.append(cpu)
            trail = " ".join(f"{line['val_accuracy']:.3f}" for line in lines)
            print(f"fold {fold}: kept {kept[-1][0]:.4f} (epoch {summary['best_epoch']} of "
                  f"{lines[-1]['epoch']}), {wall:.1f} s, {cpu:.1f} s of the processor; {trail}",
                  flush=True)
    print(f"sconce: kept {over_folds(kept):.4f}, epoch 0 {over_folds(first):.4f}, last epoch "
          f"{over_folds(last):.4f}, {max(walls):.1f} s at most, "
          f"{max(cpus):.1f} s of the processor", flush=True)
    if arguments.probe or arguments.probe_cv:
        for name, pairs in probe(rows, arguments.cache, arguments.probe_cv).items():
            print(f"scikit-learn, {name}: {over_folds(pairs):.4f} "
                  f"({' '.join(f'{a:.4f}' for a, _ in pairs)})", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--folds", type=int, default=FOLDS, help="so many of the five")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--probe-cv", action="store_true")
    parser.add_argument("--cache", type=Path, help="a file to keep the probe's features in")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:end])
    arguments.options = given[end + 1:]
    folds(arguments)


if __name__ == "__main__":
    main()
