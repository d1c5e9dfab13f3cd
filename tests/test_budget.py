"""Rounding to a FLOPs budget, baselines, and schedules written to files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffrate
import models
from diffrate.blocks.rates import expectation, flattest_logits
from diffrate.budget import BASELINES, PEERS, Budget, BudgetError, baseline_schedule, meets_budget
from diffrate.device import shapes_alone
from diffrate.schedule import Schedule, find_schedule, make_schedule, running_counts, save_schedule
from tests.tiny_models import plain


@cache
def full_size(name: str) -> diffrate.CompressedModel:
    entry = models.entry_of(name)
    with shapes_alone():
        return diffrate.patch.vit(models.create(entry))


@given(st.sampled_from(sorted(models.ZOO)), st.data())
@settings(max_examples=75, deadline=None)
def test_any_expected_counts_round_to_any_reachable_budget(name: str, data: st.DataObject) -> None:
    model = full_size(name)
    space = model.compression.space
    choices = len(space.searchable) * len(space.kinds)
    count = st.one_of(st.just(1.0), st.just(float(space.tokens)), st.floats(1, space.tokens))
    expected = data.draw(st.lists(count, min_size=choices, max_size=choices))
    least = model.flops_at(space.schedule([1] * choices))
    target = least + data.draw(st.floats(0.01, 1)) * (model.flops_at(space.dense()) - least)
    schedule = Budget(model.flops_at, target).rounded(expected, space)
    model.check(schedule)
    assert meets_budget(model.flops_at(schedule), target)


def test_counts_that_meet_the_budget_stay_as_they_are() -> None:
    model = full_size("vit_deit_small_patch16_224")
    path = Path(__file__).parent.parent / "compression_rate.json"
    published = find_schedule(path, "ViT-S-DeiT", 2.9)
    assert published.prune is not None
    expected = [float(c) for block in range(1, 12) for c in (published.prune[block], published.merge[block])]
    rounded = Budget(model.flops_at, model.flops_at(published)).rounded(expected, model.compression.space)
    assert running_counts(rounded, 197) == running_counts(published, 197)


def test_a_target_out_of_reach_gives_the_range() -> None:
    model = full_size("vit_deit_small_patch16_224")
    for target in (0.3, 4.7):
        with pytest.raises(BudgetError, match=r"accepted: 0\.6018 to 4\.599"):
            Budget(model.flops_at, target * 1e9).check(model.compression.space)


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("share", [0.8, 0.65, 0.5, 0.35])
def test_baselines_meet_the_budget_and_do_only_what_they_say(kind: str, share: float) -> None:
    model = full_size("vit_deit_base_patch16_224")
    space = model.compression.space
    target = share * model.flops_at(space.dense())
    schedule = baseline_schedule(kind, space, Budget(model.flops_at, target))
    assert meets_budget(model.flops_at(schedule), target)
    assert schedule.rules == (None if kind in ("prune", "merge", "both") else (kind,) * 12)
    if kind in PEERS:
        going = [kept.pruned - kept.merged for kept in running_counts(schedule, 197)]
        assert all(abs(one - going[0]) <= 1 for one in going[:4])
        assert all(one <= going[0] + 1 for one in going)  # never more than half of what is left
        return
    counts = running_counts(schedule, 197)[1:]
    pruned = [kept.entering - kept.pruned for kept in counts]
    merged = [kept.pruned - kept.merged for kept in counts]
    if kind == "both":
        assert sum(pruned) == pytest.approx(sum(merged), rel=0.2)
    elif kind == "merge":
        assert sum(pruned) == 0
    else:
        assert sum(merged) == 0
    ratios = [kept.merged / kept.entering for kept in counts]
    assert max(ratios) - min(ratios) < 0.15


def test_caformer_has_the_merging_baseline_alone() -> None:
    model = full_size("caformer_s36")
    budget = Budget(model.flops_at, 0.7 * model.flops_at(model.compression.space.dense()))
    assert baseline_schedule("merge", model.compression.space, budget).prune is None
    with pytest.raises(BudgetError, match="only merges; accepted: merge"):
        baseline_schedule("prune", model.compression.space, budget)


def test_random_tokens_go_whatever_their_importance() -> None:
    model = diffrate.patch.deit(plain("deit").eval())
    model.schedule = make_schedule([65, 20, 20, 20, 20, 20], [65] * 6, "random")
    images = torch.randn(1, 3, 32, 32)
    kept = {tuple((model.forward_tokens(images).origin >= 0)[0].tolist()) for _ in range(4)}
    assert len(kept) == 4
    assert all(sum(row) == 20 and row[0] for row in kept)


@given(st.integers(1, 200), st.integers(1, 9), st.floats(0, 1))
@settings(deadline=None)
def test_flattest_logits_have_the_mean_asked_for(patches: int, granularity: int, share: float) -> None:
    lowest = patches - granularity * ((patches - 1) // granularity)
    mean = lowest + share * (patches - lowest)
    found = float(expectation(flattest_logits(mean, patches, granularity), patches, granularity))
    assert found == pytest.approx(mean, abs=0.1 + 0.01 * granularity)


def test_rates_start_at_a_schedule() -> None:
    model = diffrate.patch.deit(plain("deit"), 1, 1)
    schedule = Schedule((65, 60, 50, 41, 30, 3), (65, 55, 45, 33, 20, 3))
    model.compression.start_at(schedule)
    assert model.get_kept_num() == (list(schedule.prune or ()), list(schedule.merge))


def test_saving_keeps_the_other_entries(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    save_schedule(path, "A", 2.5, Schedule((3, 3), (3, 3)))
    save_schedule(path, "B", 0.025, Schedule(None, (4,)))
    save_schedule(path, "A", 2.0, Schedule((3, 2), (3, 1)))
    save_schedule(path, "A", 2.00, Schedule((1, 1), (1, 1)))
    assert json.loads(path.read_text()) == {
        "A": {
            "2": {"prune_kept_num": [1, 1], "merge_kept_num": [1, 1]},
            "2.5": {"prune_kept_num": [3, 3], "merge_kept_num": [3, 3]},
        },
        "B": {"0.025": {"merge_kept_num": [4]}},
    }
    assert list(json.loads(path.read_text())["A"]) == ["2", "2.5"]
    assert '"prune_kept_num": [1, 1]' in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]
