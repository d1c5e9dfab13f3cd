"""The cost formula against every published figure, and against torch's own counter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffrate
import models
from diffrate.device import shapes_alone
from diffrate.schedule import find_schedule
from tests.tiny_models import GOLDEN

PROJECT = Path(__file__).parent.parent
RATES = PROJECT / "compression_rate.json"
PUBLISHED = json.loads((GOLDEN / "published_flops.json").read_text())
SCHEDULES = [(key, target) for key, entry in PUBLISHED.items() for target in entry["schedules"]]


@pytest.fixture(scope="module")
def patched() -> dict[str, diffrate.CompressedModel]:
    """All published models at full size without memory for their weights."""
    built = {}
    with shapes_alone():
        for key, entry in PUBLISHED.items():
            row = models.entry_of(entry["model"])
            built[key] = diffrate.patch.vit(models.create(row))
    return built


def test_all_published_schedules_ship() -> None:
    assert len(SCHEDULES) == 31
    table = json.loads(RATES.read_text())
    assert {(key, target) for key in PUBLISHED for target in table[key]} == set(SCHEDULES)
    assert all(isinstance(fields["merge_kept_num"], list) for entry in table.values() for fields in entry.values())


@pytest.mark.parametrize(("key", "target"), SCHEDULES)
def test_published_schedules(key: str, target: str, patched: dict[str, diffrate.CompressedModel]) -> None:
    model = patched[key]
    schedule = find_schedule(RATES, key, float(target))
    model.check(schedule)
    assert model.flops_at(schedule) == PUBLISHED[key]["schedules"][target]


@pytest.mark.parametrize("key", PUBLISHED)
def test_dense(key: str, patched: dict[str, diffrate.CompressedModel]) -> None:
    assert patched[key].flops_at(patched[key].dense_schedule()) == PUBLISHED[key]["dense"]


@pytest.mark.parametrize("key", [key for key, entry in PUBLISHED.items() if "reported_gflops" in entry])
def test_reported_figures_to_three_decimals(key: str, patched: dict[str, diffrate.CompressedModel]) -> None:
    target, gflops = PUBLISHED[key]["reported_gflops"]
    assert f"{patched[key].flops_at(find_schedule(RATES, key, float(target))) / 1e9:.3f}" == f"{gflops:.3f}"


@pytest.mark.parametrize(
    ("name", "target"),
    [("vit_deit_tiny_patch16_224", 0.8), ("vit_base_patch16_mae", 11.5), ("caformer_s36", 5.6)],
)
def test_agrees_with_torchs_counter(name: str, target: float) -> None:
    """Within 1 %, attention unfused so that the counter sees it.

    The formula leaves out matching and importance, which the counter sees as matrix products, and
    counts the class token in the patch embedding and CAFormer's head at `8 C K`. Neither counts
    softmax, normalisation, activations and biases.
    """
    row = models.entry_of(name)
    model = diffrate.patch.vit(models.create(row)).eval()
    schedule = find_schedule(RATES, row.schedule_key, target)
    model.set_kept_num(schedule.prune, schedule.merge)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(model.flops(), rel=0.01)
