"""Proportional attention and the importance of tokens (paper, section 3.2).

Proportional: a token that stands for `size` input tokens is attended to as if it were there `size`
times, by adding `log(size)` to its scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.tokens import alone, autocasts, in_graph, precise, replaced, size_dtype, uncast

CACHED_ELEMENTS = 2**18  # of the maps that are made at a time on a CPU: 1 MiB in float32
IMAGE_ELEMENTS = 2**20  # of one image's maps, up to which they pay there
HELD_ELEMENTS = 2**27  # and on other devices: 512 MiB


class Heads(NamedTuple):
    """Queries and keys of one attention, each `[B, H, N, D]`, and values `[B, H, N, V]`; scores are times `scale`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


def size_bias(size: Tensor | None, pairs: Tensor | None = None) -> Tensor | None:
    """What is added to the scores: `log(size)` per key, `[B, 1, 1, N]`, and a bias of `pairs` `[B or 1, H, Q, N]`; None
    for nothing."""
    bias = None if size is None else size.log().view(size.shape[0], 1, 1, size.shape[1])
    if bias is None or pairs is None:
        return pairs if bias is None else bias
    return bias + pairs


def attend(heads: Heads, bias: Tensor | None, dropout: float) -> Tensor:
    """Fused proportional attention, `[B, H, N, V]`: no attention map is kept."""
    query, key, value, scale = heads
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)


def attend_and_rank(heads: Heads, bias: Tensor | None, dropout: float, queries: int) -> tuple[Tensor, Tensor]:
    """Proportional attention `[B, H, N, V]`, and the importance of each token, `[B, N]`: the attention that it receives
    from the first `queries`, or from all with 0; over all heads. It is a sum or a mean: only its order means anything.

    Few tokens' importance is read off the attention map where that is no slower than fused attention, which keeps no
    map, and a row of its own. That of all tokens takes every element of the map, but not all at once: a few images are
    treated at a time, so that on a CPU their maps stay in the cache.
    """
    elements = heads.key.shape[1] * heads.query.shape[2] * heads.key.shape[2]  # of one image's maps
    if queries and not _maps_pay(heads, elements):
        return attend(heads, bias, dropout), first_tokens_attention(heads, bias, queries)
    parts, drop = parts_of(heads.key, elements), partial(F.dropout, p=dropout) if dropout > 0 else None
    if len(parts) == 1:
        return attend_with_map(heads, bias, drop, queries)
    found = []
    for part in parts:
        few = Heads(heads.query[part], heads.key[part], heads.value[part], heads.scale)
        own = bias if bias is None or bias.shape[0] == 1 else bias[part]
        found.append(attend_with_map(few, own, drop, queries))
    mixed, importance = map(torch.cat, zip(*found, strict=True))
    return mixed, importance


def first_tokens_attention(heads: Heads, bias: Tensor | None, queries: int) -> Tensor:
    """The attention of the first `queries` tokens to all, the mean over them and over heads: `[B, N]`."""
    key, rows = heads.key, []
    for first in range(queries):
        query = heads.query[:, :, first : first + 1]
        own = bias if bias is None or bias.shape[2] == 1 else bias[:, :, first : first + 1]
        if alone(query):
            rows.append(_full_scores(replaced(heads, query=query), own).softmax(dim=-1).mean(dim=0))
            continue
        # One row of scores of a batch: multiplying and adding up reads the keys where they lie. A matrix
        # product first copies them, heads apart.
        query = query * heads.scale
        images, precise = parts_of(key, key.shape[1:].numel()), size_dtype(query)
        parts = [(key[part] * query[part]).sum(-1, dtype=precise) for part in images]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows.append((scores if own is None else scores + own[:, :, 0]).softmax(dim=-1).mean(dim=1))
    return rows[0] if queries == 1 else torch.stack(rows).mean(0)


def _maps_pay(heads: Heads, elements: int) -> bool:
    """Whether attention by products takes no longer than fused attention, as measured: on a CPU, while the `elements`
    of an image's maps stay in its cache. Not in half precision in a graph, or where the CPU has a matrix unit, which
    fused attention runs on."""
    query = heads.query
    if elements > IMAGE_ELEMENTS or query.device.type != "cpu" or query.requires_grad:
        return False
    return heads.value.dtype == size_dtype(query) or not (in_graph() or torch.cpu._is_amx_tile_supported())


def attend_with_map(
    heads: Heads, bias: Tensor | None, drop: Callable[[Tensor], Tensor] | None, queries: int
) -> tuple[Tensor, Tensor]:
    """`attend_and_rank` by the attention maps of all images `[B * H, Q, N]`, which pass `drop` on their way to values.

    Scores and weights are in float32 at least: in half precision importances tie.
    """
    images, value = heads.query.shape[:2], heads.value.flatten(0, 1)
    if heads.query.device.type == "cpu" and not in_graph() and (queries or not autocasts("cpu")):
        weights = _full_scores(heads, bias).softmax(dim=-1)
        maps = weights.view(*images, *weights.shape[1:])
    else:
        key = heads.key.flatten(0, 1).transpose(-2, -1)
        scores = precise(torch.bmm(heads.query.flatten(0, 1) * heads.scale, key)).unflatten(0, images)
        maps = (scores if bias is None else scores + bias).softmax(dim=-1)
        weights = maps.flatten(0, 1)
    importance = (maps[:, :, :queries] if queries else maps).sum(dim=(1, 2))
    mixed = torch.bmm((weights if drop is None else drop(weights)).to(value.dtype), value)
    return mixed.view(*images, *mixed.shape[1:]), importance


def weights_of(heads: Heads, bias: Tensor | None) -> Tensor:
    """The attention maps of all heads, `[B, H, Q, N]`, in float32 at least: rows sum to 1."""
    return _full_scores(heads, bias).to(size_dtype(heads.query)).softmax(dim=-1).unflatten(0, heads.query.shape[:2])


def _full_scores(heads: Heads, bias: Tensor | None) -> Tensor:
    """Scores of all pairs with the bias, `[B * H, Q, N]`, by products in float32 at least, with scale and bias within
    them: passes of their own over the map, or over queries, take longer."""
    query, key = precise(heads.query.flatten(0, 1)), precise(heads.key.flatten(0, 1)).transpose(1, 2)
    if bias is None:
        return uncast(torch.baddbmm, query.new_empty(1, 1, 1), query, key, beta=0, alpha=heads.scale)
    bias = precise(bias).expand(*heads.query.shape[:2], -1, -1).flatten(0, 1)
    return uncast(torch.baddbmm, bias, query, key, alpha=heads.scale)


def parts_of(key: Tensor, elements: int) -> list[slice]:
    """The images of `key` in parts whose maps or products, `elements` of each image, fit a CPU's cache, or a share of a
    GPU's memory; in one part for a graph that is compiled or exported, which is for batches of any size."""
    if in_graph():
        return [slice(None)]
    size = max(1, (CACHED_ELEMENTS if key.device.type == "cpu" else HELD_ELEMENTS) // elements)
    return [slice(start, start + size) for start in range(0, max(1, key.shape[0]), size)]
