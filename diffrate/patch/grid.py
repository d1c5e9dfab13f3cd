"""Back to the full grid: what dense heads, and convolutions, read of a compressed model."""

from __future__ import annotations

import torch
from torch import Tensor

from diffrate.blocks.tokens import TokenState, standing


def restore(state: TokenState) -> Tensor:
    """Features for every input position `[B, N0, C]`: those of the token that stands for it.

    Where none does, the position was pruned: it gets what it last was, or zeros where nobody asked to
    remember. In search tokens are still in place: a masked one gives way to the one that stands for it
    by the share that its mask says, and so passes on how much its own features were worth.
    """
    if state.origin is None:
        return state.x
    found = standing(state.x, state.origin)
    if state.last is not None:
        found = torch.where(state.origin[:, :, None] >= 0, found, state.last)
    if state.mask is None:
        return found
    return torch.lerp(found, state.x, state.mask.to(state.x.dtype).unsqueeze(-1))


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, N, C]` as `[B, C, rows, columns]`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
