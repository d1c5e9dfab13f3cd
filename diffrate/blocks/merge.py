"""Merging: the less important tokens join their most similar kept ones (paper, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffrate.blocks.prune import keep_tokens
from diffrate.blocks.tokens import TokenState, moved, rows_of, size_dtype, take

# Negative cosines can bring a similarity-weighted size to 0 or below, and its logarithm to NaN. The
# floor lies far below what cancellation of float32 sizes leaves, so that no finite result changes.
SIZE_FLOOR = 1e-30


def length_of(x: Tensor) -> Tensor:
    """The length of each token of `x` `[B, N, C]`, `[B, N]`, in float32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=size_dtype(x)).clamp(min=1e-12)


def most_similar(
    sources: Tensor, source_length: Tensor, candidates: Tensor, candidate_length: Tensor
) -> tuple[Tensor, Tensor]:
    """The cosine of each source with its most similar candidate, and which that is, both `[B, S]`.

    They come as features, `[B, S, C]` and `[B, K, C]`, with their lengths; the cosine is in float32 at least.
    """
    # Of the candidates, which are many, the products are divided by their length, not the features.
    # The sources are scaled first, so that the products stay in the range of half precision under autocast.
    scaled = sources / source_length[:, :, None]
    # Products of half precision cost more on many a CPU than the conversion, and tell less.
    # Not `@`, which exporters copy both sides for.
    products = torch.bmm(scaled, candidates.to(scaled.dtype).transpose(1, 2))
    similarity, nearest = (products / candidate_length[:, None]).max(dim=-1)
    return similarity, nearest


def add_up(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`start` `[B, K]` plus each of `values` `[B, S]` at its `destination` `[B, S]`."""
    if on_cpu(start):
        return start.scatter_add(1, destination, values)
    return add_by_product(start[:, :, None], destination, values[:, :, None]).squeeze(-1)


def add_by_index(x: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """The first tokens of `x` `[B, K + S, C]`, `[B, K, C]`, plus each of `values` `[B, S, C]` at its `destination`.

    In place, row by row: faster on a CPU; on a GPU the sums would come in another order each time. `values` may be
    the last tokens of `x`.
    """
    (batch, tokens, _), sources = x.shape, destination.shape[1]
    # Without the last image's sources, so that of one image no row is both read and written.
    rows = x.flatten(0, 1)[: batch * tokens - sources]
    rows.index_add_(0, rows_of(destination, tokens).flatten(), values.flatten(0, 1))
    return x[:, : tokens - sources]


def add_by_product(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`start` `[B, K, C]` plus each of `values` `[B, S, C]` at its `destination`, as a product with a matrix of ones
    and zeros, `[B, K, S]`: the same sums each time."""
    goes_to = destination[:, None] == torch.arange(start.shape[1], device=start.device)[:, None]
    with torch.autocast(start.device.type, enabled=False):  # tokens keep the residual stream's precision
        return torch.baddbmm(start, goes_to.to(start.dtype), values)


def match(x: Tensor, kept: int, spared: int) -> tuple[Tensor, Tensor]:
    """For each token from position `kept` on: its destination and their cosine, both `[B, N - kept]`.

    The destination is the most similar of the first `kept` tokens of `x` `[B, N, C]`, the first
    `spared` left out: nothing is merged into class tokens and registers.
    """
    length = length_of(x)
    similarity, nearest = most_similar(x[:, kept:], length[:, kept:], x[:, spared:kept], length[:, spared:kept])
    return nearest + spared, similarity


def merge_tokens(state: TokenState, index: Tensor, kept: int, spared: int, weigh_by_similarity: bool) -> TokenState:
    """The tokens at the first `kept` of `index` `[B, K]`, each but the first `spared` averaged with those at
    the later ones that go to it; all other tokens are pruned.

    Features are the plain mean of a destination and its sources, whatever their sizes. Sizes add
    up, the sources' times their cosine with `weigh_by_similarity`. Where none but spared tokens are
    kept there is no destination, and the sources are pruned.
    """
    staying = index[:, :kept]
    if kept <= spared:
        return keep_tokens(state, staying)
    x = take(state.x, index)
    x = x.to(size_dtype(x))
    destination, similarity = match(x, kept, spared)
    ones = x.new_ones(index.shape)
    joined = add_up(ones[:, :kept], destination, ones[:, kept:])
    size = joined
    if state.size is not None or weigh_by_similarity:
        sizes = ones if state.size is None else take(state.size, index)
        added = sizes[:, kept:] * similarity if weigh_by_similarity else sizes[:, kept:]
        size = add_up(sizes[:, :kept], destination, added).clamp(min=SIZE_FLOOR)
    features = add_features(x, destination, kept) / joined[:, :, None]
    place = None if state.place is None else take(state.place, staying)
    merged = TokenState(features.to(state.x.dtype), size, place=place)
    if state.origin is None:
        return merged
    stay = torch.arange(kept, device=index.device).expand_as(staying)
    return moved(state, merged, index, torch.cat([stay, destination], dim=1))


def add_features(x: Tensor, destination: Tensor, kept: int) -> Tensor:
    """The first `kept` tokens of `x` `[B, N, C]` plus each later one at its `destination`, `[B, kept, C]`.

    `x` may be overwritten, unless a backward pass asks for it.
    """
    leaves = x[:, kept:]
    if on_cpu(x) and torch.compiler.is_compiling():  # a graph has nothing to do in place, and more runtimes know this
        return x[:, :kept].scatter_add(1, destination[:, :, None].expand_as(leaves), leaves)
    if on_cpu(x):
        return add_by_index(x.clone() if x.requires_grad else x, destination, leaves)
    return add_by_product(x[:, :kept], destination, leaves)


def on_cpu(x: Tensor) -> bool:
    """Whether sums come in the same order each time however they are made."""
    return x.device.type in ("cpu", "meta")
