"""BEiT and BEiT v2: a relative bias for each pair of positions, in each block or shared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from diffrate.blocks.positions import NO_POSITIONS, PairBias, Positions
from diffrate.patch.plain_vit import CompressedVit


class CompressedBeit(CompressedVit, Beit):
    """The bias belongs to pairs of positions: of the tokens that are left, each pair has its own."""

    cls_token: Any
    rel_pos_bias: Any

    @property
    def looks_up_places(self) -> bool:
        return any(_tables(block, self.rel_pos_bias) for block in self.blocks)

    def positions(self) -> Sequence[Positions]:
        tables = [_tables(block, self.rel_pos_bias) for block in self.blocks]
        return [PairBias(partial(_bias, found)) if found else NO_POSITIONS for found in tables]

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)


def _tables(block: Any, shared: nn.Module | None) -> list[Any]:
    """The modules whose tables of biases are added up in `block`."""
    return [item for item in (block.attn, shared) if getattr(item, "relative_position_bias_table", None) is not None]


def _bias(modules: Sequence[Any]) -> Tensor:
    """The bias of all pairs of positions, `[H, N0, N0]`."""
    biases = [item.relative_position_bias_table[item.relative_position_index] for item in modules]
    return torch.stack(biases).sum(0).permute(2, 0, 1)
