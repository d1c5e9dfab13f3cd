"""Merging: the less important tokens join their most similar kept ones (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.tokens import TokenState, followed, size_dtype

# Negative cosines can bring a similarity-weighted size to 0 or below, and its logarithm to NaN. The
# floor lies far below what cancellation of float32 sizes leaves, so that no finite result changes.
SIZE_FLOOR = 1e-30


def most_similar(sources: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of each source with its most similar candidate, and which that is, both `[B, S]`.

    They come as features, `[B, S, C]` and `[B, K, C]`; the cosine is in float32 at least.
    """
    precise = size_dtype(sources)
    # Of the candidates, which are many, the products are divided by their length, not the features.
    # The sources are scaled first, so that the products stay in the range of half precision.
    length = torch.linalg.vector_norm(candidates, dim=-1, dtype=precise).clamp(min=1e-12)
    products = F.normalize(sources, dim=-1) @ candidates.transpose(1, 2)
    similarity, nearest = (products.to(precise) / length[:, None]).max(dim=-1)
    return similarity, nearest


def add_up(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`start` `[B, K, C]` plus each of `values` `[B, S, C]` at its `destination` `[B, S]`."""
    if start.device.type in ("cpu", "meta"):
        return add_by_index(start, destination, values)
    return add_by_product(start, destination, values)


def add_by_index(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`add_up`, faster on a CPU; on a GPU the sums would come in another order each time."""
    return start.scatter_add(1, destination[:, :, None].expand_as(values), values)


def add_by_product(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`add_up` as a product with a matrix of ones and zeros, `[B, K, S]`: the same sums each time."""
    goes_to = destination[:, None] == torch.arange(start.shape[1], device=start.device)[:, None]
    with torch.autocast(start.device.type, enabled=False):  # tokens keep the residual stream's precision
        return torch.baddbmm(start, goes_to.to(start.dtype), values)


def match(x: Tensor, kept: int, spared: int) -> tuple[Tensor, Tensor]:
    """For each token from position `kept` on: its destination and their cosine, both `[B, N - kept]`.

    The destination is the most similar of the first `kept` tokens of `x` `[B, N, C]`, the first
    `spared` left out: nothing is merged into class tokens and registers.
    """
    similarity, nearest = most_similar(x[:, kept:], x[:, spared:kept])
    return nearest + spared, similarity


def merge_tokens(state: TokenState, kept: int, spared: int, weigh_by_similarity: bool) -> TokenState:
    """The first `kept` tokens, each but the first `spared` averaged with the later tokens that go to it.

    Features are the plain mean of a destination and its sources, whatever their sizes. Sizes add
    up, the sources' times their cosine with `weigh_by_similarity`. Where none but spared tokens are
    kept there is no destination, and the sources are pruned.
    """
    x, tokens = state.x, state.x.shape[1]
    place = None if state.place is None else state.place[:, :kept]
    if kept <= spared:
        return _keep_first(state, kept, place)
    destination, similarity = match(x, kept, spared)
    sizes = state.sizes()
    source_size = sizes[:, kept:]
    if weigh_by_similarity:
        source_size = source_size * similarity
    size = add_up(sizes[:, :kept, None], destination, source_size[:, :, None]).squeeze(-1)
    ones = x.new_ones(1, 1, 1)
    joined = add_up(ones.expand(x.shape[0], kept, 1), destination, ones.expand(x.shape[0], tokens - kept, 1))
    merged = TokenState(add_up(x[:, :kept], destination, x[:, kept:]) / joined, size.clamp(min=SIZE_FLOOR), place=place)
    assert merged.x.shape[1] == kept < tokens
    if state.origin is None:
        return merged
    stay = torch.arange(kept, device=x.device).expand(x.shape[0], kept)
    return followed(state, merged, torch.cat([stay, destination], dim=1))


def _keep_first(state: TokenState, kept: int, place: Tensor | None) -> TokenState:
    size = None if state.size is None else state.size[:, :kept]
    first = TokenState(state.x[:, :kept], size, place=place)
    if state.origin is None:
        return first
    position = torch.arange(state.x.shape[1], device=state.x.device).expand(state.x.shape[:2])
    return followed(state, first, torch.where(position < kept, position, -1))
