"""Schedules made by hand, to hold a search against: the same share of tokens goes in every block.

`prune` only prunes. `merge` only merges, as ToMe does. `both` prunes half of what goes and merges
the other half. `random` keeps as many tokens as `prune`, but any: see `RandomImportance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from diffrate.budgets.budget import Budget, BudgetError
from diffrate.budgets.schedule import Schedule
from diffrate.budgets.space import SearchSpace

BASELINES = ("prune", "merge", "both", "random")


class BaselineError(ValueError):
    """A baseline that the model's family cannot run."""


def baseline_schedule(kind: str, space: SearchSpace, budget: Budget) -> Schedule:
    """The schedule `kind` of a constant keep ratio that meets `budget`.

    Raises:
        BaselineError: pruning in a model that only merges.
        BudgetError: the target cannot be met.
    """
    if not space.prunes and kind != "merge":
        raise BaselineError(f"baseline {kind}: this model only merges; accepted: merge")
    blocks = len(space.searchable)
    halves = 2 if kind == "both" else 1

    def counts_at(share: float) -> list[float]:
        """Tokens kept after each step of removal when each keeps `1 - share` of them, `halves` a block."""
        ratio = (1 - share) ** (1 / halves)
        return [space.tokens * ratio**step for step in range(1, blocks * halves + 1)]

    def assemble(kept: Sequence[int]) -> Schedule:
        if kind == "both" or not space.prunes:
            return space.schedule(kept)
        whole = space.tokens
        pairs = [(whole, count) if kind == "merge" else (count, count) for count in kept]
        return space.schedule([count for pair in pairs for count in pair])

    return budget.fitted(counts_at, 1.0, assemble, space.least)


def uniform_schedules(space: SearchSpace, budget: Budget) -> dict[str, Schedule]:
    """Every uniform schedule that the model can run and that meets `budget`, by kind."""
    found = {}
    for kind in ("merge", "both", "prune") if space.prunes else ("merge",):
        with suppress(BudgetError):
            found[kind] = baseline_schedule(kind, space, budget)
    return found
