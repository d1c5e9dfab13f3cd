"""Targets that users set for a schedule, and what they mean for one model; of FLOPs and of seconds alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

from diffrate.schedule import Schedule, SearchSpace, running_counts

BISECTIONS = 60
BELOW, ABOVE = 0.02, 0.005  # a schedule meets its target from -2 % to +0.5 %
FLOPS, SHARE, SPEEDUP, LATENCY = "target_flops", "share", "target_speedup", "target_latency"
WORDS = {FLOPS: " GFLOPs", SPEEDUP: "", LATENCY: " s"}  # behind a number
ADVICE = {  # what widens the reachable range
    FLOPS: "",
    SPEEDUP: "; a larger batch or input size gains more",
    LATENCY: "; a larger batch, a smaller input size or a lower precision takes less per image",
}

Cost = Callable[[Schedule], float]
Assemble = Callable[[Sequence[int]], Schedule]


class BudgetError(ValueError):
    """A target that is no number in its range, or that no schedule of the model meets."""


@dataclass(frozen=True)
class Target:
    """A number that a user sets, and its kind.

    kind: `target_flops`, multiply-accumulates of an image; `share`, of those of the dense model; `target_speedup`, how
    many times as fast as that; or `target_latency`, seconds of an image.

    Raises:
        BudgetError: names the kind.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if not hasattr(self.value, "__float__"):
            raise BudgetError(f"{self.kind}: found {self.value!r}; accepted: a number")
        if self.kind == SHARE and not 0 < self.value <= 1:
            raise BudgetError(f"share: found {self.value!r}; accepted: above 0 to 1, of the dense model's FLOPs")
        if self.timed and not 0 < self.value < math.inf:
            raise BudgetError(f"{self.kind}: found {self.value!r}; accepted: above 0")

    @property
    def timed(self) -> bool:
        """Whether the target is one of seconds."""
        return self.kind in (SPEEDUP, LATENCY)

    @property
    def gflops(self) -> float | None:
        """A target in FLOPs as the user wrote it in GFLOPs; None of other kinds."""
        return float(f"{self.value / 1e9:.15g}") if self.kind == FLOPS else None

    def __str__(self) -> str:
        if self.kind == SHARE:
            return f"{100 * self.value:g}%"
        return f"{self.value if self.timed else self.gflops:g}"


@dataclass(frozen=True)
class Budget:
    """A target for one model: a schedule may have a `cost` of `target`, in multiply-accumulates or seconds.

    kind: that of the user's target. whole: the cost of the dense model, which a speed-up needs.
    """

    cost: Cost
    target: float
    kind: str = FLOPS
    whole: float = 0.0

    @property
    def timed(self) -> bool:
        """Whether costs are seconds."""
        return self.kind != FLOPS

    def of(self, cost: float) -> float:
        """A cost in the unit of the target: GFLOPs, times as fast as dense, or seconds."""
        if self.kind == SPEEDUP:
            return self.whole / cost
        return cost if self.kind == LATENCY else cost / 1e9

    def check(self, space: SearchSpace) -> None:
        """Refuse a target out of reach, with a BudgetError that gives the range in reach."""
        least, most = self.cost(space.fewest()), self.cost(space.dense())
        if not least <= self.target <= most:
            low, high = sorted((self.of(least), self.of(most)))
            raise BudgetError(f"{self}: accepted: {low:.4g} to {high:.4g}{ADVICE[self.kind]}")

    def fitted(self, counts_at: Callable[[float], list[float]], end: float, assemble: Assemble, least: int) -> Schedule:
        """The schedule of a falling family of counts, `counts_at` 0 to `end`, that meets the target, none below
        `least`.

        Bisection finds the two neighbours around the target; where one step of the family changes several counts at
        once, they change one after the other.

        Raises:
            BudgetError: no whole counts meet it.
        """

        def whole(share: float) -> list[int]:
            return [max(least, math.ceil(count - 1e-9)) for count in counts_at(share)]

        def cost(counts: Sequence[int]) -> float:
            return self.cost(assemble(counts))

        low, high = 0.0, end  # cost above the target at `low`, unless that is the end; below at `high`
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(whole(middle)) > self.target else (low, middle)
        above, below = whole(low), whole(high)
        steps = [above[:position] + below[position:] for position in range(len(above) + 1)]
        best = min(steps, key=lambda counts: abs(cost(counts) - self.target))
        best = list(accumulate(best, min))  # the running minimum, so that every single change has an effect
        best = _polish(best, (least, max(whole(0))), cost, self.target)
        if not meets_budget(cost(best), self.target):
            raise BudgetError(f"{self}: the nearest schedule has {self.of(cost(best)):.4g}")
        return assemble(best)

    def rounded(self, expected: Sequence[float], space: SearchSpace) -> Schedule:
        """The schedule nearest to `expected` counts, one per choice, that meets the target, without reductions that
        cost more than they save. In multiply-accumulates there are no such reductions.

        Raises:
            BudgetError: no whole counts meet it.
        """
        schedule = self._scaled(expected, space)
        for _ in range(len(expected)):
            counts = choices_of(schedule, space)
            thrifty = without_waste(counts, space, self.cost)
            if thrifty == counts:
                break
            try:
                schedule = self._scaled(thrifty, space)
            except BudgetError:  # the reductions that are left do not meet the target: take the schedule before
                break
        return schedule

    def _scaled(self, expected: Sequence[float], space: SearchSpace) -> Schedule:
        """`expected` counts scaled to meet the target, towards all tokens or the fewest, every one by the same share of
        its way: so the blocks keep their order relative to each other, and every budget is reached."""

        def counts_at(share: float) -> list[float]:
            """From all tokens (0) over the expected ones (1) to the fewest (2)."""
            if share <= 1:
                return [space.tokens + share * (count - space.tokens) for count in expected]
            return [count + (share - 1) * (space.least - count) for count in expected]

        return self.fitted(counts_at, 2.0, space.schedule, space.least)

    def __str__(self) -> str:
        return f"{self.kind} {self.of(self.target):g}{WORDS[self.kind]}"


