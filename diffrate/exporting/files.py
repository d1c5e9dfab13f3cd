"""Each kind of file, its writer and its reader; files that come whole, with what belongs beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from diffrate.atomic import first_line
from diffrate.exporting import onnx, openvino, pt2
from diffrate.exporting.metadata import Metadata
from diffrate.exporting.runner import Runner
from diffrate.exporting.targets import ExportError, target_of

# `write(program, entries, path)`, of `.onnx` with an opset as well, and `run(path, threads)`.
KINDS: Mapping[str, ModuleType] = MappingProxyType({".onnx": onnx, ".pt2": pt2, ".xml": openvino})


class Loaded(NamedTuple):
    """An exported file that is ready to run."""

    runner: Runner
    metadata: Metadata


def load_exported(path: Path, threads: int | None = None) -> Loaded:
    """The file at `path`, made by `diffrate.export`, on `threads` threads or as many as its runtime takes.

    Raises:
        ExportError: it is missing, damaged, another file, or a package is missing that runs it.
    """
    target = target_of(path)
    if not path.is_file():
        raise ExportError(
            f"{path}: found {'a folder' if path.is_dir() else 'no such file'}; accepted: an exported file"
        )
    try:
        runner = KINDS[path.suffix].run(path, threads)
    except Exception as error:  # each runtime has errors of its own
        raise ExportError(f"{path}: {target.runtime} cannot read it ({first_line(error)[:200]})") from error
    return Loaded(runner, Metadata.of_entries(runner.entries, str(path)))


def parts_of(path: Path) -> list[Path]:
    """The exported file at `path`, and that of its weights where they are beside it."""
    beside = {".onnx": path.with_name(path.name + onnx.DATA), ".xml": path.with_suffix(openvino.WEIGHTS)}
    return [path, *(part for suffix, part in beside.items() if suffix == path.suffix and part.is_file())]


@contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """A name in a scratch folder beside `path` for the block to write, alone or with others beside it. All of them
    take their place beside `path` when the block ends well, `path` last; otherwise they are gone.

    Raises:
        OSError: the folder cannot be written.
    """
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        yield Path(folder) / path.name
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
        for file in written:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        outdated = set(parts_of(path)) - {path.with_name(file.name) for file in written}
        for file in written:
            file.replace(path.with_name(file.name))
        for file in outdated:  # weights beside a file that was there before
            file.unlink()
