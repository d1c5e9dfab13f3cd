"""A budget: what is counted, how much of it there may be, and how users speak of it. FLOPs and seconds alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from diffrate.budgets.rounding import Assemble, BudgetError, Cost, meets_budget, nearest_counts
from diffrate.budgets.schedule import Schedule, running_counts
from diffrate.budgets.space import SearchSpace


@dataclass(frozen=True)
class Unit:
    """How users speak of a cost: by the option that sets it, and in numbers `of` it with a word behind.

    advice: what widens the reachable range.
    """

    option: str
    word: str
    of: Callable[[float], float]
    advice: str = ""


GFLOPS = Unit("target_flops", " GFLOPs", lambda flops: flops / 1e9)


@dataclass(frozen=True)
class Budget:
    """What a schedule may cost: `target` of `cost`."""

    cost: Cost
    target: float
    unit: Unit = GFLOPS

    @property
    def _asked(self) -> str:
        return f"{self.unit.option} {self.unit.of(self.target):g}{self.unit.word}"

    def check(self, space: SearchSpace) -> None:
        """Refuse a target out of reach.

        Raises:
            BudgetError: gives the reachable range.
        """
        least, most = self.cost(space.fewest()), self.cost(space.dense())
        if not least <= self.target <= most:
            low, high = sorted((self.unit.of(least), self.unit.of(most)))
            raise BudgetError(f"{self._asked}: accepted: {low:.4g} to {high:.4g}{self.unit.advice}")

    def fitted(self, counts_at: Callable[[float], list[float]], end: float, assemble: Assemble, least: int) -> Schedule:
        """The schedule of a falling family of counts, `counts_at` 0 to `end`, that meets the target, none below
        `least`.

        Raises:
            BudgetError: no whole counts meet it.
        """
        best = nearest_counts(counts_at, end, lambda counts: self.cost(assemble(counts)), self.target, least)
        found = self.cost(assemble(best))
        if not meets_budget(found, self.target):
            raise BudgetError(f"{self._asked}: the nearest schedule has {self.unit.of(found):.4g}")
        return assemble(best)

    def rounded(self, expected: Sequence[float], space: SearchSpace) -> Schedule:
        """The schedule nearest to `expected` counts, one per choice, that meets the target, without reductions that
        cost more than they save: what they took is spent elsewhere.

        Multiply-accumulates know no such reductions.

        Raises:
            BudgetError: no whole counts meet it.
        """
        schedule = self._nearest(expected, space)
        for _ in range(len(expected)):
            counts = choices_of(schedule, space)
            thrifty = without_waste(counts, space, self.cost)
            if thrifty == counts:
                break
            try:
                schedule = self._nearest(thrifty, space)
            except BudgetError:  # reductions that are left cannot spend it: the last one that could is good
                break
        return schedule

    def _nearest(self, expected: Sequence[float], space: SearchSpace) -> Schedule:
        """The schedule nearest to `expected` counts that meets the target.

        They are scaled towards keeping all tokens or towards keeping the fewest, every block by the same share of its
        way: this keeps what a search found about the blocks relative to each other, and reaches every budget.
        """

        def scaled(share: float) -> list[float]:
            """From all tokens (0) over the expected ones (1) to the fewest (2)."""
            if share <= 1:
                return [space.tokens + share * (count - space.tokens) for count in expected]
            return [count + (share - 1) * (space.least - count) for count in expected]

        return self.fitted(scaled, 2.0, space.schedule, space.least)


def choices_of(schedule: Schedule, space: SearchSpace) -> list[int]:
    """What really happens at a schedule: one count per choice, never rising."""
    kept = running_counts(schedule, space.limits[0])
    return [kept[block].pruned if kind == "prune" else kept[block].merged for block, kind in space.choices]


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
    for choice in range(len(counts)):
        before = space.tokens if choice == 0 else counts[choice - 1]
        for end in sorted({choice + 1} if choice % width else {choice + 1, choice + width}):
            trial = [*counts[:choice], *[before] * (end - choice), *counts[end:]]
            if trial != counts:
                trials.append(trial)
    return trials
