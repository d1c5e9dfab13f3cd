"""Merging: the less important tokens join their most similar kept ones (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.tokens import TokenState, follow, size_dtype

# Negative cosines can bring a similarity-weighted size to 0 or below, and its logarithm to NaN. The
# floor lies far below what cancellation of float32 sizes leaves, so that no finite result changes.
SIZE_FLOOR = 1e-30


def most_similar(sources: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of each source with its most similar candidate, and which that is, both `[B, S]`.

    Both come as unit vectors, `[B, S, C]` and `[B, K, C]`. The cosine is in float32 at least, in
    which the maximum is also found faster.
    """
    cosine = (sources @ candidates.transpose(1, 2)).to(size_dtype(sources))
    similarity, nearest = cosine.max(dim=-1)
    return similarity, nearest


def match(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """For each token from position `kept` on: its destination and their cosine, both `[B, N - kept]`.

    The destination is the most similar of the first `kept` tokens of `x` `[B, N, C]`, position 0
    left out: it is the class token's, and the published code leaves it out in CAFormer as well.
    """
    unit = F.normalize(x, dim=-1)
    similarity, nearest = most_similar(unit[:, kept:], unit[:, 1:kept])
    return nearest + 1, similarity


def merge_tokens(state: TokenState, kept: int, weigh_by_similarity: bool) -> TokenState:
    """The first `kept` tokens, each averaged with the later tokens that go to it.

    Features are the plain mean of a destination and its sources, whatever their sizes. Sizes add
    up, the sources' times their cosine with `weigh_by_similarity`. With `kept` 1 no destination is
    left, and the sources are pruned.
    """
    x, tokens = state.x, state.x.shape[1]
    if kept == 1:
        return _keep_first(state)
    destination, similarity = match(x, kept)
    # A product with a matrix of ones and zeros, [B, kept, N - kept]. Adding up by index is faster on a
    # CPU, but on a GPU its sums come in another order each time.
    goes_to = destination[:, None] == torch.arange(kept, device=x.device)[:, None]
    with torch.autocast(x.device.type, enabled=False):  # tokens keep the residual stream's precision
        ones = goes_to.to(x.dtype)
        merged = torch.baddbmm(x[:, :kept], ones, x[:, kept:]) / (1 + ones.sum(-1, keepdim=True))

    sizes = state.sizes()
    source_size = sizes[:, kept:]
    if weigh_by_similarity:
        source_size = source_size * similarity
    size = sizes[:, :kept] + torch.where(goes_to, source_size[:, None], 0).sum(-1)

    origin = state.origin
    if origin is not None:
        stay = torch.arange(kept, device=x.device).expand(x.shape[0], kept)
        origin = follow(origin, torch.cat([stay, destination], dim=1))
    assert merged.shape[1] == kept < tokens
    return TokenState(merged, size.clamp(min=SIZE_FLOOR), origin=origin)


def _keep_first(state: TokenState) -> TokenState:
    size = None if state.size is None else state.size[:, :1]
    origin = state.origin
    if origin is not None:
        origin = torch.where(origin == 0, origin, -1)
    return TokenState(state.x[:, :1], size, origin=origin)
