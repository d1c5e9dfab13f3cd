"""On a GPU: the golden vectors, and what the same models compute on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import diffrate
from diffrate.budget import meets_budget
from diffrate.searching.checkpoint import read_checkpoint
from tests import recipe_weights
from tests.constructions import images_for
from tests.library.test_search_function import batches, rates, small
from tests.test_constructions import CARRYING, EXACT, reduced
from tests.test_golden import CASES, TOLERANCE, load
from tests.test_search import falling
from tests.tiny_models import FAMILIES, IMAGE_SIZE, golden_model

# Each way in which tokens carry what they need, and each other kind of attention and of pooling.
HANDFUL = (*CARRYING, "attention_pool", "differential", "distilled", "eva_post_norm", "hybrid", "naflex_rope")


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.mark.parametrize(("family", "case"), CASES)
def test_golden_vectors(family: str, case: int, device: torch.device, tmp_path: Path) -> None:
    """The published system's logits, FLOPs, sizes as a set, and DeiT's origins, in float64."""
    vectors = load(family)
    vectors = {name.split("/")[1]: value for name, value in vectors.items() if name.startswith(f"eval{case}/")}
    model = golden_model(family, tmp_path).to(device)
    model.set_kept_num(vectors.get("prune"), vectors["merge"])
    images = recipe_weights.images(len(vectors["logits"]), IMAGE_SIZE[family]).to(device)
    with torch.no_grad():
        logits, flops = model(images)
        state = model.forward_tokens(images)
    np.testing.assert_allclose(logits.cpu().numpy(), vectors["logits"], **TOLERANCE)
    assert flops == vectors["flops"]
    if family != "caformer":
        np.testing.assert_allclose(np.sort(state.size.cpu().numpy()), np.sort(vectors["size"]), **TOLERANCE)
    if family == "deit":
        np.testing.assert_array_equal(state.origin.cpu().numpy(), vectors["origin"])


@pytest.mark.parametrize("name", HANDFUL)
def test_constructions(name: str, device: torch.device) -> None:
    """Logits, and features at the full grid, which need the places of tokens, are those of the CPU."""
    model, images = reduced(name, (1, 0.75, 0.6, 0.5), (1, 0.7, 0.5, 0.4)), images_for(name)
    there = copy.deepcopy(model).to(device)
    logits, features = there(images.to(device), return_flop=False), there.forward_features(images.to(device))
    torch.testing.assert_close(logits.cpu(), model(images, return_flop=False), **EXACT)
    torch.testing.assert_close(features.cpu(), model.forward_features(images), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_the_search(family: str, device: torch.device) -> None:
    """Logits, the expected cost and the gradients of all rates, in float64, are those of the CPU."""
    model = falling(family).double()
    found = []
    for place in (torch.device("cpu"), device):
        there = copy.deepcopy(model).to(place)
        logits, flops = there(recipe_weights.images(2, IMAGE_SIZE[family]).to(place))
        (F.cross_entropy(logits, torch.tensor([1, 3], device=place)) + flops / 1e9).backward()
        gradients = [rate.grad for rate in there.arch_parameters()]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        found.append([tensor.detach().cpu() for tensor in (logits, flops, *gradients) if tensor is not None])
    for expected, computed in zip(*found, strict=True):
        torch.testing.assert_close(computed, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("precision", [None, torch.float32], ids=["default", "float32"])
def test_a_search_is_saved_and_goes_on(precision: torch.dtype | None, device: torch.device, tmp_path: Path) -> None:
    """Stopped in its second epoch it ends as one that was not; in half precision, the default there, but for noise."""

    class Stop(diffrate.Observer):
        done = 0

        def on_step(self, record: diffrate.StepRecord) -> None:
            self.done += 1

        def stop(self) -> bool:
            return self.done == 3

    setting: dict[str, Any] = {"share": 0.7, "epochs": 3, "val": batches(2), "learning_rate": 0.1}
    setting |= {"flops_loss": "relative", "device": device, "precision": precision}
    whole_model, model, file = small(), small(), tmp_path / "search.pth"
    whole = diffrate.search(whole_model, batches(), **setting)
    with pytest.raises(diffrate.StoppedError):
        diffrate.search(small(), batches(), callback=Stop(), checkpoint=file, **setting)
    assert (read_checkpoint(file)["epoch"], read_checkpoint(file)["step"]) == (1, 1)
    found = diffrate.search(model, batches(), resume=file, **setting)
    assert meets_budget(found.flops, 0.7 * model.flops_at(model.dense_schedule()))
    assert all(rate.device.type == device.type for rate in model.arch_parameters())
    assert [(one.epoch, one.step) for one in found.history] == [(one.epoch, one.step) for one in whole.history]
    for one, other in zip(found.history, whole.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.05 if precision is None else 1e-3)
    if precision is not None:
        for rate, expected in zip(rates(model), rates(whole_model), strict=True):
            torch.testing.assert_close(rate, expected, rtol=0, atol=0.02)  # a fifth of one step
