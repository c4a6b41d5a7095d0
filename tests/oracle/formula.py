"""Weights and images by formula, the same in Rust (tests/common/mod.rs), so that goldens stay small.

A value depends on the tensor's name and its index alone: the FNV-1a hash of the name and the
index go through splitmix64, whose upper 24 bits give a number in [-1, 1).
"""

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def fnv1a(text):
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def uniform(name, count):
    """`count` float32 values in [-1, 1)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(fnv1a(name))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return unit * np.float32(2) - np.float32(1)


def parameter(name, shape):
    """A network's parameter: scaled so that activations stay of one order through the layers."""
    values = uniform(name, int(np.prod(shape)))
    if name.endswith("running_mean"):
        values = values * np.float32(0.1)
    elif name.endswith("running_var"):
        values = np.float32(1) + np.float32(0.5) * values
    elif len(shape) == 3:  # class token, positions
        values = values * np.float32(0.5)
    elif len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        # Squeeze-and-excitation's gates would else be shut or open, and nothing between.
        gain = 0.1 if any(gate in name for gate in [".fc1.", ".fc2.", ".se."]) else 1.0
        values = values * np.float32(gain * (6.0 / fan_in) ** 0.5)
    elif name.endswith("weight"):  # of a norm
        values = np.float32(1) + np.float32(0.25) * values
    else:
        values = values * np.float32(0.1)
    return values.reshape(shape)


def images(count, height, width):
    """A batch [count, 3, height, width]; its first image is the same whatever the count.

    Noise on a coarse grid of patches, so that networks can tell the images apart.
    """
    noise = uniform("images", count * 3 * height * width).reshape(count, 3, height, width)
    patches = uniform("patches", count * 3 * 8 * 8).reshape(count, 3, 8, 8)
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    return noise + np.float32(3) * patches[:, :, rows[:, None], columns[None, :]]


def photo(name, height, width, channels):
    """An 8-bit picture [height, width, channels]: waves of several lengths with some noise."""
    y = np.arange(height, dtype=np.int64)[:, None, None]
    x = np.arange(width, dtype=np.int64)[None, :, None]
    c = np.arange(channels, dtype=np.int64)[None, None, :]
    ramp = (x * (3 + c) + y * (7 - c) + (x * y // 16) * (c + 1)) % 512
    wave = np.where(ramp < 256, ramp, 511 - ramp)
    noise = (uniform(name, height * width * channels).reshape(height, width, channels) + 1) * 32
    return np.clip(wave * 3 // 4 + noise.astype(np.int64), 0, 255).astype(np.uint8)
