"""The search at hard counts: schedules on the budget, losses at really dropped tokens, resumption, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import diffrate
from cli.runtime import leave_group
from diffrate.budget import Budget, meets_budget, uniform_schedules
from diffrate.device import placement_of
from diffrate.searching.calibration import Calibration, Clock
from diffrate.searching.checkpoint import read_checkpoint
from diffrate.searching.hard_counts import RULES_IN_PLAY, _chosen
from diffrate.searching.moves import Moves
from diffrate.searching.settings import SearchSettingError
from diffrate.searching.teacher import Teacher
from diffrate.searching.trials import Reference, Surrogate
from tests.constructions import build, images_for
from tests.forked import two
from tests.library.test_search_function import batches, small

SETTING: dict[str, Any] = {"share": 0.6, "method": "calibrated", "work": 1000}


@cache
def whole() -> tuple[diffrate.CompressedModel, diffrate.Found]:
    """A search that was not stopped, for all tests to compare with."""
    model = small()
    return model, diffrate.search(model, batches(8), **SETTING)


class Stop(diffrate.CalibrationObserver):
    """Ends a search after some rounds."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def after_trials(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def moves_of(model: diffrate.CompressedModel, share: float, rules: tuple[str, ...] = ("published",)) -> Moves:
    dense = model.flops_at(model.dense_schedule())
    return Moves(model.compression.space.every_block(), model.flops_at, share * dense, model.read is not None, rules)


def uniform_of(model: diffrate.CompressedModel, share: float) -> dict[str, diffrate.Schedule]:
    target = share * model.flops_at(model.dense_schedule())
    return uniform_schedules(model.compression.space, Budget(model.flops_at, target))


def calibration(model: diffrate.CompressedModel, count: int = 24) -> Calibration:
    model.eval()
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    clock = Clock(placement_of(model), math.inf, lambda: False, saved=False)
    return Calibration(Teacher(model), images, None, clock, whole=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.6, 0.95),
    pool=st.sampled_from(["token", "avg"]),
    rules=st.sampled_from([("published",), ("similar", "published", "received"), ("tome",)]),
)
def test_every_move_is_a_schedule_of_the_budget(seed: int, share: float, pool: str, rules: tuple[str, ...]) -> None:
    model, rng = small(pool), Random(seed)
    moves = moves_of(model, share, rules)
    found = [moves.stepped(rng), *(moves.fitted(schedule, rng) for schedule in uniform_of(model, share).values())]
    found += [moves.changed(counts, rng) for counts in found if counts is not None]
    assert any(counts is not None for counts in found)
    for counts in found:
        if counts is not None:
            schedule = moves.schedule(counts)
            model.check(schedule)
            assert meets_budget(model.flops_at(schedule), moves.target)
            assert moves.counts(schedule) == counts  # what really happens
            assert moves.features([counts]).shape == (1, len(moves.groups()))
            assert set(schedule.rule_names) <= set(rules)
    if pool == "token" and found[0] is not None:  # of the last block nothing but the class token is read
        assert found[0][: moves.choices][-2:] == (1, 1)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_every_block_may_let_tokens_go(pool: str, tmp_path: Path) -> None:
    """The first too, and the last: so budgets are met that the published choices do not reach, by several rules."""
    model, file = small(pool), tmp_path / "search.pth"
    space, dense = model.compression.space, model.flops_at(model.dense_schedule())
    share = 0.95 * model.flops_at(space.fewest()) / dense
    found = diffrate.search(model, batches(8), method="calibrated", share=share, work=400, checkpoint=file)
    assert meets_budget(found.flops, share * dense)
    assert len(read_checkpoint(file)["calibrated"]["rules"]) == RULES_IN_PLAY
    assert min(found.schedule.prune[0], found.schedule.merge[0]) < space.limits[0]
    with pytest.raises(diffrate.BudgetError, match="accepted:"):
        diffrate.search(model, batches(8), method="gradient", share=share, steps=1)


def test_little_work_is_kept_too() -> None:
    """Also before the surrogate is asked, where trials would take twice as much."""
    found = diffrate.search(small(), batches(8), method="calibrated", share=0.5, work=200, seed=0)
    assert found.calibrated is not None
    assert sum(stage.work for stage in found.calibrated.stages) < 1.1 * 200


