"""How a family reduces tokens, where families differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from diffrate.blocks.tokens import TokenState
from diffrate.budgets.schedule import Kept


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
    compiled: what is asked first to let tokens go, with the same results (`diffrate.compile_merging`): it returns those
        that are left by their importance, or None for tokens that it is not for; None where nothing is asked first.
    """

    prefix: int
    speakers: int
    spared: int
    weigh_by_similarity: bool
    removed_speak: bool = False
    random: bool = False
    compiled: Callable[[ReductionRules, TokenState, Tensor, Kept], TokenState | None] | None = field(
        default=None, compare=False, repr=False
    )
