"""`--benchmark FILE...`: exported files beside the model that they are of, eager and compiled, all in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import models
from benchmarks.speed import SIDES, build_side
from benchmarks.subject import Subject
from diffrate.exporting.files import Loaded, load_exported, parts_of
from diffrate.exporting.metadata import Metadata
from diffrate.exporting.targets import target_of
from diffrate.running.speed import mode_name
from diffrate.running.timing import PairedTimes, peak_memory, time_all_in_turn

HEADINGS = {
    "subject": "model or file",
    "runtime": "runtime",
    "batch_size": "batch",
    "precision": "precision",
    "gflops": "GFLOPs",
    "images_per_second": "img/s",
    "speedup": "speed-up",
    "speedup_low": "lowest",
    "speedup_high": "highest",
    "ideal_speedup": "ideal",
    "share_of_ideal": "share %",
    "file_mib": "file MiB",
    "load_seconds": "load s",
    "memory_mib": "MiB",
}


@dataclass(frozen=True)
class Setting:
    """How rows are measured: modes of the live model (compiled or not), batch sizes, timed rounds."""

    modes: Sequence[bool]
    batch_sizes: Sequence[int]
    rounds: int
    device: torch.device


@dataclass(frozen=True)
class File:
    """An exported file that has been loaded, with the seconds that took and its size with all its parts."""

    path: Path
    loaded: Loaded
    seconds: float
    size: int

    @property
    def metadata(self) -> Metadata:
        """What it says of its model."""
        return self.loaded.metadata


@dataclass(frozen=True)
class FileRow:
    """One line of the table. The speed-up is the median of the rounds' ratios to the first row of the same runtime
    and batch size, and ideal what the FLOPs of the two say. Memory is what a batch adds at its peak."""

    subject: str
    runtime: str
    batch_size: int
    precision: str
    gflops: float
    images_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    ideal_speedup: float
    share_of_ideal: float
    file_mib: float | None
    load_seconds: float | None
    memory_mib: float | None

    def line(self) -> str:
        """The figures as a sentence."""
        return (
            f"{self.subject}, {self.runtime}, batch {self.batch_size}, {self.precision}: "
            f"{self.images_per_second:.1f} images/s, speed-up {self.speedup:.2f} ({self.speedup_low:.2f} to "
            f"{self.speedup_high:.2f}), {self.share_of_ideal:.0%} of the ideal {self.ideal_speedup:.2f}"
        )


@dataclass(frozen=True)
class _Contestant:
    """One that is timed: how it is built, also in another process, and what its row says."""

    subject: str
    runtime: str
    precision: str
    gflops: float
    build: Callable[..., Callable[[], Tensor]]
    arguments: tuple[object, ...]
    file: File | None = None


def open_file(path: Path) -> File:
    """Load an exported file on as many threads as torch takes, and see how long that takes.

    Raises:
        ExportError: it is none, or a package is missing.
    """
    import_module(target_of(path).runtime)  # not the file's to wait for
    start = time.perf_counter()
    loaded = load_exported(path, torch.get_num_threads())
    seconds = time.perf_counter() - start
    return File(path, loaded, seconds, sum(part.stat().st_size for part in parts_of(path)))


def file_rows(subject: Subject, files: Sequence[File], setting: Setting) -> Iterator[FileRow]:
    """For each batch size a row for the dense model, the one at the schedule, and each file."""
    for batch_size in setting.batch_sizes:
        contestants = [*_live(subject, batch_size, setting), *_of_files(files, batch_size)]
        places = [setting.device if one.file is None else torch.device("cpu") for one in contestants]
        memory = [
            peak_memory(one.build, *one.arguments, device=place) for one, place in zip(contestants, places, strict=True)
        ]
        runs = [
            _runner(one.file.loaded, batch_size) if one.file is not None else one.build(*one.arguments)
            for one in contestants
        ]
        times = time_all_in_turn(runs, setting.rounds, setting.device)
        first = {one.runtime: index for index, one in reversed(list(enumerate(contestants)))}
        for index, one in enumerate(contestants):
            base = first[one.runtime]
            paired = PairedTimes(times[base], times[index])
            yield _row(one, contestants[base].gflops / one.gflops, paired, batch_size, memory[index])


def build_file(path: Path, batch_size: int, threads: int) -> Callable[[], Tensor]:
    """What runs an exported file on random images."""
    return _runner(load_exported(path, threads), batch_size)


def _runner(loaded: Loaded, batch_size: int) -> Callable[[], Tensor]:
    images = torch.rand(batch_size, *loaded.metadata.input_size)
    return lambda: loaded.runner.logits(images)


def _live(subject: Subject, batch_size: int, setting: Setting) -> Iterator[_Contestant]:
    """The model itself, dense and at the schedule, in each mode."""
    with models.shapes_alone():
        model = subject.compressed()
    costs = dict(zip(SIDES, (model.flops_at(model.dense_schedule()) / 1e9, model.flops() / 1e9), strict=True))
    for compiled in setting.modes:
        for side in SIDES:
            arguments = (side, subject, batch_size, torch.float32, compiled, str(setting.device))
            yield _Contestant(
                f"{side} model",
                mode_name(compiled),
                "float32",
                costs[side],
                build_side,
                arguments,
            )


def _of_files(files: Sequence[File], batch_size: int) -> Iterator[_Contestant]:
    for file in files:
        arguments = (file.path, batch_size, torch.get_num_threads())
        said, runtime = file.metadata, target_of(file.path).runtime
        yield _Contestant(file.path.name, runtime, said.precision, said.gflops, build_file, arguments, file)


def _row(one: _Contestant, ideal: float, times: PairedTimes, batch_size: int, memory: int | None) -> FileRow:
    return FileRow(
        subject=one.subject,
        runtime=one.runtime,
        batch_size=batch_size,
        precision=one.precision,
        gflops=one.gflops,
        images_per_second=batch_size / median(times.rival),
        speedup=times.ratio,
        speedup_low=times.spread[0],
        speedup_high=times.spread[1],
        ideal_speedup=ideal,
        share_of_ideal=times.ratio / ideal,
        file_mib=None if one.file is None else one.file.size / 2**20,
        load_seconds=None if one.file is None else one.file.seconds,
        memory_mib=None if memory is None else memory / 2**20,
    )
