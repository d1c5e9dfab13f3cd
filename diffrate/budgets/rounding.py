"""From counts that need not be whole to a schedule that meets a budget.

What is budgeted is a function of a schedule, in whatever unit: nothing here knows what is counted.

A search ends near its target, not on it. Its expected counts are scaled until the cost is right:
towards keeping all tokens or towards keeping the fewest, every block by the same share of its way. This
keeps what the search found about the blocks relative to each other, is the least change where the
search ended close, and reaches every budget there is, whatever the rates say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from diffrate.budgets.schedule import Schedule
from diffrate.budgets.space import SearchSpace

BELOW, ABOVE = 0.02, 0.005  # a schedule meets its target from -2 % to +0.5 %
BISECTIONS = 60

Cost = Callable[[Schedule], float]
Assemble = Callable[[Sequence[int]], Schedule]


class BudgetError(ValueError):
    """A target that no schedule of the model meets."""


@dataclass(frozen=True)
class Unit:
    """How users speak of a cost: by the option that sets it, and in numbers `of` it with a word behind.

    advice: what widens the reachable range.
    """

    option: str
    word: str
    of: Callable[[float], float]
    advice: str = ""

    def shown(self, cost: float) -> str:
        """For a message."""
        return f"{self.of(cost):.4g}{self.word}"


GFLOPS = Unit("target_flops", " GFLOPs", lambda flops: flops / 1e9)


def meets_budget(found: float, target: float) -> bool:
    """Whether a cost is inside the band around its target."""
    return target * (1 - BELOW) <= found <= target * (1 + ABOVE)


def check_target(target: float, space: SearchSpace, cost: Cost, unit: Unit = GFLOPS) -> None:
    """Refuse a target that cannot be reached.

    Raises:
        BudgetError: gives the reachable range in the unit.
    """
    choices = len(space.searchable) * len(space.kinds)
    least, most = cost(space.schedule([space.least] * choices)), cost(space.dense())
    if not least <= target <= most:
        low, high = sorted((unit.of(least), unit.of(most)))
        found = f"{unit.of(target):g}{unit.word}"
        raise BudgetError(f"{unit.option} {found}: accepted: {low:.4g} to {high:.4g}{unit.advice}")


def round_to_budget(
    expected: Sequence[float], space: SearchSpace, cost: Cost, target: float, unit: Unit = GFLOPS
) -> Schedule:
    """The schedule nearest to `expected` counts, one per choice, that meets `target`.

    Raises:
        BudgetError: no whole counts meet it.
    """

    def scaled(share: float) -> list[float]:
        """From all tokens (0) over the expected ones (1) to the fewest (2)."""
        if share <= 1:
            return [space.tokens + share * (count - space.tokens) for count in expected]
        return [count + (share - 1) * (space.least - count) for count in expected]

    return fit_budget(scaled, 2.0, space.schedule, cost, target, space.least, unit)


def fit_budget(
    counts_at: Callable[[float], list[float]],
    end: float,
    assemble: Assemble,
    cost: Cost,
    target: float,
    least: int,
    unit: Unit = GFLOPS,
) -> Schedule:
    """The schedule of a falling family of counts, `counts_at` 0 to `end`, that meets `target`, none below `least`.

    Bisection finds the two neighbours around the target; where one step of the family changes
    several counts at once, they change one after the other.

    Raises:
        BudgetError: no whole counts meet it.
    """

    def whole(share: float) -> list[int]:
        return [max(least, math.ceil(count - 1e-9)) for count in counts_at(share)]

    low, high = 0.0, end  # cost above the target at `low`, unless that is the end; below at `high`
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(assemble(whole(middle))) > target else (low, middle)
    above, below = whole(low), whole(high)
    steps = [above[:position] + below[position:] for position in range(len(above) + 1)]
    best = min(steps, key=lambda counts: abs(cost(assemble(counts)) - target))
    best = list(accumulate(best, min))  # what really happens, so that every single change has an effect
    best = _polish(best, (least, max(whole(0))), assemble, cost, target)
    found = cost(assemble(best))
    if not meets_budget(found, target):
        asked = f"{unit.option} {unit.of(target):g}{unit.word}"
        raise BudgetError(f"{asked}: the nearest schedule has {unit.of(found):.4g}")
    return assemble(best)


def _polish(counts: list[int], limits: tuple[int, int], assemble: Assemble, cost: Cost, target: float) -> list[int]:
    """Change one or two counts by one while that brings the cost nearer to a target outside the band."""

    def distance(candidate: list[int]) -> tuple[float, float]:
        """How far outside the band, and, the same there, how far from the target."""
        found = cost(assemble(candidate))
        outside = max(0.0, target * (1 - BELOW) - found, found - target * (1 + ABOVE))
        return outside, abs(found - target)

    best = counts
    while not meets_budget(cost(assemble(best)), target):
        single = _neighbours(best, limits)
        nearest = min(single, key=distance)
        if distance(nearest) >= distance(best):
            nearest = min((pair for one in single for pair in _neighbours(one, limits)), key=distance)
        if distance(nearest) >= distance(best):
            break
        best = nearest
    return best


def _neighbours(counts: list[int], limits: tuple[int, int]) -> list[list[int]]:
    least, most = limits
    return [
        [*counts[:position], count + step, *counts[position + 1 :]]
        for position, count in enumerate(counts)
        for step in (-1, 1)
        if least <= count + step <= most
    ]
