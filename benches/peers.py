"""sconce beside ONNX Runtime, OpenVINO and PyTorch: the same network, threads, batch and input
size, random weights and input, float32, in turn in one run.

    cargo build --release
    python benches/peers.py [--networks NAME ...] [--batches 1 16] [--threads 2 1] [--rounds 5]

needs torch, torchvision, timm, onnx, onnxscript, onnxruntime and openvino. Prints a table for each
number of threads: for each network and batch the median over all rounds in milliseconds, and the
ratio of sconce to the fastest peer (below 1: sconce is ahead). Then the peak memory of resnet50 at
batch 16, sconce's and ONNX Runtime's, each in a new process.

Each engine is a process of its own that sleeps while another runs. Threads of an engine may go on
spinning for a moment after a pass, in wait for the next one; so every engine, sconce too, is
measured after a pause. What the sleeping processes used of the cores while sconce was measured is
added up, and told where it is more than a hundredth.
"""

import argparse
import json
import os
import resource
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
PAUSE = 0.3  # seconds before an engine is measured


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
        median = measure(ready, job["seconds"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(json.dumps({"median_ms": median, "peak_memory_mb": peak}), flush=True)


def start(engine, folder, threads):
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", engine, folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def ask(process, job):
    """A worker's answer to a job."""
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def processor_seconds(processes):
    """What processes have used of the cores so far."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:  # another system than Linux
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def sconce(binary, name, batch, threads, seconds):
    command = [binary, "bench", "-m", name, "--weights", "none", "--device", "cpu"]
    command += ["-b", str(batch), "-j", str(threads), "--seconds", str(seconds)]
    result = subprocess.run([*command, "--format", "json"], check=True, capture_output=True)
    return json.loads(result.stdout)


def table(arguments, threads, folder):
    """The times of all networks and batches for one number of threads."""
    workers = {engine: start(engine, folder, threads) for engine in ENGINES}
    print(f"{threads} threads, {SIZE} x {SIZE}, float32, median ms of {arguments.rounds} rounds\n")
    print("| network | batch | sconce | " + " | ".join(ENGINES) + " | sconce / best |")
    print("|---|---|---|" + "---|" * len(ENGINES) + "---|", flush=True)
    disturbed = total = 0
    for batch in arguments.batches:
        for name in arguments.networks:
            times = {engine: [] for engine in ["sconce", *ENGINES]}
            job = {"name": name, "batch": batch, "threads": threads}
            for engine in ENGINES:  # load and warm up
                ask(workers[engine], job | {"seconds": 0})
            for _ in range(arguments.rounds):
                time.sleep(PAUSE)
                before, started = processor_seconds(workers.values()), time.perf_counter()
                result = sconce(arguments.binary, name, batch, threads, arguments.seconds)
                times["sconce"].append(result["median_ms"])
                disturbed += processor_seconds(workers.values()) - before
                total += time.perf_counter() - started
                for engine in ENGINES:
                    time.sleep(PAUSE)
                    answer = ask(workers[engine], job | {"seconds": arguments.seconds})
                    times[engine].append(answer["median_ms"])
            medians = {engine: statistics.median(values) for engine, values in times.items()}
            best = min(medians[engine] for engine in ENGINES)
            cells = [f"{medians[engine]:.2f}" for engine in ["sconce", *ENGINES]]
            print(f"| {name} | {batch} | {' | '.join(cells)} | {medians['sconce'] / best:.2f} |", flush=True)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    if disturbed > 0.01 * total:
        print(f"\nthe peers used {disturbed:.2f} s of the cores in sconce's {total:.2f} s")
    print()


def memory(arguments, threads, folder, name="resnet50", batch=16):
    """Peak memory, each engine in a process that does nothing else."""
    # The file is written by another process, which needs torch.
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benches')!r})\n"
    code += f"import peers; peers.export({name!r}, {folder!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    ours = sconce(arguments.binary, name, batch, threads, 0)["peak_memory_mb"]
    process = start("onnxruntime", folder, threads)
    job = {"name": name, "batch": batch, "threads": threads, "seconds": 0}
    theirs = ask(process, job)["peak_memory_mb"]
    process.stdin.close()
    process.wait()
    print(f"peak memory, {name}, batch {batch}: sconce {ours:.0f} MB, onnxruntime {theirs:.0f} MB, {ours / theirs:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each engine and round")
    parser.add_argument("--binary", default=ROOT / "target/release/sconce")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*arguments.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        for threads in arguments.threads:
            table(arguments, threads, folder)
        if "resnet50" in arguments.networks and 16 in arguments.batches:
            memory(arguments, arguments.threads[0], folder)


if __name__ == "__main__":
    main()
