"""The differentiable search: parity with the published system, and what must hold of any step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import diffrate
import models
from diffrate.blocks.rates import RateError, draw, ste_ceil, ste_leaving, survival_probabilities
from tests import recipe_weights
from tests.test_golden import load
from tests.tiny_models import FAMILIES, IMAGE_SIZE, official_state, plain

CASES = [(family, granularity) for family in ("deit", "mae") for granularity in (1, 4)]


def searching(family: str, granularity: int, tmp_path: Path) -> diffrate.CompressedModel:
    model = plain(family).double()
    torch.save(official_state(family), tmp_path / "official.pth")
    models.load_weights(model, tmp_path / "official.pth")
    return getattr(diffrate.patch, family)(model, granularity, granularity).double().train()


@pytest.mark.parametrize(("family", "granularity"), CASES)
def test_golden_steps(family: str, granularity: int, tmp_path: Path) -> None:
    """Logits, losses and gradients to 1e-5: the published system has one float32 step."""
    vectors = {
        name.split("/", 1)[1]: v for name, v in load(family).items() if name.startswith(f"search_g{granularity}/")
    }
    labels = torch.from_numpy(load(family)["labels"])
    model = searching(family, granularity, tmp_path)
    rates = model.arch_parameters()
    assert len(rates) == len(vectors["block"])
    with torch.no_grad():
        for index, rate in enumerate(rates):
            rate.copy_(torch.from_numpy(vectors[f"init{index}"]))
    assert model.get_kept_num() == (vectors["kept_prune"].tolist(), vectors["kept_merge"].tolist())
    optimizer = torch.optim.AdamW(rates, lr=0.01, weight_decay=0)
    for step in range(3):
        logits, flops = model(recipe_weights.images(len(labels), 32))
        loss = F.cross_entropy(logits, labels)
        loss_flops = (flops / 1e9 - float(vectors["target_gflops"])) ** 2
        optimizer.zero_grad()
        (loss + 5 * loss_flops).backward()
        assert loss.item() == pytest.approx(float(vectors[f"step{step}_loss_cls"]), abs=1e-5)
        assert loss_flops.item() == pytest.approx(float(vectors[f"step{step}_loss_flops"]), rel=1e-5)
        if step == 0:
            np.testing.assert_allclose(logits.detach().numpy(), vectors["logits"], rtol=0, atol=1e-5)
            assert flops.item() == vectors["flops"]
            for index, rate in enumerate(rates):
                expected = vectors[f"grad{index}"]
                assert rate.grad is not None
                error = np.abs(rate.grad.numpy() - expected).max()
                assert error <= 1e-5 * (np.abs(expected).max() + 1e-5), index
        optimizer.step()


def test_choices_come_in_block_order_prune_before_merge() -> None:
    model = diffrate.patch.mae(plain("mae"), prune_granularity=1, merge_granularity=4)
    assert [len(rate) for rate in model.arch_parameters()] == [64, 16] * 4
    assert [len(rate) for rate in diffrate.patch.caformer(plain("caformer"), 1, 7).arch_parameters()] == [28] * 3


@given(st.integers(1, 40), st.integers(1, 45), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_choice_is_the_sum_over_its_candidates(patches: int, granularity: int, class_token: bool, seed: int) -> None:
    candidates = list(range(patches, 0, -granularity))
    logits = torch.randn(1, len(candidates), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probability = logits.softmax(-1)[0].tolist()
    (choice,) = draw(logits, patches, granularity, class_token)
    expected = sum(p * c for p, c in zip(probability, candidates, strict=True))
    assert choice.count == int(np.ceil(expected - 1e-12)) + class_token
    assert choice.expected.item() == choice.count
    alive = [sum(p for p, c in zip(probability, candidates, strict=True) if c > token) for token in range(patches)]
    np.testing.assert_allclose(choice.survival.numpy(), [1.0] * class_token + alive, atol=1e-12)
    assert choice.mask().tolist() == [1.0] * choice.count + [0.0] * (patches + class_token - choice.count)


def test_the_gradient_of_a_mask_is_that_of_its_probabilities() -> None:
    logits = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(65, dtype=torch.float64)
    (choice,) = draw(logits, 64, 4, True)
    (hard,) = torch.autograd.grad((choice.mask() * weights).sum(), logits)
    (soft,) = torch.autograd.grad((survival_probabilities(logits, 64, 4, True)[0] * weights).sum(), logits)
    torch.testing.assert_close(hard, soft)


def test_straight_through_values_are_exact_and_gradients_pass() -> None:
    x = torch.tensor([1.2, 7.0, -0.5], requires_grad=True)
    assert ste_ceil(x).tolist() == [2.0, 7.0, 0.0]
    ste_ceil(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
    counts = [torch.tensor(value, requires_grad=True) for value in (9.0, 5.0, 7.0)]
    leaving = ste_leaving(*counts)
    assert leaving.item() == 5
    assert torch.autograd.grad(leaving, counts, allow_unused=True)[1:] == (1, 1)
    assert torch.autograd.grad(ste_leaving(*counts), counts, allow_unused=True)[0] is None


def test_an_impossible_granularity_is_refused() -> None:
    with pytest.raises(RateError, match="found 0; accepted: from 1 to 64"):
        diffrate.patch.deit(plain("deit"), prune_granularity=0)


def falling(family: str) -> diffrate.CompressedModel:
    """Searching, at falling counts, so that every block reduces."""
    torch.manual_seed(0)
    model = getattr(diffrate.patch, family)(plain(family), 4, 4).train()
    with torch.no_grad():
        for block in model.compression.space.searchable:
            for offset, kind in enumerate(model.compression.space.kinds):
                rate = model.compression.get_parameter(f"{kind}{block}")
                rate[min(len(rate) - 2, 2 * block + offset)] = 9
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_searches(family: str) -> None:
    """A step gives every rate a gradient, and costs what the evaluated schedule costs."""
    model = falling(family)
    logits, flops = model(recipe_weights.images(2, IMAGE_SIZE[family]).float())
    assert logits.isfinite().all()
    (F.cross_entropy(logits, torch.tensor([1, 3])) + flops / 1e9).backward()
    for rate in model.arch_parameters():
        assert rate.grad is not None
        assert rate.grad.isfinite().all()
        assert rate.grad.abs().max() > 0
    assert flops.item() == pytest.approx(model.flops(), rel=1e-6)
    model.eval()
    assert model(recipe_weights.images(2, IMAGE_SIZE[family]).float())[1] == model.flops()


@pytest.mark.parametrize("family", ["deit", "caformer"])
def test_search_agrees_with_dropping_tokens_for_real(family: str) -> None:
    """The masked forward computes what the fixed schedule does, but for 1e-6 in the softmax.

    Only the last searchable block merges: sizes, which the search clamps, come too late to matter.
    """
    torch.manual_seed(0)
    model = getattr(diffrate.patch, family)(plain(family), 1, 1).double().train()
    last = model.compression.space.searchable[-1]
    with torch.no_grad():
        for rate in model.arch_parameters():
            rate[0] = 40  # keep all
        merge = model.compression.get_parameter(f"merge{last}")
        merge[0], merge[20] = 0, 40  # but merge 20 tokens in the last block that may
    images = recipe_weights.images(2, IMAGE_SIZE[family])
    masked = model(images, return_flop=False)
    dropped = model.eval()(images, return_flop=False)
    torch.testing.assert_close(masked, dropped, atol=1e-5, rtol=0)


def test_frozen_weights_get_no_gradient_and_early_blocks_no_graph() -> None:
    model = diffrate.patch.deit(plain("deit"), 4, 4).train()
    for weight in model.parameters():
        weight.requires_grad_(False)
    for rate in model.arch_parameters():
        rate.requires_grad_(True)
    graphs = []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda _m, _i, output: graphs.append(output.requires_grad))
    logits, _ = model(recipe_weights.images(1, 32).float())
    logits.sum().backward()
    assert graphs[0] is False
    assert graphs[-1] is True
    with_gradient = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert with_gradient
    assert all(name.startswith("compression.") for name in with_gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_travel_with_the_state(family: str) -> None:
    model = getattr(diffrate.patch, family)(plain(family), 4, 4)
    with torch.no_grad():
        for rate in model.arch_parameters():
            rate.normal_()
    twin = getattr(diffrate.patch, family)(plain(family), 4, 4)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert twin.get_kept_num() == model.get_kept_num()
    twin.load_state_dict(plain(family).state_dict(), strict=True)
    assert twin.get_kept_num() == model.get_kept_num()
