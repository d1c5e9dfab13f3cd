"""`diffrate.benchmark`: speed and memory of a model, dense and compressed, measured so that they can be compared.

Machines drift: each round times both sides back to back, the first of them in turn, and what counts
is the median of the rounds' ratios, not any absolute time. Memory is measured in a fresh process each."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from diffrate import ROUNDS
from diffrate.device import compile_model, generators_kept, place_of
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.shapes import channels_of
from diffrate.schedule import Schedule

Run = Callable[[], Any]
SHORTEST = 0.3  # seconds of a measurement at least
SHORT, FEWEST = 0.08, 7  # seconds of one, and rounds, where many are to fit into a time
# Linux tells of each process's memory here; elsewhere memory is measured on GPUs alone.
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of a baseline and of its rival, round by round."""

    baseline: tuple[float, ...]
    rival: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Baseline over rival of each round: above 1 the rival is faster."""
        return [baseline / rival for baseline, rival in zip(self.baseline, self.rival, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the greatest of the ratios."""
        return min(self.ratios), max(self.ratios)


class Stopwatch:
    """Marks moments on a device. A GPU's are events in its stream: what it waits for the host counts, as in use."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        """What was asked of the device until now ends here."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two marks; waits for the device."""
        if self.device.type != "cuda":
            return [after - before for before, after in pairwise(self.marks)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.marks)]


def time_within(baseline: Run, rival: Run, seconds: float, device: torch.device) -> PairedTimes:
    """Time both in turn, in as many short rounds as fit into `seconds`, `FEWEST` at least.

    Where a machine's pace changes within seconds, many short rounds tell a ratio better than a few long ones.
    """
    for run in (baseline, rival):
        run()
    pair = sum(max(SHORT, 2 * _seconds(run, 1, device)) for run in (baseline, rival))
    rounds = max(FEWEST, int(seconds / pair))
    return PairedTimes(*time_all_in_turn((baseline, rival), rounds, device, SHORT))


def time_in_turn(baseline: Run, rival: Run, rounds: int, device: torch.device) -> PairedTimes:
    """Time both as `time_all_in_turn` does."""
    return PairedTimes(*time_all_in_turn((baseline, rival), rounds, device))


