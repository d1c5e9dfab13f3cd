"""Proportional attention and the importance of tokens (paper, section 3.2).

Proportional: a token that stands for `size` input tokens is attended to as if it were there `size`
times, by adding `log(size)` to its scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.tokens import size_dtype


class Heads(NamedTuple):
    """Queries, keys and values of one attention, each `[B, H, N, D]`; scores are times `scale`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


def split_heads(attention: Any, x: Tensor) -> Heads:
    """Project `x` `[B, N, C]` with the submodules of a timm attention."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return Heads(_optional(attention, "q_norm", query), _optional(attention, "k_norm", key), value, attention.scale)


def size_bias(size: Tensor | None) -> Tensor | None:
    """`log(size)` per key, `[B, 1, 1, N]`; None while all sizes are 1."""
    return None if size is None else size.log()[:, None, None, :]


def attend(heads: Heads, bias: Tensor | None, dropout: float) -> Tensor:
    """Fused proportional attention, `[B, H, N, D]`: no attention map is kept."""
    query, key, value, scale = heads
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)


def attend_with_map(heads: Heads, bias: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Proportional attention `[B, H, N, D]` and its map `[B, H, N, N]`, for who needs all its rows."""
    # Weights in float32 at least: in half precision importances tie.
    scores = ((heads.query * heads.scale) @ heads.key.transpose(-2, -1)).to(size_dtype(heads.query))
    weights = _softmax(scores, bias)
    dropped = F.dropout(weights, dropout, training=dropout > 0)
    return dropped.to(heads.value.dtype) @ heads.value, weights


def class_importance(heads: Heads, bias: Tensor | None) -> Tensor:
    """The class token's attention to the other tokens, heads averaged: `[B, N - 1]`."""
    # One row of scores: multiplying and adding up reads the keys where they lie. A matrix product
    # first copies them, heads apart.
    products = heads.key * (heads.query[:, :, :1] * heads.scale)
    scores = products.sum(-1, dtype=size_dtype(products))
    return _softmax(scores, None if bias is None else bias[:, 0]).mean(dim=1)[:, 1:]


def mean_importance(weights: Tensor) -> Tensor:
    """The attention that each token receives, heads and queries averaged: `[B, N]`."""
    return weights.mean(dim=(1, 2))


def join_heads(attention: Any, mixed: Tensor) -> Tensor:
    """Output projection of `mixed` `[B, H, N, D]` with the attention's submodules: `[B, N, C]`."""
    batch, heads, tokens, width = mixed.shape
    joined = mixed.transpose(1, 2).reshape(batch, tokens, heads * width)
    return attention.proj_drop(attention.proj(_optional(attention, "norm", joined)))


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def _optional(module: Any, name: str, value: Tensor) -> Tensor:
    """`value` through the submodule `name` where there is one (CAFormer's attention has no norms)."""
    return getattr(module, name)(value) if hasattr(module, name) else value
