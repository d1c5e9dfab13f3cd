"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

WRITING = threading.RLock()  # held while a file is written: a process that ends takes it first
SCRATCH: set[Path] = set()  # what is written at present, files and folders, for a process that ends to remove
# The errors of `torch.load` on files that are missing, cut short, damaged or of another kind, and of fields that are
# missing.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    pickle.UnpicklingError,
)


def first_line(error: Exception) -> str:
    """The first line of an error's message without the file's name, or the error's type where it has none."""
    if type(error).__name__ == "LocalEntryNotFoundError":  # the hub's, whose message is a paragraph of advice
        return "no connection, and nothing in the cache"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error).startswith("Weights only load failed"):  # torch goes on to advise loading whatever is there
        return "not plain tensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """An empty scratch file for the block to write by its name. It becomes `path` when the block ends without an
    error, and is removed otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    with WRITING:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(descriptor)
        scratch = Path(name)
        SCRATCH.add(scratch)
        try:
            yield scratch
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
            scratch.chmod(0o644)  # mkstemp's files are for their owner alone
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        finally:
            SCRATCH.discard(scratch)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends without an error, and is removed otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    with whole_path(path) as scratch, scratch.open("wb") as file:
        yield file
