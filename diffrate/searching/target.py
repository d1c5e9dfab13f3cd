"""What a search is asked to meet: FLOPs, a share of them, a speed-up, or a time for an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from diffrate.budgets.budget import Budget
from diffrate.budgets.schedule import Schedule
from diffrate.latency.budget import latency_budget, speedup_budget
from diffrate.latency.confirm import Again, Confirmed, confirmed
from diffrate.latency.expected import expected_seconds
from diffrate.latency.measure import measure_latency
from diffrate.latency.setting import check_table, use_of
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel, PlannedCost
from diffrate.searching.settings import SearchSettingError


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
        table = measure_latency(model, device=device)
    goal = goal_at(model, asked, table)
    goal.budget.check(model.compression.space)
    return goal


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
        return Goal(speedup_budget(table, dense, asked.target_speedup), table)
    assert asked.target_latency is not None
    return Goal(latency_budget(table, asked.target_latency), table)
