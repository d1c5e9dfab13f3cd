"""Seconds as a cost: curves through noisy samples, tables, budgets in seconds, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffrate
from diffrate.blocks.masked import plan_search
from diffrate.budget import LATENCY, SPEEDUP, Budget, choices_of, meets_budget, without_waste
from diffrate.latency.measure import knots, probing_schedules, random_schedule
from diffrate.latency.table import (
    BlockTimes,
    Curve,
    LatencyFileError,
    LatencyTable,
    expected_seconds,
    fit_curve,
    fit_prices,
    fit_terms,
    read_table,
    reduction_terms,
    write_table,
)
from diffrate.schedule import RULES, Kept, Schedule, SearchSpace, running_counts
from tests.test_patch import patched

TOKENS, BLOCKS = 65, 6
SPACE = SearchSpace(limits=(TOKENS,) * BLOCKS, searchable=tuple(range(1, BLOCKS)), prunes=True, prefix=1)


def line(at_one: float, at_all: float) -> Curve:
    return Curve((1, TOKENS), (at_one, at_all))


def table_of(price: float, **changes: Any) -> LatencyTable:
    """Blocks whose attention and MLP are lines over tokens, and where each reduction takes `price` seconds."""
    kind = BlockTimes(
        line(0.1, 1.0),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        line(0.2, 2.0),
        (price, 0.0, 0.0, price, 0.0, 0.0, price, 0.0, 0.0, 0.0),
        None,
    )
    last = replace(kind, read=1, reduction=())
    whole = LatencyTable(
        {"precision": "float32", "mode": "eager"}, (kind, last), (0,) * 5 + (1,), 0.5, (0.1, 0.0), 65, 2
    )
    return replace(whole, **changes)


def speedup_budget(table: LatencyTable, speedup: float) -> Budget:
    whole = table.seconds(SPACE.dense())
    return Budget(table.seconds, whole / speedup, SPEEDUP, whole)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_curve_of_steps_is_found_again_through_outliers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = knots(1, TOKENS)
    truth = 1.0 + np.ceil(np.array(levels) / 16)  # kernels of 16 rows
    tokens = rng.choice(levels, 900)
    seconds = np.interp(tokens, levels, truth) * rng.normal(1, 0.02, 900)
    seconds[rng.random(900) < 0.05] *= 3
    found, _ = fit_curve(tokens.tolist(), seconds.tolist(), levels)
    rising = np.diff(found.at(np.arange(1, TOKENS + 1)))
    assert (rising >= -1e-12).all()
    assert np.median(np.abs(found.at(np.array(levels)) / truth - 1)) < 0.03


def test_what_attention_takes_more_is_told_apart() -> None:
    rng = Random(0)
    samples = []
    for _ in range(600):
        tokens, asked, sized = rng.randint(1, TOKENS), rng.random() < 0.5, rng.random() < 0.5
        seconds = 1 + 0.05 * tokens + asked * (0.3 + 0.01 * tokens) + sized * 0.2
        samples.append((tokens, seconds, asked, sized))
    tokens, seconds, *flags = zip(*samples, strict=True)
    plain, more = fit_curve(tokens, seconds, knots(1, TOKENS), *flags)
    at = np.array([10, 40, 60])
    powers = np.stack([np.ones(3), at, at**2], axis=-1)
    assert plain.at(at) == pytest.approx(1 + 0.05 * at, rel=0.01)
    assert powers @ np.array(more[0]) == pytest.approx(0.3 + 0.01 * at, rel=0.05)
    assert powers @ np.array(more[1]) == pytest.approx(np.full(3, 0.2), rel=0.05)


def test_the_price_of_a_reduction_is_found_again() -> None:
    rng, weights = Random(0), np.array([0.5, 0.01, 0.002, 0.3, 0.0, 0.001, 0.2, 0.005, 0.003, 0.1])
    terms = []
    for _ in range(300):
        merged, pruned, entering = sorted(rng.randint(1, TOKENS) for _ in range(3))
        kept = Kept(entering, pruned, merged if rng.random() < 0.6 else pruned)
        work = RULES[rng.choice(["published", "similar", "received"])]
        terms.append(reduction_terms(kept, rng.random() < 0.5, work))
    assert fit_terms(terms, (np.array(terms) @ weights).tolist()) == pytest.approx(weights, abs=1e-3)


def test_a_schedule_takes_the_sum_of_its_parts() -> None:
    table = table_of(price=0.25)
    dense = SPACE.dense()
    assert table.seconds(dense) == pytest.approx((0.5 + 5 * (1.0 + 2.0) + 1.0 + 0.2 + 0.1) / 2)
    pruned = SPACE.schedule([65, 65, 33, 33] + [33] * 6)  # half of the tokens go in block 2
    half_attention, half_mlp = 0.55, 1.1
    expected = 0.5 + 2 * 3.0 + (1.0 + 0.25 + half_mlp) + 2 * (half_attention + half_mlp) + half_attention + 0.2 + 0.1
    assert table.seconds(pruned) == pytest.approx(expected / 2)
    assert table.prices(pruned) == pytest.approx((0.25 / 2, 0.0))
    merged = SPACE.schedule([65, 65, 65, 33] + [33] * 6)
    assert table.seconds(merged) - table.seconds(pruned) == pytest.approx(0.25 / 2)
    assert table.repriced(2, 5).prices(pruned) == pytest.approx((0.25, 0.0))


@pytest.mark.parametrize(("more", "taken"), [(0.2, 0.2), (-0.3, -0.3), (-5.0, -0.5)])
def test_asking_for_importance_may_be_faster(more: float, taken: float) -> None:
    """Another attention runs then; it is never believed to take less than half."""
    plain = table_of(price=0.25)
    kind = replace(plain.kinds[0], attention_asked=(more, 0.0, 0.0))
    table = replace(plain, kinds=(kind, plain.kinds[1]))
    pruned = SPACE.schedule([65, 65, 33, 33] + [33] * 6)
    assert table.seconds(SPACE.dense()) == plain.seconds(SPACE.dense())
    assert table.seconds(pruned) - plain.seconds(pruned) == pytest.approx(taken / 2)
    assert table.prices(pruned) == plain.prices(pruned)


@given(st.floats(0.6, 2.5), st.floats(0.6, 2.5))
def test_prices_are_those_of_whole_runs(going: float, merging: float) -> None:
    rest, parts = [1.0, 1.0, 0.8, 0.7], np.array([[0.1, 0.1], [0.3, 0.0], [0.2, 0.4], [0.2, 0.0]])
    taken = rest + parts @ [going, merging]
    found = fit_prices(rest, parts[:, 0], parts[:, 1], taken)
    assert found == pytest.approx((going, merging), rel=0.05)


def test_prices_of_which_runs_say_nothing_stay() -> None:
    assert fit_prices([1.0], [0.1], [0.0], [1.2])[1] == pytest.approx(1.0)


@given(st.integers(0, 10_000), st.floats(1.05, 2.2), st.floats(0, 0.4))
@settings(max_examples=60, deadline=None)
def test_any_counts_round_to_a_speed_without_wasted_reductions(seed: int, speedup: float, price: float) -> None:
    table, rng = table_of(price), Random(seed)
    budget = speedup_budget(table, speedup)
    schedule = budget.rounded([rng.uniform(1, TOKENS) for _ in range(10)], SPACE)
    assert meets_budget(table.seconds(schedule), budget.target)
    assert budget.of(table.seconds(schedule)) == pytest.approx(speedup, rel=0.02)
    counts = choices_of(schedule, SPACE)
    thrifty = without_waste(counts, SPACE, table.seconds)
    assert table.seconds(SPACE.schedule(thrifty)) <= table.seconds(schedule) + 1e-12


def test_reductions_that_cost_more_than_they_save_are_switched_off() -> None:
    counts = [64, 64, 60, 60, 30, 30, 29, 29, 29, 29]
    assert without_waste(counts, SPACE, table_of(0.0).seconds) == counts
    dear = without_waste(counts, SPACE, table_of(0.3).seconds)
    assert dear == [65, 65, 65, 65, 30, 30, 30, 30, 29, 29]  # the last block reads one token: what goes there is free
    model = patched("deit")
    assert without_waste(counts, SPACE, model.flops_at) == counts  # FLOPs know no price


def test_budgets_speak_in_their_own_units() -> None:
    table = table_of(0.1)
    with pytest.raises(diffrate.BudgetError, match=r"^target_speedup 9: accepted: 1 to 2\.\d+; a larger batch"):
        speedup_budget(table, 9.0).check(SPACE)
    with pytest.raises(diffrate.BudgetError, match=r"^target_latency 0\.001 s: accepted: \d+\.\d+ to 8\.4; a larger"):
        Budget(table.seconds, 0.001, LATENCY).check(SPACE)
    Budget(table.seconds, 4.0, LATENCY).check(SPACE)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_probing_schedules_show_every_knot_and_every_kind(seed: int) -> None:
    rng = Random(seed)
    schedules = [schedule for schedule, _ in zip(probing_schedules(SPACE, rng), range(120), strict=False)]
    seen, kinds = set(), set()
    for schedule in schedules:
        for kept in running_counts(schedule, TOKENS):
            seen.add(kept.merged)
            kinds.add((kept.pruned < kept.entering, kept.merged < kept.pruned))
    assert seen >= set(knots(1, TOKENS - 1))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    assert random_schedule(SPACE, rng) != SPACE.dense()


def test_a_table_as_a_file(tmp_path: Path) -> None:
    file, table = tmp_path / "new" / "times.json", table_of(0.1)
    assert read_table(file, table.setting) is None
    write_table(file, table)
    assert read_table(file, table.setting) == table
    assert read_table(file, table.setting | {"mode": "compiled"}) is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"setting": {}}', '{"setting": {}, "kinds": [{"read": 1}]}'])
def test_a_file_that_holds_no_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(content)
    with pytest.raises(LatencyFileError, match=r"times\.json: cannot be read \(.*\); accepted: a file of measured"):
        read_table(tmp_path / "times.json", {})


def test_a_table_cannot_be_written_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LatencyFileError, match="cannot be written"):
        write_table(tmp_path / "file" / "times.json", table_of(0.1))


def test_expected_seconds_are_those_of_the_hard_counts_and_pull_rates_towards_fewer_tokens() -> None:
    model = patched("deit")
    model.compression.reset()
    plans = plan_search(model.compression.draw(), BLOCKS, TOKENS)
    seconds = expected_seconds(table_of(0.0), plans)
    hard = model.compression.expected_schedule()
    assert seconds.detach().item() == pytest.approx(table_of(0.0).seconds(hard), rel=1e-6)
    seconds.backward()
    first = model.arch_parameters()[0].grad
    assert first is not None
    assert first[0] > 0 > first[-1]  # a step down the gradient makes keeping all less likely


def test_a_price_teaches_rates_to_leave_a_block_alone() -> None:
    """Logits that almost always keep all: with a dear reduction, the rest of the probability is pushed there, too."""
    model = patched("deit")
    model.compression.reset()
    with torch.no_grad():
        for rate in model.arch_parameters():
            rate[0] = 4.0
    gradients = []
    for price in (0.0, 50.0):
        model.zero_grad()
        expected_seconds(table_of(price), plan_search(model.compression.draw(), BLOCKS, TOKENS)).backward()
        gradient = model.arch_parameters()[0].grad
        assert gradient is not None
        gradients.append(float(gradient[0]))
    cheap, dear = gradients
    assert dear < 0 < cheap


def test_a_table_of_another_model_is_refused() -> None:
    model = patched("deit")
    with pytest.raises(
        diffrate.SearchSettingError, match=r"latency: found a table of a model with other tokens \(30\); accepted: 65"
    ):
        diffrate.search(model, [], target_speedup=1.5, latency=table_of(0.1, tokens=30))


def test_a_table_of_other_blocks_is_refused() -> None:
    table, model = table_of(0.1, setting={"precision": "float32", "mode": "eager", "parameters": 7}), patched("deit")
    with pytest.raises(ValueError, match=r"with other parameters \(7\); accepted: \d+$"):
        diffrate.check_predictions(model, table, [model.dense_schedule()])


def test_a_search_for_a_speed_goes_on_with_its_table(tmp_path: Path) -> None:
    with pytest.raises(diffrate.SearchSettingError, match="latency: found none to resume with"):
        diffrate.search(patched("deit"), [], target_speedup=1.5, resume=tmp_path / "checkpoint.pth")


def test_blocks_that_were_never_seen_to_reduce_have_no_price() -> None:
    table = table_of(0.1)
    bare = replace(table, kinds=tuple(replace(kind, reduction=()) for kind in table.kinds))
    assert bare.prices(SPACE.schedule([33] * 10)) == (0.0, 0.0)


@pytest.mark.parametrize("asked", [{"target_speedup": 0.0}, {"target_latency": float("nan")}])
def test_targets_that_are_no_numbers_are_refused(asked: dict[str, float]) -> None:
    with pytest.raises(diffrate.SearchSettingError, match="accepted: above 0"):
        diffrate.search(patched("deit"), [], latency=table_of(0.1), **asked)


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    write_table(tmp_path / "times.json", table_of(0.1))
    content = json.loads((tmp_path / "times.json").read_text())
    assert content["what"].startswith("measured seconds")
    assert content["setting"]["mode"] == "eager"


def test_budgets_of_flops_round_as_before() -> None:
    model = patched("deit")
    space = model.compression.space
    budget = Budget(model.flops_at, 0.6 * model.flops_at(space.dense()))
    schedule = budget.rounded([60.0] * 10, space)
    assert isinstance(schedule, Schedule)
    assert meets_budget(model.flops_at(schedule), budget.target)