def test_the_surrogate_learns_effects_from_noisy_values() -> None:
    rng = np.random.default_rng(0)
    slopes, features = rng.normal(size=6), rng.normal(size=(220, 6))
    values = features @ slopes + rng.normal(0, 0.5, 220)
    surrogate = Surrogate(np.array([0, 0, 1, 1, 2, 2]))
    known = features[:200], values[:200], np.full(200, 0.25)
    surrogate.choose_scales(*known, seed=0)
    surrogate.fit(*known)
    mean, deviation = surrogate.predict(features[200:])
    apart = np.abs(mean - features[200:] @ slopes)
    assert apart.mean() < 0.35  # closer than a measurement is
    assert (apart < 3 * deviation + 0.1).mean() > 0.8


def test_many_trials_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surrogate's matrix would grow with their square."""
    sizes, fit = [], Surrogate.fit
    monkeypatch.setattr("diffrate.searching.trials.FITTED", 12)
    monkeypatch.setattr(Surrogate, "fit", lambda self, *known: (sizes.append(len(known[0])), fit(self, *known)))
    found = diffrate.search(small(), batches(8), **SETTING | {"work": 700}).calibrated
    assert found is not None
    assert max(sizes) == 12 < found.trials[-1].trials / 2
    assert found.trials[-1].loss <= found.trials[0].loss


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_going_on_from_the_block_where_schedules_part_changes_nothing(pool: str) -> None:
    model = small(pool)
    held, rng = calibration(model), Random(0)
    moves = moves_of(model, 0.6)
    start = next(iter(uniform_of(model, 0.6).values()))
    reference = Reference(held, start, held.drawn(3, rng))
    counts = moves.counts(start)
    late = moves.schedule((*counts[:-4], counts[-4], *[1 + (pool == "avg")] * 3))
    before = held.work
    mean, variance = reference.difference(late, 1)
    whole = held.losses(late, reference.images[1])[0] - held.losses(start, reference.images[1])[0]
    weighted = reference.weights[1] * whole
    assert mean == pytest.approx(float(weighted.mean()), abs=1e-6)
    assert variance > 0
    plain = held.work
    reference.difference(late, 1)
    assert held.work - plain < len(whole) * model.flops_at(late) / held.dense  # blocks before were not run again
    assert before < plain


def test_losses_are_those_of_a_model_at_the_schedule() -> None:
    model = small()
    held = calibration(model)
    schedule = uniform_of(model, 0.6)["both"]
    with torch.no_grad():
        dense, _ = _at(model, model.dense_schedule(), held)
        logits, _ = _at(model, schedule, held)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), dense.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(held.losses(schedule, torch.arange(len(held.images)))[0], expected, atol=1e-5, rtol=0)


def _at(model: diffrate.CompressedModel, schedule: diffrate.Schedule, held: Calibration) -> Any:
    model.set_kept_num(schedule.prune, schedule.merge)
    return model(held.images)


def test_images_on_which_more_is_lost_are_drawn_more_often_and_count_less() -> None:
    model = small()
    held, rng = calibration(model, 40), Random(0)
    held.felt, held.seen = torch.arange(40.0), torch.ones(40)
    often, total = torch.zeros(40), torch.zeros(40)
    for _ in range(300):
        index, weights = map(torch.cat, held.drawn(24, rng))
        often.index_add_(0, index, torch.ones(len(index)))
        total.index_add_(0, index, weights)
    assert often[30:].sum() > 1.35 * often[:10].sum()
    torch.testing.assert_close(total / total.mean(), torch.ones(40), atol=0.1, rtol=0)


def test_never_worse_than_by_hand() -> None:
    model, found = whole()
    calibrated = found.calibrated
    assert calibrated is not None
    assert meets_budget(found.flops, 0.6 * model.flops_at(model.dense_schedule()))
    losses = dict(calibrated.losses)
    assert {"uniform merge", "uniform both", "uniform prune", "calibrated"} <= losses.keys()
    assert min(loss for name, loss in calibrated.losses if name == calibrated.chosen) == min(
        loss for _, loss in calibrated.losses
    )
    assert model.get_kept_num() == (list(found.schedule.prune or ()), list(found.schedule.merge))
    bare = diffrate.search(small(), [images for images, _ in batches(8)], **SETTING)
    assert bare.schedule == found.schedule  # from the seed alone, and without labels
    assert calibrated.trials[-1].work <= SETTING["work"]


