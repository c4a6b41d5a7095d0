"""Goldens of the way from a picture to logits: torchvision's preprocessing and MobileNetV2 on the
photos of assets/, and Pillow's convert("RGB") on every kind of file that is read.

    python tests/oracle/photos.py mobilenet_v2-b0353104.pth \\
        efficientnet_lite0.safetensors tf_mobilenet_v1_100.safetensors

with the published file, EfficientNet-Lite0 under timm's names (`sconce export`) and what
weights/convert.py makes of TensorFlow's MobileNetV1;
writes tests/images/ (small files) and, of tests/golden/, crops.json, jpegs.json, photos.safetensors and
images.safetensors.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

import formula

TESTS = Path(__file__).parent.parent
ASSETS = TESTS.parent / "assets"
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
INTERPOLATIONS = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


def load(path):
    """As torchvision's pil_loader, but turned as EXIF says."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def picture(name, height, width, channels):
    pixels = formula.photo(name, height, width, channels)
    return Image.frombytes(MODES[channels], (width, height), pixels.tobytes())


def crop(image, resize, size, interpolation):
    image = F.resize(image, resize, INTERPOLATIONS[interpolation])
    return F.center_crop(image, size)


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & formula.MASK
    return value


def crops():
    """Pictures of many shapes through resize and centre crop; a hash of the pixels each."""
    rows = []
    shapes = [
        (333, 257, 3), (400, 100, 3), (100, 400, 1), (60, 45, 3), (1, 1, 3), (1, 700, 3),
        (900, 2, 1), (256, 256, 3), (255, 257, 4), (311, 640, 4), (224, 224, 3), (77, 1000, 2),
        (1023, 769, 3), (250, 230, 3),
    ]  # fmt: skip
    settings = [(256, 224, "bilinear"), (232, 224, "bilinear"), (235, 224, "bicubic")]
    for index, (height, width, channels) in enumerate(shapes):
        for resize, size, interpolation in settings:
            name = f"picture {index}"
            image = picture(name, height, width, channels).convert("RGB")
            pixels = np.asarray(crop(image, resize, size, interpolation))
            rows.append({
                "name": name, "height": height, "width": width, "channels": channels,
                "resize": resize, "crop": size, "interpolation": interpolation,
                "hash": f"{fnv1a(pixels.tobytes()):016x}",
                "first": pixels.reshape(-1)[:12].tolist(),
            })  # fmt: skip
    (TESTS / "golden" / "crops.json").write_text(json.dumps(rows, indent=1) + "\n")


