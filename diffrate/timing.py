"""`diffrate.benchmark`: the speed of a model, dense and compressed, measured so that the two can be compared.

Machines drift: each round times both sides back to back, in an order that alternates, and what counts
is the median of the rounds' ratios, not any absolute time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from diffrate import ROUNDS
from diffrate.device import compile_model, generators_kept, place_for
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.shapes import channels_of
from diffrate.schedule import SLICED, Schedule

Run = Callable[[], Any]
SHORTEST = 0.3  # seconds of a measurement at least
SHORT, FEWEST = 0.08, 7  # seconds of one, and rounds, where as many as possible are to fit into a given time
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def precision_name(dtype: torch.dtype) -> str:
    """The name of a precision in tables."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def mode_name(compiled: bool) -> str:
    """The name in tables of a compiled or an eager model."""
    return "compiled" if compiled else "eager"


class Use(NamedTuple):
    """How a model is used: images at a time, the type of its weights, as one compiled graph or not, and its device."""

    batch_size: int
    dtype: torch.dtype
    compiled: bool
    device: torch.device

    def words(self) -> str:
        """As text for messages."""
        return f"batch {self.batch_size}, {precision_name(self.dtype)}, {mode_name(self.compiled)}"


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


class Stopwatch:
    """Marks moments on a device. A GPU's are events in its stream: time that it waits for the host counts."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        """Mark the end of the work that was asked of the device so far."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The times between consecutive marks; waits for the device."""
        if self.device.type != "cuda":
            return [after - before for before, after in pairwise(self.marks)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.marks)]


def time_within(runs: Sequence[Run], seconds: float, device: torch.device) -> list[tuple[float, ...]]:
    """Seconds of each run, in turn, in as many short rounds as fit into `seconds`, `FEWEST` at least.

    Where a machine's pace changes within seconds, many short rounds give a better ratio than a few long ones.
    """
    for run in runs:
        run()
    each = sum(max(SHORT, 2 * _seconds(run, 1, device)) for run in runs)
    return time_in_turn(runs, max(FEWEST, int(seconds / each)), device, SHORT)


def time_in_turn(
    runs: Sequence[Run], rounds: int, device: torch.device, shortest: float = SHORTEST
) -> list[tuple[float, ...]]:
    """Seconds of each run, `rounds` times. The first run of each is not timed (allocations, compilation).

    Short runs are repeated within a round, after an untimed one that brings the run's weights back into the cache:
    a model in use runs again and again.
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


def _seconds(run: Run, repeats: int, device: torch.device) -> float:
    """Seconds of one run, the mean of several in a row."""
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repeats):
        run()
    watch.mark()
    return watch.seconds()[0] / repeats


@dataclass(frozen=True)
class Speed:
    """Dense and compressed model at one batch size and precision, timed in turn.

    Times are medians over the rounds; the speed-up is the median of the rounds' ratios, with the lowest
    and the highest; FLOPs are multiply-accumulates of an image, and their ratio is the ideal. The bound is the speed-up
    of the same model that loses as many tokens by slicing, which costs nothing; None where it was not timed.
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
    bound_speedup: float | None = None
    share_of_bound: float | None = None

    def line(self) -> str:
        """The figures as a sentence."""
        bound = (
            "" if self.share_of_bound is None else f", {self.share_of_bound:.0%} of the bound {self.bound_speedup:.2f}"
        )
        return (
            f"batch {self.batch_size}, {self.precision}: dense {self.dense_images_per_second:.1f} images/s, "
            f"compressed {self.compressed_images_per_second:.1f} images/s, speed-up {self.speedup:.2f} "
            f"({self.speedup_low:.2f} to {self.speedup_high:.2f}), {self.share_of_ideal:.0%} of the ideal "
            f"{self.ideal_speedup:.2f}{bound}"
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
    """Time `model` at its kept counts against the same model at its dense schedule, on random images, and against the
    same counts by slicing.

    In turn, `rounds` times, with weights in `dtype` on `device` (by default where the model is), as
    compiled graphs with `compile`. Copies are timed: the model itself is not touched.

    Raises:
        UnsupportedModelError: the model is not patched.
        ValueError: a batch size or a number of rounds below 1.
    """
    require_patched(model)
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if not isinstance(value, SupportsIndex) or value < 1:
            raise ValueError(f"{name}: found {value}; accepted: from 1")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: found {dtype}; accepted: a floating type")
    use = Use(batch_size, dtype, compile, place_for(model, device).device)
    current, whole = model.compression.current(), model.dense_schedule()
    times = time_in_turn(at_schedules(model, (whole, current, sliced(current)), use), rounds, use.device)
    return speed_of(times, batch_size, precision_name(dtype), (model.flops_at(whole), model.flops_at(current)))


def sliced(schedule: Schedule) -> Schedule:
    """The same counts, where the first tokens stay."""
    return replace(schedule, rules=(SLICED,) * len(schedule.merge))


def at_schedules(model: CompressedModel, schedules: Sequence[Schedule], use: Use) -> list[Callable[[], Tensor]]:
    """Functions that run a copy of `model` at each of the `schedules`, on random images."""
    runs = []
    with generators_kept():
        for schedule in schedules:
            side = copy.deepcopy(model)
            side.schedule = schedule
            runs.append(forward_pass(side, model.image_size, use))
    return runs


def forward_pass(model: nn.Module, size: tuple[int, int], use: Use) -> Callable[[], Tensor]:
    """A function that runs `model`, plain or compressed, on random images of `size`, rows and columns. The model is
    changed in place."""
    model = model.eval().requires_grad_(False).to(use.device, use.dtype)
    images = torch.randn(use.batch_size, channels_of(model), *size, device=use.device, dtype=use.dtype)
    forward = compile_model(model) if use.compiled else model
    options: dict[str, Any] = {"return_flop": False} if isinstance(model, CompressedModel) else {}

    def run() -> Tensor:
        with torch.inference_mode():
            return forward(images, **options)

    return run


def speed_of(sides: Sequence[tuple[float, ...]], batch_size: int, precision: str, costs: tuple[float, float]) -> Speed:
    """The figures of seconds round by round, dense and compressed, whose images cost `costs` multiply-accumulates, and
    sliced where that was timed, too."""
    dense, compressed = costs
    times, bounds = PairedTimes(sides[0], sides[1]), sides[2:]
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
        speedup_low=min(times.ratios),
        speedup_high=max(times.ratios),
        ideal_speedup=dense / compressed,
        share_of_ideal=times.ratio * compressed / dense,
        bound_speedup=PairedTimes(sides[0], bounds[0]).ratio if bounds else None,
        share_of_bound=PairedTimes(bounds[0], sides[1]).ratio if bounds else None,
    )
