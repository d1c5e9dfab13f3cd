"""What the flags ask a schedule to meet, in order: FLOPs, or seconds by a table that is measured once for all."""

from __future__ import annotations

from dataclasses import dataclass

import diffrate
from cli.latency import latency_table
from cli.runtime import Runtime
from cli.schedules import DIGITS, targets_of
from cli.settings import Settings, Target
from diffrate.searching.target import Asked, Goal, goal_at


@dataclass(frozen=True)
class Aim:
    """A target of the flags, and the budget that it is of a model."""

    target: Target
    goal: Goal

    @property
    def asked(self) -> Asked:
        """The target by the names of the library."""
        return asked_of(self.target)

    def named(self, model: diffrate.CompressedModel, schedule: diffrate.Schedule) -> float:
        """The GFLOPs under which files keep the schedule that meets it: the target's, or of seconds its own."""
        if self.target.gflops is not None:
            return self.target.gflops
        return float(f"{model.flops_at(schedule) / 1e9:.{DIGITS}g}")


def aims_of(settings: Settings, model: diffrate.CompressedModel, runtime: Runtime) -> list[Aim]:
    """The targets to meet by `model`, all of them in reach.

    Raises:
        BudgetError: one is not; gives the range that is.
        LatencyFileError, UsageError: as `latency_table` and `targets_of`.
    """
    targets = targets_of(settings.model, model)
    asked = [asked_of(target) for target in targets]
    table = latency_table(settings.latency, model, runtime, asked) if any(one.timed for one in asked) else None
    aims = [Aim(target, goal_at(model, asked_of(target), table)) for target in targets]
    for aim in aims:
        aim.goal.budget.check(model.compression.space)
    return aims


def asked_of(target: Target) -> Asked:
    """A target, with its GFLOPs known, by the names of the library."""
    flops = None if target.gflops is None else target.gflops * 1e9
    return Asked(target_flops=flops, target_speedup=target.speedup, target_latency=target.seconds)
