"""What the flags ask a schedule to meet, in order: FLOPs, or seconds by a table that is measured once for all."""

from __future__ import annotations

import diffrate
from cli.latency import latency_table
from cli.runtime import Runtime
from cli.schedules import DIGITS, targets_of
from cli.settings import Settings
from diffrate.budget import Budget, Target
from diffrate.searching.target import budget_of


def budgets_of(
    settings: Settings, model: diffrate.CompressedModel, runtime: Runtime
) -> tuple[dict[Target, Budget], diffrate.LatencyTable | None]:
    """What each target is for `model`, all of them in reach; and the table that those in seconds go by.

    Raises:
        BudgetError: one is not; gives the range that is.
        LatencyFileError, UsageError: as `latency_table` and `targets_of`.
    """
    targets = targets_of(settings.model, model)
    timed = any(target.timed for target in targets)
    table = latency_table(settings.latency, model, runtime, targets) if timed else None
    return {target: budget_of(model, target, table) for target in targets}, table


def kept_as(target: Target, model: diffrate.CompressedModel, schedule: diffrate.Schedule) -> float:
    """The GFLOPs under which files keep the schedule that meets a target: the target's, or of seconds its own."""
    if target.gflops is not None:
        return target.gflops
    return float(f"{model.flops_at(schedule) / 1e9:.{DIGITS}g}")
