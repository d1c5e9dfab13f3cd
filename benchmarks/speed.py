"""`--benchmark` and `--benchmark scaling`: throughput of a compressed model against the plain one, in turn."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import product
from statistics import linear_regression
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import diffrate
import models
from benchmarks.rows import Row
from diffrate.schedule import Schedule, SearchSpace
from diffrate.timing import (
    PairedTimes,
    Run,
    forward_pass,
    mode_name,
    peak_memory,
    precision_name,
    speed_of,
    time_all_in_turn,
    time_in_turn,
)
from models.zoo import ModelEntry

log = logging.getLogger(__name__)
SIDES = ("dense", "compressed")
SIZES = (Fraction(1), Fraction(12, 7), Fraction(16, 7))  # of the model's own input: 224, 384 and 512 pixels of 224
SHARES = (0.75, 0.5, 0.25)  # of the tokens, kept from the first compressed block on
EXPONENT = "images/s ~ ({axis})^{measured:+.2f}, by the FLOPs ^{ideal:+.2f} ({held})"
# What throughput goes with, and what is said of each where it is held.
AXES = {
    "input_size": "{input_size} pixels",
    "tokens_kept": "{kept_share:.0%} of the tokens",
    "batch_size": "batch {batch_size}",
}


@dataclass(frozen=True)
class Setting:
    """How rows are measured: at batch sizes, in precisions and modes (compiled or not), in so many timed rounds."""

    batch_sizes: Sequence[int]
    dtypes: Sequence[torch.dtype]
    modes: Sequence[bool]
    rounds: int
    device: torch.device


@dataclass(frozen=True)
class Subject:
    """The model that a benchmark is about, at an input size, rows and columns: built afresh for each measurement, with
    random weights.

    schedule: None where a benchmark has schedules of its own.
    """

    entry: ModelEntry
    input_size: models.Size
    schedule: Schedule | None
    granularity: int
    seed: int

    def dense(self) -> nn.Module:
        """The plain timm model.

        Raises:
            InputSizeError: its patches do not tile the input.
        """
        torch.manual_seed(self.seed)
        return models.create(self.entry, self.input_size)

    def compressed(self) -> diffrate.CompressedModel:
        """The patched model, at the schedule if there is one, else searching."""
        model = diffrate.patch.vit(self.dense(), self.granularity, self.granularity)
        if self.schedule is not None:
            model.check(self.schedule)
            model.set_kept_num(self.schedule.prune, self.schedule.merge)
        return model

    def costs(self) -> tuple[int, int]:
        """Multiply-accumulates of an image, dense and compressed."""
        with models.shapes_alone():
            model = self.compressed()
        return model.flops_at(model.dense_schedule()), model.flops()


class Side(NamedTuple):
    """One of several that are timed in turn: what its row says of it, its multiply-accumulates, and what runs it."""

    about: Row
    precision: str
    flops: float
    run: Run


def build_side(
    side: str, subject: Subject, batch_size: int, dtype: torch.dtype, compiled: bool, device: str
) -> Callable[[], Tensor]:
    """A forward pass of the dense or the compressed model on random images."""
    model = subject.dense() if side == "dense" else subject.compressed()
    return forward_pass(model, batch_size, subject.input_size, torch.device(device), dtype, compiled)


def memory_mib(build: Callable[..., Run], *arguments: Any, device: torch.device) -> float | None:
    """What a run adds at its peak, in a process of its own; None where the system does not tell."""
    size = peak_memory(build, *arguments, device=device)
    return None if size is None else size / 2**20


def rows_in_turn(sides: Sequence[Side], batch_size: int, setting: Setting) -> Iterator[Row]:
    """A row for each of the `sides`, all timed in turn; its speed-up is over the first of the same runtime."""
    times = time_all_in_turn([side.run for side in sides], setting.rounds, setting.device)
    runtimes = [side.about.get("runtime") for side in sides]
    for side, seconds, runtime in zip(sides, times, runtimes, strict=True):
        base = runtimes.index(runtime)
        paired, costs = PairedTimes(times[base], seconds), (sides[base].flops, side.flops)
        figures = asdict(speed_of(paired, batch_size, side.precision, costs))
        alone = {name.removeprefix("compressed_"): x for name, x in figures.items() if not name.startswith("dense_")}
        yield side.about | alone


def speed_row(subject: Subject, times: PairedTimes, batch_size: int, dtype: torch.dtype, compiled: bool) -> Row:
    """The figures of both sides, dense and compressed."""
    speed = speed_of(times, batch_size, precision_name(dtype), subject.costs())
    return {"model": subject.entry.name, "mode": mode_name(compiled), **asdict(speed)}


def speed_rows(subject: Subject, setting: Setting) -> Iterator[Row]:
    """A row for each precision, mode and batch size; memory is what a batch adds at its peak."""
    for dtype, compiled, batch_size in product(setting.dtypes, setting.modes, setting.batch_sizes):
        use = (subject, batch_size, dtype, compiled, str(setting.device))
        memory = {f"{side}_memory_mib": memory_mib(build_side, side, *use, device=setting.device) for side in SIDES}
        dense, compressed = (build_side(side, *use) for side in SIDES)
        times = time_in_turn(dense, compressed, setting.rounds, setting.device)
        yield speed_row(subject, times, batch_size, dtype, compiled) | memory


def scaling_rows(subject: Subject, sizes: Iterable[models.Size], setting: Setting) -> Iterator[Row]:
    """The rows for every one of the input `sizes` that the model allows, batch size, and share of tokens, in the first
    precision.

    `tokens_kept` of `tokens` go through the blocks after the first compressed one. `input_size` is the input's side, or
    that of a square of as many pixels.
    """
    for size in sizes:
        sized, side = replace(subject, input_size=size), round(math.sqrt(size[0] * size[1]))
        try:
            sized.dense()
        except models.InputSizeError as error:
            log.info("%d pixels left out: %s", side, error)
            continue
        for batch_size in setting.batch_sizes:
            for row in rows_in_turn(_shares(sized, batch_size, setting), batch_size, setting):
                yield {"model": subject.entry.name, "input_size": side} | row


def _shares(subject: Subject, batch_size: int, setting: Setting) -> list[Side]:
    """All tokens, in the plain model, and each share of them."""
    dtype = setting.dtypes[0]
    use, precision = (batch_size, subject.input_size, setting.device, dtype), precision_name(dtype)
    sides = []
    for share in SHARES:
        model = subject.compressed()
        space, whole = model.compression.space, model.flops_at(model.dense_schedule())
        if not sides:
            about = {"tokens": space.tokens, "tokens_kept": space.tokens, "kept_share": 1.0}
            sides.append(Side(about, precision, whole, forward_pass(subject.dense(), *use)))
        schedule = share_schedule(space, share)
        model.set_kept_num(schedule.prune, schedule.merge)
        about = {"tokens": space.tokens, "tokens_kept": schedule.merge[space.searchable[0]], "kept_share": share}
        sides.append(Side(about, precision, model.flops(), forward_pass(model, *use)))
    return sides


def share_schedule(space: SearchSpace, share: float) -> Schedule:
    """`share` of the tokens from the first block that may reduce on, the others merged into them."""
    kept = max(1, round(share * space.tokens))
    choices = (space.tokens, kept) if space.prunes else (kept,)
    return space.schedule(choices * len(space.searchable))


def exponents(rows: Sequence[Row]) -> Iterator[Row]:
    """Images per second grow as an axis to the power `measured`, by the FLOPs to the power `ideal`, with the other two
    axes `held`: the slopes of logarithms, by least squares."""
    for axis in AXES:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            held = ", ".join(text.format_map(row) for name, text in AXES.items() if name != axis)
            groups.setdefault(held, []).append(row)
        # Along the tokens kept, the speed-ups do without what the machine does between the rows.
        paced = "speedup" if axis == "tokens_kept" else "images_per_second"
        for held, group in groups.items():
            if len({row[axis] for row in group}) > 1:
                places, speeds, costs = ([math.log(row[name]) for row in group] for name in (axis, paced, "gflops"))
                measured, ideal = linear_regression(places, speeds).slope, -linear_regression(places, costs).slope
                yield {"axis": axis.replace("_", " "), "measured": measured, "ideal": ideal, "held": held}
