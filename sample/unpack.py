"""Unpack the digits on first use into the ImageFolder layout."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

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
    scratch = Path(tempfile.mkdtemp(prefix="digits-", dir=archive.parent))
    try:
        with tarfile.open(archive, mode="r:xz") as tar:
            for member in tqdm(tar.getmembers(), desc="unpacking the digits", unit="file", disable=not bar):
                tar.extract(member, scratch, filter="data")
        scratch.chmod(0o755)  # mkdtemp's folders are for their owner alone
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
