"""Attention among tokens of which some are masked: the search's softmax (paper, section 3.3).

    E = exp(scores - max)                  A = E * visible
    weights = (A + eps / N) / (Z + eps)    Z = sum of A, visible_ij = mask_j, and 1 for i = j

Automatic differentiation would keep seven maps of `[B, H, N, N]` and go over each in memory. Here
the ordinary softmax P is the only map, and the rest is folded into the small factors on its sides:
P = E / S with S = sum of E = 1 / max P, so that with P's diagonal d, mask m, T = (Z + eps) / S and
c = eps / (N S)

    output = (P (m v) + d (1 - m) v + c sum v) / T        T = P m + d (1 - m) + eps / S

Backward, with the output's gradient g over T and G = ((g v') - g output) P, masked and whole sums of
G's rows and columns give the rest, but for the row's maximum: eps makes the weights depend on it, by
`r = eps / S (g output - g mean v)`, which its position gets back.
A few images are treated at a time, so that on a CPU their maps stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffrate.blocks.attention import Heads
from diffrate.blocks.tokens import size_dtype

EPSILON = 1e-6
CACHED_ELEMENTS = 2**18  # of one map: 1 MiB in float32


def masked_attention(
    heads: Heads,
    bias: Tensor | None,
    mask: Tensor,
    queries: int,
    pairs: Tensor | None = None,
    masked_queries: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention `[B, H, Q, V]` where masked tokens are seen by themselves alone, and importance `[B, N]`.

    The rows may be those of the first Q tokens alone, `queries` at least. `mask` is
    `[B, N]`, `bias` `[B, 1, 1, N]` or None, and `pairs` a bias of pairs `[1, H, Q, N]` or None, which takes
    no gradient. Importance is the attention of the first `queries` tokens, the mean over them, or with
    0 the attention received from all that are there, with `masked_queries` from the others
    too, heads averaged; it takes no gradient. Computed in float32 at least, also under autocast.
    """
    query, key, value, scale = heads
    dtype = size_dtype(value)
    with torch.autocast(value.device.type, enabled=False):
        rows = None if bias is None else bias[:, 0, 0].to(dtype)
        items = (query.to(dtype), key.to(dtype), value.to(dtype))
        table = None if pairs is None else pairs.detach().to(dtype)
        asking = torch.ones_like(mask) if masked_queries else (mask > 0).to(mask.dtype)
        masks = (mask.to(dtype), asking.to(dtype))
        mixed, importance = _MaskedAttention.apply(*items, rows, *masks, table, scale, queries)
    return mixed.to(value.dtype), importance


