"""Unpack the digits on first use into the ImageFolder layout."""

from __future__ import annotations

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
