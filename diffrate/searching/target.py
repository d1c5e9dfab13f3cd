"""From a target to the budget that it is of one model; where it is of seconds, by a table of what schedules take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from diffrate.blocks.masked import BlockPlan
from diffrate.blocks.rates import with_gradient_of
from diffrate.budget import ADVICE, SHARE, SPEEDUP, WORDS, Budget, BudgetError, Target
from diffrate.device import made_by_first
from diffrate.latency.confirm import measured_times
from diffrate.latency.measure import BATCH_SIZE, measure_latency
from diffrate.latency.setting import check_table, read_table, setting_of
from diffrate.latency.table import BlockTimes, LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.schedule import Kept, RuleWork, Schedule
from diffrate.searching.settings import SearchSettingError
from diffrate.timing import PairedTimes, Use

GAIN = 0.2  # of the value, a step, for each whole excess
STIFFNESS = 60.0  # an excess of 2 % weighs about as much as the classification loss
MOST = 0.1  # of an excess that the value takes in: far from the target, it would rise without end
MEMORY = 0.9  # of the running mean


@dataclass
class Multiplier:
    """What an excess costs: `value` in its `unit`, which is 0 before the first step."""

    value: float = 0.0
    unit: float = 0.0

    def add(self, gradient: Tensor, slope: Tensor, excess: float, scale: float) -> None:
        """Add the cost's part to the `gradient` of all rates, which is `scale` times that of the classification loss.

        `slope` is the gradient of the excess, as a share of the target. Gradients that are no numbers are left to the
        scaler, which passes the step over.
        """
        own, other = torch.stack([gradient.norm(), slope.norm()]).tolist()
        unit = own / scale / other if other else math.nan
        if not math.isfinite(unit):
            return
        self.unit = MEMORY * self.unit + (1 - MEMORY) * unit if self.unit else unit
        weight = self.unit * (self.value + STIFFNESS * excess)
        self.value += GAIN * max(-MOST, min(MOST, excess))
        gradient.add_(slope, alpha=weight * scale)


SMOOTHED = 16  # tokens to both sides that a slope is taken over: kernels move in steps, and would have none between


def expected_seconds(table: LatencyTable, plans: Sequence[BlockPlan], rules: tuple[str, ...] | None = None) -> Tensor:
    """Of one image, for the plans of all blocks and the `rules` of a schedule."""
    prunes = any(plan.prune is not None for plan in plans)
    merged = tuple(plan.merged for plan in plans)
    schedule = Schedule(tuple(plan.pruned for plan in plans) if prunes else None, merged, rules=rules)
    soft = plans[0].cost[0].new_zeros(())
    for plan, step in zip(plans, table.steps(schedule), strict=True):
        soft = soft + _block(plan, *step)
    return with_gradient_of(soft.new_tensor(table.seconds(schedule)), soft / table.batch_size)


def _block(plan: BlockPlan, times: BlockTimes, kept: Kept, sized: bool, work: RuleWork) -> Tensor:
    """What carries the gradient of a block's seconds, for a batch."""
    entering, leaving = plan.cost
    soft = entering * _slope(times.plain, kept.entering)
    if times.read is not None:
        return soft
    soft = soft + leaving * _slope(times.after, kept.merged)
    fewer = max(1, kept.merged - 1)
    pruning = times.price(Kept(kept.entering, fewer, fewer), sized, work)
    merging = times.price(Kept(kept.entering, kept.entering, fewer), sized, work)
    # The probabilities that a choice keeps fewer than the tokens that are there: the least important one goes.
    prune = None if plan.prune is None else 1 - plan.prune.survival[plan.entering - 1]
    merge = None if plan.merge is None else 1 - plan.merge.survival[plan.pruned - 1]
    if prune is None:
        return soft if merge is None else soft + merging * merge
    if merge is None:
        return soft + pruning * prune
    return soft + pruning * (1 - (1 - prune) * (1 - merge)) + max(0.0, merging - pruning) * merge


def _slope(seconds: Sequence[float], tokens: int) -> float:
    """Of a curve at every number of tokens, around one."""
    low, high = max(0, tokens - SMOOTHED), min(len(seconds) - 1, tokens + SMOOTHED)
    return (seconds[high] - seconds[low]) / max(1, high - low)


REACH = 1.15  # a few seconds tell a ratio no better: what is further away than this is out of reach
REACH_SECONDS = 2.0


def table_for(model: CompressedModel, target: Target, device: torch.device) -> LatencyTable:
    """The seconds of schedules, measured with the defaults of `measure_latency`; raises as `check_reach`."""
    use = Use(BATCH_SIZE, torch.float32, False, device)
    check_reach(model, [target], use)
    return measure_latency(model, use.batch_size, use.dtype, device=device)


def budget_of(model: CompressedModel, target: Target, table: LatencyTable | None) -> Budget:
    """What a target is for `model`; one in seconds goes by `table`. SearchSettingError where the table is another
    model's."""
    dense = model.dense_schedule()
    if not target.timed:
        return Budget(model.flops_at, target.value * (model.flops_at(dense) if target.kind == SHARE else 1))
    assert table is not None
    try:
        check_table(table, model)
    except ValueError as error:
        raise SearchSettingError(str(error)) from None
    whole = table.seconds(dense)
    seconds = whole / target.value if target.kind == SPEEDUP else target.value
    return Budget(table.seconds, seconds, target.kind, whole)


def check_reach(model: CompressedModel, targets: Iterable[Target], use: Use, file: Path | None = None) -> None:
    """BudgetError where a speed is far out of reach of the schedule with the fewest tokens, before a table is measured.

    A table takes a minute; this takes a few seconds of runs in turn with the dense model, on the first process. With
    a table in `file` it takes none: that says precisely what is in reach. Raises as `read_table`, too.
    """
    timed = [target for target in targets if target.timed]
    if not timed:
        return
    fewest = model.compression.space.every_block().fewest()

    def measured() -> PairedTimes | None:
        kept = file is not None and read_table(file, setting_of(model, use)) is not None
        return None if kept else measured_times(model, fewest, use, REACH_SECONDS)

    times = made_by_first(measured)
    if times is None:
        return
    dense, least = (median(side) / use.batch_size for side in (times.baseline, times.rival))
    for target in timed:
        low, high = (1.0, times.ratio) if target.kind == SPEEDUP else (least, dense)
        if not low / REACH <= target.value <= high * REACH:
            raise BudgetError(
                f"{target.kind} {target}{WORDS[target.kind]}: accepted: {low:.3g} to {high:.3g}, measured with all "
                f"tokens and with the fewest ({use.words()}){ADVICE[target.kind]}"
            )