def test_a_start_off_the_budget_is_brought_onto_it() -> None:
    model = small()
    dense = model.dense_schedule()
    start = replace(dense, rules="similar")  # one name, as `make_schedule` takes it
    found = diffrate.search(model, batches(8), **SETTING | {"work": 300}, start=start)
    assert meets_budget(found.flops, 0.6 * model.flops_at(dense))


def test_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    file = tmp_path / "search.pth"
    _, expected = whole()
    with pytest.raises(KeyboardInterrupt):
        diffrate.search(small(), batches(8), **SETTING, checkpoint=file, trials=Stop(2))
    found = diffrate.search(small(), batches(8), **SETTING, resume=file)
    assert found.calibrated is not None
    assert expected.calibrated is not None
    assert (found.schedule, found.calibrated.losses) == (expected.schedule, expected.calibrated.losses)
    with pytest.raises(diffrate.SearchCheckpointError, match="was made with seed 0; accepted: 1"):
        diffrate.search(small(), batches(8), **SETTING, resume=file, seed=1)
    with pytest.raises(diffrate.SearchCheckpointError, match="calibrated search's"):
        diffrate.search(small(), batches(8), share=0.6, resume=file)
    diffrate.search(small(), batches(8), share=0.6, checkpoint=file)
    with pytest.raises(diffrate.SearchCheckpointError, match="gradient search's"):
        diffrate.search(small(), batches(8), **SETTING, resume=file)


@pytest.mark.parametrize("name", ["no_class_token", "no_pool", "registers", "attention_pool", "relative_table", "rope"])
def test_constructions(name: str) -> None:
    model = diffrate.patch.vit(build(name), 1, 1)
    images = images_for(name, 6)
    found = diffrate.search(model, [images], share=0.7, method="calibrated", work=60)
    assert meets_budget(found.flops, 0.7 * model.flops_at(model.dense_schedule()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "magic"}, "method: found 'magic'"),
        ({"work": 0}, "work: found 0"),
        ({"minutes": -1.0}, "minutes: found -1.0"),
        ({"images": 1}, "images: found 1"),
    ],
)
def test_settings_that_make_no_sense(more: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchSettingError, match=message):
        diffrate.search(small(), batches(), **SETTING | more)


@pytest.mark.parametrize("broken", [1, 24])
def test_images_that_are_no_numbers_are_refused(broken: int) -> None:
    images = torch.randn(24, 3, 32, 32)
    images[:broken] = float("nan")
    with pytest.raises(
        diffrate.NonFiniteLossError, match="the loss is nan on the calibration images; accepted: images,"
    ):
        diffrate.search(small(), [images], **SETTING)


def test_one_image_is_too_few() -> None:
    with pytest.raises(ValueError, match="found 1 images; accepted: from 2"):
        diffrate.search(small(), [torch.randn(1, 3, 32, 32)], **SETTING)


class SlowClock:
    """Time that passes by forward passes alone: `pace` of the dense model on an image take a second, at other
    schedules `slower` times as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pace: float, slower: float) -> None:
        self.seconds, self.pace, self.slower, worked = 0.0, pace, slower, Calibration._worked

        def passes(held: Calibration, images: int, share: float) -> None:
            worked(held, images, share)
            self.seconds += images * share / self.pace * (1.0 if share == 1.0 else self.slower)

        monkeypatch.setattr(Calibration, "_worked", passes)
        monkeypatch.setattr("diffrate.searching.calibration.time.monotonic", lambda: self.seconds)


@pytest.mark.parametrize(("slower", "minutes"), [(1.0, 0.1), (8.0, 0.1), (8.0, 1.0)])
def test_minutes_are_kept_by_the_clock(slower: float, minutes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that makes 100 passes a second at first, and fewer from the first trial on."""
    model, clock = small(), SlowClock(monkeypatch, 100.0, slower)
    loader = list(torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(50))
    found = diffrate.search(model, loader, share=0.6, method="calibrated", minutes=minutes)
    assert meets_budget(found.flops, 0.6 * model.flops_at(model.dense_schedule()))
    assert found.calibrated is not None
    stages = {stage.name: stage for stage in found.calibrated.stages}
    assert stages["choice"].seconds > 0
    assert clock.seconds <= 60 * minutes * 1.15
    assert clock.seconds >= 60 * minutes * 0.5 or minutes == 1.0  # few images are soon known


