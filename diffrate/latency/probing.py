"""Which schedules to time so that every part of a block is seen at every number of tokens. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from diffrate.budgets.schedule import Schedule
from diffrate.budgets.space import SearchSpace

KNOTS = 56  # token counts to look at, at most: kernels move in steps of 16 or 32 rows


def knots(least: int, tokens: int) -> list[int]:
    """The token counts to look at, from the fewest to all."""
    step = max(1, -(-(tokens - least) // KNOTS))
    return sorted({*range(tokens, least, -step), least})


def probing_schedules(space: SearchSpace, rng: Random) -> Iterator[Schedule]:
    """Schedules without end. Each takes some of the knots in falling order, and blocks that leave their tokens whole
    between them; when all knots were taken it starts over, with others side by side.

    Up to a block drawn each time tokens are only pruned, so that there are whole sizes at few tokens, too.
    """
    blocks = len(space.searchable)
    levels: list[int] = []
    while True:
        steps = rng.randint(max(1, blocks // 3), max(1, 2 * blocks // 3))
        if len(levels) < steps:
            levels = knots(space.least, space.tokens - 1)
            rng.shuffle(levels)
        chosen, levels = sorted(levels[:steps], reverse=True), levels[steps:]
        reducing = sorted(rng.sample(range(blocks), len(chosen)))
        yield _assembled(space, dict(zip(reducing, chosen, strict=True)), rng.randint(-1, blocks), rng)


def random_schedule(space: SearchSpace, rng: Random) -> Schedule:
    """A schedule of any kind: few reductions or many, early or late, small or large."""
    blocks = len(space.searchable)
    count = rng.randint(1, blocks)
    least = rng.randint(space.least, max(space.least, space.tokens // 2))
    counts = sorted((rng.randint(least, space.tokens - 1) for _ in range(count)), reverse=True)
    reducing = dict(zip(sorted(rng.sample(range(blocks), count)), counts, strict=True))
    return _assembled(space, reducing, rng.choice((-1, blocks, rng.randrange(blocks))), rng)


def _assembled(space: SearchSpace, leaving: dict[int, int], merging: int, rng: Random) -> Schedule:
    """The schedule that leaves so many tokens in some of the searchable blocks: by pruning alone before block number
    `merging`, by merging from there on, with some pruning before it in every other block."""
    counts, before = [], space.tokens
    for block in range(len(space.searchable)):
        after = min(before, leaving.get(block, before))
        if space.prunes:
            pruned = rng.choice((before, rng.randint(after, before)))
            counts.append(after if block < merging else pruned)
        counts.append(after)
        before = after
    return space.schedule(counts)
