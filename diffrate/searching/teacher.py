"""The dense model as the teacher of the compressed one: no labels are needed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def divergence(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far logits `[B, K]` are from the dense model's, per image, `[B]`.

    The cross-entropy of the dense outputs, less their own entropy: 0 where nothing was lost
    (Kullback and Leibler's divergence).
    """
    dense = taught.float().log_softmax(-1)
    return (dense.exp() * (dense - outputs.float().log_softmax(-1))).sum(-1).clamp(min=0)


def angle(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far features `[B, C]`, or those of all positions `[B, N0, C]`, are from the dense model's, per image, `[B]`.

    One less the cosine, its mean over positions where there are any.
    """
    apart = 1 - F.cosine_similarity(outputs.float(), taught.float(), dim=-1)
    return apart if apart.ndim == 1 else apart.mean(1)
