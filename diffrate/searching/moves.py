"""Schedules near a schedule, all of them on the budget: what a search at hard counts tries next.

A schedule is seen as one number per choice, the logarithm of the tokens before it over those after it. Any
such numbers that are scaled together until the cost is right make a schedule, so that a change in one place is
paid for in all others. What a schedule costs is a function of it, and nothing here knows what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from diffrate.budgets.budget import ABOVE, BELOW, Budget, Cost, choices_of, meets_budget
from diffrate.budgets.schedule import Schedule
from diffrate.budgets.space import SearchSpace
from diffrate.budgets.uniform import uniform_schedules

Counts = tuple[int, ...]
STEPS = (0.5, 0.2, 0.08)  # how far a change goes, in logarithms: large ones and small ones
LEAST_STEP = 1e-6  # between scales: far below one token
SPENT = 0.001  # of the budget that may be left over, kept below its upper end


class Moves:
    """The schedules of `space` that cost `target`.

    idle: the last searchable block is the model's last, and nothing of what it leaves is read but the prefix.
    Its tokens cost, and nothing is lost with them: they go, always.
    """

    def __init__(self, space: SearchSpace, cost: Cost, target: float, idle: bool) -> None:
        self.space, self.cost, self.target = space, cost, target
        self.width = len(space.kinds)
        self.choices = len(space.searchable) * self.width
        self.free = self.choices - (self.width if idle and len(space.searchable) > 1 else 0)

    def schedule(self, counts: Sequence[int]) -> Schedule:
        """The schedule of one count per choice."""
        return self.space.schedule(counts)

    def counts(self, schedule: Schedule) -> Counts:
        """What really happens at a schedule: one count per choice, never rising."""
        return tuple(choices_of(schedule, self.space))

    def uniform(self) -> dict[str, Schedule]:
        """The uniform schedules of the budget, by kind."""
        return uniform_schedules(self.space, Budget(self.cost, self.target))

    def fitted(self, schedule: Schedule, rng: Random) -> Counts | None:
        """`schedule` scaled onto the budget, or as it is where it alone meets it; None where neither does."""
        counts = self.counts(schedule)
        found = self._at(self._ratios(counts), rng)
        return counts if found is None and meets_budget(self._cost(counts), self.target) else found

    def stepped(self, rng: Random) -> Counts | None:
        """A schedule that removes tokens in one to three places, and keeps all that are left between them."""
        ratios = np.zeros(self.choices)
        for place in rng.sample(range(self.free), min(self.free, rng.choice((1, 2, 2, 3)))):
            ratios[place] = 0.2 + rng.expovariate(1)
        return self._at(ratios, rng)

    def changed(self, counts: Counts, rng: Random) -> Counts | None:
        """A schedule near the one of `counts`; None where the change drawn leads nowhere.

        A choice is switched off, or gives a part of what it removes to another one (pruning to merging in the same
        block, or from block to block), or removes more or less.
        """
        ratios = self._ratios(counts)
        for _ in range(rng.choice((1, 1, 2, 3))):
            here, kind = rng.randrange(self.free), rng.random()
            if kind < 0.2:
                ratios[here] = 0.0
            elif kind < 0.5:
                there = here ^ 1 if self.width == 2 and rng.random() < 0.5 else rng.randrange(self.free)
                part = ratios[here] * rng.choice((1.0, rng.random()))
                ratios[here] -= part
                ratios[there] += part
            else:
                ratios[here] = max(0.0, ratios[here] + rng.gauss(0, rng.choice(STEPS)))
        found = self._at(ratios, rng)
        return None if found == counts else found

    def features(self, counts: Counts) -> np.ndarray:
        """What the loss depends on, about linearly near a schedule: the tokens after each block, and what each choice
        removes, all as logarithms, `[F]`."""
        ratios = self._ratios(counts)[: self.free]
        return np.concatenate([np.cumsum(ratios)[self.width - 1 :: self.width], ratios])

    def groups(self) -> np.ndarray:
        """Which group each feature belongs to, `[F]`: tokens, then the kinds of choices."""
        choices = np.arange(self.free) % self.width + 1
        return np.concatenate([np.zeros(self.free // self.width, dtype=int), choices])

    def _ratios(self, counts: Counts) -> np.ndarray:
        there = np.array([self.space.tokens, *counts], dtype=np.float64)
        return np.log(there[:-1] / there[1:])

    def _at(self, ratios: np.ndarray, rng: Random) -> Counts | None:
        """Counts whose logarithms fall as `ratios` do, scaled onto the budget; None where none meet it."""
        falls = np.cumsum(ratios[: self.free])
        most = self.target * (1 + ABOVE - SPENT)
        if not falls[-1] > 0:
            return None
        low, high = 0.0, math.log(self.space.tokens) / falls[falls > 0][0] + 1
        if self._cost(self._scaled(falls, high)) > most:
            return None
        above, below = self._scaled(falls, low), self._scaled(falls, high)
        while above != below and high - low > LEAST_STEP:
            middle = (low + high) / 2
            counts = self._scaled(falls, middle)
            if self._cost(counts) > most:
                low, above = middle, counts
            else:
                high, below = middle, counts
        counts = self._filled(self._scaled(falls, high), most, rng)
        return tuple(counts) if self._cost(counts) >= self.target * (1 - BELOW) else None

    def _scaled(self, falls: np.ndarray, scale: float) -> list[int]:
        tokens = self.space.tokens * np.exp(-np.minimum(scale * falls, 50.0))
        kept = np.clip(np.ceil(tokens - 0.5), self.space.least, self.space.tokens).astype(int).tolist()
        return kept + [self.space.least] * (self.choices - self.free)

    def _filled(self, counts: list[int], most: float, rng: Random) -> list[int]:
        """The same with single tokens added, in places drawn, while they fit."""
        places = list(range(self.free))
        rng.shuffle(places)
        for place in places:
            limit = self.space.tokens if place == 0 else counts[place - 1]
            if counts[place] < limit:
                more = [*counts[:place], counts[place] + 1, *counts[place + 1 :]]
                if self._cost(more) <= most:
                    counts = more
        return counts

    def _cost(self, counts: Sequence[int]) -> float:
        return self.cost(self.space.schedule(counts))
