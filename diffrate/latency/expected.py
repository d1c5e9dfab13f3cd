"""What a step of the gradient search is expected to take, in seconds, with gradients for its rates.

Its value is that of the counts as they are drawn. Its gradient is that of the times of blocks at the expected
counts, and of the price of each reduction times the probability that there is one: rates can learn to leave a
block alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffrate.budgets.schedule import Kept, Schedule
from diffrate.latency.table import BlockTimes, LatencyTable
from diffrate.rates.masked_block import BlockPlan
from diffrate.rates.rate import Choice
from diffrate.rates.ste import with_gradient_of

SMOOTHED = 16  # tokens to both sides that a slope is taken over: kernels move in steps, and would have none between


def expected_seconds(table: LatencyTable, plans: Sequence[BlockPlan]) -> Tensor:
    """Of one image, for the plans of all blocks."""
    prunes = any(plan.prune is not None for plan in plans)
    schedule = Schedule(tuple(plan.pruned for plan in plans) if prunes else None, tuple(plan.merged for plan in plans))
    soft = plans[0].cost[0].new_zeros(())
    for plan, step in zip(plans, table.steps(schedule), strict=True):
        soft = soft + _block(plan, *step)
    return with_gradient_of(soft.new_tensor(table.seconds(schedule)), soft / table.batch_size)


def _block(plan: BlockPlan, times: BlockTimes, kept: Kept, sized: bool) -> Tensor:
    """What carries the gradient of a block's seconds, for a batch."""
    entering, leaving = plan.cost
    soft = entering * _slope(times.plain, kept.entering)
    if times.read is not None:
        return soft
    soft = soft + leaving * _slope(times.after, kept.merged)
    fewer = max(1, kept.merged - 1)
    pruning = times.price(Kept(kept.entering, fewer, fewer), sized)
    merging = times.price(Kept(kept.entering, kept.entering, fewer), sized)
    prune, merge = _reducing(plan.prune, plan.entering), _reducing(plan.merge, plan.pruned)
    if prune is None:
        return soft if merge is None else soft + merging * merge
    return (
        soft
        + pruning * (prune if merge is None else 1 - (1 - prune) * (1 - merge))
        + (0.0 if merge is None else max(0.0, merging - pruning) * merge)
    )


def _reducing(choice: Choice | None, tokens: int) -> Tensor | None:
    """The probability that a choice keeps fewer than the `tokens` that are there: the least important one goes."""
    return None if choice is None else 1 - choice.survival[tokens - 1]


def _slope(seconds: Sequence[float], tokens: int) -> float:
    """Of a curve at every number of tokens, around one."""
    low, high = max(0, tokens - SMOOTHED), min(len(seconds) - 1, tokens + SMOOTHED)
    return (seconds[high] - seconds[low]) / max(1, high - low)
