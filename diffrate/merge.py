"""Merging: the less important tokens join their most similar kept ones (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.tokens import TokenState, follow

# Negative cosines can bring a similarity-weighted size to 0 or below, and its logarithm to NaN. The
# floor lies far below what cancellation of float32 sizes leaves, so that no finite result changes.
SIZE_FLOOR = 1e-30


def match(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """For each token from position `kept` on: its destination and their cosine, both `[B, N - kept]`.

    The destination is the most similar of the first `kept` tokens of `x` `[B, N, C]`, position 0
    left out: it is the class token's, and the published code leaves it out in CAFormer as well.
    """
    unit = F.normalize(x, dim=-1)
    cosine = unit[:, kept:] @ unit[:, 1:kept].transpose(1, 2)
    similarity, nearest = cosine.max(dim=-1)
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
    goes_to = F.one_hot(destination, kept).transpose(1, 2)  # [B, kept, N - kept]
    features = goes_to.to(x.dtype)
    merged = (x[:, :kept] + features @ x[:, kept:]) / (1 + features.sum(-1, keepdim=True))

    sizes = state.sizes()
    source_size = sizes[:, kept:]
    if weigh_by_similarity:
        source_size = source_size * similarity.to(source_size.dtype)
    size = sizes[:, :kept] + (goes_to.to(sizes.dtype) @ source_size.unsqueeze(-1)).squeeze(-1)

    origin = state.origin
    if origin is not None:
        stay = torch.arange(kept, device=x.device).expand(x.shape[0], kept)
        origin = follow(origin, torch.cat([stay, destination], dim=1))
    assert merged.shape[1] == kept < tokens
    return TokenState(merged.to(x.dtype), size.clamp(min=SIZE_FLOOR), origin=origin)


def _keep_first(state: TokenState) -> TokenState:
    size = None if state.size is None else state.size[:, :1]
    origin = state.origin
    if origin is not None:
        origin = torch.where(origin == 0, origin, -1)
    return TokenState(state.x[:, :1], size, origin=origin)
