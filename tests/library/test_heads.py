"""Heads that are no softmax: one output, and labels that each stand for themselves."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import diffrate
from cli.runtime import leave_group
from diffrate.searching.settings import SearchSettingError
from diffrate.searching.teacher import Teacher, losses_at, sigmoid_divergence
from tests.forked import two
from tests.library.test_search_function import SMALL

SETTING: dict[str, Any] = {"share": 0.6, "method": "calibrated", "work": 300}
KEPT = diffrate.Schedule((14, 10, 8, 6), (12, 9, 7, 5))


def headed(outputs: int) -> diffrate.CompressedModel:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": outputs})
    model.head.weight.data *= 20  # away from chance
    return diffrate.patch.vit(model, prune_granularity=1, merge_granularity=1).eval()


def images(count: int = 3, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 32, 32, generator=generator) for _ in range(count)]


def outputs(model: diffrate.CompressedModel, schedule: diffrate.Schedule, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model.outputs_at(batch, schedule)


# --- losses --------------------------------------------------------------------------------------


def test_one_output_loses_its_squared_error_relative_to_the_variance() -> None:
    model, batch = headed(1), torch.cat(images())
    dense = outputs(model, model.dense_schedule(), batch)
    expected = ((outputs(model, KEPT, batch) - dense).square().mean() / dense.var(unbiased=False)).item()
    assert expected > 0
    assert losses_at(model, [model.dense_schedule(), KEPT], images()) == pytest.approx([0, expected], rel=1e-4)
    shifted = headed(1)
    with torch.no_grad():
        shifted.head.weight *= 3
        shifted.head.bias += 5
    assert losses_at(shifted, [KEPT], images()) == pytest.approx([expected], rel=1e-3)


@pytest.mark.parametrize(("count", "multi_label"), [(1, False), (1, True), (5, True)])
def test_what_is_found_is_what_loses_least(count: int, multi_label: bool) -> None:
    model = headed(count)
    found = diffrate.search(model, images(), multi_label=multi_label, **SETTING)
    assert found.calibrated is not None
    losses = [loss for _, loss in found.calibrated.losses]
    assert 0 < min(losses) < max(losses) < math.inf
    learnt = diffrate.search(
        headed(count), images(), share=0.6, loss="distill", multi_label=multi_label, flops_weight=0.0
    )
    assert all(0 < record.loss < math.inf for record in learnt.history)
    assert len({count for record in learnt.history for count in record.counts[:1]}) > 1  # rates move


def test_multi_label_is_binary_cross_entropy_less_the_entropy() -> None:
    taught, found = torch.randn(2, 7, 5).unbind()
    expected = F.binary_cross_entropy_with_logits(found, taught.sigmoid(), reduction="none")
    entropy = F.binary_cross_entropy_with_logits(taught, taught.sigmoid(), reduction="none")
    torch.testing.assert_close(sigmoid_divergence(found, taught), (expected - entropy).mean(1), atol=1e-6, rtol=1e-4)
    assert not sigmoid_divergence(taught, taught).any()
    model = headed(5)
    apart = sigmoid_divergence(
        *(outputs(model, schedule, torch.cat(images())) for schedule in (KEPT, model.dense_schedule()))
    )
    assert losses_at(model, [KEPT], images(), multi_label=True) == pytest.approx([float(apart.mean())], rel=1e-4)


def test_the_step_of_a_gradient_search_is_relative_to_its_batch() -> None:
    model, batch = headed(1), images(1)[0]
    teacher = Teacher(model)
    apart, _ = teacher.searching(batch)
    with torch.no_grad():
        dense = teacher.taught(batch)
        step, _ = model.search_step(batch)
    torch.testing.assert_close(apart.detach(), (step - dense).square().mean() / dense.var(unbiased=False))
    assert math.isfinite(float(teacher.searching(batch[:1])[0].detach()))  # one image has no variance


@pytest.mark.parametrize(("count", "multi_label"), [(1, False), (5, True)])
def test_sensitivity_has_the_same_losses(count: int, multi_label: bool) -> None:
    model = headed(count)
    found = diffrate.sensitivity(model, images(), shares=(0.5,), multi_label=multi_label)
    space = model.compression.space.every_block()
    for place, one in enumerate(found):
        counts = list(space.limits[:1]) * len(found)
        counts[place] = one.kept
        expected = losses_at(model, [space.schedule(counts)], images(), multi_label=multi_label)
        assert one.loss == pytest.approx(expected[0], rel=1e-3, abs=1e-7)
        assert one.agreement is None
    assert max(one.loss for one in found) > 0


def test_schedules_that_all_lose_the_same_are_not_searched() -> None:
    model = headed(1)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(SearchSettingError, match=r"loss: found 0 for each of [0-9]+ schedules; accepted: a model"):
        diffrate.search(model, images(), **SETTING)


def test_one_output_has_no_loss_of_labels() -> None:
    pairs = [(batch, torch.zeros(len(batch), 1)) for batch in images()]
    with pytest.raises(SearchSettingError, match=r"one output; accepted: a criterion, or the loss 'distill'"):
        diffrate.search(headed(1), pairs, share=0.6)
    found = diffrate.search(headed(1), pairs, share=0.6, criterion=nn.MSELoss(), val=pairs)
    assert found.scores is not None
    assert found.scores.mae is not None


def test_labels_of_multi_label_are_learnt_from() -> None:
    classes = [(batch, torch.arange(len(batch)) % 5) for batch in images()]
    ones = [(batch, F.one_hot(labels, 5).float()) for batch, labels in classes]
    first, second = (diffrate.search(headed(5), pairs, share=0.6, multi_label=True) for pairs in (classes, ones))
    assert first.history == second.history
    assert first.history[0].loss != diffrate.search(headed(5), classes, share=0.6).history[0].loss


@pytest.mark.parametrize("method", ["gradient", "calibrated"])
def test_a_resumed_search_has_the_same_heads(method: str, tmp_path: Path) -> None:
    file = tmp_path / "search.pth"
    setting = SETTING if method == "calibrated" else {"share": SETTING["share"], "loss": "distill"}
    diffrate.search(headed(5), images(), checkpoint=file, multi_label=True, **setting)
    diffrate.search(headed(5), images(), resume=file, multi_label=True, **setting)
    with pytest.raises(diffrate.SearchCheckpointError, match="made with multi_label True; accepted: False"):
        diffrate.search(headed(5), images(), resume=file, **setting)


# --- scores --------------------------------------------------------------------------------------


def test_one_output_is_scored_as_numbers() -> None:
    model, batches = headed(1), images()
    labels = torch.cat([model.outputs_at(batch, KEPT)[:, 0].detach() for batch in batches]) + torch.randn(18)
    pairs = list(zip(batches, labels.split(6), strict=True))
    scores = diffrate.evaluate(model, pairs)
    error = labels - outputs(model, model.compression.current(), torch.cat(batches))[:, 0]
    assert scores.mae == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert scores.loss == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert scores.r2 == pytest.approx(1 - float(error.square().mean() / labels.var(unbiased=False)), rel=1e-5)
    assert scores.ranked == ("R2", scores.r2)
    assert math.isnan(scores.acc1)
    assert scores.line(10**9) == f"* MAE {scores.mae:.3f} R2 {scores.r2:.3f} loss {scores.loss:.3f} flops 1.000"
    assert set(scores.record(1)) == {"mae", "r2", "loss", "images", "gflops"}
    assert diffrate.evaluate(model, [(batch, numbers[:, None]) for batch, numbers in pairs]) == scores
    assert math.isnan(diffrate.evaluate(model, [(batches[0], torch.ones(6))]).r2 or 0.0)


def test_multi_label_is_scored_by_average_precision() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    model, batches = headed(5), images()
    labels = (torch.rand(18, 5, generator=torch.Generator().manual_seed(2)) < 0.4).long()
    labels[:, 3] = 0  # never there, which no precision is of
    scores = diffrate.evaluate(model, list(zip(batches, labels.split(6), strict=True)), multi_label=True)
    logits = outputs(model, model.compression.current(), torch.cat(batches))
    there = [0, 1, 2, 4]
    expected = metrics.average_precision_score(labels[:, there].numpy(), logits[:, there].numpy(), average="macro")
    assert scores.mean_average_precision == pytest.approx(expected, rel=1e-6)
    assert scores.loss == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, labels.float())), rel=1e-5)
    assert scores.ranked == ("mAP", scores.mean_average_precision)
    assert scores.line(0).startswith(f"* mAP {expected:.3f} loss")
    classes = torch.arange(18) % 5
    one_hot = F.one_hot(classes, 5)
    pairs = [list(zip(batches, found.split(6), strict=True)) for found in (classes, one_hot)]
    assert diffrate.evaluate(model, pairs[0], multi_label=True) == diffrate.evaluate(model, pairs[1], multi_label=True)


@pytest.mark.parametrize("missing", ["sklearn", "sklearn.metrics"])
def test_a_package_that_is_not_there_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sklearn.metrics", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(diffrate.ScoresError, match=r"^multi_label: found no scikit-learn; accepted: .*pip install"):
        diffrate.evaluate(headed(5), [], multi_label=True)


@pytest.mark.parametrize(
    ("count", "labels", "found"),
    [
        (5, torch.tensor([0, 1, 2, 3, 4, 5]), r"5; accepted: class indices \[6\], integers from 0 to 4"),
        (5, torch.tensor([0, -1, 2, 3, 4, 0]), "-1; accepted: class indices"),
        (5, torch.zeros(6), r"float32 \[6\]; accepted: class indices"),
        (5, torch.zeros(6, 5, dtype=torch.long), r"int64 \[6, 5\]; accepted: class indices"),
        (5, torch.zeros(4, dtype=torch.long), r"int64 \[4\]; accepted: class indices"),
        (5, [0, 1, 2, 3, 4, 0], "a list; accepted: class indices"),
        (5, None, "none; accepted: class indices"),
        (1, torch.zeros(6, 2), r"float32 \[6, 2\]; accepted: numbers \[6\] or \[6, 1\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(count: int, labels: Any, found: str) -> None:
    with pytest.raises(diffrate.ScoresError, match=f"^labels: found {found}.*$"):
        diffrate.evaluate(headed(count), [(images()[0], labels)])


def share(folder: Path, model: diffrate.CompressedModel, pairs: list[Any]) -> None:
    dist.init_process_group("gloo")
    mine = pairs[:2] if dist.get_rank() == 0 else pairs[2:]
    nothing = pairs if dist.get_rank() == 0 else []
    scores = [asdict(diffrate.evaluate(model, part)) for part in (mine, nothing)]
    losses = losses_at(model, [KEPT], [batch for batch, _ in mine])
    torch.save((scores, losses), folder / f"rank{dist.get_rank()}")
    leave_group()


def test_the_images_of_all_processes_count(tmp_path: Path) -> None:
    model = headed(1)
    pairs = [(batch, torch.randn(len(batch))) for batch in images()]
    alone = asdict(diffrate.evaluate(model, pairs))
    for done in two(partial(share, tmp_path, model, pairs), tmp_path):
        assert (done.code, done.err) == (0, "")
    for rank in (0, 1):
        scores, losses = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert scores[0] == pytest.approx(alone, nan_ok=True)
        assert scores[1] == pytest.approx(alone, nan_ok=True)
        assert losses == pytest.approx(losses_at(model, [KEPT], images()))
