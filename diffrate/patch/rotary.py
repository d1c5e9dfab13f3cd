"""Rotary angles of a model, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from diffrate.blocks.positions import Rotary, with_prefix


def rotary_positions(angles: Tensor, blocks: Iterable[Any], prefix: int) -> list[Rotary]:
    """What each of `blocks` knows of positions, of sines and cosines of the grid's patches.

    `angles` are the same for all blocks, `[N, 2 D]`, or mixed: each block and head has its own, `[blocks, H, N, 2 D]`.
    The `prefix` tokens in front are not turned.
    """
    table = with_prefix(angles, prefix)
    blocks = list(blocks)
    tables = list(table) if table.ndim == 4 else [table] * len(blocks)
    # timm reads the layout off the attention, too: the rotary module does not always have it.
    halves = (bool(getattr(block.attn, "rotate_half", False)) for block in blocks)
    return [Rotary(own, half) for own, half in zip(tables, halves, strict=True)]
