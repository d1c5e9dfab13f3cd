"""From timed runs to what each part of a block costs at any number of tokens. No torch here.

All parts are fitted at once to all samples of a kind of block, by least squares of relative errors in which
outliers count less. Times over tokens are piecewise linear and never fall; what a reduction adds is linear in
the rows that it moves and in the pairs that it compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import lsq_linear

from diffrate.budgets.schedule import Kept

REWEIGHTED = 6  # times
OUTLIER = 2.0  # median deviations, from which on samples count less
SAMPLES_A_KNOT = 4.0  # at least, in the mean
BELIEVED = (0.5, 3.0)  # of a factor on a price
DOUBT = 0.02  # of a whole run's time, that a factor of 2 is believed at


class Curve(NamedTuple):
    """Seconds over tokens: linear between knots, and never falling."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds at numbers of tokens, `[...]`; the ends go on as they are."""
        return np.interp(tokens, self.tokens, self.seconds)


class AttentionTimes(NamedTuple):
    """A batch's attention over the tokens that enter: plain, what it takes more where their importance is `asked`
    for, and where they are `sized`; both as coefficients of 1, N and N^2."""

    plain: Curve
    asked: tuple[float, ...]
    sized: tuple[float, ...]


class AttentionSample(NamedTuple):
    """One measurement of it."""

    tokens: int
    asked: bool
    sized: bool
    seconds: float


def fit_curve(tokens: Sequence[int], seconds: Sequence[float], knots: Sequence[int]) -> Curve:
    """The curve through samples at numbers of `tokens`, with as many of the `knots` as samples suffice for."""
    counts = np.asarray(tokens)
    chosen = _thinned(knots, len(counts), len(set(tokens)))
    weights = _fitted(_rising(counts, chosen), np.asarray(seconds), len(chosen))
    return Curve(tuple(chosen), tuple(np.cumsum(weights).tolist()))


def fit_attention(samples: Sequence[AttentionSample], knots: Sequence[int]) -> AttentionTimes:
    """Attention's times of samples of all kinds."""
    counts = np.array([sample.tokens for sample in samples])
    chosen = _thinned(knots, len(samples), len(set(counts.tolist())))
    extras = []
    for flag in ("asked", "sized"):
        there = np.array([float(getattr(sample, flag)) for sample in samples])
        extras.append(there[:, None] * powers(counts))
    columns = np.concatenate([_rising(counts, chosen), *extras], axis=1)
    weights = _fitted(columns, np.array([sample.seconds for sample in samples]), len(chosen))
    plain, asked, sized = np.split(weights, [len(chosen), len(chosen) + 3])
    return AttentionTimes(
        Curve(tuple(chosen), tuple(np.cumsum(plain).tolist())), tuple(asked.tolist()), tuple(sized.tolist())
    )


def powers(tokens: np.ndarray) -> np.ndarray:
    """1, N and N^2 of numbers of tokens `[...]`, as `[..., 3]`."""
    counts = np.asarray(tokens, dtype=np.float64)
    return np.stack([np.ones_like(counts), counts, counts**2], axis=-1)


MERGING_TERMS = range(3, 6)  # of those of a reduction's price


def reduction_terms(kept: Kept, sized: bool) -> list[float]:
    """What a block's reduction depends on: that it is there at all, the rows that come and that stay after pruning;
    where it merges, that it does, the tokens before, and the pairs of sources and destinations; and sizes."""
    merges = kept.merged < kept.pruned
    pairs = (kept.pruned - kept.merged) * kept.merged
    pruning = [1.0, float(kept.entering), float(kept.pruned)]
    return [
        *pruning,
        *([1.0, float(kept.pruned), float(pairs)] if merges else [0.0] * len(MERGING_TERMS)),
        float(sized),
    ]


def fit_reduction(kept: Sequence[Kept], sized: Sequence[bool], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of `reduction_terms`, none below 0."""
    columns = np.array([reduction_terms(*pair) for pair in zip(kept, sized, strict=True)])
    return tuple(_fitted(columns, np.asarray(seconds), columns.shape[1]).tolist())


def fit_prices(
    rest: Sequence[float], going: Sequence[float], merging: Sequence[float], taken: Sequence[float]
) -> tuple[float, float]:
    """By how much the price of letting tokens go, and what merging adds to it, are to be multiplied so that with the
    `rest` they come to the seconds `taken` by whole runs: two factors, 1 as far as the runs do not say otherwise."""
    whole = np.asarray(taken, dtype=np.float64)
    columns = np.stack([going, merging], axis=1) / whole[:, None]
    doubt = DOUBT * np.eye(2)
    found = lsq_linear(
        np.concatenate([columns, doubt]),
        np.concatenate([1 - np.asarray(rest) / whole, doubt.sum(axis=0)]),
        bounds=BELIEVED,
        method="bvls",
    )
    return float(found.x[0]), float(found.x[1])


def fit_line(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Constant and slope over numbers of tokens, none below 0."""
    columns = np.stack([np.ones(len(tokens)), np.asarray(tokens, dtype=np.float64)], axis=1)
    constant, slope = _fitted(columns, np.asarray(seconds), 2).tolist()
    return constant, slope


def _rising(tokens: np.ndarray, knots: Sequence[int]) -> np.ndarray:
    """For weights that are the steps from knot to knot: `[S, K]`, rows sum up to what is reached at each sample."""
    places = np.interp(tokens, knots, np.arange(len(knots)))
    return np.clip(places[:, None] - np.arange(len(knots)) + 1, 0, 1)


def _thinned(knots: Sequence[int], samples: int, different: int) -> list[int]:
    """As many of the knots, at even steps, as there are samples for; the ends at least."""
    wanted = max(1, min(len(knots), different, int(samples / SAMPLES_A_KNOT)))
    return [knots[round(place)] for place in np.linspace(0, len(knots) - 1, wanted)] if wanted > 1 else [knots[-1]]


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
