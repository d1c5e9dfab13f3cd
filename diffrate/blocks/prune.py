"""Pruning: keep the most important tokens (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffrate.blocks.tokens import TokenState, follow, take


def most_important(importance: Tensor, kept: int, class_token: bool) -> Tensor:
    """Positions `[B, kept]` of the most important of N tokens, in falling order.

    With `class_token`, `importance` `[B, N - 1]` leaves the class token out and it comes first;
    else `importance` is `[B, N]`.
    """
    if not class_token:
        return importance.topk(kept, dim=1).indices
    others = importance.topk(kept - 1, dim=1).indices + 1
    return torch.cat([others.new_zeros(others.shape[0], 1), others], dim=1)


def keep_tokens(state: TokenState, index: Tensor) -> TokenState:
    """The tokens at `index` `[B, K]`, in that order; the others are pruned."""
    origin = state.origin
    if origin is not None:
        moved = torch.full(state.x.shape[:2], -1, device=index.device)
        positions = torch.arange(index.shape[1], device=index.device).expand_as(index)
        origin = follow(origin, moved.scatter(1, index, positions))
    size = None if state.size is None else take(state.size, index)
    return TokenState(take(state.x, index), size, origin=origin)
