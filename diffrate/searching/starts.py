"""Where a search may begin: at the best of the uniform schedules of its budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from diffrate.budgets.budget import Budget
from diffrate.budgets.schedule import Schedule, running_counts
from diffrate.budgets.uniform import uniform_schedules
from diffrate.patch.base import CompressedModel
from diffrate.searching.teacher import losses_at


def best_uniform(
    model: CompressedModel,
    budget: Budget,
    loader: Iterable[Any],
    precision: torch.dtype | None = None,
    multi_label: bool = False,
) -> Schedule | None:
    """The uniform schedule that meets `budget` and whose outputs are nearest to the dense model's on the images of
    `loader`; None where no uniform one meets it."""
    found = list(uniform_schedules(model.compression.space, budget.cost, budget.target).values())
    if not found:
        return None
    losses = losses_at(model, found, loader, precision, multi_label) if len(found) > 1 else [0.0]
    return _within_reach(found[losses.index(min(losses))])


def _within_reach(schedule: Schedule) -> Schedule:
    """The same reductions with no count above the tokens that are there: from so far off, rates would learn nothing."""
    if schedule.prune is None:
        return schedule
    kept = running_counts(schedule, schedule.merge[0])
    return replace(schedule, prune=tuple(count.pruned for count in kept), merge=tuple(count.merged for count in kept))