@torch.no_grad()
def photos(pth, efficientnet_lite0, tf_mobilenet_v1_100):
    """Logits of the photos, with the published weights and with the embedded ones."""
    published = torch.load(pth, map_location="cpu", weights_only=True)
    embedded = load_file(TESTS.parent / "weights" / "mobilenet_v2.safetensors")
    embedded = {name: torch.from_numpy(t.astype(np.float32)) for name, t in embedded.items()}
    tensors = {}
    for kind, state in [("published", published), ("embedded", embedded)]:
        model = torchvision.models.mobilenet_v2().eval()
        model.load_state_dict(state, strict=False)
        transforms = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
        for path in sorted(ASSETS.glob("*.png")):
            logits = model(transforms(load(path))[None])[0]
            top = logits.softmax(0).max(0)
            print(kind, path.name, int(top.indices), f"{float(top.values):.4f}")
            tensors[f"{kind}/{path.name}"] = logits.numpy()
    for name, path, settings, model in [
        ("efficientnet_lite0", efficientnet_lite0, (256, 224, "bicubic"),
         timm.create_model("tf_efficientnet_lite0")),
        ("tf_mobilenet_v1_100", tf_mobilenet_v1_100, (256, 224, "bilinear"),
         timm.create_model("mobilenetv1_100", pad_type="same", bn_eps=1e-3, num_classes=1001)),
    ]:  # fmt: skip
        state = {key: torch.from_numpy(tensor) for key, tensor in load_file(path).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
        model.eval()
        for path in sorted(ASSETS.glob("*.png")):
            pixels = F.to_tensor(crop(load(path), *settings))
            logits = model(F.normalize(pixels, [0.5] * 3, [0.5] * 3)[None])[0]
            top = logits.softmax(0).max(0)
            print(name, path.name, int(top.indices), f"{float(top.values):.4f}")
            tensors[f"{name}/{path.name}"] = logits.numpy()
    save_file(tensors, TESTS / "golden" / "photos.safetensors")


def images():
    """A small file of every kind, and what Pillow makes of it."""
    folder = TESTS / "images"
    folder.mkdir(exist_ok=True)
    rgb = picture("rgb", 17, 23, 3)
    rgba = picture("rgba", 17, 23, 4)
    grey = picture("grey", 17, 23, 1)
    palette = rgb.quantize(16)
    cmyk = Image.merge("CMYK", picture("cmyk", 17, 23, 4).split())
    wide = formula.photo("wide", 17, 23, 3).astype(np.uint16)
    smooth = picture("smooth", 16, 24, 3).resize((48, 32), Image.Resampling.BICUBIC)

    for name, image in [("rgb", rgb), ("rgba", rgba), ("grey", grey), ("palette", palette)]:
        image.save(folder / f"{name}.png")
    picture("la", 17, 23, 2).save(folder / "grey-alpha.png")
    grey.point(lambda v: 255 * (v > 100)).convert("1").save(folder / "one-bit.png")
    palette.save(folder / "palette-transparent.png", transparency=3)
    rgb.save(folder / "color-key.png", transparency=(10, 20, 30))
    Image.fromarray(wide[..., 0] * 257).save(folder / "grey-16.png")
    rgb.save(folder / "rgb.bmp")
    palette.save(folder / "palette.bmp")
    palette.save(folder / "palette.gif")
    palette.save(folder / "animated.gif", save_all=True, append_images=[palette.rotate(180)])
    rgb.save(folder / "lossless.webp", lossless=True)
    rgba.save(folder / "lossless-alpha.webp", lossless=True, exact=True)
    smooth.save(folder / "lossy.webp", quality=90)
    smooth.save(folder / "animated.webp", save_all=True, append_images=[smooth.rotate(180)], lossless=True)
    for compression in ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]:
        rgb.save(folder / f"rgb-{compression}.tiff", compression=compression)
    grey.save(folder / "grey.tiff")
    cmyk.save(folder / "cmyk.tiff")
    rgb.save(folder / "rgb.ppm")
    grey.save(folder / "grey.pgm")
    smooth.save(folder / "444.jpg", quality=95, subsampling=0)
    smooth.save(folder / "420.jpg", quality=95, subsampling=2)
    smooth.save(folder / "422.jpg", quality=95, subsampling=1)
    odd = picture("odd", 40, 30, 3).resize((203, 131), Image.Resampling.BICUBIC)
    odd.save(folder / "odd-420.jpg", quality=75, subsampling=2, optimize=True)
    odd.save(folder / "restart.jpg", quality=75, subsampling=2, restart_marker_blocks=3)
    smooth.save(folder / "progressive.jpg", quality=95, subsampling=0, progressive=True)
    smooth.convert("L").save(folder / "grey.jpg", quality=95)
    cmyk.resize((48, 32), Image.Resampling.BICUBIC).save(folder / "cmyk.jpg", quality=95)
    smooth.save(folder / "wrong-extension.png", "JPEG", quality=95, subsampling=0)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        smooth.save(folder / f"orientation-{orientation}.jpg", quality=95, subsampling=0, exif=exif)

    tensors = {}
    for path in sorted(folder.iterdir()):
        if path.name == "grey-16.png":  # Pillow clips these to white; we scale them
            tensors[path.name] = np.repeat(wide[..., :1].astype(np.uint8), 3, axis=2)
        else:
            tensors[path.name] = np.asarray(load(path))
    save_file(tensors, TESTS / "golden" / "images.safetensors")
    print(len(tensors), "images")


# Sampling factors of luminance; chrominance has 1 x 1.
SAMPLINGS = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111}


def jpegs():
    """Small JPEGs of many shapes, samplings, qualities and restart intervals, sequential and progressive,
    by OpenCV, with a hash of what Pillow makes of each."""
    import cv2

    rows = []
    for index in range(240):
        draw = [int(v * 2**20) for v in formula.uniform(f"jpeg {index}", 8) % 1]
        # A few pixels, or several blocks.
        height, width = [1 + d % (9 if index % 3 == 0 else 67) for d in draw[:2]]
        small = picture(f"jpeg {index}", 2 + height // 4, 2 + width // 4, 3)
        pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
        name = list(SAMPLINGS)[index % 4]
        settings = [
            cv2.IMWRITE_JPEG_QUALITY, [30, 75, 90, 100][draw[2] % 4],
            cv2.IMWRITE_JPEG_OPTIMIZE, draw[3] % 2,
            cv2.IMWRITE_JPEG_PROGRESSIVE, draw[6] % 2,
            cv2.IMWRITE_JPEG_RST_INTERVAL, [0, 0, 1, 3][draw[4] % 4],
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[name],
        ]  # fmt: skip
        _, data = cv2.imencode(".jpg", pixels[..., 0] if draw[5] % 10 == 0 else pixels, settings)
        with Image.open(io.BytesIO(data)) as image:
            read = np.asarray(image.convert("RGB"))
        rows.append({
            "name": f"{name} {height}x{width}{' progressive' * (draw[6] % 2)}", "jpeg": base64.b64encode(data).decode(),
            "hash": f"{fnv1a(read.tobytes()):016x}",
        })  # fmt: skip
    text = ",\n".join(json.dumps(row) for row in rows)
    (TESTS / "golden" / "jpegs.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    crops()
    jpegs()
    photos(*sys.argv[1:])
    images()
