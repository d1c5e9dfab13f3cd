"""The sample that ships: 5,000 digits and a small model trained on them. See README.md here."""

from __future__ import annotations

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

MODEL = "vit_sample_patch4_28"
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
