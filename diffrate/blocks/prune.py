"""Pruning: keep the most important tokens (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.tokens import TokenState, moved, take


def most_important(importance: Tensor, kept: int, prefix: int) -> Tensor:
    """Positions `[B, kept]` of the tokens to keep: the first `prefix`, then the most important of the others.

    `importance` `[B, N - prefix]` leaves the prefix out; the others come in falling order.
    """
    others = importance.topk(kept - prefix, dim=1).indices
    if not prefix:
        return others
    if prefix == 1:
        return F.pad(others + 1, (1, 0))
    first = torch.arange(prefix, device=others.device).expand(others.shape[0], prefix)
    return torch.cat([first, others + prefix], dim=1)


def keep_tokens(state: TokenState, index: Tensor) -> TokenState:
    """The tokens at `index` `[B, K]`, in that order; the others are pruned."""
    size = None if state.size is None else take(state.size, index)
    place = None if state.place is None else take(state.place, index)
    kept = TokenState(take(state.x, index), size, place=place)
    if state.origin is None:
        return kept
    return moved(state, kept, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
