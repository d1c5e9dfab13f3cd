"""Against the method written out token by token, on random models, sizes, schedules and batches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import diffrate
from diffrate.blocks import masked
from diffrate.schedule import PUBLISHED, RULE_NAMES, make_schedule
from tests.oracle import Oracle

QUICK = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Case(NamedTuple):
    """A random model at a random schedule, and images for it."""

    model: Any
    oracle: Oracle
    schedule: list[tuple[int, int]]
    images: torch.Tensor

    def __repr__(self) -> str:
        return f"{type(self.model).__name__} of {len(self.schedule)} blocks at {self.schedule} by {self.oracle.rules}"


@st.composite
def cases(draw: st.DrawFn, most_images: int = 2, rules: Any = RULE_NAMES, types: Any = (torch.float64,)) -> Case:
    heads, depth, patch = draw(st.integers(1, 3)), draw(st.integers(3, 4)), draw(st.integers(2, 3))
    rows, columns, mean = draw(st.integers(2, 3)), draw(st.integers(1, 4)), draw(st.booleans())
    sizes = {"img_size": (patch * rows, patch * columns), "patch_size": patch, "depth": depth, "num_heads": heads}
    sizes |= {"embed_dim": 4 * heads * draw(st.integers(1, 2)), "num_classes": draw(st.integers(1, 5))}
    pooling = {"global_pool": "avg", "fc_norm": True} if mean else {"global_pool": "token"}
    dtype = draw(st.sampled_from(types))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **pooling).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():  # as fresh weights are, tokens are all alike
        parameter += 0.3 * torch.randn_like(parameter)
    model = getattr(diffrate.patch, "mae" if mean else "deit")(model, 1, 1)
    tokens, least = rows * columns + 1, 1 + mean  # a mean is of some patches
    if draw(st.booleans()):
        counts = st.lists(st.integers(least, tokens), min_size=depth, max_size=depth)
        schedule = list(zip(draw(counts), draw(counts), strict=True))
    else:  # a few tokens go in each block
        schedule, left = [], tokens
        for _ in range(depth):
            pruned = max(least, left - draw(st.sampled_from((0, 0, 1))))
            left = max(least, pruned - draw(st.integers(0, pruned // 2)))
            schedule.append((pruned, left))
    prune, merge = zip(*schedule, strict=True)
    named = draw(st.lists(st.sampled_from(rules), min_size=depth, max_size=depth))
    model.schedule = make_schedule(prune, merge, named)
    weights = {name: value.double().numpy() for name, value in model.named_parameters() if "compression" not in name}
    images = torch.randn(draw(st.integers(1, most_images)), 3, *sizes["img_size"], dtype=dtype)
    return Case(model, Oracle(weights, heads, patch, mean, named), schedule, images)


STEADY = tuple(name for name in RULE_NAMES if name != "random")
# How near the logits come, and how near values may come of which the larger decides.
NEAR = {torch.float64: (1e-8, 1e-12), torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.1, 0.03)}


@settings(QUICK, max_examples=40)
@given(case=cases(types=tuple(NEAR)))
def test_logits_and_multiplications(case: Case) -> None:
    """By every rule; where a rounding decides which token goes, nothing can be said."""
    rand_like, draws = torch.rand_like, []
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda like: draws.append(rand_like(like)) or draws[-1])
        logits, flops = case.model(case.images, return_flop=True)
    expected = []
    for number, image in enumerate(case.images):
        case.oracle.draws = [drawn[number].double().numpy() for drawn in draws]
        expected.append(case.oracle.logits(image.double().numpy(), case.schedule))
    assert int(flops) * len(case.images) == case.oracle.multiplications
    near, apart = NEAR[case.images.dtype]
    assume(case.oracle.closest > apart)
    np.testing.assert_allclose(logits.double().numpy(), np.array(expected), rtol=near, atol=near)


@QUICK
@given(case=cases(most_images=5, rules=STEADY), seed=st.integers(0, 100))
def test_an_image_is_for_itself(case: Case, seed: int) -> None:
    """A batch in another order gives the same in that order, and fewer images give the same for each."""
    order = torch.randperm(len(case.images), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        together = case.model(case.images, return_flop=False)
        shuffled = case.model(case.images[order], return_flop=False)
        first = case.model(case.images[:1], return_flop=False)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first, together[:1], rtol=1e-9, atol=1e-9)


@QUICK
@given(case=cases(rules=(PUBLISHED,)))
def test_a_search_at_certain_counts(case: Case) -> None:
    """With certain rates, a search computes what the fixed counts do, but for its two constants: what it raises sizes
    to, and what it adds in the softmax."""
    model, space = case.model, case.model.compression.space
    rows = [{"prune": space.limits[0], "merge": space.limits[0]} for _ in case.schedule]
    for block, kind in space.choices:
        kept = max(case.schedule[block][kind == "merge"], space.prefix + 1)  # a search leaves one patch
        rows[block][kind] = kept
        rate = getattr(model.compression, f"{kind}{block}")
        rate.copy_(torch.where(torch.arange(len(rate)) == space.limits[0] - kept, 100.0, -100.0))
    model.set_kept_num([row["prune"] for row in rows], [row["merge"] for row in rows])
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "LEAST_SEARCH_SIZE", -math.inf)
        patch.setattr(masked, "EPSILON", 0.0)
        at_fixed, flops = model(case.images, return_flop=True)
        model.compression.schedule = None
        searched, expected = model.train()(case.images, return_flop=True)
    assert float(expected) == pytest.approx(flops, rel=1e-6)
    assume(searched.isfinite().all())  # sizes below 0 have no logarithm
    torch.testing.assert_close(searched, at_fixed, rtol=1e-5, atol=1e-5)
