"""The measured speed of a schedule beside the predicted one, and what to do where it is too slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from diffrate.budgets.budget import SPEEDUP, Budget, BudgetError, choices_of
from diffrate.budgets.schedule import Schedule
from diffrate.group import made_by_first
from diffrate.latency.setting import Use
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.running.speed import at_schedules
from diffrate.running.timing import PairedTimes, time_within

SECONDS = 8.0  # of timed pairs
TOO_SLOW = 0.03  # of what was asked: from here on a schedule is rounded again
TOO_FAST = 0.03  # of what was asked: from here on what is left over is spent, once
CORRECTIONS = 3

# A better schedule of a corrected budget: of what was found before, and of that rounded to it.
Again = Callable[[Budget, Schedule, Schedule], Schedule]


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
        if self.option == SPEEDUP:
            figures = f"speed-up: asked {self.asked:.2f}, predicted {self.predicted:.2f}, measured {self.measured:.2f}"
        else:
            asked, predicted, measured = (1000 * value for value in (self.asked, self.predicted, self.measured))
            figures = f"latency: asked {asked:.3g} ms, predicted {predicted:.3g} ms, measured {measured:.3g} ms"
        return f"{figures} ({self.words})"


def measured_times(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> PairedTimes:
    """`model` dense and at `schedule`, timed in pairs for so many `seconds`.

    Copies are timed: the model itself is not touched.
    """
    sides = at_schedules(model, (model.dense_schedule(), schedule), use.batch_size, use.device, use.dtype, use.compiled)
    return time_within(sides[0], sides[1], seconds, use.device)


def measured_speedup(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> float:
    """How many times as fast as dense `model` is at `schedule`: the median of pairs."""
    return 1.0 if schedule == model.dense_schedule() else measured_times(model, schedule, use, seconds).ratio


def confirmed(
    model: CompressedModel,
    schedule: Schedule,
    budget: Budget,
    table: LatencyTable,
    use: Use,
    again: Again | None = None,
) -> tuple[Schedule, Confirmed]:
    """`schedule`, or where it is measured to be too slow or faster than asked, one of a budget corrected by the ratio
    of measured and predicted, and its speeds. The first process measures, and all go by that.

    `again` finds a better schedule of the corrected budget than by rounding; without it nothing is spent of what is
    left over.
    """
    measured = partial(_measured, model, budget=budget, table=table, use=use)
    found = [(made_by_first(partial(measured, schedule)), schedule)]
    corrected, slowest, spent = budget, budget.target / (1 - TOO_SLOW), again is None
    for _ in range(CORRECTIONS):
        cost, schedule = found[-1]
        fast = cost < budget.target / (1 + TOO_FAST)
        if cost <= slowest and (spent or not fast):
            break
        spent = spent or fast
        corrected = replace(corrected, target=corrected.target * (budget.target / cost))
        try:
            space = model.compression.space
            other = corrected.rounded(choices_of(schedule, space), space)
            other = other if again is None else again(corrected, schedule, other)
        except BudgetError:  # no schedule is that fast
            break
        if other == schedule:
            break
        found.append((made_by_first(partial(measured, other)), other))
    enough = [one for one in found if one[0] <= slowest]
    # What takes longer within the budget removes less.
    cost, schedule = max(enough, key=lambda one: one[0]) if enough else min(found, key=lambda one: one[0])
    of = budget.of
    speeds = of(budget.target), of(table.seconds(schedule)), of(cost)
    return schedule, Confirmed(*speeds, budget.kind, use.words())


def _measured(model: CompressedModel, schedule: Schedule, budget: Budget, table: LatencyTable, use: Use) -> float:
    """Seconds of an image at `schedule`; of a speed-up, those of the table's dense model over the measured ratio."""
    if budget.kind == SPEEDUP:
        return table.seconds(model.dense_schedule()) / measured_speedup(model, schedule, use, SECONDS)
    return median(measured_times(model, schedule, use, SECONDS).rival) / use.batch_size
