"""Where a search may begin: at the best of the uniform schedules of its budget."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from diffrate.budgets.rounding import BudgetError
from diffrate.budgets.schedule import Schedule
from diffrate.budgets.uniform import baseline_schedule
from diffrate.patch.base import CompressedModel
from diffrate.searching.teacher import losses_at


def best_uniform(
    model: CompressedModel, target: float, loader: Iterable[Any], precision: torch.dtype | None = None
) -> Schedule | None:
    """The uniform schedule that meets `target` multiply-accumulates and whose outputs are nearest to the dense
    model's on the images of `loader`; None where no uniform one meets it."""
    space, found = model.compression.space, []
    for kind in ("merge", "both", "prune") if space.prunes else ("merge",):
        with suppress(BudgetError):
            found.append(baseline_schedule(kind, space, model.flops_at, target))
    if len(found) < 2:
        return found[0] if found else None
    losses = losses_at(model, found, loader, precision)
    return found[losses.index(min(losses))]
