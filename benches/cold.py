"""One photo, a cold process: sconce with its embedded model beside the same classification by ONNX
Runtime from Python, in turn. Wall time and peak memory of the whole process.

    cargo build --release
    python benches/cold.py [--rounds 7]

needs torch and torchvision (to write the ONNX file once), numpy, Pillow and onnxruntime.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHOTO = ROOT / "assets" / "coffee.png"


def export(path):
    import torch
    import torchvision
    from safetensors.numpy import load_file

    state = load_file(ROOT / "weights" / "mobilenet_v2.safetensors")
    state = {name: torch.from_numpy(tensor).float() for name, tensor in state.items()}
    model = torchvision.models.mobilenet_v2().eval()
    model.load_state_dict(state, strict=False)
    example = torch.zeros(1, 3, 224, 224)
    torch.onnx.export(model, (example,), path, input_names=["x"], dynamo=False)


def classify(path):
    """What a small Python script would do: torchvision's preprocessing by Pillow and numpy."""
    import numpy as np
    import onnxruntime
    from PIL import Image

    image = Image.open(PHOTO).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = [round((side - 224) / 2) for side in image.size]
    image = image.crop((left, top, left + 224, top + 224))
    x = np.asarray(image, dtype=np.float32) / 255
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": x.transpose(2, 0, 1)[None]})[0][0]
    labels = (ROOT / "assets" / "imagenet_labels.txt").read_text().splitlines()
    probability = 1 / np.exp(logits - logits.max()).sum()
    print(labels[logits.argmax()], f"{probability:.3f}")


def measure(command):
    """Wall seconds and peak MB of a command."""
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    ])  # fmt: skip
    _, status, usage = os.wait4(process, 0)
    assert status == 0, command
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        classify(arguments.worker)
        return
    path = os.path.join(tempfile.mkdtemp(), "mobilenet_v2.onnx")
    if os.fork() == 0:  # torch stays out of the process that is measured
        export(path)
        os._exit(0)
    os.wait()
    commands = {
        "sconce": [str(ROOT / "target/release/sconce"), "classify", str(PHOTO)],
        "onnxruntime": [sys.executable, __file__, "--worker", path],
    }
    results = {name: [] for name in commands}
    for round_number in range(arguments.rounds + 1):
        for name, command in commands.items():
            result = measure(command)
            if round_number > 0:  # the first is for the disk's cache
                results[name].append(result)
    medians = {}
    for name, values in results.items():
        medians[name] = [statistics.median(column) for column in zip(*values)]
        print(f"{name}: {medians[name][0] * 1e3:.0f} ms, {medians[name][1]:.0f} MB")
    ratios = [a / b for a, b in zip(medians["sconce"], medians["onnxruntime"])]
    print(f"sconce / onnxruntime: time {ratios[0]:.3f}, memory {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
