"""What a family lets the search choose, and how counts in the search's order make a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffrate.budgets.schedule import Schedule

GRANULARITY = 4  # tokens between the candidates of a count, as published


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a model.

    limits: the most tokens of each block of a schedule, prefix included.
    searchable: the blocks with choices; the others stay whole.
    prunes: whether each has a pruning choice before its merging choice.
    prefix: the first tokens, which always stay: class, distillation, registers.
    least: the fewest tokens that a block may keep: the prefix, and one more where no class token is in it.
    """

    limits: tuple[int, ...]
    searchable: tuple[int, ...]
    prunes: bool
    prefix: int
    least: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The choices of a block, in order."""
        return ("prune", "merge") if self.prunes else ("merge",)

    @property
    def choices(self) -> list[tuple[int, str]]:
        """The block and the kind of every choice, in order."""
        return [(block, kind) for block in self.searchable for kind in self.kinds]

    @property
    def tokens(self) -> int:
        """Tokens that enter a searchable block when nothing was removed."""
        return self.limits[self.searchable[0]]

    def dense(self) -> Schedule:
        """The schedule that removes nothing."""
        return Schedule(self.limits if self.prunes else None, self.limits, self.limits[0])

    def fewest(self) -> Schedule:
        """The schedule that removes all that it may."""
        return self.schedule([self.least] * len(self.choices))

    def schedule(self, counts: Sequence[int]) -> Schedule:
        """The schedule of one count per choice, in block order, prune before merge."""
        rows = {kind: list(self.limits) for kind in self.kinds}
        for (block, kind), count in zip(self.choices, counts, strict=True):
            rows[kind][block] = count
        return Schedule(tuple(rows["prune"]) if self.prunes else None, tuple(rows["merge"]), self.limits[0])
