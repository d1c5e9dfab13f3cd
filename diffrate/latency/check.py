"""How well a table predicts whole schedules: measured against dense in turn, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch

from diffrate.budgets.schedule import Schedule
from diffrate.latency.confirm import measured_speedup
from diffrate.latency.setting import check_table, use_of
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.running.precision import place_of

SECONDS = 5.0  # of timed pairs, for a schedule


@dataclass(frozen=True)
class PredictionCheck:
    """The speed-ups of schedules over dense, as predicted and as measured."""

    schedules: tuple[Schedule, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """By how much each predicted time is off, as a share of the measured one."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return tuple(abs(measured / predicted - 1) for predicted, measured in pairs)

    def line(self) -> str:
        """As a sentence."""
        middle, worst = 100 * median(self.errors), 100 * max(self.errors)
        return f"prediction: median error {middle:.1f} %, worst {worst:.1f} % over {len(self.errors)} schedules"


def check_predictions(
    model: CompressedModel,
    table: LatencyTable,
    schedules: Iterable[Schedule],
    *,
    seconds: float = SECONDS,
    device: torch.device | str | None = None,
    callback: Callable[[Schedule, float, float], None] | None = None,
) -> PredictionCheck:
    """Hold the speed-ups that `table` predicts of `model` at `schedules` against measured ones, in pairs for so many
    `seconds` each.

    `callback` is told each schedule, its predicted and its measured speed-up.

    Raises:
        ScheduleError: a schedule does not fit the model.
        ValueError: no schedule, seconds not above 0, or a table of another model.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: found {seconds}; accepted: above 0")
    check_table(table, model)
    use, whole = use_of(table, place_of(model, device).device), table.seconds(model.dense_schedule())
    rows = []
    for schedule in schedules:
        model.check(schedule)
        predicted = whole / table.seconds(schedule)
        rows.append((schedule, predicted, measured_speedup(model, schedule, use, seconds)))
        if callback is not None:
            callback(*rows[-1])
    if not rows:
        raise ValueError("schedules: found none; accepted: one at least")
    return PredictionCheck(*zip(*rows, strict=True))