@pytest.mark.parametrize("asked", [1, 2, 7, 40])
def test_stops_after_the_trial_in_which_it_is_asked_to(asked: int, tmp_path: Path) -> None:
    class Stopping(diffrate.CalibrationObserver):
        left, rounds = asked, 0

        def stop(self) -> bool:
            self.left -= 1
            assert self.left >= -1, "it went on"  # loading asks once more
            return self.left <= 0

        def after_trials(self) -> None:
            self.rounds += 1

    told, file = Stopping(), tmp_path / "search.pth"
    with pytest.raises(diffrate.StoppedError, match="stopped while schedules were tried") as stopped:
        diffrate.search(small(), batches(8), **SETTING, checkpoint=file, trials=told)
    assert stopped.value.saved == (told.rounds > 0) == file.exists()


def test_a_timed_search_goes_on_with_its_images(tmp_path: Path) -> None:
    file = tmp_path / "search.pth"
    with pytest.raises(KeyboardInterrupt):
        diffrate.search(small(), batches(8), **SETTING, minutes=5, checkpoint=file, trials=Stop(1))
    with_more = diffrate.search(small(), batches(12), **SETTING, minutes=5, resume=file)
    assert with_more.calibrated is not None
    assert with_more.calibrated.trials[0].trials > len(with_more.calibrated.losses)  # those before count


def test_what_measurement_does_not_tell_apart_goes_to_the_simplest() -> None:
    names, rng = ["calibrated", "start", "uniform both", "uniform merge"], torch.Generator().manual_seed(0)
    place, noise = placement_of(small()), torch.randn(4, 400, generator=rng).abs()

    def chosen(*means: float, images: int = 400) -> str:
        rows = [row - row.mean() + mean for row, mean in zip(noise[:, :images], means, strict=True)]
        index, alike, error = _chosen(names, rows, place)
        assert names[index] in alike
        assert (error == 0) == (means[index] == min(means))
        return names[index]

    assert chosen(1.0, 1.01, 1.01, 1.01) == "uniform merge"
    assert chosen(1.0, 1.01, 1.01, 1.5) == "uniform both"
    assert chosen(1.0, 1.01, 1.5, 1.5) == "start"
    assert chosen(1.0, 1.5, 1.5, 1.5) == "calibrated"
    assert chosen(1.0, 1.01, 1.01, 1.01, images=8) == "calibrated"  # too few to say that they are alike
    assert _chosen(names, [torch.zeros(8)] * 4, place)[:2] == (3, tuple(names))


def search_apart(folder: Path) -> None:
    """Each process on every second of nine batches."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = diffrate.search(small(), batches(9)[rank::2], **SETTING)
    assert found.calibrated is not None
    kept = found.schedule
    assert kept.prune is not None
    torch.save([list(kept.prune), list(kept.merge), *found.calibrated.losses], folder / f"rank{rank}")
    leave_group()


def test_two_processes_share_the_images_and_find_the_same(tmp_path: Path) -> None:
    for done in two(partial(search_apart, tmp_path), tmp_path):
        assert (done.code, done.err) == (0, "")
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    assert first == second


def test_a_start_of_another_model_is_refused_before_anything_is_tried() -> None:
    class Trying(diffrate.CalibrationObserver):
        def on_plan(self, images: int, work: float, speed: float) -> None:
            raise AssertionError("the search has begun")

    model = small("token")
    rows = (197,) * len(model.dense_schedule().merge)
    other = diffrate.Schedule(rows, rows, 197)
    with pytest.raises(diffrate.ScheduleError, match="made for 197 tokens"):
        diffrate.search(model, batches(), share=0.5, method="calibrated", start=other, trials=Trying())
