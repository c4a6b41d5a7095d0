#!/usr/bin/env python3
"""sconce and PyTorch on one CUDA device, in turn: images a second, in inference and in training.

    pip install torch torchvision
    cargo build --release --features cudnn
    python benches/cuda.py [--networks NAME ...] [--batch 64] [--rounds 3] [--modes infer train]
                           [--precisions tf32 bf16] [--sconce target/release/sconce]

224 x 224, random images that are on the device already, random weights. Inference ends with the logits
on the host; training is forward, backward and SGD with momentum. PyTorch runs channels last, with
cuDNN's search for algorithms, as it is and compiled (`torch.compile`); bf16 is its autocast. Each
engine is a process of its own, one after the other; printed are medians over all rounds, the largest
memory that PyTorch held, and sconce's speed over PyTorch's (above 1: sconce is ahead).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

NETWORKS = [
    "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "vit_b_16",
]  # fmt: skip
SCONCE = Path(__file__).parent.parent / "target/release/sconce"

PYTORCH = """
import json, sys, time
import torch, torchvision
name, batch, mode, precision, compiled, seconds = sys.argv[1], int(sys.argv[2]), *sys.argv[3:6], float(sys.argv[6])
torch.backends.cudnn.benchmark = True
tf32 = precision == "tf32"
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(precision)
model = getattr(torchvision.models, name)(weights=None).cuda().to(memory_format=torch.channels_last)
model.train(mode == "train")
images = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
labels = torch.randint(0, 1000, (batch,), device="cuda")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
scaler = torch.amp.GradScaler("cuda", enabled=precision == "f16")
run = torch.compile(model) if compiled == "compiled" else model

def step():
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        if mode == "infer":
            with torch.inference_mode():
                return run(images).float().cpu()
        loss = torch.nn.functional.cross_entropy(run(images).float(), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.cuda.synchronize()
    return loss.item()

for _ in range(10):
    step()
times, begun = [], time.perf_counter()
while len(times) < 5 or time.perf_counter() - begun < seconds:
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
print(json.dumps({"ms": sorted(times)[len(times) // 2] * 1e3, "mb": torch.cuda.max_memory_allocated() / 1e6}))
"""


def last_json(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{command[:3]}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def sconce(arguments, name, mode, precision):
    command = [
        arguments.sconce, "bench", "-m", name, "--weights", "none", "--device", "cuda", "--precision", precision,
        "-b", str(arguments.batch), "--seconds", str(arguments.seconds), "--format", "json",
    ]  # fmt: skip
    return last_json(command + (["--train"] if mode == "train" else []))


def pytorch(arguments, name, mode, precision, compiled):
    return last_json([
        sys.executable, "-c", PYTORCH, name, str(arguments.batch), mode, precision, compiled, str(arguments.seconds),
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--modes", nargs="+", default=["infer", "train"])
    parser.add_argument("--precisions", nargs="+", default=["tf32", "bf16"])
    parser.add_argument("--sconce", default=str(SCONCE))
    arguments = parser.parse_args()
    print("Images a second.\n")
    print("| network | | numbers | sconce | pytorch | MB | compiled | sconce / pytorch | / compiled |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.networks:
        for mode in arguments.modes:
            for precision in arguments.precisions:
                engines = {
                    "sconce": lambda: sconce(arguments, name, mode, precision),
                    "eager": lambda: pytorch(arguments, name, mode, precision, "eager"),
                    "compiled": lambda: pytorch(arguments, name, mode, precision, "compiled"),
                }
                found = {engine: [] for engine in engines}
                memory = 0.0
                for _ in range(arguments.rounds):
                    for engine, run in engines.items():
                        result = run()
                        if result is None:
                            continue
                        found[engine].append(arguments.batch / result.get("median_ms", result.get("ms")) * 1e3)
                        memory = max(memory, result.get("mb", 0.0) if engine == "eager" else 0.0)
                speed = {engine: statistics.median(times) if times else None for engine, times in found.items()}
                shown = {engine: "-" if value is None else f"{value:.0f}" for engine, value in speed.items()}

                def over(other):
                    if speed["sconce"] is None or speed[other] is None:
                        return "-"
                    return f"{speed['sconce'] / speed[other]:.2f}"

                print(
                    f"| {name} | {mode} | {precision} | {shown['sconce']} | {shown['eager']} | {memory:.0f} | "
                    f"{shown['compiled']} | {over('eager')} | {over('compiled')} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
