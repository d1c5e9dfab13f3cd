"""The search's attention and its own backward pass against the formula, differentiated by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffrate.blocks import attention
from diffrate.blocks.attention import Heads
from diffrate.blocks.masked import EPSILON, masked_attention


def by_the_formula(
    heads: Heads,
    bias: Tensor | None,
    mask: Tensor,
    queries: int,
    pairs: Tensor | None = None,
    masked_queries: bool = False,
) -> tuple[Tensor, Tensor]:
    query, key, value, scale = heads
    tokens = key.shape[2]
    scores = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if pairs is not None:
        scores = scores + pairs
    exponential = (scores - scores.amax(-1, keepdim=True)).exp()
    itself = torch.eye(tokens, dtype=mask.dtype)[: query.shape[2]]
    visible = mask[:, None, None, :] + (1 - mask[:, None, None, :]) * itself
    exponential = exponential * visible
    weights = (exponential + EPSILON / tokens) / (exponential.sum(-1, keepdim=True) + EPSILON)
    if queries:
        return weights @ value, weights[:, :, :queries].mean((1, 2))
    heard = torch.ones_like(mask) if masked_queries else (mask > 0).double()
    importance = (weights.mean(1) * heard[:, :, None]).sum(1) / heard.sum(1, keepdim=True)
    return weights @ value, importance


def inputs(with_bias: bool, seed: int = 0, prefix: int = 1) -> tuple[list[Tensor], Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randn(3, 2, 9, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = (torch.rand(3, 9, generator=generator) < 0.6).double()
    mask[:, :prefix] = 1
    mask[2, prefix:] = 0  # one image with its prefix tokens alone
    bias = torch.randn(3, 1, 1, 9, generator=generator, dtype=torch.float64).requires_grad_() if with_bias else None
    return items, bias, mask.requires_grad_()


@pytest.mark.parametrize(
    ("rows", "queries", "masked_queries"),
    [(9, 1, False), (9, 2, False), (9, 0, False), (9, 0, True), (4, 1, False), (4, 2, False), (1, 1, False)],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_pairs", [0, 1, 3])
@pytest.mark.parametrize("cached", [1, 2**18])
def test_values_and_gradients(
    queries: int,
    masked_queries: bool,
    with_bias: bool,
    with_pairs: int,
    cached: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Image by image and all at once, with the queries of all tokens and of the first ones, and a bias of pairs for all
    images, or one for each."""
    monkeypatch.setattr(attention, "CACHED_ELEMENTS", cached)
    pairs = torch.randn(with_pairs, 2, rows, 9, dtype=torch.float64) if with_pairs else None
    results = []
    for attend in (masked_attention, by_the_formula):
        (query, key, value), bias, mask = inputs(with_bias, prefix=max(1, queries))
        heads = Heads(query[:, :, :rows], key, value, 0.5)
        mixed, importance = attend(heads, bias, mask, queries, pairs, masked_queries)
        (mixed * torch.arange(4)).pow(2).sum().backward()
        gradients = [item.grad for item in (query, key, value, mask, bias) if item is not None]
        results.append([mixed.detach(), importance.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_values_may_be_wider_than_keys() -> None:
    """As in differential attention: two maps share values of twice the width."""
    (query, key, value), _, mask = inputs(with_bias=False)
    wide = torch.cat([value, value * 2], dim=-1)
    results = [attend(Heads(query, key, wide, 0.5), None, mask, 0) for attend in (masked_attention, by_the_formula)]
    torch.testing.assert_close(*results)


def test_nothing_masked_is_ordinary_attention() -> None:
    (query, key, value), _, mask = inputs(with_bias=False)
    mixed, _ = masked_attention(Heads(query, key, value, 0.5), None, torch.ones_like(mask), 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_autocast_computes_in_float32_and_answers_in_half() -> None:
    (query, key, value), _, mask = inputs(with_bias=False)
    half = Heads(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, importance = masked_attention(half, None, mask.float(), 1)
    assert mixed.dtype == torch.bfloat16
    assert importance.dtype == torch.float32
    mixed.float().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
