"""From files to labels: sconce beside Python pipelines, in turn, on a folder of JPEGs, two cores in all.

    cargo build --release
    python benches/images.py make PHOTOS OUT [--count 700]
    python benches/images.py OUT [--size 500|1600|4000] [--rounds 3] [--cores 2]
    python benches/images.py compare OUT

`make` cuts so many JPEGs of 500x375, 1600x1200 and 4000x3000 pixels out of a folder of photographs,
with a little noise where they are enlarged, as a sensor would give. The second form measures images
per second, each pipeline in a process of its own, after a pass that warms the disk's cache. `compare`
takes sconce's pixels and labels beside Pillow's, with and without --exact.

The Python pipelines decode with Pillow's draft mode or with torchvision's decoder, and classify with
ONNX Runtime, in three shapes: `alone`, a process for each core that does everything; `feed`, a process
for each core that decodes and the parent that classifies with as many threads; `loader`, the same
through PyTorch's DataLoader.

needs numpy, Pillow, onnxruntime, torch and torchvision. The network is mobilenet_v2 with sconce's
weights, written by `sconce export --to onnx`.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCONCE = ROOT / "target/release/sconce"
SIZES = [(500, 375), (1600, 1200), (4000, 3000)]
BATCH = 16


def make_one(job):
    import numpy as np
    from PIL import Image

    source, target, (width, height), seed = job
    draw = random.Random(seed)
    with Image.open(source) as photo:
        photo = photo.convert("RGB")
    # The largest part of that shape, made smaller at random.
    part = draw.uniform(0.6, 1.0) * min(photo.width / width, photo.height / height)
    w, h = int(width * part), int(height * part)
    x, y = draw.randint(0, photo.width - w), draw.randint(0, photo.height - h)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, (x, y, x + w, y + h))
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if part < 1:
        noise = np.random.default_rng(seed).normal(0, 2, (height, width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    # Of pictures from the web some are progressive; what cameras write is not.
    progressive = draw.random() < 0.1 and width < 4000
    image.save(target, quality=draw.choice([80, 85, 90, 95]), progressive=progressive)


def make(photos, out, count):
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert files, f"{photos}: no photographs"
    jobs = []
    for size in SIZES:
        folder = out / str(size[0])
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            target = folder / f"{index:04}.jpg"
            seed = zlib.crc32(f"{size} {index}".encode())
            jobs.append((files[index % len(files)], target, size, seed))
    with multiprocessing.Pool() as pool:
        for _ in pool.imap_unordered(make_one, jobs, chunksize=4):
            pass


def centre(width, height):
    # As torchvision's Resize: the long side is cut to a whole number of pixels.
    width, height = int(256 * width / min(width, height)), int(256 * height / min(width, height))
    return (width, height), (round((width - 224) / 2), round((height - 224) / 2))


def normalized(pixels):
    import numpy as np

    x = pixels.astype(np.float32) / 255
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return x.transpose(2, 0, 1)


def crop(path, draft):
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        size, (left, top) = centre(*image.size)
        if draft:
            image.draft("RGB", size)
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def pillow(path):
    return normalized(crop(path, draft=True))


def torchvision(path):
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.v2 import functional as F

    image = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
    size, (left, top) = centre(image.shape[2], image.shape[1])
    image = F.resize(image, [size[1], size[0]], antialias=True)
    image = image[:, top : top + 224, left : left + 224].to(torch.float32) / 255
    return F.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).numpy()


DECODERS = {"pillow": pillow, "torchvision": torchvision}


def session(network, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[0].argmax(1)


def export(network):
    command = [SCONCE, "export", "--to", "onnx", "-o", network, "-q"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def chunks(items):
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def decode_batch(job):
    import numpy as np

    decoder, paths = job
    return np.stack([DECODERS[decoder](path) for path in paths])


STATE = {}


def start_alone(network):
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    STATE["run"] = session(network, 1)


def alone_batch(job):
    return STATE["run"](decode_batch(job)).tolist()


class Files:
    """A data set for PyTorch's DataLoader."""

    def __init__(self, decoder, paths):
        self.decoder, self.paths = decoder, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return DECODERS[self.decoder](self.paths[index])


