"""Pruning and merging as pure functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diffrate.blocks import attention
from diffrate.blocks.attention import Heads, first_tokens_attention, size_bias
from diffrate.blocks.reduction import (
    LEAST_SIZE,
    Mean,
    add_by_index,
    add_by_product,
    keep_tokens,
    merge_tokens,
    most_important,
    most_similar,
)
from diffrate.blocks.tokens import TokenState, follow

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 12), st.integers(1, 2**31))


def random_state(batch: int, tokens: int, seed: int, traced: bool = True) -> TokenState:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)
    state = TokenState(x, torch.rand(batch, tokens, generator=generator, dtype=torch.float64) + 0.5)
    return state.traced() if traced else state


def merge_in_order(state: TokenState, kept: int, spared: int, cosine_sizes: bool) -> TokenState:
    """`merge_tokens` of tokens that are in the order of importance."""
    batch, tokens, _ = state.x.shape
    return merge_tokens(
        state, torch.arange(tokens).expand(batch, tokens), kept, spared, Mean(cosine_sizes=cosine_sizes)
    )


def merge_by_hand(x: torch.Tensor, size: torch.Tensor, kept: int, weigh: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One image `[N, C]`, token by token, as the paper tells it."""
    members = {position: [x[position]] for position in range(kept)}
    new_size = size[:kept].clone()
    for source in range(kept, len(x)):
        cosines = F.cosine_similarity(x[source][None], x[1:kept])
        destination = int(cosines.argmax()) + 1
        members[destination].append(x[source])
        new_size[destination] += size[source] * (cosines.max() if weigh else 1)
    features = torch.stack([torch.stack(members[position]).mean(0) for position in range(kept)])
    return features, new_size


