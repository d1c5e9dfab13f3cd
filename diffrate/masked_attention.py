"""Attention among tokens of which some are masked: the search's softmax (paper, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffrate.attention import Heads

EPSILON = 1e-6


def masked_attention(heads: Heads, bias: Tensor | None, mask: Tensor, class_token: bool) -> tuple[Tensor, Tensor]:
    """Attention `[B, H, N, D]` where masked tokens are seen by themselves alone, and importance `[B, N]`."""
    query, key, value, scale = heads
    tokens = query.shape[2]
    scores = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    exponential = (scores - scores.amax(-1, keepdim=True)).float().exp()
    itself = torch.eye(tokens, device=mask.device, dtype=mask.dtype)
    visible = mask[:, None, None, :] + (1 - mask[:, None, None, :]) * itself
    exponential = exponential * visible
    weights = (exponential + EPSILON / tokens) / (exponential.sum(-1, keepdim=True) + EPSILON)
    weights = weights.to(value.dtype)
    importance = weights.detach()[:, :, 0].mean(1) if class_token else weights.detach().mean((1, 2))
    return weights @ value, importance
