"""What each block can lose alone: against whole forward passes, on models left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffrate
from diffrate.searching.teacher import angle, divergence
from tests.constructions import build, images_for
from tests.tiny_models import FAMILIES, IMAGE_SIZE, plain

SMALL = ("registers", "no_class_token", "no_pool", "distilled", "rope", "relative_table", "attention_pool")


def patched(name: str) -> tuple[diffrate.CompressedModel, Tensor]:
    """A small model of a family or a construction, and three images for it."""
    if name not in FAMILIES:
        return diffrate.patch.vit(build(name)), images_for(name, 3)
    torch.manual_seed(0)
    model = getattr(diffrate.patch, name)(plain(name).double().eval())
    side = IMAGE_SIZE[name]
    return model, torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def alone(model: diffrate.CompressedModel, one: diffrate.Sensitivity) -> diffrate.Schedule:
    """The schedule that was measured."""
    space = model.compression.space.every_block()
    choices = [(block, kind) for block in space.searchable for kind in space.kinds]
    return space.schedule([one.kept if at == (one.block, one.kind) else space.limits[at[0]] for at in choices])


@torch.inference_mode()
def outputs(model: diffrate.CompressedModel, images: Tensor, schedule: diffrate.Schedule) -> Tensor:
    model.set_kept_num(schedule.prune, schedule.merge)
    return model(images, return_flop=False).float()


@pytest.mark.parametrize("name", [*FAMILIES, *SMALL])
def test_losses_are_those_of_whole_forward_passes(name: str) -> None:
    model, images = patched(name)
    found = diffrate.sensitivity(model, [images[:2], (images[2:], "no labels")], shares=(0.6, 0.1))
    space = model.compression.space.every_block()
    assert [(one.block, one.kind) for one in found[::2]] == [
        (b, kind) for b in space.searchable for kind in space.kinds
    ]
    assert model.compression.schedule is None
    taught = outputs(model, images, model.dense_schedule())
    for one in found:
        seen = outputs(model, images, alone(model, one))
        measure = divergence if model.has_head() else angle
        assert one.loss == pytest.approx(float(measure(seen, taught).mean()), abs=1e-6)
        same = float((seen.argmax(-1) == taught.argmax(-1)).float().mean()) if model.has_head() else None
        assert one.agreement == (None if same is None else pytest.approx(same))
        assert (one.images, one.tokens) == (3, space.limits[one.block])
        assert space.least <= one.kept == max(space.least, round(one.share * one.tokens))
    unread = model.read is not None
    assert all((one.loss == 0) == (unread and one.block == len(space.limits) - 1) for one in found)


def test_without_a_head_it_is_the_angle_of_the_features() -> None:
    model = diffrate.patch.vit(build("registers", num_classes=0))
    images = images_for("registers")
    found = diffrate.sensitivity(model, [images], shares=(0.5,))
    taught = outputs(model, images, model.dense_schedule())
    assert taught.shape == (2, 48)
    for one in found:
        assert one.agreement is None
        assert one.loss == pytest.approx(
            float(angle(outputs(model, images, alone(model, one)), taught).mean()), abs=1e-6
        )


def test_the_dense_blocks_run_once_a_batch() -> None:
    model, images = patched("deit")
    runs = []
    blocks = model.compressible_blocks()
    for index in (0, 2):
        part: Any = blocks[index]
        part.norm1.register_forward_hook(lambda *_, index=index: runs.append(index))
    told = []
    diffrate.sensitivity(model, [images, images], shares=(0.5, 0.2), callback=told.append)
    assert runs.count(0) == 2 * (1 + 4)  # dense, and for two shares each kind in that block
    assert runs.count(2) == 2 * (1 + 3 * 4)
    assert told == [0, 1, 2, 3, 4, 5] * 2


def test_the_model_is_left_as_it_was() -> None:
    model, images = patched("deit")
    kept = [65, 60, 50, 40, 30, 20]
    model.set_kept_num(kept, kept)
    model.train()
    model.get_submodule("blocks.1").eval()
    modes = [module.training for module in model.modules()]
    diffrate.sensitivity(model, [images], shares=(0.5,))
    with pytest.raises(diffrate.NonFiniteLossError, match="calibration images"):
        diffrate.sensitivity(model, [images * torch.nan])
    assert model.get_kept_num() == (kept, kept)
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_shares_that_keep_the_same_tokens_count_once() -> None:
    model, images = patched("registers")  # 21 tokens, 5 of which always stay
    found = diffrate.sensitivity(model, [images], shares=(0.1, 0.2, 0.99, 0.5))
    assert [one.kept for one in found if (one.block, one.kind) == (1, "merge")] == [10, 5]


@pytest.mark.parametrize(
    ("shares", "said"), [((), "found none"), ((0.5, 1), "found 1;"), ((0,), "found 0;"), ((0.999,), "all of 65 tokens")]
)
def test_shares_are_checked(shares: tuple[float, ...], said: str) -> None:
    model, images = patched("deit")
    with pytest.raises(diffrate.SearchSettingError, match=said):
        diffrate.sensitivity(model, [images], shares=shares)


def test_a_patched_model_and_a_batch_are_needed() -> None:
    unpatched: Any = plain("deit")
    with pytest.raises(diffrate.UnsupportedModelError, match=r"diffrate\.patch\.vit"):
        diffrate.sensitivity(unpatched, [])
    with pytest.raises(ValueError, match="found no batch"):
        diffrate.sensitivity(patched("deit")[0], [])