@given(SHAPES, st.data(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_merge_equals_the_rule_token_by_token(shape: tuple[int, int, int], data: st.DataObject, weigh: bool) -> None:
    batch, tokens, seed = shape
    tokens += 1
    kept = data.draw(st.integers(2, tokens - 1))
    state = random_state(batch, tokens, seed)
    merged = merge_in_order(state, kept, 1, cosine_sizes=weigh)
    assert state.size is not None
    assert merged.size is not None
    for image in range(batch):
        features, size = merge_by_hand(state.x[image], state.size[image], kept, weigh)
        torch.testing.assert_close(merged.x[image], features)
        torch.testing.assert_close(merged.size[image], size.clamp(min=LEAST_SIZE))


@given(SHAPES, st.data())
@settings(max_examples=50, deadline=None)
def test_plain_sizes_are_conserved_and_follow_the_origins(shape: tuple[int, int, int], data: st.DataObject) -> None:
    batch, tokens, seed = shape
    tokens += 1
    kept = data.draw(st.integers(2, tokens - 1))
    ones = random_state(batch, tokens, seed)._replace(size=None)
    merged = merge_in_order(ones, kept, 1, cosine_sizes=False)
    assert merged.origin is not None
    assert merged.size is not None
    counts = F.one_hot(merged.origin, kept).sum(1)
    torch.testing.assert_close(merged.size, counts.double())


@given(SHAPES, st.data(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_pruning_keeps_the_most_important(shape: tuple[int, int, int], data: st.DataObject, class_token: bool) -> None:
    batch, tokens, seed = shape
    kept = data.draw(st.integers(1, tokens))
    state = random_state(batch, tokens, seed)
    importance = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
    index = most_important(importance, kept, class_token)
    pruned = keep_tokens(state, index)
    for image in range(batch):
        order = importance[image, int(class_token) :].argsort(descending=True).tolist()
        expected = [0, *(position + 1 for position in order)][:kept] if class_token else order[:kept]
        assert index[image].tolist() == expected
        torch.testing.assert_close(pruned.x[image], state.x[image][expected])
        assert pruned.origin is not None
        origins = pruned.origin[image].tolist()
        assert [origins[position] for position in expected] == list(range(kept))
        assert sorted(origins)[: tokens - kept] == [-1] * (tokens - kept)


@given(SHAPES, st.data())
@settings(max_examples=50, deadline=None)
def test_adding_by_index_and_by_product_is_the_same(shape: tuple[int, int, int], data: st.DataObject) -> None:
    batch, kept, seed = shape
    sources = data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(batch, kept, 3, generator=generator, dtype=torch.float64)
    values = torch.randn(batch, sources, 3, generator=generator, dtype=torch.float64)
    destination = torch.randint(kept, (batch, sources), generator=generator)
    by_index = add_by_index(torch.cat([start, values], dim=1), destination, values)
    torch.testing.assert_close(by_index, add_by_product(start, destination, values))
    expected = start.clone()
    for image in range(batch):
        for source, goes_to in enumerate(destination[image].tolist()):
            expected[image, goes_to] += values[image, source]
    torch.testing.assert_close(by_index, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_merging_has_the_gradient_of_its_rule(batch: int) -> None:
    """Of one image, which is merged in views of one tensor, and of several; nothing that is handed in changes."""
    state = random_state(batch, 9, seed=5, traced=False)
    assert state.size is not None
    index = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(image))[:7] for image in range(batch)]
    )

    def merge(x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        merged = merge_tokens(TokenState(x, size), index, 4, 1, Mean(cosine_sizes=True))
        return merged.x, merged.sizes()

    before = state.x.clone(), state.size.clone()
    assert torch.autograd.gradcheck(merge, (state.x.requires_grad_(), state.size.requires_grad_()))
    with torch.no_grad():
        merge(state.x, state.size)
    assert torch.equal(state.x, before[0])
    assert torch.equal(state.size, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_is_reduced_as_in_a_batch(dtype: torch.dtype) -> None:
    """Importance, pruning and merging take ways of their own for one image."""
    query, key, value = torch.randn(3, 3, 2, 30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads = Heads(query, key, value, 0.3)
    x = torch.randn(3, 30, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    size = torch.rand(3, 30, generator=torch.Generator().manual_seed(2)) + 0.5
    importance = first_tokens_attention(heads, size_bias(size), 1)
    for image in range(3):
        one = slice(image, image + 1)
        own = Heads(heads.query[one], heads.key[one], heads.value[one], heads.scale)
        found = first_tokens_attention(own, size_bias(size[one]), 1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, importance[one], rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    index = most_important(importance, 20, 1)
    merged = merge_tokens(TokenState(x, size), index, 12, 1, Mean(cosine_sizes=True))
    assert merged.size is not None
    for image in range(3):
        one = slice(image, image + 1)
        alone = merge_tokens(TokenState(x[one], size[one]), index[one], 12, 1, Mean(cosine_sizes=True))
        assert alone.size is not None
        torch.testing.assert_close(alone.x, merged.x[one])
        torch.testing.assert_close(alone.size, merged.size[one])


@pytest.mark.parametrize("elements", [0, 2**20])
@pytest.mark.parametrize("cached", [1, 2**18])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("biased", ["no", "keys", "pairs"])
def test_attention_and_importance_are_the_same_with_a_map_and_without(
    monkeypatch: pytest.MonkeyPatch, elements: int, cached: int, queries: int, biased: str
) -> None:
    """All maps at once, an image at a time, or fused attention and the queries' rows."""
    monkeypatch.setattr(attention, "IMAGE_ELEMENTS", elements)
    monkeypatch.setattr(attention, "CACHED_ELEMENTS", cached)
    heads = Heads(*torch.randn(3, 4, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0.3)
    shape = {"no": None, "keys": (4, 1, 1, 9), "pairs": (1, 2, 9, 9)}[biased]
    bias = None if shape is None else torch.randn(shape, dtype=torch.float64)
    mixed, importance = attention.attend_and_rank(heads, bias, 0.0, queries)
    scores = heads.query @ heads.key.transpose(-2, -1) * 0.3
    weights = (scores if bias is None else scores + bias).softmax(-1)
    torch.testing.assert_close(mixed, weights @ heads.value)
    received = weights[:, :, :queries].sum((1, 2))
    torch.testing.assert_close(importance / importance.sum(1, keepdim=True), received / received.sum(1, keepdim=True))


def test_fine_tuning_and_large_maps_go_by_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps would be kept for the way back, or leave the cache."""
    called = []
    fused = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a: called.append(1) or fused(*a))
    heads = Heads(*torch.randn(3, 1, 2, 9, 8), 0.3)
    attention.attend_and_rank(heads, None, 0.0, 1)
    assert not called
    attention.attend_and_rank(heads._replace(query=heads.query.clone().requires_grad_()), None, 0.0, 1)
    attention.attend_and_rank(Heads(*torch.randn(3, 1, 2, 800, 8), 0.3), None, 0.0, 1)
    assert len(called) == 2


def test_position_zero_is_never_a_destination() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]])
    merged = merge_in_order(TokenState(x).traced(), 2, 1, cosine_sizes=False)
    assert merged.origin is not None
    assert merged.origin.tolist() == [[0, 1, 1]]
    _, along = most_similar(x[:, 2:], x[:, 1:2])
    torch.testing.assert_close(along / x[:, 2:].norm(dim=-1), F.cosine_similarity(x[:, 2], x[:, 1])[None])


def test_merging_into_one_token_prunes() -> None:
    state = random_state(2, 6, seed=3)
    merged = merge_in_order(state, 1, 1, cosine_sizes=True)
    torch.testing.assert_close(merged.x, state.x[:, :1])
    assert merged.origin is not None
    assert merged.origin.tolist() == [[0, -1, -1, -1, -1, -1]] * 2


def test_opposite_tokens_leave_a_positive_size() -> None:
    """Similarity -1 takes the whole size away: its logarithm must stay finite."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, -2.0]]])
    merged = merge_in_order(TokenState(x), 2, 1, cosine_sizes=True)
    assert merged.size is not None
    assert merged.size.log().isfinite().all()
    torch.testing.assert_close(merged.size[:, 0], torch.ones(1))


def test_zero_tokens_match_without_nan() -> None:
    merged = merge_in_order(TokenState(torch.zeros(1, 4, 3)), 2, 1, cosine_sizes=True)
    assert merged.x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_float32_sizes(dtype: torch.dtype) -> None:
    state = TokenState(torch.randn(2, 9, 4, dtype=dtype))
    merged = merge_in_order(state, 4, 1, Mean(cosine_sizes=True))
    assert merged.x.dtype == dtype
    assert merged.size is not None
    assert merged.size.dtype == torch.float32


def test_following_keeps_pruned_tokens_pruned() -> None:
    origin = torch.tensor([[0, 1, -1, 2]])
    moved = torch.tensor([[1, -1, 0]])
    assert follow(origin, moved).tolist() == [[1, -1, -1, 0]]
