"""`measure_latency`, and searches for a speed, on a small model that is really timed."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import diffrate
import diffrate.latency.measure as measure
from diffrate import timing
from diffrate.budget import Budget, uniform_schedules
from diffrate.latency.measure import random_schedule
from diffrate.latency.table import LatencyTable, use_of
from diffrate.timing import PairedTimes
from tests.test_latency import table_of
from tests.test_patch import patched


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is not how precise a time is."""
    monkeypatch.setattr(measure, "WHOLE_RUNS", 0.01)
    monkeypatch.setattr(timing, "SHORT", 0.001)
    monkeypatch.setattr(timing, "FEWEST", 2)
    monkeypatch.setattr(measure, "NOISY", math.inf)  # other tests run beside these
    monkeypatch.setattr(measure, "REACH_SECONDS", 0.01)
    monkeypatch.setattr(measure, "CONFIRMED", 0.01)


def images(count: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 3, 32, 32, generator=generator).split(8))


@pytest.mark.parametrize("family", ["deit", "mae"])
def test_times_are_measured_and_kept(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = patched(family), []
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    file = tmp_path / "times.json"
    table = diffrate.measure_latency(
        model, 2, seconds=0.1, file=file, progress=lambda runs, share: told.append((runs, share))
    )
    assert told[-1][0] >= measure.RUNS[0]
    assert told[-1][1] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert table.setting["batch_size"] == 2
    space = model.compression.space
    for schedule in (space.dense(), *(random_schedule(space, Random(seed)) for seed in range(5))):
        assert 0 < table.seconds(schedule) < 1
    fewest = space.schedule([space.least] * len(model.arch_parameters()))
    assert table.seconds(fewest) < table.seconds(space.dense())

    def fails(*_: object) -> None:
        raise AssertionError("it is in the file")

    monkeypatch.setattr(measure, "_sampled", fails)
    assert diffrate.measure_latency(model, 2, file=file) == table
    with pytest.raises(AssertionError, match="it is in the file"):
        diffrate.measure_latency(model, 3, file=file)  # another use


def test_a_noisy_table_says_so_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measure, "NOISY", 0.0)
    file = tmp_path / "times.json"
    with caplog.at_level(logging.WARNING):
        table = diffrate.measure_latency(patched("deit"), 2, seconds=0.1, file=file)
    assert table.batch_size == 2
    assert "times are rough, and not kept" in caplog.text
    assert not file.exists()


def test_a_speed_far_out_of_reach_is_refused_before_a_table_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_sampled", lambda *_, **__: pytest.fail("it takes a minute"))
    with pytest.raises(diffrate.BudgetError, match=r"target_speedup 50: accepted: 1 to .*a larger batch or input size"):
        diffrate.search(patched("deit"), images(), target_speedup=50, loss="distill")


def test_a_model_that_is_not_patched_is_refused() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match="accepted: a model after"):
        diffrate.measure_latency(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("seconds", 0)])
def test_measurements_that_make_no_sense_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: found 0"):
        diffrate.measure_latency(patched("deit"), **{name: value})


OF_METHOD: dict[str, dict[str, Any]] = {
    "gradient": {"method": "gradient", "budget": "held"},
    "calibrated": {"method": "calibrated", "work": 100},
}


