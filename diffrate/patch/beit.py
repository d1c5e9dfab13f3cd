"""BEiT and BEiT v2: a relative bias for each pair of positions, in each block or shared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor

from diffrate.blocks.positions import NO_POSITIONS, PairBias, Positions
from diffrate.patch.plain_vit import CompressedVit


class CompressedBeit(CompressedVit, Beit):
    """The bias belongs to pairs of positions: of the tokens that are left, each pair has its own."""

    cls_token: Any
    rel_pos_bias: Any

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return x, [_positions(block.attn, shared) for block in self.blocks]


def _positions(attention: Any, shared: Tensor | None) -> Positions:
    """The bias of one block: its own, the `shared` one `[H, N0, N0]`, both added up, or none."""
    own = attention.relative_position_bias_table is not None
    if not own and shared is None:
        return NO_POSITIONS
    return PairBias(partial(_bias, attention if own else None, shared))


def _bias(attention: Any | None, shared: Tensor | None) -> Tensor:
    """The bias of all pairs of positions, `[H, N0, N0]`."""
    if attention is None:
        assert shared is not None
        return shared
    own = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
    return own if shared is None else own + shared
