"""`--benchmark FILE...`: exported files beside the model that they are of, eager and compiled, all in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.rows import Row
from benchmarks.speed import SIDES, Setting, Side, Subject, build_side, memory_mib, rows_in_turn
from diffrate.files.runtimes import Loaded, load_exported, parts_of
from diffrate.files.targets import target_of
from diffrate.timing import mode_name


class File(NamedTuple):
    """An exported file that has been loaded, with the seconds that took and its size with all its parts."""

    path: Path
    loaded: Loaded
    seconds: float
    mib: float


def open_file(path: Path) -> File:
    """Load an exported file on as many threads as torch takes, and see how long that takes.

    Raises:
        ExportError: it is none, or a package is missing.
    """
    import_module(target_of(path).runtime)  # not the file's to wait for
    start = time.perf_counter()
    loaded = load_exported(path, torch.get_num_threads())
    seconds = time.perf_counter() - start
    return File(path, loaded, seconds, sum(part.stat().st_size for part in parts_of(path)) / 2**20)


def file_rows(subject: Subject, files: Sequence[File], setting: Setting) -> Iterator[Row]:
    """For each batch size a row for the dense model, the one at the schedule, and each file; memory is what a batch
    adds at its peak."""
    for batch_size in setting.batch_sizes:
        sides = [*_live(subject, batch_size, setting), *(_of_file(file, batch_size) for file in files)]
        yield from rows_in_turn(sides, batch_size, setting)


def build_file(path: Path, batch_size: int, threads: int) -> Callable[[], Tensor]:
    """What runs an exported file on random images."""
    return _runner(load_exported(path, threads), batch_size)


def _runner(loaded: Loaded, batch_size: int) -> Callable[[], Tensor]:
    images = torch.rand(batch_size, *loaded.metadata.input_size)
    return lambda: loaded.runner.logits(images)


def _live(subject: Subject, batch_size: int, setting: Setting) -> Iterator[Side]:
    """The model itself, dense and at the schedule, in each mode."""
    for compiled in setting.modes:
        for side, flops in zip(SIDES, subject.costs(), strict=True):
            use = (side, subject, batch_size, torch.float32, compiled, str(setting.device))
            about = {"subject": f"{side} model", "runtime": mode_name(compiled)}
            about |= {"file_mib": None, "load_seconds": None}
            about |= {"memory_mib": memory_mib(build_side, *use, device=setting.device)}
            yield Side(about, "float32", flops, build_side(*use))


def _of_file(file: File, batch_size: int) -> Side:
    said, use = file.loaded.metadata, (file.path, batch_size, torch.get_num_threads())
    about = {"subject": file.path.name, "runtime": target_of(file.path).runtime}
    about |= {"file_mib": file.mib, "load_seconds": file.seconds}
    about |= {"memory_mib": memory_mib(build_file, *use, device=torch.device("cpu"))}
    return Side(about, said.precision, 1e9 * said.gflops, _runner(file.loaded, batch_size))
