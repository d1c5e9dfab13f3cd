"""What a search is asked to meet: FLOPs, a share of them, a speed-up, or a time for an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from diffrate.budgets.budget import Budget
from diffrate.budgets.rounding import BudgetError
from diffrate.budgets.schedule import Schedule
from diffrate.group import made_by_first
from diffrate.latency.confirm import LATENCY, Again, Confirmed, confirmed, measured_times, speedup_unit
from diffrate.latency.expected import expected_seconds
from diffrate.latency.file import read_table
from diffrate.latency.measure import BATCH_SIZE, measure_latency
from diffrate.latency.setting import Use, check_table, setting_of, use_of
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel, PlannedCost
from diffrate.running.timing import PairedTimes
from diffrate.searching.settings import SearchSettingError

REACH = 1.15  # a few seconds tell a ratio no better: what is further away than this is out of reach
REACH_SECONDS = 2.0


@dataclass(frozen=True)
class Asked:
    """A target as users give it: one of the four."""

    target_flops: float | None = None
    share: float | None = None
    target_speedup: float | None = None
    target_latency: float | None = None

    def check(self) -> None:
        """Refuse several of them, none, or a number that makes no sense.

        Raises:
            SearchSettingError: names them.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            names = ", ".join(vars(self))
            raise SearchSettingError(f"{names}: found {', '.join(given) or 'none'}; accepted: one of them")
        ((name, value),) = given.items()
        if not hasattr(value, "__float__"):
            raise SearchSettingError(f"{name}: found {value!r}; accepted: a number")
        if name == "share" and not 0 < value <= 1:
            raise SearchSettingError(f"share: found {value!r}; accepted: above 0 to 1, of the dense model's FLOPs")
        if self.timed and not 0 < value < math.inf:
            raise SearchSettingError(f"{name}: found {value!r}; accepted: above 0")

    @property
    def timed(self) -> bool:
        """Whether it is a matter of seconds."""
        return self.target_speedup is not None or self.target_latency is not None


@dataclass(frozen=True)
class Goal:
    """A budget of a model, and where it is of seconds, the table that says what schedules take."""

    budget: Budget
    table: LatencyTable | None = None

    @property
    def cost(self) -> PlannedCost | None:
        """What a step of the gradient search is expected to cost; None for multiply-accumulates."""
        return None if self.table is None else partial(expected_seconds, self.table)

    def confirmed(
        self, model: CompressedModel, schedule: Schedule, device: torch.device, again: Again | None = None
    ) -> tuple[Schedule, Confirmed | None]:
        """`schedule` as it is, or, of seconds, as fast as was asked for by measurement, and its speeds.

        `again` finds a better schedule of a corrected budget than by rounding.
        """
        if self.table is None:
            return schedule, None
        return confirmed(model, schedule, self.budget, self.table, use_of(self.table, device), again)


def goal_of(model: CompressedModel, asked: Asked, table: LatencyTable | None, device: torch.device) -> Goal:
    """The budget of a target in order. Where it is of seconds and there is no `table`, one is measured, with the
    defaults of `measure_latency`.

    Raises:
        SearchSettingError: the table is another model's.
        BudgetError: it is out of reach.
    """
    if asked.timed and table is None:
        use = Use(BATCH_SIZE, torch.float32, False, device)
        check_reach(model, [asked], use)
        table = measure_latency(model, use.batch_size, use.dtype, device=device)
    goal = goal_at(model, asked, table)
    goal.budget.check(model.compression.space)
    return goal


def check_reach(model: CompressedModel, asked: Sequence[Asked], use: Use, file: Path | None = None) -> None:
    """Refuse a speed that the schedule with the fewest tokens is far from, before a table is measured.

    A table takes a minute; this takes a few seconds of runs in turn with the dense model, on the first process. With
    a table in `file` it takes none: that says precisely what is in reach.

    Raises:
        BudgetError: names the first of `asked` that is out of reach.
        LatencyFileError: `file` is none of a table.
    """
    timed = [one for one in asked if one.timed]
    if not timed:
        return
    fewest = model.compression.space.fewest()

    def measured() -> PairedTimes | None:
        kept = file is not None and read_table(file, setting_of(model, use)) is not None
        return None if kept else measured_times(model, fewest, use, REACH_SECONDS)

    times = made_by_first(measured)
    if times is None:
        return
    dense, least = (median(side) / use.batch_size for side in (times.baseline, times.rival))
    for one in timed:
        if one.target_speedup is not None:
            unit, value, low, high = speedup_unit(dense), one.target_speedup, 1.0, times.ratio
        else:
            assert one.target_latency is not None
            unit, value, low, high = LATENCY, one.target_latency, least, dense
        if not low / REACH <= value <= high * REACH:
            raise BudgetError(
                f"{unit.option} {value:g}{unit.word}: accepted: {low:.3g} to {high:.3g}, measured with all tokens and "
                f"with the fewest ({use.words()}){unit.advice}"
            )


def goal_at(model: CompressedModel, asked: Asked, table: LatencyTable | None) -> Goal:
    """The same of what is known to be asked in order and measured, in reach or not.

    Raises:
        SearchSettingError: the table is another model's.
    """
    dense = model.dense_schedule()
    if not asked.timed:
        flops = asked.target_flops if asked.share is None else asked.share * model.flops_at(dense)
        assert flops is not None
        return Goal(Budget(model.flops_at, flops))
    assert table is not None
    try:
        check_table(table, model)
    except ValueError as error:
        raise SearchSettingError(str(error)) from None
    if asked.target_speedup is not None:
        whole = table.seconds(dense)
        return Goal(Budget(table.seconds, whole / asked.target_speedup, speedup_unit(whole)), table)
    assert asked.target_latency is not None
    return Goal(Budget(table.seconds, asked.target_latency, LATENCY), table)