def choices_of(schedule: Schedule, space: SearchSpace) -> list[int]:
    """The tokens that are left after each choice of a schedule, never rising."""
    kept = running_counts(schedule, space.limits[0])
    return [kept[block].pruned if kind == "prune" else kept[block].merged for block, kind in space.choices]


def without_waste(counts: Sequence[int], space: SearchSpace, cost: Cost) -> list[int]:
    """The counts with every reduction switched off that costs more than it saves, the worst first: a choice alone, or
    both of a block, where one without the other would cost as much."""
    best, width = list(accumulate(counts, min)), len(space.kinds)
    least = cost(space.schedule(best))
    while True:
        trials = []
        for choice in range(len(best)):
            before = space.tokens if choice == 0 else best[choice - 1]
            for end in sorted({choice + 1} if choice % width else {choice + 1, choice + width}):
                trials.append([*best[:choice], *[before] * (end - choice), *best[end:]])
        trials = [trial for trial in trials if trial != best]
        costs = [cost(space.schedule(trial)) for trial in trials]
        if not costs or min(costs) >= least:
            return best
        least = min(costs)
        best = trials[costs.index(least)]


def meets_budget(found: float, target: float) -> bool:
    """Whether a cost is inside the band around its target."""
    return target * (1 - BELOW) <= found <= target * (1 + ABOVE)


def _polish(
    counts: list[int], limits: tuple[int, int], cost: Callable[[Sequence[int]], float], target: float
) -> list[int]:
    """Change one or two counts by one, within `limits`, while that brings the cost nearer to a target outside the
    band."""

    def distance(candidate: list[int]) -> tuple[float, float]:
        """How far outside the band, and, the same there, how far from the target."""
        found = cost(candidate)
        outside = max(0.0, target * (1 - BELOW) - found, found - target * (1 + ABOVE))
        return outside, abs(found - target)

    def neighbours(of: list[int]) -> list[list[int]]:
        changes = ((at, count + step) for at, count in enumerate(of) for step in (-1, 1))
        return [[*of[:at], count, *of[at + 1 :]] for at, count in changes if limits[0] <= count <= limits[1]]

    best = counts
    while not meets_budget(cost(best), target):
        single = neighbours(best)
        nearest = min(single, key=distance)
        if distance(nearest) >= distance(best):
            nearest = min((pair for one in single for pair in neighbours(one)), key=distance)
        if distance(nearest) >= distance(best):
            break
        best = nearest
    return best


PEERS = ("tome", "pitome")  # baselines by the names of their rules
BASELINES = ("prune", "merge", "both", "random", *PEERS)


def baseline_schedule(kind: str, space: SearchSpace, budget: Budget) -> Schedule:
    """The schedule `kind` that meets `budget`: of a constant keep ratio by the rule of `space`, with "random" by
    another; of the `PEERS` by their own rule, the same number in each block, but never more than half of the patches.

    Raises:
        BudgetError: the target cannot be met, or it prunes in a model that only merges.
    """
    if kind in PEERS:
        space = space.ruled(kind).every_block()
    elif not space.prunes and kind != "merge":
        raise BudgetError(f"baseline {kind}: this model only merges; accepted: {', '.join(('merge', *PEERS))}")
    elif kind == "random":
        space = space.ruled(kind)
    halves = 2 if kind == "both" else 1

    def counts_at(share: float) -> list[float]:
        """Tokens kept after each step of removal when each keeps `1 - share` of them, `halves` a block, or of peers
        when each takes a `share` of all."""
        left, counts = float(space.tokens), []
        if kind not in PEERS:
            ratio = (1 - share) ** (1 / halves)
            return [space.tokens * ratio**step for step in range(1, len(space.searchable) * halves + 1)]
        for _ in space.searchable:
            left -= min(share * space.tokens, (left - space.prefix) / 2)
            counts.append(left)
        return counts

    def assemble(kept: Sequence[int]) -> Schedule:
        if kind == "both" or not space.prunes:
            return space.schedule(kept)
        prunes = kind in ("prune", "random")
        return space.schedule([left for count in kept for left in (count if prunes else space.tokens, count)])

    return budget.fitted(counts_at, 0.5 if kind in PEERS else 1.0, assemble, space.least)


def uniform_schedules(space: SearchSpace, budget: Budget) -> dict[str, Schedule]:
    """Every uniform schedule that the model can run and that meets `budget`, by kind."""
    found = {}
    for kind in ("merge", "both", "prune") if space.prunes else ("merge",):
        with suppress(BudgetError):
            found[kind] = baseline_schedule(kind, space, budget)
    return found