@pytest.mark.parametrize("method", OF_METHOD)
def test_a_search_meets_a_speed_by_its_table(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = patched("deit"), table_of(0.3)
    dense = table.seconds(model.dense_schedule())

    def as_predicted(_: object, schedule: diffrate.Schedule, *__: object) -> float:
        return dense / table.seconds(schedule)

    monkeypatch.setattr(measure, "measured_speedup", as_predicted)
    found = diffrate.search(model, images(), target_speedup=1.6, latency=table, loss="distill", **OF_METHOD[method])
    assert found.speed is not None
    assert found.speed.predicted == pytest.approx(1.6, rel=0.02)
    assert found.speed.measured == found.speed.predicted
    assert found.speed.line() == (
        f"speed-up: asked 1.60, predicted {found.speed.predicted:.2f}, measured {found.speed.predicted:.2f} "
        "(batch 2, float32, eager)"
    )
    assert tuple(model.get_kept_num()[1]) == found.schedule.merge


@pytest.mark.parametrize("method", OF_METHOD)
def test_what_is_measured_to_be_too_slow_is_made_faster(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all reductions save a tenth less than the table says."""
    model, table = patched("deit"), table_of(0.1)
    dense = table.seconds(model.dense_schedule())
    monkeypatch.setattr(measure, "measured_speedup", lambda model, schedule, *_: 0.9 * dense / table.seconds(schedule))
    found = diffrate.search(model, images(), target_speedup=1.5, latency=table, loss="distill", **OF_METHOD[method])
    assert found.speed is not None
    assert found.speed.measured >= 1.5 * 0.97
    assert found.speed.predicted == pytest.approx(found.speed.measured / 0.9)
    assert found.flops == model.flops_at(found.schedule)


def test_a_speed_that_no_uniform_schedule_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every reduction is dear, one alone is all that there is."""
    model, table = patched("deit"), table_of(1.2)
    space = model.compression.space
    most = table.seconds(space.dense()) / min(
        table.seconds(space.schedule([65] * place + [1] * (10 - place))) for place in range(10)
    )
    target = 0.97 * most
    assert uniform_schedules(space, Budget(table.seconds, table.seconds(space.dense()) / target)) == {}
    monkeypatch.setattr(
        measure, "measured_speedup", lambda _, schedule, *__: table.seconds(space.dense()) / table.seconds(schedule)
    )
    found = diffrate.search(model, images(), target_speedup=target, latency=table, method="calibrated", work=100)
    assert found.speed is not None
    assert found.speed.predicted == pytest.approx(target, rel=0.03)


def test_images_that_come_once_are_searched_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = patched("deit"), table_of(0.1)
    dense = table.seconds(model.dense_schedule())
    monkeypatch.setattr(measure, "measured_speedup", lambda model, schedule, *_: 0.9 * dense / table.seconds(schedule))
    found = diffrate.search(model, iter(images()), target_speedup=1.5, latency=table, method="calibrated", work=100)
    assert found.speed is not None
    assert found.speed.measured >= 1.5 * 0.97


def test_a_latency_is_asked_for_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, table = patched("deit"), table_of(0.1)
    dense = table.seconds(model.dense_schedule())

    def as_predicted(_: object, schedule: diffrate.Schedule, *__: object) -> PairedTimes:
        return PairedTimes((2 * dense,), (2 * table.seconds(schedule),))  # of a batch of two

    monkeypatch.setattr(measure, "measured_times", as_predicted)
    found = diffrate.search(model, images(), target_latency=6.0, latency=table, method="calibrated", work=100)
    assert found.speed is not None
    assert (found.speed.asked, found.speed.option) == (6.0, "target_latency")
    assert found.speed.measured == pytest.approx(6.0, rel=0.02)
    assert found.speed.line().startswith("latency: asked 6e+03 ms, predicted ")


def test_predictions_are_held_against_measurements() -> None:
    model = patched("deit")
    table = diffrate.measure_latency(model, 1, seconds=0.1)
    schedules, told = [random_schedule(model.compression.space, Random(seed)) for seed in range(3)], []
    checked = diffrate.check_predictions(
        model, table, schedules, seconds=0.01, callback=lambda *figures: told.append(figures)
    )
    assert checked.schedules == tuple(schedules)
    assert [figures[1:] for figures in told] == list(zip(checked.predicted, checked.measured, strict=True))
    # How precise it is, a quiet machine tells: these timings take a millisecond.
    assert all(measured > 0 for measured in checked.measured)
    pairs = zip(checked.predicted, checked.measured, strict=True)
    assert checked.errors == pytest.approx([abs(measured / predicted - 1) for predicted, measured in pairs])
    assert checked.line().endswith("over 3 schedules")


def test_a_table_says_how_the_model_is_used() -> None:
    table: LatencyTable = table_of(0.1, setting={"precision": "bf16", "mode": "compiled"})
    use = use_of(table, torch.device("cpu"))
    assert (use.dtype, use.compiled, use.words()) == (torch.bfloat16, True, "batch 2, bf16, compiled")


@pytest.mark.parametrize("images_once", [False, True])
def test_what_is_measured_to_be_faster_keeps_more(images_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all reductions save a tenth more than the table says: known only by searching on."""
    model, table = patched("deit"), table_of(0.1)
    dense = table.seconds(model.dense_schedule())
    monkeypatch.setattr(measure, "measured_speedup", lambda model, schedule, *_: 1.1 * dense / table.seconds(schedule))
    loader = iter(images()) if images_once else images()
    found = diffrate.search(model, loader, target_speedup=1.6, latency=table, method="calibrated", work=100)
    assert found.speed is not None
    assert found.speed.measured == pytest.approx(1.76 if images_once else 1.6, rel=0.03)
    assert found.speed.predicted == pytest.approx(found.speed.measured / 1.1)
