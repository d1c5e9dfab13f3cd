"""From timed runs to what each part of a block costs at any number of tokens. Nothing here needs torch.

All parts are fitted at once to all samples of a kind of block, by least squares of relative errors in which
outliers count less. Times over tokens are piecewise linear and never fall; what a reduction adds is linear in
the rows that it moves and in the pairs that it compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from diffrate.schedule import PUBLISHED, RULES, Kept, RuleWork, Schedule, running_counts

REWEIGHTED = 6  # times
OUTLIER = 2.0  # median deviations, from which on samples count less
SAMPLES_A_KNOT = 4.0  # at least, in the mean
BELIEVED = (0.5, 3.0)  # of a factor on a price
DOUBT = 0.02  # of a whole run's time, that a factor of 2 is believed at


@dataclass(frozen=True)
class Curve:
    """Seconds over tokens: linear between knots, and never falling."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds at numbers of tokens, `[...]`; the ends go on as they are."""
        return np.interp(tokens, self.tokens, self.seconds)


def fit_curve(
    tokens: Sequence[int], seconds: Sequence[float], knots: Sequence[int], *flags: Sequence[bool]
) -> tuple[Curve, list[tuple[float, ...]]]:
    """The curve through samples at numbers of `tokens`, with as many of the `knots` as samples suffice for, and what
    the samples take more where each of the `flags` is set: coefficients of `powers`."""
    counts, wanted = np.asarray(tokens), int(min(len(knots), len(set(tokens)), len(tokens) / SAMPLES_A_KNOT))
    chosen = [knots[round(at)] for at in np.linspace(0, len(knots) - 1, wanted)] if wanted > 1 else [knots[-1]]
    # The curve's weights are the steps from knot to knot: a row sums up the steps to what the sample reaches.
    steps = np.arange(len(chosen))
    rising = np.clip(np.interp(counts, chosen, steps)[:, None] - steps + 1, 0, 1)
    more = [np.asarray(flag, dtype=np.float64)[:, None] * powers(counts) for flag in flags]
    weights = _fitted(np.concatenate([rising, *more], axis=1), np.asarray(seconds), len(chosen))
    heights, *found = np.split(weights, range(len(chosen), len(weights), 3))
    return Curve(tuple(chosen), tuple(np.cumsum(heights).tolist())), [tuple(one.tolist()) for one in found]


