"""Patched models: the fixed interface, copies, threads, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffrate
import models
from diffrate.blocks.tokens import TokenState
from diffrate.patch.features import restore
from tests import recipe_weights
from tests.tiny_models import (
    FAMILIES,
    IMAGE_SIZE,
    TOKENS,
    dense,
    golden_model,
    official_state,
    plain,
    schedule_for,
)

FALLING = {
    "deit": ([65, 62, 46, 33, 26, 19], [65, 59, 39, 29, 21, 19]),
    "mae": ([65, 62, 46, 33, 26, 19], [65, 59, 39, 29, 21, 19]),
    "caformer": (None, [196, 150, 140, 90, 196, 49, 49]),
}


def patched(family: str) -> diffrate.CompressedModel:
    torch.manual_seed(0)
    model = getattr(diffrate.patch, family)(plain(family).eval())
    model.set_kept_num(*FALLING[family])
    return model


def images(family: str, batch: int = 2) -> torch.Tensor:
    return recipe_weights.images(batch, IMAGE_SIZE[family]).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_is_in_place_and_changes_no_dense_logits(family: str) -> None:
    model = plain(family).eval()
    if family == "caformer":
        model.head.fc.norm.eps = 1e-5  # the original's, which patching restores
    before = model(images(family))
    returned = getattr(diffrate.patch, family)(model)
    assert returned is model
    assert returned.flops() == returned.flops_at(returned.dense_schedule())
    torch.testing.assert_close(returned(images(family), return_flop=False), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_num_is_as_set(family: str) -> None:
    model = patched(family)
    assert model.get_kept_num() == FALLING[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schedule_is_fixed_by_setting_it(family: str) -> None:
    model = patched(family)
    assert model.schedule == diffrate.Schedule(*(counts and tuple(counts) for counts in FALLING[family]))
    model.schedule = dense = model.dense_schedule()
    assert model.schedule == dense
    assert model.flops() == model.flops_at(dense)
    for wrong in (FALLING[family], replace(dense, tokens=7), replace(dense, merge=dense.merge[1:])):
        with pytest.raises(diffrate.ScheduleError, match="accepted: "):
            model.schedule = wrong
        assert model.schedule == dense


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_left_match_the_schedule(family: str, batch: int) -> None:
    model = patched(family)
    state = model.forward_tokens(images(family, batch))
    kept = 90 if family == "caformer" else 19
    assert state.x.shape[:2] == (batch, kept)
    assert state.size is not None
    assert state.size.shape == (batch, kept)
    assert state.origin is not None
    assert state.origin.shape == (batch, TOKENS[family])
    assert state.origin.max() == kept - 1
    # Every kept token stands for itself at least.
    assert all(len(set(row.tolist()) - {-1}) == kept for row in state.origin)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_see_each_other(family: str) -> None:
    model = patched(family).double()
    batch = images(family, 3).double()
    together = model(batch, return_flop=False)
    alone = torch.cat([model(image[None], return_flop=False) for image in batch])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


COPIES: dict[str, Callable[[diffrate.CompressedModel], diffrate.CompressedModel]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", COPIES)
def test_copies_give_the_same_logits(family: str, kind: str) -> None:
    model = patched(family)
    expected = model(images(family))
    twin = COPIES[kind](model)
    logits, flops = twin(images(family))
    assert torch.equal(logits, expected[0])
    assert flops == expected[1]
    twin.set_kept_num(*(None if counts is None else [max(1, c) for c in counts] for counts in twin.get_kept_num()))
    assert model.get_kept_num() == FALLING[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_carries_the_schedule(family: str, tmp_path: Path) -> None:
    model = patched(family)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    twin = getattr(diffrate.patch, family)(plain(family).eval())
    twin.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    assert twin.get_kept_num() == FALLING[family]
    assert torch.equal(twin(images(family), return_flop=False), model(images(family), return_flop=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_state_loads_strictly_and_leaves_the_schedule(family: str) -> None:
    model = patched(family)
    model.load_state_dict(plain(family).state_dict(), strict=True)
    assert model.get_kept_num() == FALLING[family]


def test_a_state_of_another_depth_is_refused() -> None:
    state = {"compression._extra_state": torch.ones(2, 5, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"found \[2, 5\]; accepted: \[2, 6\]"):
        patched("deit").load_state_dict(state, strict=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_official_weights_load_before_or_after_patching(family: str, tmp_path: Path) -> None:
    before = golden_model(family, tmp_path)
    after = dense(getattr(diffrate.patch, family)(plain(family).double().eval()))
    torch.save(official_state(family), tmp_path / "official.pth")
    models.load_weights(after, tmp_path / "official.pth")
    batch = images(family).double()
    assert torch.equal(before(batch, return_flop=False), after(batch, return_flop=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_threads_share_a_model(family: str) -> None:
    model = patched(family)
    batches = [images(family) + index for index in range(8)]
    with torch.inference_mode():
        alone = [model(batch, return_flop=False) for batch in batches]

    def run(index: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(batches[index % 8], return_flop=False)

    with ThreadPoolExecutor(8) as pool:
        for index, logits in enumerate(pool.map(run, range(24))):
            assert torch.equal(logits, alone[index % 8])


@given(st.sampled_from(FAMILIES), st.data())
@settings(max_examples=30, deadline=None)
def test_any_valid_schedule_gives_finite_logits(family: str, data: st.DataObject) -> None:
    counts = st.lists(st.integers(1, TOKENS[family]), min_size=6, max_size=6)
    prune, merge = schedule_for(family, data.draw(counts))
    if prune is not None:
        prune = data.draw(counts)
    model = patched(family)
    model.set_kept_num(prune, merge)
    with torch.inference_mode():
        logits = model(images(family, 1), return_flop=False)
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_token_left_is_finite_in_every_precision(family: str, dtype: torch.dtype) -> None:
    model = patched(family).to(dtype)
    model.set_kept_num(*schedule_for(family, [TOKENS[family], 5, 2, 1, 1, 1]))
    with torch.inference_mode():
        logits = model(images(family).to(dtype), return_flop=False)
    assert logits.isfinite().all()
    assert logits.dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("at_rates", "similarity"), [(False, 0.999), (True, 0.85)])
def test_bfloat16_autocast_stays_near_float32(family: str, at_rates: bool, similarity: float) -> None:
    """Less near at rates: on random weights importances nearly tie, and some tokens change places."""
    model = patched(family)
    if not at_rates:
        model.set_kept_num(*schedule_for(family, [TOKENS[family]] * 6))
    with torch.inference_mode():
        expected = model(images(family), return_flop=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images(family), return_flop=False)
    assert torch.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0) > similarity


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_rates_are_trainable(family: str) -> None:
    model = patched(family).train()
    model(images(family), return_flop=False).sum().backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("compression.")}


def test_a_block_that_removes_nothing_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the third block removes tokens: one ranking and one merge in the whole model."""
    import diffrate.blocks.block as block
    import diffrate.blocks.reduction as rule

    calls = []
    for module, name in ((rule, "keep_tokens"), (rule, "merge_tokens"), (block, "attend_and_rank")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=original, _n=name: calls.append(_n) or _f(*a))
    model = patched("deit")
    model.set_kept_num([65, 65, 60, 60, 60, 60], [65, 65, 50, 60, 60, 60])
    model(images("deit"))
    assert calls == ["attend_and_rank", "merge_tokens"]


