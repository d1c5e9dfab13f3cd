"""How a family reduces tokens, where families differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from diffrate.blocks.tokens import TokenState
from diffrate.budgets.schedule import Kept


class Reduction(Protocol):
    """Another way to let tokens go, with the same results."""

    def __call__(self, rules: ReductionRules, state: TokenState, importance: Tensor, kept: Kept) -> TokenState | None:
        """The tokens that are left by `importance` `[B, N - prefix]`; None for tokens that it is not for."""
        ...


@dataclass(frozen=True)
class ReductionRules:
    """How a family reduces tokens.

    prefix: the first tokens, which are never removed: class, distillation, registers.
    speakers: how many of them, from the first, say how important the others are: by their attention,
        the mean over them. With 0 it is the attention that a token receives from all that are there.
    spared: the first tokens that none is merged into, the prefix at least, when the others are in order
        of importance.
    weigh_by_similarity: a merged token counts for its size times its cosine, else for its size.
    removed_speak: in search, tokens that are removed go on being asked (the published search of CAFormer).
    random: any tokens go, whatever their importance (a baseline, drawn from torch's generator).
    compiled: what is asked first to let tokens go (`diffrate.compile_merging`); None for nothing.
    """

    prefix: int
    speakers: int
    spared: int
    weigh_by_similarity: bool
    removed_speak: bool = False
    random: bool = False
    compiled: Reduction | None = field(default=None, compare=False, repr=False)