def time_all_in_turn(
    runs: Sequence[Run], rounds: int, device: torch.device, shortest: float = SHORTEST
) -> list[tuple[float, ...]]:
    """Seconds of each run, `rounds` times, after a first run each that does not count (allocations, compilation).

    Short runs are repeated within a round, after one that brings the run's weights back to the
    cache from which the others' have driven them: a model in use runs again and again.
    """
    for run in runs:
        run()
    repeats = [math.ceil(shortest / _seconds(run, 1, device)) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        order = range(len(runs))
        for index in order if turn % 2 == 0 else reversed(order):
            if repeats[index] > 1:
                runs[index]()
            times[index].append(_seconds(runs[index], repeats[index], device))
    return [tuple(row) for row in times]


def peak_memory(build: Callable[..., Run], *arguments: Any, device: torch.device) -> int | None:
    """Bytes that `build(*arguments)()` adds at its peak to what is there after `build`.

    In a fresh process, which `build` and its arguments must reach by pickle: what an earlier run
    left to the allocator would hide the peak. None where the system does not tell.
    """
    if device.type != "cuda" and not os.access(_RESET, os.W_OK):
        return None
    with _fresh_process(build.__module__).Pool(1) as pool:
        return pool.apply(_measure, (build, arguments, str(device)))


def _fresh_process(module: str) -> Any:
    """How to start a process that nothing was computed in: where there is one, from a server that has
    imported `module` once, which takes seconds each time otherwise."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _measure(build: Callable[..., Run], arguments: tuple[Any, ...], device: str) -> int:
    run = build(*arguments)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident("VmRSS") - _resident("RssFile")
    _RESET.write_text("5")  # the highest mark of resident memory starts over
    run()
    return _resident("VmHWM") - _resident("RssFile") - before  # code that is read for the first time is no memory of it


def _resident(name: str) -> int:
    """Resident memory of this process in bytes, now (`VmRSS`), at its highest (`VmHWM`), or of files (`RssFile`)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Seconds of one run, the mean of several in a row."""
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repeats):
        run()
    watch.mark()
    return watch.seconds()[0] / repeats


SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Speed:
    """Both sides at one batch size and precision, timed in turn.

    Times are medians over the rounds; the speed-up is the median of the rounds' ratios, with the lowest
    and the highest; FLOPs are multiply-accumulates of an image, and their ratio is the ideal.
    """

    batch_size: int
    precision: str
    dense_images_per_second: float
    compressed_images_per_second: float
    dense_ms_per_image: float
    compressed_ms_per_image: float
    dense_gflops: float
    compressed_gflops: float
    speedup: float
    speedup_low: float
    speedup_high: float
    ideal_speedup: float
    share_of_ideal: float

    @property
    def setting(self) -> str:
        """What was timed, for a sentence."""
        return self.precision

    def line(self) -> str:
        """The figures as a sentence."""
        return (
            f"batch {self.batch_size}, {self.setting}: dense {self.dense_images_per_second:.1f} images/s, "
            f"compressed {self.compressed_images_per_second:.1f} images/s, speed-up {self.speedup:.2f} "
            f"({self.speedup_low:.2f} to {self.speedup_high:.2f}), {self.share_of_ideal:.0%} of the ideal "
            f"{self.ideal_speedup:.2f}"
        )


def benchmark(
    model: CompressedModel,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    rounds: int = ROUNDS,
    device: torch.device | str | None = None,
    compile: bool = False,
) -> Speed:
    """Time `model` at its kept counts against the same model at its dense schedule, on random images.

    In turn, `rounds` times, with weights in `dtype` on `device` (by default where the model is), as
    compiled graphs with `compile`. Copies are timed: the model itself is not touched.

    Raises:
        UnsupportedModelError: the model is not patched.
        ValueError: a batch size or a number of rounds below 1.
    """
    require_patched(model)
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: found {value}; accepted: from 1")
    place = place_of(model, device)
    current, whole = model.compression.current(), model.dense_schedule()
    sides = at_schedules(model, (whole, current), batch_size, place.device, dtype, compile)
    times = time_in_turn(sides[0], sides[1], rounds, place.device)
    return speed_of(times, batch_size, precision_name(dtype), (model.flops_at(whole), model.flops_at(current)))


def at_schedules(
    model: CompressedModel,
    schedules: Sequence[Schedule],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
) -> list[Callable[[], Tensor]]:
    """What runs a copy of `model` at each of the `schedules`, on random images."""
    sides = []
    with generators_kept():
        for schedule in schedules:
            side = copy.deepcopy(model)
            side.set_kept_num(schedule.prune, schedule.merge)
            sides.append(forward_pass(side, batch_size, model.image_size, device, dtype, compiled))
    return sides


def forward_pass(
    model: nn.Module,
    batch_size: int,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """What runs `model`, plain or compressed, on random images of `size`, rows and columns; it is changed in place."""
    model = model.eval().requires_grad_(False).to(device, dtype)
    channels = channels_of(model)
    images = torch.randn(batch_size, channels, *size, device=device, dtype=dtype)
    forward = compile_model(model) if compiled else model
    options: dict[str, Any] = {"return_flop": False} if isinstance(model, CompressedModel) else {}

    def run() -> Tensor:
        with torch.inference_mode():
            return forward(images, **options)

    return run


def speed_of(times: PairedTimes, batch_size: int, precision: str, costs: tuple[int, int]) -> Speed:
    """The figures of `times`, dense and compressed, whose images cost `costs` multiply-accumulates."""
    dense, compressed = costs
    seconds, fewer = median(times.baseline), median(times.rival)
    return Speed(
        batch_size=batch_size,
        precision=precision,
        dense_images_per_second=batch_size / seconds,
        compressed_images_per_second=batch_size / fewer,
        dense_ms_per_image=1000 * seconds / batch_size,
        compressed_ms_per_image=1000 * fewer / batch_size,
        dense_gflops=dense / 1e9,
        compressed_gflops=compressed / 1e9,
        speedup=times.ratio,
        speedup_low=times.spread[0],
        speedup_high=times.spread[1],
        ideal_speedup=dense / compressed,
        share_of_ideal=times.ratio * compressed / dense,
    )


def precision_name(dtype: torch.dtype) -> str:
    """What tables call a precision."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def precision_named(name: str) -> torch.dtype:
    """The precision that tables call so."""
    return next((dtype for dtype, short in SHORT_NAMES.items() if short == name), None) or getattr(torch, name)


def mode_name(compiled: bool) -> str:
    """What tables call a way to run: as one compiled graph, or eager."""
    return "compiled" if compiled else "eager"
