"""From counts that need not be whole to a schedule that costs a target, in whatever unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from diffrate.budgets.schedule import Schedule

BELOW, ABOVE = 0.02, 0.005  # a schedule meets its target from -2 % to +0.5 %
BISECTIONS = 60

Cost = Callable[[Schedule], float]
Assemble = Callable[[Sequence[int]], Schedule]


class BudgetError(ValueError):
    """A target that no schedule of the model meets."""


def meets_budget(found: float, target: float) -> bool:
    """Whether a cost is inside the band around its target."""
    return target * (1 - BELOW) <= found <= target * (1 + ABOVE)


def nearest_counts(
    counts_at: Callable[[float], list[float]],
    end: float,
    cost: Callable[[Sequence[int]], float],
    target: float,
    least: int,
) -> list[int]:
    """The whole counts of a falling family, `counts_at` 0 to `end`, whose cost is nearest to `target`, none below
    `least`.

    Bisection finds the two neighbours around the target; where one step of the family changes
    several counts at once, they change one after the other.
    """

    def whole(share: float) -> list[int]:
        return [max(least, math.ceil(count - 1e-9)) for count in counts_at(share)]

    low, high = 0.0, end  # cost above the target at `low`, unless that is the end; below at `high`
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(whole(middle)) > target else (low, middle)
    above, below = whole(low), whole(high)
    steps = [above[:position] + below[position:] for position in range(len(above) + 1)]
    best = min(steps, key=lambda counts: abs(cost(counts) - target))
    best = list(accumulate(best, min))  # what really happens, so that every single change has an effect
    return _polish(best, (least, max(whole(0))), cost, target)


def _polish(
    counts: list[int], limits: tuple[int, int], cost: Callable[[Sequence[int]], float], target: float
) -> list[int]:
    """Change one or two counts by one while that brings the cost nearer to a target outside the band."""

    def distance(candidate: list[int]) -> tuple[float, float]:
        """How far outside the band, and, the same there, how far from the target."""
        found = cost(candidate)
        outside = max(0.0, target * (1 - BELOW) - found, found - target * (1 + ABOVE))
        return outside, abs(found - target)

    best = counts
    while not meets_budget(cost(best), target):
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
