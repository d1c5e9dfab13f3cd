"""The measured speed of schedules beside the predicted one, and the correction of schedules that miss a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from diffrate.budget import SPEEDUP, Budget, BudgetError, choices_of
from diffrate.device import made_by_first, placement_of
from diffrate.latency.setting import check_table, use_of
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.schedule import Schedule, SearchSpace
from diffrate.timing import PairedTimes, Use, at_schedules, time_within

SECONDS = 8.0  # of timed pairs
CHECK_SECONDS = 5.0  # the same, of `check_predictions` for a schedule
TOO_SLOW = 0.03  # of what was asked: from here on a schedule is rounded again
TOO_FAST = 0.03  # of what was asked: from here on what is left over is spent, once
CORRECTIONS = 3

# From a corrected budget, the schedule found before, and that schedule rounded to it, to a better schedule.
Again = Callable[[Budget, Schedule, Schedule], Schedule]


@dataclass(frozen=True)
class Confirmed:
    """A schedule's speed: as asked for, as predicted by the table, and as measured in turn with the dense model.

    In the unit of the target: how many times as fast as dense, or seconds of an image. words: how the model is used.
    """

    asked: float
    predicted: float
    measured: float
    option: str
    words: str

    def line(self) -> str:
        """As text."""
        if self.option == SPEEDUP:
            figures = f"speed-up: asked {self.asked:.2f}, predicted {self.predicted:.2f}, measured {self.measured:.2f}"
        else:
            asked, predicted, measured = (1000 * value for value in (self.asked, self.predicted, self.measured))
            figures = f"latency: asked {asked:.3g} ms, predicted {predicted:.3g} ms, measured {measured:.3g} ms"
        return f"{figures} ({self.words})"


def measured_times(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> PairedTimes:
    """Time copies of `model`, dense and at `schedule`, in pairs for so many `seconds`."""
    runs = at_schedules(model, (model.dense_schedule(), schedule), use)
    return PairedTimes(*time_within(runs, seconds, use.device))


def measured_speedup(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> float:
    """How many times as fast as dense `model` is at `schedule`: the median of pairs."""
    return 1.0 if schedule == model.dense_schedule() else measured_times(model, schedule, use, seconds).ratio


def confirmed(
    model: CompressedModel,
    schedule: Schedule,
    space: SearchSpace,
    budget: Budget,
    table: LatencyTable | None,
    again: Again | None = None,
) -> tuple[Schedule, Confirmed | None]:
    """`schedule` and its speeds, or another where it is measured to be slower or faster than asked: the budget is
    corrected by the ratio of measured and predicted. For a budget of FLOPs, `schedule` alone. The first process
    measures for all.

    `again` finds a better schedule of the corrected budget than rounding among the choices of `space` does. Without
    it, a schedule that is faster than asked stays.
    """
    if table is None or not budget.timed:
        return schedule, None
    use = use_of(table, placement_of(model).device)

    def seconds_at(schedule: Schedule) -> float:
        """Of an image, measured; of a speed-up, the table's of the dense model over the measured ratio."""
        if budget.kind == SPEEDUP:
            return budget.whole / measured_speedup(model, schedule, use, SECONDS)
        return median(measured_times(model, schedule, use, SECONDS).rival) / use.batch_size

    found = []
    corrected, slowest, spent = budget, budget.target / (1 - TOO_SLOW), again is None
    while True:
        cost = made_by_first(partial(seconds_at, schedule))
        found.append((cost, schedule))
        fast = cost < budget.target / (1 + TOO_FAST)
        if len(found) > CORRECTIONS or (cost <= slowest and (spent or not fast)):
            break
        spent = spent or fast
        corrected = replace(corrected, target=corrected.target * (budget.target / cost))
        ruled = space.ruled(schedule.rule_names)
        try:
            other = corrected.rounded(choices_of(schedule, ruled), ruled)
            other = other if again is None else again(corrected, schedule, other)
        except BudgetError:  # no schedule is that fast
            break
        if other == schedule:
            break
        schedule = other
    enough = [one for one in found if one[0] <= slowest]
    # Of those that are fast enough, the slowest removes least.
    cost, schedule = max(enough, key=lambda one: one[0]) if enough else min(found, key=lambda one: one[0])
    asked, predicted, measured = map(budget.of, (budget.target, table.seconds(schedule), cost))
    return schedule, Confirmed(asked, predicted, measured, budget.kind, use.words())


@dataclass(frozen=True)
class PredictionCheck:
    """The speed-ups of schedules over dense, as predicted and as measured."""

    schedules: tuple[Schedule, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """The error of each predicted time, as a share of the measured one."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return tuple(abs(measured / predicted - 1) for predicted, measured in pairs)

    def line(self) -> str:
        """As text."""
        middle, worst = 100 * median(self.errors), 100 * max(self.errors)
        return f"prediction: median error {middle:.1f} %, worst {worst:.1f} % over {len(self.errors)} schedules"


def check_predictions(
    model: CompressedModel,
    table: LatencyTable,
    schedules: Iterable[Schedule],
    *,
    seconds: float = CHECK_SECONDS,
    device: torch.device | str | None = None,
    callback: Callable[[Schedule, float, float], None] | None = None,
) -> PredictionCheck:
    """Compare the speed-ups that `table` predicts of `model` at `schedules` with measured ones, in pairs for so many
    `seconds` each.

    `callback` gets each schedule, its predicted and its measured speed-up.

    Raises:
        ScheduleError: a schedule does not fit the model.
        ValueError: no schedule, seconds not above 0, or a table of another model.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: found {seconds}; accepted: above 0")
    check_table(table, model)
    use, whole = use_of(table, placement_of(model, device).device), table.seconds(model.dense_schedule())
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
