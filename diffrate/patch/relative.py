"""timm's VisionTransformerRelPos: a relative bias for each pair of positions, from a table or a small network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor

from diffrate.blocks.positions import PairBias, Positions
from diffrate.patch.plain_vit import CompressedVit
from diffrate.patch.shapes import weights
from diffrate.patch.sizes import Size


class CompressedRelPos(CompressedVit, VisionTransformerRelPos):
    """The bias belongs to pairs of positions: of the tokens that are left, each pair has its own."""

    shared_rel_pos: Any

    def train_to_search(self) -> None:
        """Without the dropout of the networks that make biases."""
        super().train_to_search()
        for maker in self._makers():
            maker.eval()

    def _makers(self) -> set[Any]:
        """What makes the biases: a module for each block, or one for all."""
        return {block.attn.rel_pos or self.shared_rel_pos for block in self.blocks}

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.shared_rel_pos is None:
            return x, [PairBias(partial(_bias, block.attn.rel_pos)) for block in self.blocks]
        shared = _bias(self.shared_rel_pos)
        return x, [PairBias(lambda: shared)] * len(self.blocks)

    def embedding_flops(self, size: Size) -> int:
        """The networks that make biases are counted here: they run once for all tokens."""
        return super().embedding_flops(size) + sum(map(_network_flops, self._makers()))


def _bias(maker: Any) -> Tensor:
    """The bias of all pairs of positions, `[H, N0, N0]`."""
    return maker.get_bias()[0]


def _network_flops(maker: Any) -> int:
    """Multiply-accumulates of making biases: a network runs on each distance that there is, a table costs nothing."""
    coordinates = getattr(maker, "rel_coords_log", None)
    return 0 if coordinates is None else coordinates.shape[:-1].numel() * weights(maker.mlp)
