"""The tokens on their way through a model: a value handed on from block to block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenState(NamedTuple):
    """Tokens between two blocks.

    x: features, `[B, N, C]`.
    size: how many input tokens each token stands for, `[B, N]`; None while all stand for one.
    mask: 1 for tokens that are there and 0 for those that search has removed, `[B, N]`, carrying the
        gradient to the rates; None where tokens are really dropped.
    origin: the position in `x` of the token that stands for each input token, -1 where it was
        pruned, `[B, N0]`; None when nobody asked for it.
    """

    x: Tensor
    size: Tensor | None = None
    mask: Tensor | None = None
    origin: Tensor | None = None

    def sizes(self) -> Tensor:
        """`size` with the ones written out, `[B, N]`."""
        if self.size is not None:
            return self.size
        return torch.ones(self.x.shape[:2], dtype=size_dtype(self.x), device=self.x.device)

    def traced(self) -> TokenState:
        """The same tokens, each its own origin: from here on every reduction is followed."""
        batch, tokens, _ = self.x.shape
        return self._replace(origin=torch.arange(tokens, device=self.x.device).expand(batch, tokens))


def size_dtype(x: Tensor) -> torch.dtype:
    """Sizes stay in float32 beside half-precision features: bfloat16 cannot tell 256 from 257."""
    return torch.promote_types(x.dtype, torch.float32)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `[B, K]` of `values` `[B, N]` or `[B, N, C]`."""
    if values.ndim == 2:
        return values.gather(1, index)
    # Whole rows are copied at once, where gather would look up each of their elements.
    batch, tokens, width = values.shape
    first = torch.arange(0, batch * tokens, tokens, device=index.device)
    rows = (index + first[:, None]).flatten()
    return values.reshape(batch * tokens, width).index_select(0, rows).reshape(batch, index.shape[1], width)


def follow(origin: Tensor, moved: Tensor) -> Tensor:
    """Origins `[B, N0]` after token i went to position `moved[:, i]` (`[B, N]`, -1 when removed)."""
    return torch.where(origin >= 0, moved.gather(1, origin.clamp(min=0)), origin)
