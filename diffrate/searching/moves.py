"""The schedules of a budget, as counts of tokens and rules by number; and ways from one to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from diffrate.budget import ABOVE, BELOW, Cost, choices_of, meets_budget
from diffrate.schedule import PUBLISHED, Schedule, SearchSpace

Counts = tuple[int, ...]  # one per choice; where there are rules to choose among, then the number of each block's
STEPS = (0.5, 0.2, 0.08)  # how far a change goes, in logarithms: large ones and small ones
LEAST_STEP = 1e-6  # between scales: far below one token
RULED, RULED_ALL = 0.2, 0.25  # of changes are of a rule; of these are of the rule of all blocks
SPENT = 0.001  # of the budget that may be left over, kept below its upper end


class Moves:
    """The schedules of `space` that cost `target`, with one of `rules` in each block.

    idle: the last searchable block is the model's last, and nothing of what it leaves is read but the prefix.
    Its tokens cost, and nothing is lost with them: they go, always.
    """

    def __init__(self, space: SearchSpace, cost: Cost, target: float, idle: bool, rules: Sequence[str]) -> None:
        self.space, self.cost, self.target, self.rules = space.ruled(rules[0]), cost, target, tuple(rules)
        self.width = len(space.kinds)
        self.choices = len(space.searchable) * self.width
        self.free = self.choices - (self.width if idle and len(space.searchable) > 1 else 0)

    def schedule(self, counts: Sequence[int]) -> Schedule:
        """The schedule of one count per choice, and of the rules."""
        return self._ruled(counts[self.choices :]).schedule(counts[: self.choices])

    def _ruled(self, rules: Sequence[int]) -> SearchSpace:
        if not rules:
            return self.space
        names = [PUBLISHED] * len(self.space.limits)
        for block, rule in zip(self.space.searchable, rules, strict=True):
            names[block] = self.rules[rule]
        return self.space.ruled(names)

    def counts(self, schedule: Schedule) -> Counts:
        """What really happens at a schedule: one count per choice, never rising; and its rules, the first of those in
        play where it has another."""
        counts, names = choices_of(schedule, self.space), schedule.rule_names
        if len(self.rules) > 1:
            counts += [self.rules.index(names[b]) if names[b] in self.rules else 0 for b in self.space.searchable]
        return tuple(counts)

    def fitted(self, schedule: Schedule, rng: Random) -> Counts | None:
        """`schedule` scaled onto the budget, or as it is where it alone meets it; None where neither does."""
        counts = self.counts(schedule)
        found = self._at(self._ratios(counts), counts[self.choices :], rng)
        return counts if found is None and meets_budget(self.cost(self.schedule(counts)), self.target) else found

    def stepped(self, rng: Random) -> Counts | None:
        """A schedule that removes tokens at one to three choices, and keeps all that are left between them."""
        ratios = np.zeros(self.choices)
        for choice in rng.sample(range(self.free), min(self.free, rng.choice((1, 2, 2, 3)))):
            ratios[choice] = 0.2 + rng.expovariate(1)
        rules = [rng.randrange(len(self.rules))] * len(self.space.searchable) if len(self.rules) > 1 else []
        return self._at(ratios, rules, rng)

    def changed(self, counts: Counts, rng: Random) -> Counts | None:
        """A schedule near the one of `counts`; None where the change drawn leads nowhere.

        A choice is switched off, or gives a part of what it removes to another one (pruning to merging in the same
        block, or from block to block), or removes more or less, or another rule is taken.
        """
        ratios, rules = self._ratios(counts), list(counts[self.choices :])
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rules and rng.random() < RULED:
                rule, alone = rng.randrange(len(self.rules)), rng.random() < 1 - RULED_ALL
                here = rng.randrange(self.free) // self.width
                rules = [rule if there == here or not alone else old for there, old in enumerate(rules)]
                continue
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
        found = self._at(ratios, rules, rng)
        return None if found == counts else found

    def features(self, rows: Sequence[Counts]) -> np.ndarray:
        """What the loss depends on, about linearly near a schedule: the tokens after each block, what each choice
        removes, and what is merged by each rule but the first, all as logarithms, `[M, F]`."""
        counts, last = np.array(rows), self.width - 1
        ratios = self._ratios(counts)[:, : self.free]
        merged = ratios[:, last :: self.width]
        rules = counts[:, self.choices : self.choices + merged.shape[1]]
        by_rule = [np.where(rules == rule, merged, 0.0) for rule in range(1, len(self.rules))]
        return np.concatenate([np.cumsum(ratios, axis=1)[:, last :: self.width], ratios, *by_rule], axis=1)

    def groups(self) -> np.ndarray:
        """Which group each feature belongs to, `[F]`: tokens, then the kinds of choices, then rules."""
        choices, blocks = np.arange(self.free) % self.width + 1, self.free // self.width
        rules = np.full(blocks * (len(self.rules) - 1), self.width + 1)
        return np.concatenate([np.zeros(blocks, dtype=int), choices, rules])

    def _ratios(self, counts: Counts | np.ndarray) -> np.ndarray:
        there = np.insert(np.asarray(counts, dtype=np.float64)[..., : self.choices], 0, self.space.tokens, axis=-1)
        return np.log(there[..., :-1] / there[..., 1:])

    def _at(self, ratios: np.ndarray, rules: Sequence[int], rng: Random) -> Counts | None:
        """Counts whose logarithms fall as `ratios` do, scaled onto the budget, and `rules`; None where none meet it.

        Single tokens are added, at choices drawn, while they fit.
        """
        falls = np.cumsum(ratios[: self.free])
        if not falls[-1] > 0:
            return None
        space, most = self._ruled(rules), self.target * (1 + ABOVE - SPENT)

        def cost(kept: Sequence[int]) -> float:
            return self.cost(space.schedule(kept))

        def scaled(scale: float) -> list[int]:
            tokens = space.tokens * np.exp(-np.minimum(scale * falls, 50.0))
            kept = np.clip(np.ceil(tokens - 0.5), space.least, space.tokens).astype(int).tolist()
            return kept + [space.least] * (self.choices - self.free)

        low, high = 0.0, math.log(space.tokens) / falls[falls > 0][0] + 1
        above, below = scaled(low), scaled(high)
        if cost(below) > most:
            return None
        while above != below and high - low > LEAST_STEP:
            middle = (low + high) / 2
            counts = scaled(middle)
            if cost(counts) > most:
                low, above = middle, counts
            else:
                high, below = middle, counts
        choices = list(range(self.free))
        rng.shuffle(choices)
        for choice in choices:
            more = [*below[:choice], below[choice] + 1, *below[choice + 1 :]]
            if below[choice] < (below[choice - 1] if choice else space.tokens) and cost(more) <= most:
                below = more
        return (*below, *rules) if cost(below) >= self.target * (1 - BELOW) else None
