"""Files that are written whole or not at all; files of others, so that none can do harm or hang."""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import stat
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

WRITING = threading.RLock()  # held while a file is written: a process that ends takes it first
SCRATCH: set[Path] = set()  # what is written at present, files and folders, for a process that ends to remove
LONGEST_NUMBER = 400  # digits of a whole number in JSON: Python reads up to 4,300
LARGEST_JSON = 2**22  # bytes of a file: thousands of schedules; Python may take forty times as much for the values
MAKES_SPACE = b"bytearray"  # what pickles of plain values alone may call with a number
# The errors of `torch.load` on files that are missing, cut short, damaged or of another kind, and of fields that are
# missing.
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError, RecursionError),
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


def one_line(text: str) -> str:
    """`text` with what is not printable as Python writes it: no line breaks, nothing that steers a terminal."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def refuse_pipe(path: Path | str) -> None:
    """OSError where a path is a pipe or a device: to read it may take for ever."""
    mode = Path(path).stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a pipe or a device, no file", str(path))


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read, or is no text.
        ValueError: it is too large, or as `parse_json` says.
    """
    refuse_pipe(path)
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"found {path.stat().st_size:,} bytes; accepted: up to {LARGEST_JSON:,}")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """The value of a JSON text, in which an object has each name once.

    Raises:
        ValueError: json.JSONDecodeError where it is none, else one line on what it holds.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"found {name!r} twice in an object")
            found[name] = value
        return found

    def whole(digits: str) -> int:
        if len(digits) > LONGEST_NUMBER:
            raise ValueError(f"found a number of {len(digits)} digits")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=once, parse_int=whole)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def load_tensors(path: Path | str, **options: Any) -> Any:
    """What `torch.save` left in a file, of plain values and tensors alone, on the CPU.

    Raises:
        one of `UNREADABLE`: the file is missing, damaged, of another kind, or larger once it is unpacked.
    """
    import torch

    check_unpacked(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of files that it then refuses
        return torch.load(path, map_location="cpu", weights_only=True, **options)


def holds_weights(tensor: Any) -> bool:
    """Whether it holds floats of 16 bits or more, as weights do: not the numbers of a quantised model."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def check_unpacked(path: Path | str) -> None:
    """Refuse a file of which little makes much: an archive of more than twice its size, or a pickle that asks for space
    by a number. No weights are packed that tightly.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: there is no such file, or it is such a one, or damaged.
    """
    refuse_pipe(path)
    size = Path(path).stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            unpacked = sum(part.file_size for part in parts)
            if unpacked > 2 * size:
                raise ValueError(f"{unpacked:,} bytes in a file of {size:,}; accepted: up to twice as many")
            makes_space = any(MAKES_SPACE in archive.read(part) for part in parts if part.filename.endswith(".pkl"))
    else:
        with Path(path).open("rb") as file:
            makes_space = size > 0 and mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(MAKES_SPACE) >= 0
    if makes_space:
        raise ValueError("not plain tensors")


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """An empty scratch file for the block to write by its name. It becomes `path`, or the file that this links to, with
    the permissions of the file that was there, when the block ends without an error, and is removed otherwise.

    Raises:
        OSError: the folder cannot be written.
    """
    real = Path(os.path.realpath(path))
    scratch = real.with_name(f".{real.name}-{uuid4().hex}")
    with WRITING:
        SCRATCH.add(scratch)
        try:
            scratch.touch(exist_ok=False)
            mode = (real if real.is_file() else scratch).stat().st_mode  # writers change it
            yield scratch
            with scratch.open("rb+") as file:
                os.fsync(file.fileno())
            scratch.chmod(stat.S_IMODE(mode))
            scratch.replace(real)
        except BaseException as error:
            scratch.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename in (None, str(scratch)):
                error.filename = str(path)  # not the scratch file's
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
        try:
            yield file
        except RuntimeError as error:  # torch's writer has one of its own for whatever the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
