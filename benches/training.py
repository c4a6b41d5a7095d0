#!/usr/bin/env python3
"""A full training step (forward, backward, SGD with momentum) of sconce and of PyTorch, in turn.

    pip install torch torchvision
    cargo build --release
    python benches/training.py [NETWORK[:BATCH] ...] [--rounds N] [--threads N]

224 x 224, float32, random images. PyTorch runs in both memory layouts, each engine in a process of
its own, one after the other; printed are the medians over all rounds, peak memory, and the ratio of
sconce to the better layout.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

NETWORKS = ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small",
            "shufflenet_v2_x1_0", "vit_b_16:4"]
SCONCE = Path(__file__).parent.parent / "target/release/sconce"

PYTORCH = """
import json, resource, sys, time
import torch, torchvision
name, batch, threads, layout, seconds = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4], float(sys.argv[5])
torch.set_num_threads(threads)
model = getattr(torchvision.models, name)(weights=None).train()
images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
if layout == "channels_last":
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
times, begun = [], None
while len(times) < 6 or time.perf_counter() - begun < seconds:
    start = time.perf_counter()
    begun = begun or start
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    times.append((time.perf_counter() - start) * 1e3)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
print(json.dumps({"ms": sorted(times[3:])[len(times[3:]) // 2], "mb": peak}))
"""


def sconce(name, batch, threads, seconds):
    command = [SCONCE, "bench", "-m", name, "--weights", "none", "--train", "-b", str(batch),
               "-j", str(threads), "--seconds", str(seconds), "--format", "json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found["median_ms"], found["peak_memory_mb"]


def pytorch(name, batch, threads, layout, seconds):
    command = [sys.executable, "-c", PYTORCH, name, str(batch), str(threads), layout, str(seconds)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found["ms"], found["mb"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3)
    arguments = parser.parse_args()
    print("| network | batch | sconce ms | MB | pytorch nchw | MB | channels_last | MB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for network in arguments.networks:
        name, _, batch = network.partition(":")
        batch = int(batch or 16)
        engines = {
            "sconce": lambda: sconce(name, batch, arguments.threads, arguments.seconds),
            "contiguous": lambda: pytorch(name, batch, arguments.threads, "contiguous", arguments.seconds),
            "channels_last": lambda: pytorch(name, batch, arguments.threads, "channels_last", arguments.seconds),
        }
        found = {engine: [] for engine in engines}
        for _ in range(arguments.rounds):
            for engine, run in engines.items():
                found[engine].append(run())
        ms = {e: statistics.median(t for t, _ in runs) for e, runs in found.items()}
        mb = {e: max(m for _, m in runs) for e, runs in found.items()}
        cells = " | ".join(f"{ms[e]:.0f} | {mb[e]:.0f}" for e in engines)
        ratio = ms["sconce"] / min(ms["contiguous"], ms["channels_last"])
        print(f"| {name} | {batch} | {cells} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
