"""Checks what `sconce export` writes: every network as ONNX with onnx's checker and in ONNX
Runtime, and as safetensors in torchvision and timm, against sconce's own logits for five photos.

    python tests/oracle/exports.py target/release/sconce [NAME ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import formula

BINARY = sys.argv[1]


def sconce(*arguments):
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def preprocess(image, settings):
    """As the file's metadata says it, with Pillow."""
    resize, crop = settings["resize"], settings["crop"]
    width, height = image.size
    if width < height:
        size = (resize, int(resize * height / width))
    else:
        size = (int(resize * width / height), resize)
    kind = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[settings["interpolation"]]
    image = image.resize(size, kind)
    left, top = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    image = image.crop((left, top, left + crop, top + crop))
    pixels = np.asarray(image, np.float32) / 255
    mean, std = [np.array(settings[k], np.float32) for k in ("mean", "std")]
    return ((pixels - mean) / std).transpose(2, 0, 1)


def compare(what, actual, expected):
    difference = float(np.abs(actual - expected).max())
    top = [np.argsort(-row, kind="stable")[:5].tolist() for row in actual]
    same = top == [np.argsort(-row, kind="stable")[:5].tolist() for row in expected]
    print(f"{what}: largest difference {difference:.1e}, top-5 {'same' if same else 'DIFFERS'}",
          flush=True)  # fmt: skip
    return difference, same


def check(name, folder):
    """Formula-filled weights, through sconce and the exported files."""
    blank, filled = folder / "blank.safetensors", folder / "filled.safetensors"
    sconce("export", "-m", name, "--weights", "none", "--to", "safetensors", "-o", blank)
    classes = len(json.loads(safe_open(blank, "np").metadata()["sconce"])["labels"])
    tensors = {k: formula.parameter(k, v.shape) for k, v in load_file(blank).items()}
    photos = sorted(folder.glob("*.png"))
    arguments = ["--weights", filled, "-m", name]
    # Logits as large as those of trained networks: their head is scaled by what comes out first.
    layers = json.loads(sconce("models", name, "--format", "json"))
    head = [layer["name"] for layer in layers if layer["operation"] == "linear"][-1]
    for last in [False, True]:
        save_file(tensors, filled, safe_open(blank, "np").metadata())
        lines = sconce("classify", *arguments, "--exact", "--logits", "--format", "jsonl", *photos)
        logits = np.array([json.loads(line)["logits"] for line in lines.splitlines()], np.float32)
        if not last:
            for tensor in [f"{head}.weight", f"{head}.bias"]:
                if tensor in tensors:
                    tensors[tensor] *= np.float32(10 / np.abs(logits).max())
    worst = []
    for dtype in ["f32", "f16"]:
        file = folder / f"{dtype}.onnx"
        sconce("export", *arguments, "--to", "onnx", "--dtype", dtype, "-o", file)
        onnx.checker.check_model(str(file), full_check=True)
        metadata = {p.key: p.value for p in onnx.load(str(file)).metadata_props}
        assert len(json.loads(metadata["labels"])) == classes
        settings = json.loads(metadata["preprocessing"])
        images = np.stack([preprocess(Image.open(p).convert("RGB"), settings) for p in photos])
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        run = lambda batch: session.run(["logits"], {"images": batch})[0]
        five = run(images)
        one = np.concatenate([run(images[i : i + 1]) for i in range(5)])
        if dtype == "f32":
            worst = [compare(f"{name} {dtype}, batch {n}", y, logits) for n, y in [(1, one), (5, five)]]
            ok = all(same and difference < 1e-4 for difference, same in worst)
        else:
            difference = np.linalg.norm(five - logits) / np.linalg.norm(logits)
            print(f"{name} {dtype}: {file.stat().st_size} bytes, relative difference {difference:.1e}")
            # Formula-filled deep networks give logits so large that the scaled head is nothing there.
            held = np.abs(tensors[f"{head}.weight"]).max() > 2.0**-14
            ok &= bool(difference < 0.05) or not held
    for dialect in ["torchvision", "timm"]:
        model = reference(name, dialect, classes)
        if model is None:
            continue
        file = folder / f"{dialect}.safetensors"
        sconce("export", *arguments, "--to", "safetensors", "--dialect", dialect, "-o", file)
        state = {k: torch.from_numpy(v) for k, v in load_file(file).items()}
        model.load_state_dict(state)
        with torch.no_grad():
            out = model.eval()(torch.from_numpy(images)).numpy()
        difference, same = compare(f"{name} in {dialect}", out, logits)
        ok &= same and difference < 1e-4
        back = sconce("classify", "-m", file, "--exact", "--logits", "--format", "jsonl", photos[0])
        ok &= json.loads(back)["logits"] == json.loads(lines.splitlines()[0])["logits"]
    return ok


def reference(name, dialect, classes):
    if dialect == "torchvision" and hasattr(torchvision.models, name):
        return getattr(torchvision.models, name)(num_classes=classes)
    timm_name = {"mobilenet_v2": "mobilenetv2_100", "mobilenet_v1_100": "mobilenetv1_100",
                 "mobilenet_v1_125": "mobilenetv1_125", "mobilenet_v2_050": "mobilenetv2_050",
                 "mobilenet_v2_140": "mobilenetv2_140",
                 "efficientnet_lite0": "tf_efficientnet_lite0"}.get(name, name)  # fmt: skip
    if dialect == "timm" and timm_name in timm.list_models():
        if not name.startswith(("mobilenet_v3", "shufflenet")):
            return timm.create_model(timm_name, num_classes=classes)
    return None


def main():
    names = sys.argv[2:] or [m["name"] for m in json.loads(sconce("models", "--format", "json"))]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for index in range(5):
            size = [(300, 260), (256, 256), (225, 400), (240, 333), (500, 375)][index]
            Image.fromarray(formula.photo(f"export {index}", *size, 3)).save(folder / f"{index}.png")
        failed = [name for name in names if not check(name, folder)]
    print(f"{len(names)} networks, failed: {failed or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
