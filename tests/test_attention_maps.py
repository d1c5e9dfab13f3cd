"""Maps of attention at the full grid: those of timm's own weights while all tokens are there, else shared over the
patches of merged tokens."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import diffrate
from tests.constructions import CONSTRUCTIONS, build, images_for, size_of
from tests.test_patch import patched


def of_timm(model: Any, images: Tensor) -> list[Tensor]:
    """Each block's softmax weights `[B, H, N, N]` from the queries and keys that a timm model makes."""
    found: list[Tensor] = []

    def keep(attention: Any, _: Any, fused: Tensor) -> None:
        query, key, _ = fused.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        found.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))

    hooks = [
        block.attn.qkv.register_forward_hook(lambda _, given, out, own=block.attn: keep(own, given, out))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["class_token", "qk_norm", "registers", "no_class_token", "distilled", "pre_norm"])
def test_dense_maps_are_those_of_timms_weights(name: str) -> None:
    model, images = build(name), images_for(name)
    weights = [one.mean(1) for one in of_timm(model, images)]
    asking = {"no_class_token": 0, "distilled": 2}.get(name, 1)
    rolled = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for one in weights:
        rolled = (one + torch.eye(one.shape[-1])) / 2 @ rolled
    prefix = model.num_prefix_tokens
    rows = [one[:, : asking or None].mean(1) for one in (*weights, rolled)]
    maps = diffrate.attention_maps(diffrate.patch.vit(model), images)
    assert maps.blocks.shape == (2, 4, 4, 4)
    for found, expected in zip((*maps.blocks.unbind(1), maps.rollout), rows, strict=True):
        torch.testing.assert_close(found.flatten(1), expected[:, prefix:], atol=1e-12, rtol=0)
    torch.testing.assert_close(maps.prefix, torch.stack(rows, 1)[..., :prefix], atol=1e-12, rtol=0)


def halved(model: diffrate.CompressedModel) -> diffrate.CompressedModel:
    """`model`, which prunes and merges in every block."""
    tokens, prefix = model.compression.space.limits[0], model.compression.space.prefix
    left = [tokens - step * (tokens - prefix) // 10 for step in range(9)]
    model.set_kept_num([left[2 * block + 1] for block in range(4)], [left[2 * block + 2] for block in range(4)])
    return model


def lifted(model: Any, images: Tensor, asking: int) -> tuple[Tensor, Tensor]:
    """Rows `[blocks, N0]` and the rollout `[N0]` of one image, position by position, from the maps that a hook of the
    dropout sees and the origins after each block."""
    found: list[Tensor] = []
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda *given: found.append(given[2])) for block in model.blocks
    ]
    with torch.no_grad():
        states = model.forward_blocks(images)
    for hook in hooks:
        hook.remove()
    tokens = found[0].shape[-1]
    origins = [torch.arange(tokens), *(state.origin[0] for state in states)]
    rows, flow = [], torch.eye(tokens, dtype=torch.float64)
    for weights, origin in zip(found, origins, strict=False):
        one, there = weights[0].mean(0), [place for place in range(tokens) if origin[place] >= 0]
        group = {place: [other for other in there if origin[other] == origin[place]] for place in there}
        merged = {place: flow[group[place]].mean(0) for place in there}
        spread = torch.zeros(tokens, tokens, dtype=torch.float64)
        for place in there:
            for other in there:
                spread[place, other] = one[origin[place], origin[other]] / len(group[other])
        rows.append(spread[:asking].mean(0) if asking else spread[there].mean(0))
        flow = torch.zeros_like(flow)
        for place in there:
            flow[place] = (sum(spread[place, other] * merged[other] for other in there) + merged[place]) / 2
    there = origins[-1] >= 0
    return torch.stack(rows), flow[:asking].mean(0) if asking else flow[there].mean(0)


@pytest.mark.parametrize("name", ["class_token", "registers", "no_class_token", "distilled", "rope"])
def test_compressed_maps_are_shared_over_the_patches_of_a_token(name: str) -> None:
    model, images = halved(diffrate.patch.vit(build(name), 1, 1, input_size=size_of(name))), images_for(name)
    maps, prefix = diffrate.attention_maps(model, images), model.num_prefix_tokens
    for index in range(2):
        rows, rollout = lifted(model, images[index : index + 1], {"no_class_token": 0, "distilled": 2}.get(name, 1))
        torch.testing.assert_close(maps.blocks[index].flatten(1), rows[:, prefix:], atol=1e-12, rtol=0)
        torch.testing.assert_close(maps.rollout[index].flatten(), rollout[prefix:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in CONSTRUCTIONS if name != "differential"])
def test_rows_sum_to_one_and_pruned_patches_have_nothing(name: str) -> None:
    model, images = halved(diffrate.patch.vit(build(name), 1, 1, input_size=size_of(name))), images_for(name)
    maps, prefix = diffrate.attention_maps(model, images), model.compression.space.prefix
    total = torch.cat([maps.blocks.flatten(2), maps.rollout.flatten(1)[:, None]], dim=1).sum(-1) + maps.prefix.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
    assert maps.blocks.shape == (2, 4, *model.token_grid)
    assert maps.prefix.shape == (2, 5, prefix)
    for block, state in enumerate(model.forward_blocks(images)[:-1]):
        gone = state.origin[:, prefix:] < 0
        assert gone.any()
        assert torch.equal(maps.blocks[:, block + 1].flatten(1) == 0, gone)
    dense = diffrate.attention_maps(model, images, model.dense_schedule())
    torch.testing.assert_close(dense.blocks[:, 0], maps.blocks[:, 0])
    assert (dense.blocks > 0).all()


def test_a_caformers_maps_are_of_its_third_stage() -> None:
    model = patched("caformer")
    maps = diffrate.attention_maps(model, torch.randn(1, 3, 224, 224))
    assert maps.blocks.shape == (1, 5, 14, 14)
    assert maps.prefix.shape == (1, 6, 0)
    torch.testing.assert_close(maps.blocks.sum((-1, -2)), torch.ones(1, 5))
    torch.testing.assert_close(maps.rollout.sum((-1, -2)), torch.ones(1))


def test_modes_are_kept_and_dropout_is_left_out() -> None:
    model = timm.create_model("test_vit", attn_drop_rate=0.5, proj_drop_rate=0.5)
    diffrate.patch.vit(model).train()
    images = torch.randn(1, 3, 160, 160)
    assert torch.equal(*(diffrate.attention_maps(model, images).rollout for _ in range(2)))
    assert model.training
    assert model.compression.schedule is None


def test_half_precision_gives_maps_in_single() -> None:
    model = timm.create_model("test_vit").bfloat16().eval()
    diffrate.patch.vit(model)
    images = torch.randn(1, 3, 160, 160)
    maps = diffrate.attention_maps(model, images.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = diffrate.attention_maps(model.float(), images)
    assert maps.rollout.dtype == cast.rollout.dtype == torch.float32
    torch.testing.assert_close(cast.rollout, maps.rollout, atol=1e-3, rtol=0.05)


def test_what_has_no_maps_is_refused_by_name() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match="accepted: a model after"):
        diffrate.attention_maps(timm.create_model("test_vit"), torch.randn(1, 3, 160, 160))
    model = diffrate.patch.vit(build("differential"))
    with pytest.raises(diffrate.UnsupportedModelError, match="found DiffAttention, the difference of two maps"):
        diffrate.attention_maps(model, images_for("differential"))
    model = diffrate.patch.vit(build("class_token"))
    with pytest.raises(diffrate.ScheduleError):
        diffrate.attention_maps(model, images_for("class_token"), diffrate.Schedule((3,), (3,)))
