"""How a family reduces tokens, where families differ."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    prefix: int
    speakers: int
    spared: int
    weigh_by_similarity: bool
    removed_speak: bool = False
    random: bool = False