def fit_terms(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of `terms` `[S, F]` that give `seconds` `[S]`, none below 0."""
    columns = np.asarray(terms, dtype=np.float64)
    return tuple(_fitted(columns, np.asarray(seconds), columns.shape[1]).tolist())


def powers(tokens: np.ndarray) -> np.ndarray:
    """1, N and N^2 of numbers of tokens `[...]`, as `[..., 3]`."""
    counts = np.asarray(tokens, dtype=np.float64)
    return np.stack([np.ones_like(counts), counts, counts**2], axis=-1)


MERGING_TERMS = range(3, 9)  # of those of a reduction's price: three for rules of each kind


def reduction_terms(kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> list[float]:
    """What the time of a block's reduction depends on: a constant, the tokens that enter, those left after pruning;
    where it merges a constant, the tokens before merging, the pairs of sources and destinations, each for the rules
    that compare halves and for the others; and sizes."""
    pairs = kept.pruned**2 / 4 if work.halves else (kept.pruned - kept.merged) * kept.merged
    merging, none = [1.0, float(kept.pruned), float(pairs)], [0.0] * (len(MERGING_TERMS) // 2)
    if kept.merged == kept.pruned:
        merging = none
    both = [*none, *merging] if work.halves else [*merging, *none]
    return [1.0, float(kept.entering), float(kept.pruned), *both, float(sized)]


def asks(kept: Kept, work: RuleWork) -> bool:
    """Whether a block removes tokens, and asks for their importance."""
    return kept.merged < kept.entering and (work.ranks or (kept.pruned < kept.entering and not work.free))


def fit_prices(
    rest: Sequence[float], going: Sequence[float], merging: Sequence[float], taken: Sequence[float]
) -> tuple[float, float]:
    """Two factors, for the price of removing tokens and for what merging adds to it, with which these and the `rest`
    sum up to the seconds `taken` by whole runs; 1 as far as the runs do not show otherwise."""
    whole = np.asarray(taken, dtype=np.float64)
    columns = np.concatenate([np.stack([going, merging], axis=1) / whole[:, None], DOUBT * np.eye(2)])
    wanted = np.concatenate([1 - np.asarray(rest) / whole, [DOUBT, DOUBT]])
    first, second = lsq_linear(columns, wanted, bounds=BELIEVED, method="bvls").x.tolist()
    return first, second


def _fitted(columns: np.ndarray, seconds: np.ndarray, rising: int) -> np.ndarray:
    """The weights of `columns` `[S, F]` that give `seconds` `[S]`; the first `rising` not below 0."""
    least = np.concatenate([np.zeros(rising), np.full(columns.shape[1] - rising, -np.inf)])
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-12)
    trust, weights = np.ones(len(seconds)), np.zeros(columns.shape[1])
    for _ in range(REWEIGHTED):
        rows = trust / seconds
        found = lsq_linear(columns / scale * rows[:, None], seconds * rows, bounds=(least, np.inf), method="bvls")
        weights = found.x / scale
        apart = np.abs(columns @ weights / seconds - 1)
        limit = OUTLIER * max(float(np.median(apart)), 1e-6)
        trust = np.sqrt(np.minimum(1.0, limit / np.maximum(apart, 1e-12)))
    return weights


LEAST = 0.5  # of the plain attention's time, that attention takes where importance is asked for


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that a batch takes in the parts of one kind of block.

    attention: over the tokens that enter; attention_asked, attention_received, attention_sized: what it takes more
    where their importance is asked for, by the attention of the first tokens or of all, and where they stand for
    several, as coefficients of `powers`. mlp: over the tokens that leave.
    reduction: coefficients of `reduction_terms`, none where nothing is reduced. read: how many first tokens are all
    that is left, of a last block of which no more is read; None for all.
    """

    attention: Curve
    attention_asked: tuple[float, ...]
    attention_received: tuple[float, ...]
    attention_sized: tuple[float, ...]
    mlp: Curve
    reduction: tuple[float, ...]
    read: int | None

    # Lists by the number of tokens:

    @cached_property
    def plain(self) -> list[float]:
        """Attention without a reduction and with sizes of 1."""
        return self.attention.at(self._counts).tolist()

    @cached_property
    def asked(self) -> tuple[list[float], list[float]]:
        """What attention takes more where importance is asked for: by that of the first tokens, and of all tokens.
        Negative where another, faster attention is used then."""
        least = -LEAST * np.asarray(self.plain)
        return self._more(self.attention_asked, least), self._more(self.attention_received, least)

    @cached_property
    def sized(self) -> list[float]:
        """What attention takes more where tokens stand for several."""
        return self._more(self.attention_sized, 0.0)

    @cached_property
    def after(self) -> list[float]:
        """The MLP."""
        return self.mlp.at(self._counts).tolist()

    @property
    def _counts(self) -> np.ndarray:
        return np.arange(self.attention.tokens[-1] + 1)

    def _more(self, coefficients: Sequence[float], least: np.ndarray | float) -> list[float]:
        return np.maximum(least, powers(self._counts) @ np.asarray(coefficients)).tolist()

    def seconds(self, kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> float:
        """One block of a batch; `sized` where tokens that enter stand for several, and what its rule takes."""
        seconds = self.plain[kept.entering] + (self.sized[kept.entering] if sized else 0.0)
        if self.read is not None:
            return seconds + self.after[self.read]
        return seconds + self.price(kept, sized, work) + self.after[kept.merged]

    def price(self, kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> float:
        """What removing tokens takes, their importance included; 0 where none are removed."""
        asked = self.asked[work.received][kept.entering] if self.reduction and asks(kept, work) else 0.0
        return asked + sum(self.prices(kept, sized, work))

    def prices(self, kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> tuple[float, float]:
        """What removing tokens takes without their importance, in two parts: at all, and what merging adds to it."""
        if kept.merged == kept.entering or not self.reduction or work.free:
            return 0.0, 0.0
        terms = reduction_terms(kept, sized, work)
        parts = [weight * term for weight, term in zip(self.reduction, terms, strict=True)]
        merging = sum(parts[term] for term in MERGING_TERMS)
        return sum(parts) - merging, merging


def block_times(rows: Sequence[Any], read: int | None, knots: Sequence[int]) -> BlockTimes:
    """The times of one kind of block. A row is one block in one run: its tokens, whether they have sizes, the work of
    its rule, and the seconds of attention, reduction and MLP. `read` is as in `BlockTimes`."""
    kept, sized, works, attention, _, mlp = zip(*rows, strict=True)
    asked = [read is None and asks(one, work) for one, work in zip(kept, works, strict=True)]
    received = [one and work.received for one, work in zip(asked, works, strict=True)]
    flags = ([one and not other for one, other in zip(asked, received, strict=True)], received, sized)
    plain, (more, more_received, more_sized) = fit_curve([one.entering for one in kept], attention, knots, *flags)
    reducing = [row for row in rows if read is None and row[0].merged < row[0].entering]
    reduction: tuple[float, ...] = ()
    if reducing:
        reduction = fit_terms([reduction_terms(*row[:3]) for row in reducing], [row[4] for row in reducing])
    after = Curve((read,), (median(mlp),)) if read is not None else fit_curve([k.merged for k in kept], mlp, knots)[0]
    return BlockTimes(plain, more, more_received, more_sized, after, reduction, read)


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

    def steps(self, schedule: Schedule) -> Iterator[tuple[BlockTimes, Kept, bool, RuleWork]]:
        """The times of each block, its tokens, whether those that enter stand for several, and what its rule takes."""
        sized, counts = False, running_counts(schedule, self.tokens)
        for kept, kind, rule in zip(counts, self.order, schedule.rule_names, strict=False):
            yield self.kinds[kind], kept, sized, RULES[rule]
            sized = sized or kept.merged < kept.pruned

    def seconds(self, schedule: Schedule) -> float:
        """Of one image at `schedule`."""
        total, leaving = self.embedding, self.tokens
        for times, kept, sized, work in self.steps(schedule):
            total += times.seconds(kept, sized, work)
            leaving = kept.merged
        return (total + self.head[0] + self.head[1] * leaving) / self.batch_size

    def prices(self, schedule: Schedule) -> tuple[float, float]:
        """What the reductions of `schedule` take of its `seconds`: at all, and what merging adds to it."""
        prices = [times.prices(kept, sized, work) for times, kept, sized, work in self.steps(schedule)]
        return sum(going for going, _ in prices) / self.batch_size, sum(more for _, more in prices) / self.batch_size

    def repriced(self, going: float, merging: float) -> LatencyTable:
        """The same with the prices of reductions times `going`, and what merging adds to them times `merging`."""

        def reduction(weights: tuple[float, ...]) -> tuple[float, ...]:
            return tuple((merging if term in MERGING_TERMS else going) * part for term, part in enumerate(weights))

        return replace(self, kinds=tuple(replace(kind, reduction=reduction(kind.reduction)) for kind in self.kinds))
