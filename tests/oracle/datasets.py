"""Small data sets as the hub keeps them: parquet files with a column of PNG images.

    python tests/oracle/datasets.py

writes tests/golden/datasets/*.parquet. Each picture of CIFAR's kind has its column in red and its row
in green, so that a picture that is laid on its side is seen to be.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import formula

GOLDEN = Path(__file__).parent.parent / "golden" / "datasets"
CIFAR = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def digit(name):
    return png(formula.photo(name, 28, 28, 1)[:, :, 0])


def colours(name):
    pixels = formula.photo(name, 32, 32, 3)
    pixels[:, :, 0] = np.arange(32) * 8
    pixels[:, :, 1] = np.arange(32)[:, None] * 8
    return png(pixels)


def write(file, images, labels, columns=("image", "label"), names=None, described=True):
    image, label = columns
    kind = pa.string() if isinstance(labels[0], str) else pa.int64()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [None if i is None else {"bytes": i, "path": f"{n}.png"} for n, i in enumerate(images)]
    table = pa.table({
        image: pa.array(values, struct),
        "note": pa.array(["never read"] * len(labels)),
        label: pa.array(labels, kind),
    })
    if described:
        features = {image: {"_type": "Image"}, "note": {"dtype": "string", "_type": "Value"}}
        if names:
            features[label] = {"names": names, "_type": "ClassLabel"}
        else:
            features[label] = {"dtype": str(kind), "_type": "Value"}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    # As the hub writes them.
    pq.write_table(table, GOLDEN / f"{file}.parquet", compression="snappy", row_group_size=7)


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    digits = [str(d) for d in range(10)]
    for part, count in [("train", 20), ("test", 10)]:
        labels = [n % 10 for n in range(count)]
        write(f"mnist-{part}", [digit(f"{part} {n}") for n in labels], labels, names=digits)
        pictures = [colours(f"{part} {n}") for n in labels]
        write(f"cifar10-{part}", pictures, labels, ("img", "label"), CIFAR)
    pictures[3] = pictures[3][:60]
    write("cifar10-broken", pictures, labels, ("img", "label"), CIFAR)
    # Names, one of which no row has; a row without a class, one without an image, a broken image.
    names = ["circle", "square", "star"]
    labels = [0, 2, 0, 2, 0, 2, 0, 2, -1, 0, 2]
    pictures = [colours(f"shape {n}") for n in range(len(labels))]
    pictures[9] = None
    pictures[10] = b"no image"
    write("shapes-train", pictures, labels, ("picture", "shape"), names)
    write("shapes-validation", pictures[:2], labels[:2], ("picture", "shape"), names)
    write("shapes-test", pictures[2:5], labels[2:5], ("picture", "shape"), names)
    # Nothing is described, and the classes are words.
    words = ["b", "a", "b", "a", "b", "a"]
    write("words", pictures[:6], words, described=False)


if __name__ == "__main__":
    main()
