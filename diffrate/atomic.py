"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What `torch.load` raises on files that are missing, cut short, damaged or something else, and what reading
# fields that are not there raises.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    pickle.UnpicklingError,
)


def first_line(error: Exception) -> str:
    """The message of an error in one line, without the file that the caller names, or what kind it is."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cache_folder(name: str) -> Path | None:
    """The folder `name` where users' programs keep what can be made again, with the folders above it; None where there
    is no such place."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffrate" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):  # nobody's home, or nothing may be written there
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """An empty scratch file for the block to write by its name, which becomes `path` when the block ends
    well and is gone otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o644)  # mkstemp's files are for their owner alone
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole when the block ends well, and not at all otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    with whole_path(path) as scratch, scratch.open("wb") as file:
        yield file
