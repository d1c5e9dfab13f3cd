"""Parity with the published system at fixed rates, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import recipe_weights
from tests.tiny_models import FAMILIES, GOLDEN, IMAGE_SIZE, VIT_SIZE, golden_model

CASES = [(family, case) for family in FAMILIES for case in range(3)]
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def load(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{family}_tiny.npz") as vectors:
        return dict(vectors)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_and_flops(family: str, case: int, tmp_path: Path) -> None:
    vectors = load(family)
    model = golden_model(family, tmp_path)
    model.set_kept_num(vectors.get(f"eval{case}/prune"), vectors[f"eval{case}/merge"])
    expected = vectors[f"eval{case}/logits"]
    logits, flops = model(recipe_weights.images(len(expected), IMAGE_SIZE[family]))
    np.testing.assert_allclose(logits.detach().numpy(), expected, **TOLERANCE)
    assert flops == vectors[f"eval{case}/flops"]


@pytest.mark.parametrize(("family", "case"), [item for item in CASES if item[0] != "caformer"])
def test_sizes(family: str, case: int, tmp_path: Path) -> None:
    """Sizes as a set: a block that removes nothing need not sort."""
    vectors = load(family)
    model = golden_model(family, tmp_path)
    model.set_kept_num(vectors[f"eval{case}/prune"], vectors[f"eval{case}/merge"])
    expected = vectors[f"eval{case}/size"]
    state = model.forward_tokens(recipe_weights.images(len(expected), IMAGE_SIZE[family]))
    assert state.size is not None
    np.testing.assert_allclose(np.sort(state.size.detach().numpy()), np.sort(expected), **TOLERANCE)


@pytest.mark.parametrize("case", range(3))
def test_origins(case: int, tmp_path: Path) -> None:
    """Only DeiT has published origins; each of these schedules removes tokens in the last block."""
    vectors = load("deit")
    model = golden_model("deit", tmp_path)
    model.set_kept_num(vectors[f"eval{case}/prune"], vectors[f"eval{case}/merge"])
    expected = vectors[f"eval{case}/origin"]
    state = model.forward_tokens(recipe_weights.images(len(expected), 32))
    assert state.origin is not None
    np.testing.assert_array_equal(state.origin.numpy(), expected)


@pytest.mark.parametrize("family", ["deit", "mae"])
def test_dense(family: str, tmp_path: Path) -> None:
    vectors = load(family)
    model = golden_model(family, tmp_path)
    expected = vectors["dense/logits"]
    logits, flops = model(recipe_weights.images(len(expected), 32))
    np.testing.assert_allclose(logits.detach().numpy(), expected, **TOLERANCE)
    assert flops == vectors["dense/flops"]


def test_the_tiny_models_are_those_of_the_vectors() -> None:
    config = json.loads(str(load("deit")["config"]))
    assert {name: config[name] for name in VIT_SIZE} == VIT_SIZE
    assert json.loads(str(load("caformer")["config"]))["depths"] == [1, 1, 5, 2]


def test_merge_goes_through_float32_unchanged(tmp_path: Path) -> None:
    vectors = load("deit")
    model = golden_model("deit", tmp_path).float()
    model.set_kept_num(vectors["eval0/prune"], vectors["eval0/merge"])
    logits = model(recipe_weights.images(4, 32).float(), return_flop=False)
    np.testing.assert_allclose(logits.detach().numpy(), vectors["eval0/logits"], rtol=0, atol=1e-4)
    assert logits.dtype == torch.float32
