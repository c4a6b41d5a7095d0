"""sconce beside ONNX Runtime, OpenVINO and PyTorch: the same network, threads, batch and input
size, random weights and input, float32, in turn in one run.

    cargo build --release
    python benches/peers.py [--networks NAME ...] [--batches 1 16] [--threads 2] [--rounds 5]

needs torch, torchvision, timm, onnx, onnxscript, onnxruntime and openvino. Prints for each network
and batch the median over all rounds in milliseconds, and the ratio of sconce to the fastest peer
(below 1: sconce is ahead). Each engine is a process of its own that sleeps while another runs.
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

ROOT = Path(__file__).parent.parent
NETWORKS = [
    "resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v1_100", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x1_0", "vit_b_16",
]  # fmt: skip
TIMM = {"mobilenet_v1_100": "mobilenetv1_100"}
ENGINES = ["onnxruntime", "openvino", "pytorch"]
SIZE = 224


def torch_model(name):
    import timm
    import torch
    import torchvision

    torch.manual_seed(0)
    if name in TIMM:
        return timm.create_model(TIMM[name]).eval()
    return getattr(torchvision.models, name)().eval()


def export(name, folder):
    """The network as an ONNX file with a free batch axis."""
    import torch

    path = Path(folder) / f"{name}.onnx"
    if not path.exists():
        example = torch.randn(2, 3, SIZE, SIZE)
        torch.onnx.export(
            torch_model(name), (example,), path, input_names=["x"], output_names=["y"],
            dynamo=False, dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, opset_version=17,
        )  # fmt: skip
    return path


def passes(engine, name, batch, threads, folder):
    """A function that runs the network once."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            export(name, folder), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, {"x": x})
    if engine == "openvino":
        import openvino

        core = openvino.Core()
        model = core.read_model(export(name, folder))
        model.reshape([batch, 3, SIZE, SIZE])
        settings = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda: request.infer({0: x}, share_inputs=True)
    import torch

    torch.set_num_threads(threads)
    model, x = torch_model(name), torch.from_numpy(x)

    def in_layout(layout):
        arranged, values = model.to(memory_format=layout), x.to(memory_format=layout)

        def run():
            with torch.inference_mode():
                arranged(values)

        run()
        started = time.perf_counter()
        run()
        return time.perf_counter() - started, run

    # The better of PyTorch's two memory layouts; the model stays in the one set last.
    (plain, _), (last, run) = in_layout(torch.contiguous_format), in_layout(torch.channels_last)
    return run if last < plain else in_layout(torch.contiguous_format)[1]


def measure(run, seconds):
    """Median time of a pass, in milliseconds."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def worker(engine, folder):
    """Answers jobs that come as lines of JSON."""
    ready, job_ready = None, None
    for line in sys.stdin:
        job = json.loads(line)
        key = job["name"], job["batch"], job["threads"]
        if key != job_ready:
            ready = passes(engine, *key, folder)
            job_ready = key
            measure(ready, 0)
        print(json.dumps(measure(ready, job["seconds"])), flush=True)


def sconce(binary, name, batch, threads, seconds):
    command = [binary, "bench", "-m", name, "--weights", "none", "--device", "cpu"]
    command += ["-b", str(batch), "-j", str(threads), "--seconds", str(seconds)]
    result = subprocess.run([*command, "--format", "json"], check=True, capture_output=True)
    return json.loads(result.stdout)["median_ms"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each engine and round")
    parser.add_argument("--binary", default=ROOT / "target/release/sconce")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    folder = tempfile.mkdtemp()
    workers = {
        engine: subprocess.Popen(
            [sys.executable, __file__, "--worker", engine, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)},
            stderr=subprocess.DEVNULL,
        )
        for engine in ENGINES
    }  # fmt: skip

    def ask(engine, job):
        workers[engine].stdin.write(json.dumps(job) + "\n")
        workers[engine].stdin.flush()
        return json.loads(workers[engine].stdout.readline())

    print(f"{arguments.threads} threads, {SIZE} x {SIZE}, float32, median ms of {arguments.rounds} rounds\n")
    print("| network | batch | sconce | " + " | ".join(ENGINES) + " | sconce / best |")
    print("|---|---|---|" + "---|" * len(ENGINES) + "---|", flush=True)
    for batch in arguments.batches:
        for name in arguments.networks:
            times = {engine: [] for engine in ["sconce", *ENGINES]}
            job = {"name": name, "batch": batch, "threads": arguments.threads}
            for engine in ENGINES:  # load and warm up
                ask(engine, job | {"seconds": 0})
            for _ in range(arguments.rounds):
                times["sconce"].append(
                    sconce(arguments.binary, name, batch, arguments.threads, arguments.seconds)
                )
                for engine in ENGINES:
                    times[engine].append(ask(engine, job | {"seconds": arguments.seconds}))
            medians = {engine: statistics.median(values) for engine, values in times.items()}
            best = min(medians[engine] for engine in ENGINES)
            cells = [f"{medians[engine]:.2f}" for engine in ["sconce", *ENGINES]]
            print(f"| {name} | {batch} | {' | '.join(cells)} | {medians['sconce'] / best:.2f} |", flush=True)
    for process in workers.values():
        process.stdin.close()


if __name__ == "__main__":
    main()
