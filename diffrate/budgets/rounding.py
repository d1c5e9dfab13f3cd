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
from itertools import accumulate

from diffrate.budgets.budget import ABOVE, BELOW, Budget, BudgetError, choices_of, meets_budget, without_waste
from diffrate.budgets.schedule import Schedule
from diffrate.budgets.space import SearchSpace

BISECTIONS = 60

Assemble = Callable[[Sequence[int]], Schedule]


def round_to_budget(expected: Sequence[float], space: SearchSpace, budget: Budget) -> Schedule:
    """The schedule nearest to `expected` counts, one per choice, that meets the budget, without reductions that
    cost more than they save: what they took is spent elsewhere.

    Multiply-accumulates know no such reductions.

    Raises:
        BudgetError: no whole counts meet it.
    """
    schedule = _rounded(expected, space, budget)
    for _ in range(len(expected)):
        counts = choices_of(schedule, space)
        thrifty = without_waste(counts, space, budget.cost)
        if thrifty == counts:
            break
        try:
            schedule = _rounded(thrifty, space, budget)
        except BudgetError:  # reductions that are left cannot spend it: the last one that could is good
            break
    return schedule


def _rounded(expected: Sequence[float], space: SearchSpace, budget: Budget) -> Schedule:
    """The schedule nearest to `expected` counts that meets the budget."""

    def scaled(share: float) -> list[float]:
        """From all tokens (0) over the expected ones (1) to the fewest (2)."""
        if share <= 1:
            return [space.tokens + share * (count - space.tokens) for count in expected]
        return [count + (share - 1) * (space.least - count) for count in expected]

    return fit_budget(scaled, 2.0, space.schedule, budget, space.least)


def fit_budget(
    counts_at: Callable[[float], list[float]], end: float, assemble: Assemble, budget: Budget, least: int
) -> Schedule:
    """The schedule of a falling family of counts, `counts_at` 0 to `end`, that meets `budget`, none below `least`.

    Bisection finds the two neighbours around the target; where one step of the family changes
    several counts at once, they change one after the other.

    Raises:
        BudgetError: no whole counts meet it.
    """

    cost = budget.cost

    def whole(share: float) -> list[int]:
        return [max(least, math.ceil(count - 1e-9)) for count in counts_at(share)]

    low, high = 0.0, end  # cost above the target at `low`, unless that is the end; below at `high`
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(assemble(whole(middle))) > budget.target else (low, middle)
    above, below = whole(low), whole(high)
    steps = [above[:position] + below[position:] for position in range(len(above) + 1)]
    best = min(steps, key=lambda counts: abs(cost(assemble(counts)) - budget.target))
    best = list(accumulate(best, min))  # what really happens, so that every single change has an effect
    best = _polish(best, (least, max(whole(0))), assemble, budget)
    found = cost(assemble(best))
    if not meets_budget(found, budget.target):
        raise BudgetError(f"{budget}: the nearest schedule has {budget.of(found):.4g}")
    return assemble(best)


def _polish(counts: list[int], limits: tuple[int, int], assemble: Assemble, budget: Budget) -> list[int]:
    """Change one or two counts by one while that brings the cost nearer to a target outside the band."""

    cost, target = budget.cost, budget.target

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
