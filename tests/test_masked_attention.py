"""The search's attention and its own backward pass against the formula, differentiated by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffrate.blocks.attention import Heads
from diffrate.rates import masked_attention as subject
from diffrate.rates.masked_attention import EPSILON, masked_attention


def by_the_formula(heads: Heads, bias: Tensor | None, mask: Tensor, class_token: bool) -> tuple[Tensor, Tensor]:
    query, key, value, scale = heads
    tokens = key.shape[2]
    scores = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    exponential = (scores - scores.amax(-1, keepdim=True)).exp()
    itself = torch.eye(tokens, dtype=mask.dtype)[: query.shape[2]]
    visible = mask[:, None, None, :] + (1 - mask[:, None, None, :]) * itself
    exponential = exponential * visible
    weights = (exponential + EPSILON / tokens) / (exponential.sum(-1, keepdim=True) + EPSILON)
    return weights @ value, weights[:, :, 0].mean(1) if class_token else weights.mean((1, 2))


def inputs(with_bias: bool, seed: int = 0) -> tuple[list[Tensor], Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randn(3, 2, 9, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = (torch.rand(3, 9, generator=generator) < 0.6).double()
    mask[:, 0] = 1
    mask[2, 1:] = 0  # one image with its class token alone
    bias = torch.randn(3, 1, 1, 9, generator=generator, dtype=torch.float64).requires_grad_() if with_bias else None
    return items, bias, mask.requires_grad_()


@pytest.mark.parametrize(("rows", "class_token"), [(9, True), (9, False), (4, True), (1, True)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("cached", [1, 2**18])
def test_values_and_gradients(
    class_token: bool, with_bias: bool, cached: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image by image and all at once, with the queries of all tokens and of the first ones."""
    monkeypatch.setattr(subject, "CACHED_ELEMENTS", cached)
    results = []
    for attend in (masked_attention, by_the_formula):
        (query, key, value), bias, mask = inputs(with_bias)
        mixed, importance = attend(Heads(query[:, :, :rows], key, value, 0.5), bias, mask, class_token)
        (mixed * torch.arange(4)).pow(2).sum().backward()
        gradients = [item.grad for item in (query, key, value, mask, bias) if item is not None]
        results.append([mixed.detach(), importance.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_nothing_masked_is_ordinary_attention() -> None:
    (query, key, value), _, mask = inputs(with_bias=False)
    mixed, _ = masked_attention(Heads(query, key, value, 0.5), None, torch.ones_like(mask), True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)


def test_autocast_computes_in_float32_and_answers_in_half() -> None:
    (query, key, value), _, mask = inputs(with_bias=False)
    half = Heads(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, importance = masked_attention(half, None, mask.float(), True)
    assert mixed.dtype == torch.bfloat16
    assert importance.dtype == torch.float32
    mixed.float().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
