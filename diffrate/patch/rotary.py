"""Rotary angles of a model, block by block, and what models that have them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffrate.blocks.positions import Positions, Rotary, with_prefix
from diffrate.patch.plain_vit import CompressedVit


class RotaryVit(CompressedVit):
    """A ViT with a module for rotary embeddings, or none."""

    rope: Any

    def train_to_search(self) -> None:
        """Without the shifted angles of training, which evaluation never has."""
        super().train_to_search()
        if self.rope is not None:
            self.rope.eval()

    def turned_by(self, angles: Tensor | None) -> Sequence[Positions]:
        """What each block knows of positions, of sines and cosines of the grid's patches.

        `angles` are the same for all blocks, `[N, 2 D]`, or mixed: each block and head has its own,
        `[blocks, H, N, 2 D]`; None for no rotary embedding. The prefix tokens in front are not turned.
        """
        if angles is None:
            return self.no_positions()
        table = with_prefix(angles, self.num_prefix_tokens)
        tables = list(table) if table.ndim == 4 else [table] * len(self.blocks)
        # timm reads the layout off the attention, too: the rotary module does not always have it.
        halves = (bool(getattr(block.attn, "rotate_half", False)) for block in self.blocks)
        return [Rotary(own, half) for own, half in zip(tables, halves, strict=True)]