def test_drop_path_and_layer_scale_are_applied() -> None:
    """Layer scale 0 silences every branch: the tokens leave as they came."""
    model = plain("deit", init_values=1e-5).eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.ls1.gamma)
        torch.nn.init.zeros_(block.ls2.gamma)
    compressed = dense(diffrate.patch.deit(model))
    state = compressed.forward_tokens(images("deit"))
    torch.testing.assert_close(state.x, model._pos_embed(model.patch_embed(images("deit"))))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reg_tokens": 2}, "num_prefix_tokens=3"),
        ({"global_pool": "avg"}, "global_pool='avg'"),
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"patch_drop_rate": 0.5}, "patch_drop"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"class_token": False, "global_pool": "avg"}, "num_prefix_tokens=0"),
    ],
)
def test_models_that_are_not_handled_are_refused_by_name(options: dict[str, object], expected: str) -> None:
    with pytest.raises(diffrate.UnsupportedModelError) as caught:
        diffrate.patch.deit(plain("deit", **options))
    assert expected in str(caught.value)


def test_unknown_parts_of_a_block_are_refused() -> None:
    model = plain("deit")
    model.blocks[2].attn.add_module("rotary", torch.nn.Identity())
    with pytest.raises(diffrate.UnsupportedModelError, match=r"blocks\.2\.attn: found rotary"):
        diffrate.patch.deit(model)


def test_patching_twice_is_refused() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match="not yet patched"):
        diffrate.patch.deit(patched("deit"))


def test_other_architectures_are_refused() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match="MetaFormer"):
        diffrate.patch.deit(plain("caformer"))
    with pytest.raises(diffrate.UnsupportedModelError, match="VisionTransformer"):
        diffrate.patch.caformer(plain("deit"))


def test_caformers_last_stage_stays_whole() -> None:
    with pytest.raises(diffrate.ScheduleError, match=r"merge_kept_num\[5\]: found 48; accepted: 49"):
        patched("caformer").set_kept_num(None, [196] * 5 + [48, 49])


def test_caformer_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"accepted: \[14, 14\]"):
        patched("caformer")(torch.zeros(1, 3, 256, 256))


def test_caformers_features_are_timms() -> None:
    plain_model = plain("caformer").double().eval()
    plain_model.head.fc.norm.eps = 1e-5
    batch = images("caformer").double()
    with torch.inference_mode():
        features, (_, maps) = plain_model.forward_features(batch), plain_model.forward_intermediates(batch, [0, 2])
        model = dense(diffrate.patch.caformer(plain_model))
        torch.testing.assert_close(model.forward_features(batch), features)
        torch.testing.assert_close(model.forward_intermediates(batch, [0, 2], intermediates_only=True), maps)
        model.set_kept_num(None, [196, 90, 50, 20, 1, 49, 49])
        assert model.forward_features(batch).shape == features.shape
    with pytest.raises(ValueError, match="output_fmt: found 'NLC'; accepted: 'NCHW'"):
        model.forward_intermediates(batch, output_fmt="NLC")


def test_restoring_gives_each_position_its_representative() -> None:
    x = torch.tensor([[[1.0], [2.0]]])
    state = TokenState(x, origin=torch.tensor([[1, 0, 1, -1]]))
    assert restore(state).flatten().tolist() == [2, 1, 2, 0]
