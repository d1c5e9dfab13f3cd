"""Proportional attention and the importance of tokens (paper, section 3.2).

Proportional: a token that stands for `size` input tokens is attended to as if it were there `size`
times, by adding `log(size)` to its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.tokens import alone, size_dtype

CACHED_ELEMENTS = 2**19  # of the maps that are made at a time on a CPU: 2 MiB in float32
HELD_ELEMENTS = 2**27  # and on other devices: 512 MiB


class Heads(NamedTuple):
    """Queries and keys of one attention, each `[B, H, N, D]`, and values `[B, H, N, V]`; scores are times `scale`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def asking(self, tokens: int | None) -> Heads:
        """The same, with the queries of the first `tokens` alone; of all for None."""
        return self if tokens is None else self._replace(query=self.query[:, :, :tokens])


def size_bias(size: Tensor | None) -> Tensor | None:
    """`log(size)` per key, `[B, 1, 1, N]`; None while all sizes are 1."""
    return None if size is None else size.log()[:, None, None, :]


def add_bias(bias: Tensor | None, pairs: Tensor | None) -> Tensor | None:
    """The bias of keys `[B, 1, 1, N]` and that of pairs `[B or 1, H, Q, N]` together; None for neither."""
    if bias is None or pairs is None:
        return pairs if bias is None else bias
    return bias + pairs


def attend(heads: Heads, bias: Tensor | None, dropout: float) -> Tensor:
    """Fused proportional attention, `[B, H, N, V]`: no attention map is kept."""
    query, key, value, scale = heads
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)


def attend_and_receive(heads: Heads, bias: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Proportional attention `[B, H, N, V]`, and the attention that each token receives from all: `[B, N]`.

    The mean over heads and queries takes every element of the map, but not all at once: a few images are
    treated at a time, so that on a CPU their maps stay in the cache. That costs about as much as fused attention.
    """
    parts = list(_parts(heads.key, heads.key.shape[1] * heads.query.shape[2] * heads.key.shape[2]))
    if len(parts) == 1:
        return _attend_with_map(heads, bias, dropout)
    mixed, importance = [], []
    for part in parts:
        few = Heads(heads.query[part], heads.key[part], heads.value[part], heads.scale)
        attended, received = _attend_with_map(few, bias if bias is None or bias.shape[0] == 1 else bias[part], dropout)
        mixed.append(attended)
        importance.append(received)
    return torch.cat(mixed), torch.cat(importance)


def speakers_importance(heads: Heads, bias: Tensor | None, speakers: int) -> Tensor:
    """The attention of the first `speakers` tokens to all, the mean over them and over heads: `[B, N]`."""
    rows = [row_importance(heads, heads.query[:, :, row : row + 1], _row(bias, row)) for row in range(speakers)]
    return rows[0] if speakers == 1 else torch.stack(rows).mean(0)


def row_importance(heads: Heads, query: Tensor, bias: Tensor | None) -> Tensor:
    """The attention of one `query` `[B, H, 1, D]` to all tokens, heads averaged: `[B, N]`."""
    precise = size_dtype(query)
    if alone(query) and not _autocasts(query.device.type):
        start = query.new_zeros(1, 1, 1, dtype=precise) if bias is None else bias[0].to(precise)
        keys = heads.key[0].to(precise).transpose(-2, -1)
        scores = torch.baddbmm(start, query[0].to(precise), keys, alpha=heads.scale)
        return scores.softmax(dim=-1).mean(dim=0)
    # One row of scores of a batch: multiplying and adding up reads the keys where they lie. A matrix
    # product first copies them, heads apart.
    key, query = heads.key, query * heads.scale
    parts = [(key[part] * query[part]).sum(-1, dtype=precise) for part in _parts(key, key.shape[1:].numel())]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts)
    return _softmax(scores, None if bias is None else bias[:, :, 0]).mean(dim=1)


def _attend_with_map(heads: Heads, bias: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    # Weights in float32 at least: in half precision importances tie.
    scores = ((heads.query * heads.scale) @ heads.key.transpose(-2, -1)).to(size_dtype(heads.query))
    weights = _softmax(scores, bias)
    dropped = F.dropout(weights, dropout, training=dropout > 0)
    return dropped.to(heads.value.dtype) @ heads.value, weights.mean(dim=(1, 2))


def _parts(key: Tensor, elements: int) -> Iterator[slice]:
    """The images of `key` in parts whose maps or products, `elements` of each image, fit a CPU's cache, or a share of a
    GPU's memory; in one part for a graph that is compiled or exported, which is for batches of any size."""
    batch = key.shape[0]
    if torch.compiler.is_compiling():
        return iter([slice(None)])
    held = CACHED_ELEMENTS if key.device.type == "cpu" else HELD_ELEMENTS
    size = max(1, held // elements)
    return (slice(start, start + size) for start in range(0, max(1, batch), size))


def _autocasts(device_type: str) -> bool:
    """Whether products would be taken in half precision."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _row(bias: Tensor | None, row: int) -> Tensor | None:
    """The bias of one query, `[B, H, 1, N]`, of a bias that is the same for all queries or not."""
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, row : row + 1]


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    return (scores if bias is None else scores + bias).softmax(dim=-1)
