"""Every ViT that timm has a name for: patched, with a cost that torch's counter confirms, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffrate
from diffrate.device import shapes_alone
from diffrate.schedule import Schedule
from tests.constructions import since

FILES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "naflexvit",
    "vision_transformer_relpos",
    "vision_transformer_hybrid",
)
NAMES = [name for file in FILES for name in timm.list_models(module=file)]
# Attention and MLP side by side, or several of each: compression sits between the two.
PARALLEL = {
    "vit_base_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_huge_patch14_xp_224": "ParallelScalingBlock",
    "vit_large_patch14_xp_224": "ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
}
SHALLOW = 3  # blocks: enough for one that may reduce tokens between a first and a last that may not


def shallow(name: str) -> Any:
    """The model with few of its blocks, at full width, without memory for its weights."""
    with shapes_alone():
        try:
            # Some buffers of older timm start on the CPU even so.
            return timm.create_model(name, depth=SHALLOW).eval().to("meta")
        except AssertionError:  # says something of each of its blocks
            model: Any = timm.create_model(name).eval()
            model.blocks = model.blocks[:SHALLOW]
            return model


def counted(call: Callable[[], object]) -> float:
    """Multiply-accumulates by torch's counter; it multiplies by two."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def images_of(model: nn.Module) -> torch.Tensor:
    stem: Any = getattr(model, "patch_embed", None)
    config: Any = model.pretrained_cfg
    return torch.empty(1, 3, *(config["input_size"][1:] if stem is None else stem.img_size), device="meta")


def halved(model: diffrate.CompressedModel) -> Schedule:
    """Half of the patch tokens go in the second block, most by pruning: finding what to merge with is not counted."""
    space = model.compression.space
    limit, patches = space.limits[0], space.limits[0] - space.prefix
    counts = {kind: [limit, space.prefix + round(share * patches)] for kind, share in (("prune", 0.6), ("merge", 0.5))}
    prune, merge = (tuple(row + row[-1:] * (len(space.limits) - 2)) for row in counts.values())
    return Schedule(prune, merge)


@pytest.fixture(scope="module")
def known() -> set[object]:
    """The constructions whose cost was counted."""
    return set()


def construction(model: Any) -> object:
    """What a model is made of, whatever its sizes."""
    of = type(model), model.global_pool, model.num_prefix_tokens, frozenset(model.state_dict())
    return *of, re.sub(r"[\d.]+", "", repr(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_patched_with_a_cost_that_is_right_or_refused_with_a_reason(name: str, known: set[object]) -> None:
    """Costs are counted once for names that differ in sizes alone."""
    plain = shallow(name).requires_grad_(False)
    if name in PARALLEL:
        with pytest.raises(diffrate.UnsupportedModelError, match=rf"blocks\.0: found {PARALLEL[name]}; accepted: "):
            diffrate.patch.vit(plain)
        assert type(plain).__module__.startswith("timm.")  # as it was
        return
    made_of, images = construction(plain), images_of(plain)
    dense = None if made_of in known else counted(lambda: plain(images))
    model = diffrate.patch.vit(plain)
    if dense is None:
        return
    known.add(made_of)
    assert model.flops_at(model.dense_schedule()) == pytest.approx(dense, rel=0.01)
    schedule = halved(model)
    model.set_kept_num(schedule.prune, schedule.merge)
    # The class token's shortcut through the last block is left out, as the paper leaves it out.
    compressed = counted(lambda: model.classify(model.run_blocks(model.enter(images))[-1]))
    assert model.flops() == pytest.approx(compressed, rel=0.01)


@since("1.0.31")
def test_nearly_all_names_are_supported() -> None:
    assert len(NAMES) >= 293
    assert PARALLEL.keys() <= set(NAMES)
    assert len(PARALLEL) / len(NAMES) < 0.05
