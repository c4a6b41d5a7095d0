#!/usr/bin/env python3
"""Five epochs on everything, from pretrained weights with a fresh head: sconce's validation accuracy
beside the same run in PyTorch, for several seeds.

    pip install torch torchvision safetensors pillow
    cargo build --release
    python benches/unfrozen.py FOLDER [--seeds 5] [--epochs 5]

Both start from the embedded mobilenet_v2 and train all of it: AdamW, rate 1e-4, decay 0.05 but on
norms and biases, batches of 16, constant rate, no augmentation, batch norms on the batch. The images to
validate on are the same, a fold of `finetune.py`; pixels are torchvision's in both. Orders of images and
fresh heads are each engine's own, drawn from the seed.
"""

import argparse
import tempfile
from pathlib import Path

import finetune

RATE, DECAY, BATCH = 1e-4, 0.05, 16


def ours(data, out, seed, epochs):
    options = [
        "--freeze", "none", "--augment", "none", "--optimizer", "adamw", "--lr", str(RATE),
        "--weight-decay", str(DECAY), "--schedule", "constant", "--warmup", "0",
        "-b", str(BATCH), "--epochs", str(epochs), "--seed", str(seed),
    ]  # fmt: skip
    _, lines, _, _ = finetune.sconce(data, out, options)
    return [line["val_accuracy"] for line in lines]


def theirs(images, labels, val, seed, epochs):
    import torch

    torch.manual_seed(seed)
    model = finetune.network()
    model.classifier[1] = torch.nn.Linear(1280, int(labels.max()) + 1)
    torch.nn.init.normal_(model.classifier[1].weight, 0, 0.01)
    torch.nn.init.zeros_(model.classifier[1].bias)
    model = model.to(memory_format=torch.channels_last)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    train = (~val).nonzero().flatten()
    found = []
    for _ in range(epochs):
        model.train()
        for batch in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            named = torch.cat([model(part) for part in images[val].split(BATCH)]).argmax(1)
        found.append(float((named == labels[val]).double().mean()))
    return found


def main():
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = finetune.assign(arguments.folder)
    names = sorted({label for _, label, _ in rows})
    labels = torch.tensor([names.index(label) for _, label, _ in rows])
    val = torch.tensor([fold == 0 for _, _, fold in rows])
    images = torch.stack([finetune.load(path) for path, _, _ in rows])
    last = {"sconce": [], "pytorch": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "fold.csv"
        finetune.write_fold(rows, 0, data)
        for seed in range(arguments.seeds):
            runs = {
                "sconce": ours(data, Path(temporary) / "run", seed, arguments.epochs),
                "pytorch": theirs(images, labels, val, seed, arguments.epochs),
            }
            for name, accuracies in runs.items():
                last[name].append(accuracies[-1])
                trail = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
                print(f"seed {seed} {name}: {trail}", flush=True)
    means = {name: sum(values) / len(values) for name, values in last.items()}
    print(", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))


if __name__ == "__main__":
    main()
