"""Loading a network from a warm file until it is ready to run: sconce from safetensors beside ONNX
Runtime's session from the ONNX file of the same weights, in turn, each in a new process.

    cargo build --release
    python benches/loading.py [resnet50] [--rounds 7] [--threads 2]

needs onnxruntime. Both files are written by `sconce export`, with random weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCONCE = Path(__file__).parent.parent / "target/release/sconce"


def open_session(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    before, started = memory(), time.perf_counter()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - started
    del session
    print(json.dumps({"load_ms": seconds * 1e3, "memory_mb": memory() - before}))


def memory():
    """Peak memory so far, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(command):
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", nargs="?", default="resnet50")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads = arguments.threads
    if arguments.worker:
        open_session(arguments.worker, threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights, onnx = [os.path.join(folder, f"network.{end}") for end in ("safetensors", "onnx")]
        for kind, path in [("safetensors", weights), ("onnx", onnx)]:
            export = [SCONCE, "export", "-m", arguments.network, "--weights", "none"]
            subprocess.run([*export, "--to", kind, "-o", path], check=True)
        sconce = [SCONCE, "bench", "-m", weights, "-j", str(threads), "--seconds", "0"]
        commands = {
            "sconce": [*sconce, "--format", "json"],
            "onnxruntime": [sys.executable, __file__, "--worker", onnx, "--threads", str(threads)],
        }
        results = {name: [] for name in commands}
        for round_number in range(arguments.rounds + 1):
            for name, command in commands.items():
                time.sleep(0.2)
                result = run(command)
                if round_number > 0:  # the first is for the disk's cache
                    results[name].append(result)
        size = os.path.getsize(weights) / 1e6
    print(f"{arguments.network}, file of {size:.0f} MB, {threads} threads")
    medians = {}
    for name, runs in results.items():
        times = [r["load_ms"] for r in runs]
        medians[name] = statistics.median(times)
        peak = statistics.median(r.get("peak_memory_mb", r.get("memory_mb")) for r in runs)
        print(f"{name}: median {medians[name]:.0f} ms, fastest {min(times):.0f} ms, peak {peak:.0f} MB")
    print(f"sconce / onnxruntime: {medians['sconce'] / medians['onnxruntime']:.2f}")


if __name__ == "__main__":
    main()
