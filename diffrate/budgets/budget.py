"""Targets and budgets: what users ask a schedule to meet, and what that is for one model. FLOPs and seconds alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from diffrate.budgets.schedule import Schedule, running_counts
from diffrate.budgets.space import SearchSpace

BELOW, ABOVE = 0.02, 0.005  # a schedule meets its target from -2 % to +0.5 %
FLOPS, SHARE, SPEEDUP, LATENCY = "target_flops", "share", "target_speedup", "target_latency"
WORDS = {FLOPS: " GFLOPs", SPEEDUP: "", LATENCY: " s"}  # behind a number
ADVICE = {  # what widens the reachable range
    FLOPS: "",
    SPEEDUP: "; a larger batch or input size gains more",
    LATENCY: "; a larger batch, a smaller input size or a lower precision takes less per image",
}

Cost = Callable[[Schedule], float]


class BudgetError(ValueError):
    """A target that no schedule of the model meets."""


class TargetError(ValueError):
    """A target that makes no sense."""


@dataclass(frozen=True)
class Target:
    """What a user asks for: a number of one kind.

    kind: `target_flops`, multiply-accumulates of an image; `share`, of those of the dense model; `target_speedup`, how
    many times as fast as that; or `target_latency`, seconds of an image.

    Raises:
        TargetError: names the kind.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if not hasattr(self.value, "__float__"):
            raise TargetError(f"{self.kind}: found {self.value!r}; accepted: a number")
        if self.kind == SHARE and not 0 < self.value <= 1:
            raise TargetError(f"share: found {self.value!r}; accepted: above 0 to 1, of the dense model's FLOPs")
        if self.timed and not 0 < self.value < math.inf:
            raise TargetError(f"{self.kind}: found {self.value!r}; accepted: above 0")

    @property
    def timed(self) -> bool:
        """Whether it is a matter of seconds."""
        return self.kind in (SPEEDUP, LATENCY)

    @property
    def gflops(self) -> float | None:
        """Of a target in FLOPs, as many GFLOPs as were written."""
        return float(f"{self.value / 1e9:.15g}") if self.kind == FLOPS else None

    def __str__(self) -> str:
        if self.kind == SHARE:
            return f"{100 * self.value:g}%"
        return f"{self.value if self.timed else self.gflops:g}"


@dataclass(frozen=True)
class Budget:
    """What a target is for one model: a schedule may cost `target` of `cost`, multiply-accumulates or seconds.

    kind: how users speak of it. whole: what the dense model costs, of a speed-up.
    """

    cost: Cost
    target: float
    kind: str = FLOPS
    whole: float = 0.0

    @property
    def timed(self) -> bool:
        """Whether it is a matter of seconds."""
        return self.kind != FLOPS

    def of(self, cost: float) -> float:
        """A cost in the unit of the target: GFLOPs, times as fast as dense, or seconds."""
        if self.kind == SPEEDUP:
            return self.whole / cost
        return cost if self.kind == LATENCY else cost / 1e9

    def check(self, space: SearchSpace) -> None:
        """Refuse a target out of reach.

        Raises:
            BudgetError: gives the reachable range.
        """
        choices = len(space.searchable) * len(space.kinds)
        least, most = self.cost(space.schedule([space.least] * choices)), self.cost(space.dense())
        if not least <= self.target <= most:
            low, high = sorted((self.of(least), self.of(most)))
            raise BudgetError(f"{self}: accepted: {low:.4g} to {high:.4g}{ADVICE[self.kind]}")

    def times(self, by: float) -> Budget:
        """The same with another target."""
        return replace(self, target=self.target * by)

    def __str__(self) -> str:
        return f"{self.kind} {self.of(self.target):g}{WORDS[self.kind]}"


def meets_budget(found: float, target: float) -> bool:
    """Whether a cost is inside the band around its target."""
    return target * (1 - BELOW) <= found <= target * (1 + ABOVE)


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
