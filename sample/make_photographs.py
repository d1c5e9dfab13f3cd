"""Make a second data set, and a model to train on it: squares of the photographs that scikit-image ships.

Usage: pip install scikit-image && python -m sample.make_photographs FOLDER

The class of a square is the photograph that it was cut from. Each photograph is split into five upright strips:
three for `train/`, two between them for `val/`, so that no pixel is in both. `start.safetensors` is a small ViT with
fresh weights, 64 patches and a class token, to begin training with.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import timm
import torch
from PIL import Image

import diffrate

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
STRIPS = 5
SPLITS = (("train", 300, (0, 2, 4)), ("val", 75, (1, 3)))  # squares of a photograph, and the strips they are cut from
SIDE = 128  # pixels of a square
CUT = 120  # pixels that it is cut from, at most
SHAPE = {"img_size": SIDE, "embed_dim": 128, "depth": 10, "num_heads": 4}


def cut(photograph: Path, folder: Path, rng: random.Random) -> None:
    """Squares of one photograph into `folder/train/` and `folder/val/`."""
    image = Image.open(photograph).convert("RGB")
    strip = image.width / STRIPS
    for split, count, strips in SPLITS:
        inside = folder / split / photograph.stem
        inside.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            side = rng.uniform(0.5, 1.0) * min(strip, CUT)
            left = rng.choice(strips) * strip + rng.uniform(0, strip - side)
            top = rng.uniform(0, image.height - side)
            box = (left, top, left + side, top + side)
            square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
            square.save(inside / f"{index:03d}.jpg", quality=90)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sample.make_photographs FOLDER")
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        sys.exit("sample/make_photographs.py needs the package scikit-image: pip install scikit-image")
    folder, rng = Path(sys.argv[1]), random.Random(0)
    for name in PHOTOGRAPHS:
        cut(Path(package.origin).with_name("data") / name, folder, rng)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(PHOTOGRAPHS), **SHAPE)
    diffrate.save(diffrate.patch.vit(model), folder / "start.safetensors")
    print(f"{folder}: {len(PHOTOGRAPHS)} classes, {len(PHOTOGRAPHS) * sum(count for _, count, _ in SPLITS):,} squares")
