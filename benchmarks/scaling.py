"""`--benchmark scaling`: how throughput goes with input size, tokens kept, and batch size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import linear_regression, median

import torch

import models
from benchmarks.subject import Subject
from diffrate.budgets.schedule import Schedule
from diffrate.budgets.space import SearchSpace
from diffrate.running.speed import forward_pass, precision_name
from diffrate.running.timing import time_in_turn

log = logging.getLogger(__name__)
SIZES = (Fraction(1), Fraction(12, 7), Fraction(16, 7))  # of the model's own input: 224, 384 and 512 pixels of 224
SHARES = (0.75, 0.5, 0.25)  # of the tokens, kept from the first compressed block on
HEADINGS = {
    "input_size": "pixels",
    "batch_size": "batch",
    "tokens": "tokens",
    "tokens_kept": "kept",
    "gflops": "GFLOPs",
    "images_per_second": "img/s",
    "ms_per_image": "ms/img",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "share_of_ideal": "share %",
}
AXES = {"input_size": "input size", "tokens_kept": "tokens kept", "batch_size": "batch size"}


@dataclass(frozen=True)
class ScalingRow:
    """One model: `tokens_kept` of `tokens` go through the blocks after the first compressed one.

    `input_size` is the input's side, or that of a square of as many pixels. The times are medians over the
    rounds, the speed-up is the median of the rounds' ratios to the plain model at the same input and batch
    size, against which it is timed in turn.
    """

    model: str
    precision: str
    input_size: int
    batch_size: int
    tokens: int
    tokens_kept: int
    kept_share: float
    gflops: float
    images_per_second: float
    ms_per_image: float
    speedup: float
    ideal_speedup: float
    share_of_ideal: float

    def line(self) -> str:
        """The row as a sentence."""
        return (
            f"{self.input_size} pixels, batch {self.batch_size}, {self.tokens_kept} of {self.tokens} tokens: "
            f"{self.images_per_second:.1f} images/s, speed-up {self.speedup:.2f} of {self.ideal_speedup:.2f}"
        )


@dataclass(frozen=True)
class Exponent:
    """Images per second grow as `axis` to the power `measured` over `rows`; by the FLOPs, to the power `ideal`."""

    axis: str
    rows: tuple[ScalingRow, ...]
    measured: float
    ideal: float

    def line(self) -> str:
        """The exponent as a sentence, with what was the same in all its rows."""
        first = self.rows[0]
        fixed = {
            "input_size": f"{first.input_size} pixels",
            "tokens_kept": f"{first.kept_share:.0%} of the tokens",
            "batch_size": f"batch {first.batch_size}",
        }
        held = ", ".join(text for axis, text in fixed.items() if axis != self.axis)
        return f"images/s ~ ({AXES[self.axis]})^{self.measured:+.2f}, by the FLOPs ^{self.ideal:+.2f} ({held})"


@dataclass(frozen=True)
class Setting:
    """What the rows of a run have in common: batch sizes, precision, timed pairs, device."""

    batch_sizes: tuple[int, ...]
    dtype: torch.dtype
    rounds: int
    device: torch.device


def scaling_rows(subject: Subject, sizes: Iterable[models.Size], setting: Setting) -> Iterator[ScalingRow]:
    """The rows for every one of the input `sizes` that the model allows, batch size, and share of tokens."""
    for size in sizes:
        sized = replace(subject, input_size=size)
        try:
            sized.dense()
        except models.InputSizeError as error:
            log.info("%d pixels left out: %s", _side(size), error)
            continue
        for batch_size in setting.batch_sizes:
            yield from _rows_at(sized, batch_size, setting)


def exponents(rows: Sequence[ScalingRow]) -> list[Exponent]:
    """The slopes of logarithms, by least squares: along each axis, the other two held."""
    fits = []
    for axis in AXES:
        held = [name if name != "tokens_kept" else "kept_share" for name in AXES if name != axis]
        groups: dict[tuple[float, ...], list[ScalingRow]] = {}
        for row in rows:
            groups.setdefault(tuple(getattr(row, name) for name in held), []).append(row)
        for group in groups.values():
            if len({getattr(row, axis) for row in group}) > 1:
                # Along the tokens kept, the speed-ups do without what the machine does between the rows.
                paired = axis == "tokens_kept"
                measured = _slope(axis, group, [row.speedup if paired else row.images_per_second for row in group])
                fits.append(Exponent(axis, tuple(group), measured, _slope(axis, group, [1 / r.gflops for r in group])))
    return fits


def share_schedule(space: SearchSpace, share: float) -> Schedule:
    """`share` of the tokens from the first block that may reduce on, the others merged into them."""
    kept = max(1, round(share * space.tokens))
    choices = (space.tokens, kept) if space.prunes else (kept,)
    return space.schedule(choices * len(space.searchable))


def _rows_at(subject: Subject, batch_size: int, setting: Setting) -> Iterator[ScalingRow]:
    size, dtype, device = subject.input_size, setting.dtype, setting.device
    dense = forward_pass(subject.dense(), batch_size, size, device, dtype)
    for share in SHARES:
        compressed = subject.compressed()
        space = compressed.compression.space
        schedule = share_schedule(space, share)
        compressed.set_kept_num(schedule.prune, schedule.merge)
        times = time_in_turn(dense, forward_pass(compressed, batch_size, size, device, dtype), setting.rounds, device)
        whole, flops = compressed.flops_at(compressed.dense_schedule()), compressed.flops()
        fixed = {
            "model": subject.entry.name,
            "precision": precision_name(dtype),
            "input_size": _side(size),
            "batch_size": batch_size,
            "tokens": space.tokens,
        }
        if share == SHARES[0]:
            kept = {"tokens_kept": space.tokens, "kept_share": 1.0}
            yield ScalingRow(**fixed, **kept, **_figures(batch_size, times.baseline, whole, whole, 1.0))
        kept = {"tokens_kept": schedule.merge[space.searchable[0]], "kept_share": share}
        yield ScalingRow(**fixed, **kept, **_figures(batch_size, times.rival, flops, whole, times.ratio))


def _side(size: models.Size) -> int:
    return round(math.sqrt(size[0] * size[1]))


def _figures(batch_size: int, seconds: Sequence[float], flops: int, whole: int, speedup: float) -> dict[str, float]:
    """The measured fields of a row; `flops` of an image against the plain model's, `whole`."""
    return {
        "gflops": flops / 1e9,
        "images_per_second": batch_size / median(seconds),
        "ms_per_image": 1000 * median(seconds) / batch_size,
        "speedup": speedup,
        "ideal_speedup": whole / flops,
        "share_of_ideal": speedup * flops / whole,
    }


def _slope(axis: str, rows: Sequence[ScalingRow], values: Sequence[float]) -> float:
    return linear_regression([math.log(getattr(row, axis)) for row in rows], [math.log(v) for v in values]).slope
