"""What a schedule costs in seconds: the sum of what its blocks' parts were measured to cost. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffrate.budgets.schedule import Kept, Schedule, running_counts
from diffrate.latency.curves import MERGING_TERMS, Curve, powers, reduction_terms

LEAST = 0.5  # of the plain attention's time, that attention takes where importance is asked for


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that a batch takes in the parts of one kind of block.

    attention: over the tokens that enter; attention_asked, attention_sized: what it takes more where their importance
    is asked for, and where they stand for several, as coefficients of `powers`. mlp: over the tokens that leave.
    reduction: coefficients of `reduction_terms`, none where nothing is reduced. read: how many first tokens are all
    that is left, of a last block of which no more is read; None for all.
    """

    attention: Curve
    attention_asked: tuple[float, ...]
    attention_sized: tuple[float, ...]
    mlp: Curve
    reduction: tuple[float, ...]
    read: int | None

    @cached_property
    def plain(self) -> list[float]:
        """Attention at every number of tokens, without a reduction and with sizes of 1."""
        return self.attention.at(self._counts).tolist()

    @cached_property
    def asked(self) -> list[float]:
        """What attention takes more where importance is asked for, at every number of tokens; less than nothing where
        it is another attention then, and a faster one."""
        more = powers(self._counts) @ np.asarray(self.attention_asked)
        return np.maximum(-LEAST * np.asarray(self.plain), more).tolist()

    @cached_property
    def sized(self) -> list[float]:
        """What attention takes more where tokens stand for several, at every number of tokens."""
        return np.maximum(0.0, powers(self._counts) @ np.asarray(self.attention_sized)).tolist()

    @cached_property
    def after(self) -> list[float]:
        """The MLP at every number of tokens, as many as attention's."""
        return self.mlp.at(self._counts).tolist()

    @property
    def _counts(self) -> np.ndarray:
        return np.arange(self.attention.tokens[-1] + 1)

    def seconds(self, kept: Kept, sized: bool) -> float:
        """One block of a batch; `sized` where tokens that enter stand for several."""
        seconds = self.plain[kept.entering] + (self.sized[kept.entering] if sized else 0.0)
        if self.read is not None:
            return seconds + self.after[self.read]
        return seconds + self.price(kept, sized) + self.after[kept.merged]

    def price(self, kept: Kept, sized: bool) -> float:
        """What it takes that tokens go: to ask for their importance, and to let them go; 0 where none do."""
        if kept.merged == kept.entering or not self.reduction:
            return 0.0
        return self.asked[kept.entering] + sum(self.prices(kept, sized))

    def prices(self, kept: Kept, sized: bool) -> tuple[float, float]:
        """What it takes to let them go, in two parts: at all, and what merging adds to it."""
        if kept.merged == kept.entering or not self.reduction:
            return 0.0, 0.0
        parts = [weight * term for weight, term in zip(self.reduction, reduction_terms(kept, sized), strict=True)]
        merging = sum(parts[term] for term in MERGING_TERMS)
        return sum(parts) - merging, merging


@dataclass(frozen=True)
class LatencyTable:
    """The seconds of one model on one machine.

    setting: what was measured, plain values by name. kinds: of blocks; order: which each block is of. embedding:
    seconds of a batch before the first block; head: after the last, a constant and a slope over the tokens left.
    tokens: that enter the first block.
    """

    setting: dict[str, Any]
    kinds: tuple[BlockTimes, ...]
    order: tuple[int, ...]
    embedding: float
    head: tuple[float, float]
    tokens: int
    batch_size: int

    @cached_property
    def blocks(self) -> tuple[BlockTimes, ...]:
        """The times of each block."""
        return tuple(self.kinds[kind] for kind in self.order)

    def steps(self, schedule: Schedule) -> Iterator[tuple[BlockTimes, Kept, bool]]:
        """The times of each block, its tokens, and whether those that enter stand for several."""
        sized = False
        for kept, times in zip(running_counts(schedule, self.tokens), self.blocks, strict=False):
            yield times, kept, sized
            sized = sized or kept.merged < kept.pruned

    def seconds(self, schedule: Schedule) -> float:
        """Of one image at `schedule`."""
        total, leaving = self.embedding, self.tokens
        for times, kept, sized in self.steps(schedule):
            total += times.seconds(kept, sized)
            leaving = kept.merged
        return (total + self.head[0] + self.head[1] * leaving) / self.batch_size

    def prices(self, schedule: Schedule) -> tuple[float, float]:
        """What the reductions of `schedule` take of its `seconds`: to let tokens go, and what merging adds to it."""
        prices = [times.prices(kept, sized) for times, kept, sized in self.steps(schedule)]
        return sum(going for going, _ in prices) / self.batch_size, sum(more for _, more in prices) / self.batch_size

    def repriced(self, going: float, merging: float) -> LatencyTable:
        """The same where letting tokens go costs `going` times as much, and what merging adds to it `merging` times."""

        def reduction(kind: BlockTimes) -> tuple[float, ...]:
            terms = enumerate(kind.reduction)
            return tuple((merging if term in MERGING_TERMS else going) * weight for term, weight in terms)

        return replace(self, kinds=tuple(replace(kind, reduction=reduction(kind)) for kind in self.kinds))

    def rest(self) -> float:
        """Seconds of a batch outside the blocks, at all tokens."""
        return self.embedding + self.head[0] + self.head[1] * self.tokens