def python_pipeline(shape, decoder, paths, network, cores):
    """Labels of all paths, and the seconds from the first file to the last label."""
    jobs = [(decoder, chunk) for chunk in chunks(paths)]
    if decoder == "torchvision" or shape == "loader":
        import torch

        torch.set_num_threads(1)
    if shape == "alone":
        with multiprocessing.Pool(cores, start_alone, (network,)) as pool:
            pool.map(alone_batch, jobs[:cores], chunksize=1)
            started = time.perf_counter()
            labels = [label for batch in pool.imap(alone_batch, jobs) for label in batch]
            return labels, time.perf_counter() - started
    run = session(network, cores)
    if shape == "loader":
        from torch.utils.data import DataLoader

        loader = DataLoader(Files(decoder, paths), BATCH, num_workers=cores, prefetch_factor=4)
        started = time.perf_counter()
        labels = [label for batch in loader for label in run(batch.numpy())]
        return labels, time.perf_counter() - started
    with multiprocessing.Pool(cores) as pool:
        pool.map(decode_batch, jobs[:cores], chunksize=1)
        started = time.perf_counter()
        labels = [label for batch in pool.imap(decode_batch, jobs) for label in run(batch)]
        return labels, time.perf_counter() - started


def worker(arguments):
    shape, decoder, network, cores, *folders = arguments
    paths = [str(path) for path in files_of(folders)]
    labels, seconds = python_pipeline(shape, decoder, paths, network, int(cores))
    assert len(labels) == len(paths)
    print(len(paths) / seconds)


def files_of(folders):
    return sorted(path for folder in folders for path in Path(folder).rglob("*.jpg"))


def sconce(folders, cores, *more):
    """Images per second of the whole process, from its start to its end."""
    command = [str(SCONCE), "classify", *folders, "-j", str(cores), "-b", str(BATCH)]
    command += ["-k", "1", "--format", "jsonl", "-q", *more]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - started
    return done.stdout.count(b"\n") / seconds


def measure(folders, rounds, cores):
    network = os.path.join(tempfile.mkdtemp(), "mobilenet_v2.onnx")
    export(network)
    python = [(s, d) for s in ("alone", "feed", "loader") for d in DECODERS]
    rates = {"sconce": [], "sconce --exact": []}
    rates |= {f"{decoder}, {shape}": [] for shape, decoder in python}
    for path in files_of(folders):
        path.read_bytes()
    for _ in range(rounds):
        rates["sconce"].append(sconce(folders, cores))
        rates["sconce --exact"].append(sconce(folders, cores, "--exact"))
        for shape, decoder in python:
            command = [sys.executable, __file__, "worker", shape, decoder, network, str(cores)]
            done = subprocess.run(command + folders, check=True, stdout=subprocess.PIPE)
            rates[f"{decoder}, {shape}"].append(float(done.stdout.split()[-1]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:22} {rate:7.1f} images/s")
    best = max(rate for name, rate in medians.items() if "," in name)
    for name in ("sconce", "sconce --exact"):
        print(f"{name} / best of Python: {medians[name] / best:.2f}")


def compare(folders):
    """Pixels and labels beside Pillow's, which reads every picture whole."""
    import numpy as np

    network = os.path.join(tempfile.mkdtemp(), "mobilenet_v2.onnx")
    export(network)
    run = session(network, 2)
    paths = [str(path) for path in files_of(folders)]
    with tempfile.TemporaryDirectory() as out:
        expected = {}
        with open(os.path.join(out, "crops"), "wb") as crops:
            for batch in chunks(paths):
                pixels = [crop(path, draft=False) for path in batch]
                crops.writelines(pixels)
                labels = run(np.stack([normalized(image) for image in pixels]))
                expected |= dict(zip(batch, labels))
        Path(out, "paths").write_text("\n".join(os.path.abspath(path) for path in paths))
        command = ["cargo", "test", "--release", "-q", "--test", "pictures", "--", "--ignored"]
        command += ["--nocapture", "crops_of_a_folder"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"SCONCE_CROPS": out})
    for flags in ([], ["--exact"]):
        command = [str(SCONCE), "classify", *folders, "-k", "1", "--format", "jsonl", "-q"]
        done = subprocess.run(command + flags, check=True, stdout=subprocess.PIPE)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for least in (0, 0.3):
            sure = [l for l in lines if l["top"][0]["probability"] >= least]
            same = sum(l["top"][0]["index"] == expected[l["path"]] for l in sure)
            name = " ".join(["sconce", *flags])
            print(f"{name}: same label on {same} of {len(sure)} with a probability from {least}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="+", metavar="FOLDER")
    parser.add_argument("--count", type=int, default=700, help="JPEGs of each size to make")
    parser.add_argument("--size", type=int, choices=[width for width, _ in SIZES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    match options.arguments:
        case ["worker", *arguments]:
            worker(arguments)
        case ["make", photos, out]:
            make(Path(photos), Path(out), options.count)
        case ["compare", *folders]:
            compare(folders)
        case [folder]:
            if options.size:
                folder = os.path.join(folder, str(options.size))
            measure([folder], options.rounds, options.cores)
        case _:
            parser.error("see --help for the three forms")


if __name__ == "__main__":
    main()
