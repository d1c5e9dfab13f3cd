"""A budget: what is counted, how much of it there may be, and how users speak of it. FLOPs and seconds alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from diffrate.budgets.rounding import GFLOPS, BudgetError, Cost, Unit, check_target, meets_budget, round_to_budget
from diffrate.budgets.schedule import Schedule, running_counts
from diffrate.budgets.space import SearchSpace


@dataclass(frozen=True)
class Budget:
    """What a schedule may cost: `target` of `cost`."""

    cost: Cost
    target: float
    unit: Unit = GFLOPS

    def check(self, space: SearchSpace) -> None:
        """Refuse a target out of reach.

        Raises:
            BudgetError: gives the reachable range.
        """
        check_target(self.target, space, self.cost, self.unit)

    def met_by(self, schedule: Schedule) -> bool:
        """Whether a schedule costs what it may."""
        return meets_budget(self.cost(schedule), self.target)

    def times(self, by: float) -> Budget:
        """The same with another target."""
        return replace(self, target=self.target * by)

    def rounded(self, expected: Sequence[float], space: SearchSpace) -> Schedule:
        """The schedule nearest to `expected` counts, one per choice, that meets the target, without reductions that
        cost more than they save: what they took is spent elsewhere.

        Multiply-accumulates know no such reductions.

        Raises:
            BudgetError: no whole counts meet it.
        """
        schedule = round_to_budget(expected, space, self.cost, self.target, self.unit)
        for _ in range(len(expected)):
            counts = choices_of(schedule, space)
            thrifty = without_waste(counts, space, self.cost)
            if thrifty == counts:
                break
            try:
                schedule = round_to_budget(thrifty, space, self.cost, self.target, self.unit)
            except BudgetError:  # reductions that are left cannot spend it: the last one that could is good
                break
        return schedule


def choices_of(schedule: Schedule, space: SearchSpace) -> list[int]:
    """What really happens at a schedule: one count per choice, never rising."""
    kept = running_counts(schedule, space.limits[0])
    pairs = [(kept[block].pruned, kept[block].merged) for block in space.searchable]
    return [count for pair in pairs for count in pair[-len(space.kinds) :]]


def without_waste(counts: Sequence[int], space: SearchSpace, cost: Cost) -> list[int]:
    """The counts with every reduction switched off that costs more than it saves, the worst first: a choice alone, or
    all of a block, where one without the other would cost as much."""
    best = list(accumulate(counts, min))
    least = cost(space.schedule(best))
    while True:
        trials = _switched_off(best, space)
        costs = [cost(space.schedule(trial)) for trial in trials]
        if not costs or min(costs) >= least:
            return best
        least = min(costs)
        best = trials[costs.index(least)]


def _switched_off(counts: list[int], space: SearchSpace) -> list[list[int]]:
    """The counts with one choice that keeps all that are there, or with all choices of a block."""
    width, trials = len(space.kinds), []
    for place in range(len(counts)):
        before = space.tokens if place == 0 else counts[place - 1]
        ends = {place + 1} if place % width else {place + 1, place + width}
        for end in sorted(ends):
            trial = [*counts[:place], *[before] * (end - place), *counts[end:]]
            if trial != counts:
                trials.append(trial)
    return trials
