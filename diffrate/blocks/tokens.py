"""The tokens on their way through a model: a value handed on from block to block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Values = TypeVar("Values", bound=tuple[Any, ...])


def replaced(values: Values, **parts: Any) -> Values:
    """The named tuple `values` with other `parts`: its `_replace`, which torch compiles from 2.7 on only."""
    kind: Any = type(values)
    return kind(**{**dict(zip(kind._fields, values, strict=True)), **parts})


class TokenState(NamedTuple):
    """Tokens between two blocks.

    x: features, `[B, N, C]`.
    size: how many input tokens each token stands for, `[B, N]`; None while all stand for one.
    mask: 1 for tokens that are there and 0 for those that search has removed, `[B, N]`, carrying the
        gradient to the rates; None where tokens are really dropped.
    origin: the position in `x` of the token that stands for each input token, -1 where it was
        pruned, `[B, N0]`; None when nobody asked for it.
    place: the input position that each token comes from, `[B, N]`, or `[1, N]` while all images have
        the same. What belongs to a position (rotary angles, relative bias) is looked up by it, and so
        goes with the token; a merged token has the place of its destination. None when nobody asked.
    last: features of each input token when it was pruned, `[B, N0, C]`; None when nobody asked.
    """

    x: Tensor
    size: Tensor | None = None
    mask: Tensor | None = None
    origin: Tensor | None = None
    place: Tensor | None = None
    last: Tensor | None = None

    def sizes(self) -> Tensor:
        """`size` with the ones written out, `[B, N]`."""
        if self.size is not None:
            return self.size
        return torch.ones(self.x.shape[:2], dtype=size_dtype(self.x), device=self.x.device)

    def traced(self) -> TokenState:
        """The same tokens, each its own origin: from here on every reduction is followed."""
        batch, tokens, _ = self.x.shape
        return replaced(self, origin=torch.arange(tokens, device=self.x.device).expand(batch, tokens))

    def masked(self) -> TokenState:
        """The same tokens as they enter a search: with a mask that says that all of them are there."""
        return replaced(self, mask=torch.ones(self.x.shape[:2], dtype=size_dtype(self.x), device=self.x.device))

    def placed(self) -> TokenState:
        """The same tokens, each at its own place: from here on places go with them."""
        return replaced(self, place=torch.arange(self.x.shape[1], device=self.x.device)[None])

    def remembered(self) -> TokenState:
        """The same tokens, traced: from here on what pruned tokens last were is kept."""
        return replaced(self.traced(), last=torch.zeros_like(self.x))


def size_dtype(x: Tensor) -> torch.dtype:
    """Sizes stay in float32 beside half-precision features: bfloat16 cannot tell 256 from 257."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def precise(x: Tensor) -> Tensor:
    """`x` in `size_dtype`: itself where it is."""
    return x if x.dtype == size_dtype(x) else x.to(size_dtype(x))


def alone(values: Tensor) -> bool:
    """Whether there is one image, `[1, ...]`: then views do where batches need copies or sums of indices. Never in a
    graph, which is for batches of any size."""
    return not in_graph() and values.shape[0] == 1


def in_graph() -> bool:
    """Whether operations are recorded for a graph: compiled, exported, or traced by `torch.jit.trace`.

    A choice by the batch size would be part of the graph, and wrong for other batches.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]


def autocasts(device_type: str) -> bool:
    """Whether products would be taken in half precision."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # the meta device knows none


def uncast(product: Callable[..., Tensor], *factors: Tensor, **options: Any) -> Tensor:
    """`product` of `factors` in their precision, under autocast, too."""
    kind = factors[0].device.type
    if not autocasts(kind):
        return product(*factors, **options)
    with torch.autocast(kind, enabled=False):
        return product(*factors, **options)


def rows_of(index: Tensor, tokens: int) -> Tensor:
    """Positions `[B, K]` of each image's `tokens` as rows of all images together."""
    if alone(index):
        return index
    return index + torch.arange(index.shape[0], device=index.device)[:, None] * tokens


def take(values: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` `[B, K]` of `values` `[B, N]`, `[1, N]` or `[B, N, C]`."""
    if values.ndim == 2:
        return values.expand(index.shape[0], -1).gather(1, index)
    if alone(index):
        return values.index_select(1, index.select(0, 0))
    # Whole rows are copied at once, where gather would look up each of their elements.
    return F.embedding(rows_of(index, values.shape[1]), values.flatten(0, 1))


def follow(origin: Tensor, moved: Tensor) -> Tensor:
    """Origins `[B, N0]` after token i went to position `moved[:, i]` (`[B, N]`, -1 when removed)."""
    return torch.where(origin >= 0, moved.gather(1, origin.clamp(min=0)), origin)


def followed(before: TokenState, after: TokenState, to: Tensor) -> TokenState:
    """`after` with what `before` knew of the input tokens, when token i went to position `to[:, i]`.

    `to` is `[B, N]`, -1 for tokens that were pruned. Only for tokens that are traced.
    """
    assert before.origin is not None
    origin = follow(before.origin, to)
    last = before.last
    if last is not None:
        pruned = (origin < 0) & (before.origin >= 0)
        last = torch.where(pruned[:, :, None], standing(before.x, before.origin), last)
    return replaced(after, origin=origin, last=last)


def moved(before: TokenState, after: TokenState, index: Tensor, to: Tensor) -> TokenState:
    """`followed` when the tokens at `index` `[B, K]` went to positions `to` `[B, K]` and all others were pruned."""
    gone = torch.full(before.x.shape[:2], -1, device=index.device)
    return followed(before, after, gone.scatter(1, index, to))


def standing(x: Tensor, origin: Tensor) -> Tensor:
    """Features `[B, N0, C]` of the token in `x` `[B, N, C]` that stands for each input token, zeros for none."""
    index = origin.clamp(min=0)[:, :, None].expand(-1, -1, x.shape[-1])
    return torch.where(origin[:, :, None] >= 0, x.gather(1, index), 0)
