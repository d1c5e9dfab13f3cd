"""The measured speed of a schedule beside the predicted one, and what to do where it is too slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from diffrate.budgets.budget import Budget, choices_of
from diffrate.budgets.rounding import BudgetError
from diffrate.budgets.schedule import Schedule
from diffrate.group import made_by_first
from diffrate.latency.setting import Use
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.running.speed import at_schedules
from diffrate.running.timing import time_within

SECONDS = 8.0  # of timed pairs
TOO_SLOW = 0.03  # of what was asked: from here on a schedule is rounded again
CORRECTIONS = 3

Again = Callable[[Budget, Schedule], Schedule]


@dataclass(frozen=True)
class Confirmed:
    """A schedule's speed: as asked for, as predicted by the table, as measured against dense in turn.

    In the unit of the budget: how many times as fast as dense, or seconds of an image. words: how it is used.
    """

    asked: float
    predicted: float
    measured: float
    option: str
    words: str

    def line(self) -> str:
        """As a sentence."""
        if self.option == "target_speedup":
            figures = f"speed-up: asked {self.asked:.2f}, predicted {self.predicted:.2f}, measured {self.measured:.2f}"
        else:
            asked, predicted, measured = (1000 * value for value in (self.asked, self.predicted, self.measured))
            figures = f"latency: asked {asked:.3g} ms, predicted {predicted:.3g} ms, measured {measured:.3g} ms"
        return f"{figures} ({self.words})"


def measured_speedup(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> float:
    """How many times as fast as dense `model` is at `schedule`: the median of pairs in turn, for so many
    `seconds`.

    Copies are timed: the model itself is not touched.
    """
    if schedule == model.dense_schedule():
        return 1.0
    sides = at_schedules(model, (model.dense_schedule(), schedule), use.batch_size, use.device, use.dtype, use.compiled)
    return time_within(sides[0], sides[1], seconds, use.device).ratio


def confirmed(
    model: CompressedModel,
    schedule: Schedule,
    budget: Budget,
    table: LatencyTable,
    use: Use,
    again: Again | None = None,
) -> tuple[Schedule, Confirmed]:
    """`schedule`, or where it is measured to be too slow one that is rounded again to a budget corrected by the ratio
    of measured and predicted, and its speeds. The first process measures, and all go by that.

    `again` makes a better schedule of the corrected budget of the rounded one.
    """
    whole, space = table.seconds(model.dense_schedule()), model.compression.space
    asked, corrected = whole / budget.target, budget
    best = 0.0, schedule
    for _ in range(1 + CORRECTIONS):
        ratio = made_by_first(partial(measured_speedup, model, schedule, use, SECONDS))
        if ratio > best[0]:
            best = ratio, schedule
        if ratio >= asked * (1 - TOO_SLOW):
            break
        corrected = corrected.times(ratio / asked)
        try:
            schedule = corrected.rounded(choices_of(schedule, space), space)
        except BudgetError:  # no schedule is that fast
            break
        if again is not None:
            schedule = again(corrected, schedule)
    ratio, schedule = best
    predicted = table.seconds(schedule)
    of = budget.unit.of
    figures = of(budget.target), of(predicted), of(whole / ratio)
    return schedule, Confirmed(*figures, budget.unit.option, use.words())
