"""What belongs to a position in the image goes with the token: rotary angles, and biases of pairs.

Each token knows the input position that it comes from (`TokenState.place`), through pruning, sorting
and merging; a merged token has that of its destination. A block's attention looks up there what its
model keeps for positions. Learned embeddings are in the features from the start, and need nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from diffrate.blocks.attention import Heads
from diffrate.blocks.tokens import replaced


class Positions:
    """Nothing is known of positions: of models whose embeddings are in the features."""

    def turn(self, heads: Heads, place: Tensor | None) -> Heads:
        """Queries and keys turned by the angles of their places `[B or 1, N]` (RoPE)."""
        return heads

    def pairs(self, place: Tensor | None) -> Tensor | None:
        """What is added to the scores of each pair of tokens, `[B or 1, H, N, N]`; None for nothing."""
        return None


@dataclass(frozen=True, eq=False)
class Rotary(Positions):
    """Angles of every input position: `table` has their sines, then their cosines, `[N0, 2 D]`, or `[H, N0, 2 D]`
    where heads differ; `half` is timm's name for the layout in which the first half of the channels turns
    with the second, not each with its neighbour."""

    table: Tensor
    half: bool

    def turn(self, heads: Heads, place: Tensor | None) -> Heads:
        assert place is not None
        table = self.table[place] if self.table.ndim == 2 else self.table[:, place].transpose(0, 1)
        angles = table if table.ndim == 4 else table[:, None]  # [B, 1 or H, N, 2 D]
        query, key = (apply_rot_embed_cat(item, angles, half=self.half) for item in (heads.query, heads.key))
        return replaced(heads, query=query.type_as(heads.value), key=key.type_as(heads.value))


@dataclass(frozen=True, eq=False)
class PairBias(Positions):
    """A bias of every pair of input positions: `table()` makes it when it is needed, `[H, N0, N0]`, since those
    of all blocks together are large. Rows ask and columns are seen."""

    table: Callable[[], Tensor]

    def pairs(self, place: Tensor | None) -> Tensor | None:
        assert place is not None
        table = self.table()
        pair = place[:, :, None] * table.shape[-1] + place[:, None, :]
        found = table.flatten(1).index_select(1, pair.flatten())
        return found.unflatten(1, pair.shape).transpose(0, 1)


NO_POSITIONS = Positions()


def with_prefix(table: Tensor, prefix: int) -> Tensor:
    """A table of sines and cosines `[..., N, 2 D]` with `prefix` tokens in front that are not turned."""
    if not prefix:
        return table
    sines, cosines = torch.zeros_like(table[..., :prefix, :]).chunk(2, dim=-1)
    return torch.cat([torch.cat([sines, cosines + 1], dim=-1), table], dim=-2)