class _MaskedAttention(torch.autograd.Function):
    """Inputs: queries `[B, H, Q, D]`, keys `[B, H, N, D]`, values `[B, H, N, V]`, bias, mask and which
    tokens are queries for importance, `[B, N]`, pairs."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        asking: Tensor,
        pairs: Tensor | None,
        scale: float,
        queries: int,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, rows, _ = query.shape
        tokens = key.shape[2]
        seen = mask[:, None, :, None]  # [B, 1, N, 1]
        hides = 1 - seen[:, :, :rows]
        visible = torch.cat([value * seen, seen.expand(-1, heads, -1, -1)], dim=-1)  # the last column gives P m
        mixed, importance = value.new_empty(*query.shape[:3], value.shape[3]), torch.empty_like(mask)
        totals, inverses = torch.empty_like(query[..., :1]), torch.empty_like(query[..., :1])
        positions, maps = torch.empty_like(totals, dtype=torch.int64), []
        for part in _parts(batch, heads * rows * tokens, query.device):
            softmax = _softmax(query[part], key[part], scale, bias if bias is None else bias[part], pairs)
            inverse, highest = softmax.max(-1, keepdim=True)  # 1 / S, and where E is 1
            hidden = softmax.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * hides[part]  # d (1 - m)
            product = softmax @ visible[part]
            total = product[..., -1:] + hidden + EPSILON * inverse
            spread = EPSILON / tokens * inverse  # c
            everywhere = value[part].sum(-2, keepdim=True)
            mixed[part] = (product[..., :-1] + hidden * value[part, :, :rows] + spread * everywhere) / total
            totals[part] = total
            importance[part] = _importance(softmax, mask[part], asking[part], hidden, spread, total, queries)
            inverses[part], positions[part] = inverse, highest
            maps.append(softmax)
        ctx.save_for_backward(query, key, value, mask, mixed, totals, inverses, positions, *maps)
        ctx.has_bias, ctx.scale = bias is not None, scale
        ctx.mark_non_differentiable(importance)
        return mixed, importance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, mixed, totals, inverses, positions, *maps = ctx.saved_tensors
        batch, heads, rows, _ = query.shape
        tokens = key.shape[2]
        seen = mask[:, None, :, None]
        masked_key, ones = key * seen, value.new_ones(1, 1, 1, 1)
        grads = [torch.empty_like(item) for item in (query, key, value)]
        columns, to_highest = torch.empty_like(mask), torch.empty_like(mask)
        diagonals = torch.zeros_like(mask)
        parts = _parts(batch, heads * rows * tokens, query.device)
        for part, softmax in zip(parts, maps, strict=True):
            k, v, hides = key[part], value[part], 1 - seen[part, :, :rows]
            itself = softmax.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            spread = EPSILON / tokens * inverses[part]
            grad = grad_mixed[part] / totals[part]
            centre = (grad * mixed[part]).sum(-1, keepdim=True)
            sides = torch.cat([grad, -centre], -1), torch.cat([v, ones.expand(*v.shape[:-1], 1)], -1)
            flow = (sides[0] @ sides[1].transpose(-2, -1)).mul_(softmax)  # G, of `visible`
            own = flow.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            columns[part], diagonals[part, :rows] = flow.sum((1, 2)), own.squeeze(-1).sum(1)
            grads[0][part] = flow @ masked_key[part] + own * hides * k[:, :, :rows]
            grads[1][part] = flow.transpose(-2, -1) @ query[part] * seen[part]
            grads[1][part, :, :rows] += own * hides * query[part]
            everywhere = (spread * grad).sum(-2, keepdim=True)
            back = EPSILON * inverses[part] * (centre - grad @ v.mean(-2, keepdim=True).transpose(-2, -1))  # r
            highest = positions[part]
            grads[0][part] -= back * k.gather(2, highest.expand_as(query[part]))
            grads[1][part].scatter_add_(2, highest.expand_as(query[part]), -back * query[part])
            to_highest[part] = torch.zeros_like(k[..., :1]).scatter_add_(2, highest, back).sum((1, 3))
            grads[2][part] = softmax.transpose(-2, -1) @ grad * seen[part] + everywhere
            grads[2][part, :, :rows] += itself * hides * grad
            grads[0][part] *= ctx.scale
            grads[1][part] *= ctx.scale
        to_bias = mask * columns + (1 - mask) * diagonals - to_highest if ctx.has_bias else None
        return *grads, to_bias, columns - diagonals, None, None, None, None


def _softmax(query: Tensor, key: Tensor, scale: float, bias: Tensor | None, pairs: Tensor | None) -> Tensor:
    scores = (query @ key.transpose(-2, -1)).mul_(scale)
    if bias is not None:
        scores += bias[:, None, None]
    if pairs is not None:
        scores += pairs
    return scores.softmax(-1)


def _importance(
    softmax: Tensor, mask: Tensor, asking: Tensor, hidden: Tensor, spread: Tensor, total: Tensor, queries: int
) -> Tensor:
    """The mean over heads of the weights' first rows, or of all that are queries: `[b, N]`."""
    if queries == 1:  # itself always seen
        return ((softmax[:, :, 0] * mask[:, None] + spread[:, :, 0]) / total[:, :, 0]).mean(1)
    if queries:
        first = slice(queries)
        rows = (softmax[:, :, first] * mask[:, None, None] + spread[:, :, first]) / total[:, :, first]
        return rows.mean((1, 2))
    voice = asking[:, None, :, None] / total
    received = (softmax.transpose(-2, -1) @ voice).squeeze(-1) * mask[:, None]
    heard = (received + (hidden * voice).squeeze(-1) + (spread * voice).sum(-2)).mean(1)
    return heard / asking.sum(-1, keepdim=True)


def _parts(batch: int, elements: int, device: torch.device) -> Iterator[slice]:
    """The batch in parts whose maps fit a CPU's cache; in one part on other devices."""
    size = max(1, CACHED_ELEMENTS // elements) if device.type == "cpu" else batch
    for start in range(0, batch, size):
        yield slice(start, start + size)
