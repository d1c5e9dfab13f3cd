"""`diffrate.search`, `evaluate` and `benchmark` as a user calls them: lists of tensors, loaders, errors."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import diffrate
from diffrate.budget import meets_budget
from diffrate.searching.checkpoint import read_checkpoint
from diffrate.searching.gradient import paced
from diffrate.searching.settings import SearchSettingError, SearchSettings
from diffrate.searching.teacher import losses_at
from tests.tiny_models import plain

Batch = tuple[Tensor, Tensor]
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def small(pool: str = "token") -> diffrate.CompressedModel:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", global_pool=pool, **SMALL)
    return diffrate.patch.vit(model, prune_granularity=1, merge_granularity=1)


def batches(count: int = 3, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(count)
    ]


def rates(model: diffrate.CompressedModel) -> list[Tensor]:
    return [rate.detach().clone() for rate in model.arch_parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- search: what it finds -----------------------------------------------------------------------


def test_a_list_of_tensors_is_a_loader() -> None:
    model = small()
    whole = model.flops_at(model.dense_schedule())
    found = diffrate.search(model, batches(), target_flops=0.7 * whole, epochs=2)
    assert meets_budget(found.flops, 0.7 * whole)
    assert found.flops == model.flops()
    assert model.get_kept_num() == (list(found.schedule.prune or ()), list(found.schedule.merge))
    assert [(record.epoch, record.step) for record in found.history] == [(e, s) for e in (0, 1) for s in (0, 1, 2)]
    assert all(len(record.counts) == len(model.arch_parameters()) for record in found.history)
    assert found.history[0].learning_rate == pytest.approx(0.01)
    assert found.history[-1].learning_rate == pytest.approx(0.001)
    assert found.scores is None


def test_mixing_leaves_the_images_of_the_caller() -> None:
    loader, before = batches(), batches()
    diffrate.search(small(), loader, share=0.7, mixup=Mixup(0.8, num_classes=5))
    assert all(torch.equal(images, old) for (images, _), (old, _) in zip(loader, before, strict=True))


@given(st.floats(0.45, 0.95), st.sampled_from(["token", "avg"]), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_any_share_is_met(share: float, pool: str, granularity: int) -> None:
    model = small(pool)
    whole = model.flops_at(model.dense_schedule())
    try:
        found = diffrate.search(model, batches(1), share=share, granularity=granularity, flops_loss="relative")
    except diffrate.BudgetError as error:
        assert "accepted" in str(error) or "nearest" in str(error)  # noqa: PT017  (16 tokens do not meet every budget)
        return
    assert meets_budget(found.flops, share * whole)


def test_the_best_epoch_on_the_validation_images_is_reported() -> None:
    model, seen = small(), []

    class Watch(diffrate.Observer):
        def on_epoch(self, record: diffrate.EpochRecord) -> None:
            seen.append(record)

    found = diffrate.search(model, batches(), share=0.7, epochs=4, val=batches(2), learning_rate=1.0, callback=Watch())
    best = max(seen, key=lambda record: record.scores.acc1)
    assert found.scores == best.scores
    assert found.schedule == best.schedule
    assert diffrate.evaluate(model, batches(2)) == found.scores


def test_any_criterion_and_mixed_labels() -> None:
    calls: list[int] = []

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        return logits.square().mean()

    diffrate.search(small(), batches(), share=0.7, criterion=criterion)
    assert calls == [4, 4, 4]
    mixed = [(images, nn.functional.one_hot(labels, 5).float()) for images, labels in batches()]
    first = diffrate.search(small(), mixed, share=0.7)
    second = diffrate.search(small(), batches(), share=0.7, mixup=lambda x, y: (x, nn.functional.one_hot(y, 5).float()))
    assert first.history == second.history


def test_a_start_and_a_warm_up_and_a_callback() -> None:
    model, records = small(), []
    start = diffrate.Schedule((17, 9, 9, 9), (17, 9, 9, 9))
    diffrate.search(model, batches(), share=0.7, start=start, warmup=True, callback=records.append)
    assert len(records) == 3
    assert all(8 < count <= 9 for count in records[0].counts)
    free = small()
    diffrate.search(free, batches(), share=0.7, start=start, flops_weight=0.0)
    assert same(rates(model), rates(free))


def test_accumulated_batches_and_steps() -> None:
    found = diffrate.search(small(), batches(6), share=0.7, accumulate=2, steps=2)
    assert len(found.history) == 2


def test_a_second_search_starts_afresh() -> None:
    model = small()
    first = diffrate.search(model, batches(), share=0.7)
    again = diffrate.search(model, batches(), share=0.7)
    assert first == again


# --- search: against the dense model, on a held budget --------------------------------------------


@pytest.mark.parametrize("loss", ["distill", "tokens"])
@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_the_dense_model_takes_the_place_of_labels(loss: str, pool: str) -> None:
    model = small(pool)
    bare = diffrate.search(model, [images for images, _ in batches()], share=0.7, loss=loss, flops_weight=0.0)
    assert rates(model)[0].abs().sum() > 0  # without a cost, it is the loss that moves it
    paired = diffrate.search(small(pool), batches(), share=0.7, loss=loss, flops_weight=0.0)
    assert bare.history == paired.history
    assert all(record.loss > 0 for record in bare.history)
    mixing = diffrate.search(small(pool), batches(), share=0.7, loss=loss, mixup=lambda x, y: (x.flip(0) + x, y))
    assert mixing.history[0].loss != bare.history[0].loss


def test_nothing_is_apart_at_the_dense_counts() -> None:
    model, images = small(), batches()[0][0]
    model.eval()
    dense, kept = model.dense_schedule(), diffrate.Schedule((17, 9, 9, 9), (17, 9, 9, 9))
    apart = losses_at(model, [dense, kept], batches())
    assert apart[0] == pytest.approx(0, abs=1e-6)
    assert apart[1] > 0
    model.set_kept_num(kept.prune or (), kept.merge)
    assert torch.equal(model.outputs_at(images, kept), model(images, return_flop=False))
    assert torch.equal(model.features_at(images, kept), model.forward_features(images)[:, 1:])
    model.set_kept_num(dense.prune or (), dense.merge)
    assert torch.equal(model.outputs_at(images, dense), model(images, return_flop=False))


def test_models_without_a_head_are_searched_by_their_features() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0})
    model = diffrate.patch.vit(plain, prune_granularity=1, merge_granularity=1)
    with pytest.raises(diffrate.UnsupportedModelError, match="or the loss 'distill'"):
        diffrate.search(model, batches(), share=0.7)
    found = diffrate.search(model, batches(), share=0.7, loss="distill")
    assert all(0 < record.loss < 2 for record in found.history)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_held_budget_ends_on_its_target(accumulate: int) -> None:
    model = small()
    target = 0.6 * model.flops_at(model.dense_schedule())
    more: dict[str, Any] = {"epochs": 15, "learning_rate": 0.1, "accumulate": accumulate, "loss": "distill"}
    found = diffrate.search(model, batches(6), target_flops=target, budget="held", **more)
    assert found.history[-1].flops == pytest.approx(target, rel=0.06)  # of 16 patches, one is about that much


def test_a_held_budget_goes_on_bit_for_bit(tmp_path: Path) -> None:
    more: dict[str, Any] = {"share": 0.6, "epochs": 3, "budget": "held", "loss": "tokens", "learning_rate": 0.1}
    whole = diffrate.search(small(), batches(), **more)
    file = tmp_path / "search.pth"

    class Stop(diffrate.Observer):
        steps = 0

        def on_step(self, record: diffrate.StepRecord) -> None:
            self.steps += 1

        def stop(self) -> bool:
            return self.steps == 4

    with pytest.raises(diffrate.StoppedError):
        diffrate.search(small(), batches(), checkpoint=file, callback=Stop(), **more)
    assert read_checkpoint(file)["multiplier"][1] > 0
    assert diffrate.search(small(), batches(), resume=file, **more) == whole


def test_a_start_and_its_spread() -> None:
    start = diffrate.Schedule((17, 14, 11, 8), (17, 12, 9, 7))
    first = {}
    for spread in (None, 0.05):
        found = diffrate.search(small(), batches(), share=0.7, start=start, start_spread=spread)
        first[spread] = found.history[0]
    assert first[0.05].counts == pytest.approx(first[None].counts, abs=0.05)


def test_features_of_every_patch_are_not_every_familys() -> None:
    model = diffrate.patch.vit(plain("caformer"))
    with pytest.raises(diffrate.UnsupportedModelError, match="loss: found 'tokens' for CompressedCaformer"):
        diffrate.search(model, batches(), share=0.9, loss="tokens")


def test_images_alone_have_no_labels() -> None:
    with pytest.raises(ValueError, match="loader: found images alone"):
        diffrate.search(small(), [images for images, _ in batches()], share=0.7)


# --- search: what it leaves as it was -------------------------------------------------------------


def state_of(model: nn.Module) -> tuple[Any, ...]:
    modes = {name: module.training for name, module in model.named_modules()}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.named_parameters() if "compression" not in name}
    return modes, needed, weights


def partly_frozen() -> diffrate.CompressedModel:
    model = small().train()
    model.blocks[0].eval()
    model.patch_embed.requires_grad_(False)
    return model


def generators() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002


def unchanged(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return before[:2] == after[:2] and all(torch.equal(value, after[2][name]) for name, value in before[2].items())


def seed() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)


def test_modes_gradients_weights_and_generators_are_as_before() -> None:
    model = partly_frozen()
    model.set_kept_num([17, 12, 12, 12], [17, 12, 9, 9])  # as a search leaves it, with rates that are frozen
    before = state_of(model)
    seed()
    expected = generators()
    seed()
    diffrate.search(model, batches(), share=0.7)
    assert generators() == expected
    assert unchanged(before, state_of(model))
    assert all(value.grad is None for value in model.parameters())


def test_they_are_as_before_when_it_fails() -> None:
    model = partly_frozen()
    model.set_kept_num([17, 12, 12, 12], [17, 12, 9, 9])
    before, kept = state_of(model), model.get_kept_num()

    def fail(record: diffrate.StepRecord) -> None:
        if record.step == 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        diffrate.search(model, batches(), share=0.7, callback=fail)
    assert unchanged(before, state_of(model))
    assert model.get_kept_num() == kept


# --- search: loaders, seeds, checkpoints ----------------------------------------------------------


def shuffled() -> DataLoader[Any]:
    images, labels = (torch.cat(part) for part in zip(*batches(4), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)


@pytest.mark.parametrize("more", [{"epochs": 2}, {"method": "calibrated", "work": 200}])
def test_a_shuffling_loader_repeats_with_its_seed(more: dict[str, Any]) -> None:
    def found(drawn: int, **others: Any) -> Any:
        model = small()  # from a seed of its own
        torch.manual_seed(drawn)
        result = diffrate.search(model, shuffled(), share=0.7, **more, **others)
        return result.history or (result.calibrated and result.calibrated.losses)

    assert found(6) == found(5)
    assert found(5, seed=1) != found(5)


@pytest.mark.parametrize("make", [batches, shuffled])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_it_goes_on_bit_for_bit(make: Any, stop: int, tmp_path: Path) -> None:
    whole_model, model, file = small(), small(), tmp_path / "search.pth"
    whole = diffrate.search(whole_model, make(), share=0.7, epochs=3, val=batches(2), learning_rate=0.1)

    class Stop(diffrate.Observer):
        def __init__(self) -> None:
            self.steps = 0

        def on_step(self, record: diffrate.StepRecord) -> None:
            self.steps += 1

        def stop(self) -> bool:
            return self.steps == stop - 1

    setting: dict[str, Any] = {"share": 0.7, "epochs": 3, "val": batches(2), "learning_rate": 0.1, "checkpoint": file}
    with pytest.raises(diffrate.StoppedError, match="stopped at epoch"):
        diffrate.search(model, make(), callback=Stop(), notes={"mine": [1, "two"]}, **setting)
    assert read_checkpoint(file)["mine"] == [1, "two"]
    again = small()
    found = diffrate.search(again, make(), resume=file, **setting)
    assert found == whole
    assert same(rates(again), rates(whole_model))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"seed": 1}, "was made with seed 0; accepted: 1"),
        ({"learning_rate": 0.02}, "was made with learning_rate 0.01; accepted: 0.02"),
        ({"granularity": 2}, "was made with granularity 1; accepted: 2"),
        ({"share": 0.6}, "was made with target "),
        ({"steps": 2}, "was made with steps 3; accepted: 2"),
        ({"loss": "distill"}, "was made with loss labels; accepted: distill"),
        ({"budget": "held"}, "was made with budget penalty; accepted: held"),
    ],
)
def test_another_search_is_refused_by_name(more: dict[str, Any], expected: str, tmp_path: Path) -> None:
    file = tmp_path / "search.pth"
    diffrate.search(small(), batches(), share=0.7, checkpoint=file)
    with pytest.raises(diffrate.SearchCheckpointError, match=expected):
        diffrate.search(small(), batches(), **{"share": 0.7, "resume": file} | more)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"mode": "finetune"}, tmp_path / "other.pth")
    for name, expected in (("gone.pth", "cannot be read"), ("text.pth", "cannot be read"), ("other.pth", "finetune")):
        with pytest.raises(diffrate.SearchCheckpointError, match=expected):
            diffrate.search(small(), batches(), share=0.7, resume=tmp_path / name)


def test_options_are_keywords_or_settings() -> None:
    settings = SearchSettings(share=0.7, epochs=2, learning_rate=0.1)
    named = diffrate.search(small(), batches(), share=0.7, epochs=2, learning_rate=0.1)
    assert diffrate.search(small(), batches(), settings=settings) == named
    assert diffrate.search(small(), batches(), settings=SearchSettings(share=0.7), epochs=2, learning_rate=0.1) == named
    with pytest.raises(TypeError, match="epoch: no option of a search; accepted: target_flops, share, "):
        diffrate.search(small(), batches(), share=0.7, epoch=2)
    with pytest.raises(SearchSettingError, match="epochs: found '2'; accepted: from 1"):
        diffrate.search(small(), batches(), share=0.7, epochs="2")
    assert "least_learning_rate: and in the last step, default a tenth of that" in str(diffrate.search.__doc__)


@pytest.mark.parametrize(
    ("more", "error", "expected"),
    [
        ({}, SearchSettingError, "target_flops, share, target_speedup, target_latency: found none"),
        ({"share": 0.5, "target_flops": 1e6}, SearchSettingError, "found target_flops, share; accepted: one of them"),
        ({"share": 1.5}, SearchSettingError, "share: found 1.5"),
        ({"share": 0.01}, diffrate.BudgetError, "accepted: "),
        ({"target_flops": float("nan")}, diffrate.BudgetError, "accepted: "),
        ({"share": 0.7, "epochs": 0}, SearchSettingError, "epochs: found 0; accepted: from 1"),
        ({"share": 0.7, "flops_loss": "squared"}, SearchSettingError, "accepted: absolute or relative"),
        ({"share": 0.7, "least_learning_rate": 1.0}, SearchSettingError, "least_learning_rate: found 1.0"),
        ({"share": 0.7, "accumulate": 4}, SearchSettingError, "accumulate: found 4; accepted: up to 3"),
        ({"share": 0.7, "steps": 9}, SearchSettingError, "steps: found 9; accepted: 1 to 3"),
        ({"share": 0.7, "granularity": 16}, diffrate.RateError, "granularity: found 16; accepted: from 1 to 15"),
        ({"share": 0.7, "granularity": 0}, diffrate.RateError, "granularity: found 0"),
        ({"share": 0.7, "loss": "words"}, SearchSettingError, "loss: found 'words'; accepted: labels, distill, tokens"),
        ({"share": 0.7, "budget": "tight"}, SearchSettingError, "budget: found 'tight'; accepted: penalty or held"),
        ({"share": 0.7, "budget": "held", "warmup": True}, SearchSettingError, "warmup: found True"),
        ({"share": 0.7, "loss": "tokens", "criterion": len}, SearchSettingError, "criterion: found one with the loss"),
        ({"share": 0.7, "start_spread": 0.0}, SearchSettingError, "start_spread: found 0.0"),
        ({"share": 0.7, "seed": -1}, SearchSettingError, "seed: found -1"),
        ({"share": 0.7, "epochs": 1.5}, SearchSettingError, "epochs: found 1.5; accepted: a whole number from 1"),
        ({"share": 0.7, "steps": 2.5}, SearchSettingError, "steps: found 2.5; accepted: a whole number from 1"),
        ({"share": 0.7, "rule": "pitome"}, SearchSettingError, "rule: found 'pitome' by gradient; accepted: another"),
        ({"share": 0.7, "start": diffrate.Schedule((17,) * 4, ("a",) * 4)}, diffrate.ScheduleError, "start: merge_"),
        ({"share": 0.7, "start": diffrate.Schedule(30, 30)}, diffrate.ScheduleError, "start: "),
        ({"share": 0.7, "checkpoint": "/nowhere/at/all.pth"}, SearchSettingError, "checkpoint: found"),
        ({"share": 0.7, "start": diffrate.Schedule((17,), (17,))}, diffrate.ScheduleError, "start: "),
    ],
)
def test_settings_that_make_no_sense(more: dict[str, Any], error: type[Exception], expected: str) -> None:
    model = small().train()
    with pytest.raises(error, match=expected):
        diffrate.search(model, batches(), **more)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


class Stream:
    """Batches that can be gone through again, and tell no length."""

    def __iter__(self) -> Any:
        return iter(batches())


class Flow(IterableDataset[Any]):
    """The images of `batches`, one by one: its loader has a `__len__`, which raises."""

    def __iter__(self) -> Any:
        return (pair for images, labels in batches() for pair in zip(images, labels, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        *(Stream, lambda: (batch for batch in batches()), lambda: tuple(batches())),
        lambda: DataLoader(Flow(), batch_size=4),
    ],
)
def test_any_iterable_is_a_loader(make: Any) -> None:
    expected = diffrate.search(small(), batches(), share=0.7, epochs=2)
    assert diffrate.search(small(), make(), share=0.7, epochs=2) == expected


def test_a_generator_runs_dry_and_says_so() -> None:
    with pytest.raises(ValueError, match="loader: no batch left at epoch 1, step 0"):
        diffrate.search(small(), (batch for batch in batches()), share=0.7, steps=3, epochs=2)
    with pytest.raises(SearchSettingError, match="loader: found no batch"):
        diffrate.search(small(), [], share=0.7)


def test_a_generator_with_steps_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stop(diffrate.Observer):
        asked = 0

        def stop(self) -> bool:
            self.asked += 1
            return self.asked == 4

    setting: dict[str, Any] = {"share": 0.7, "epochs": 2, "steps": 3}
    whole = diffrate.search(small(), iter(batches(6)), **setting)
    with pytest.raises(diffrate.StoppedError):
        diffrate.search(small(), iter(batches(6)), **setting, checkpoint=tmp_path / "a.pth", callback=Stop())
    assert diffrate.search(small(), iter(batches(6)), **setting, resume=tmp_path / "a.pth") == whole

    def failing() -> Any:
        raise OSError("the disk is gone")
        yield

    with pytest.raises(OSError, match="the disk is gone"):  # not called a fault of the checkpoint
        diffrate.search(small(), failing(), **setting, resume=tmp_path / "a.pth")


def test_images_to_score_may_come_once() -> None:
    found = [diffrate.search(small(), batches(), share=0.7, epochs=2, val=make(batches(2))) for make in (list, iter)]
    assert found[0] == found[1]


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_a_search_learns_whoever_calls_it(within: Any) -> None:
    loader, model = batches(), small()
    expected = diffrate.search(small(), loader, share=0.7)
    with within():
        assert diffrate.search(model, loader, share=0.7) == expected


def test_a_model_that_is_not_patched_is_refused() -> None:
    plain: Any = timm.create_model("vit_tiny_patch16_224", **SMALL)
    for call in (lambda: diffrate.search(plain, batches(), share=0.5), lambda: diffrate.benchmark(plain)):
        with pytest.raises(diffrate.UnsupportedModelError, match="VisionTransformer; accepted: a model after"):
            call()


@pytest.mark.parametrize("budget", ["penalty", "held"])
def test_a_loss_that_tells_no_schedules_apart_is_refused(budget: str) -> None:
    """Only the cost would be left to search by."""
    model = small()
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(
        SearchSettingError, match=r"loss: found 1\.6\d* without a gradient in 3 steps; accepted: a model"
    ):
        diffrate.search(model, batches(), share=0.7, budget=budget, epochs=2)


@pytest.mark.parametrize("act", [diffrate.evaluate, diffrate.sensitivity, partial(diffrate.search, share=0.7)])
def test_what_is_no_loader_is_refused(act: Any) -> None:
    with pytest.raises(ValueError, match="loader: found NoneType; accepted: a DataLoader, a list, any iterable of"):
        act(small(), None)


def test_a_loss_that_is_no_number_names_the_step() -> None:
    with pytest.raises(diffrate.NonFiniteLossError, match="nan at epoch 0, step 0"):
        diffrate.search(small(), batches(), share=0.7, criterion=lambda logits, labels: logits.sum() * float("nan"))


# --- evaluate and benchmark -----------------------------------------------------------------------


def test_evaluation_counts_patched_and_plain_models_alike() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL).train()
    patched = diffrate.patch.vit(copy.deepcopy(plain), 1, 1)
    dense = patched.dense_schedule()
    patched.set_kept_num(dense.prune, dense.merge)
    first, second = (diffrate.evaluate(model, batches()) for model in (plain, patched))
    assert (first.acc1, first.acc5, first.images) == (second.acc1, second.acc5, 12)
    assert first.acc5 == 100
    assert first.loss == pytest.approx(second.loss, abs=1e-5)
    assert plain.training
    assert patched.training
    logits = torch.cat([plain.eval()(images) for images, _ in batches()])
    labels = torch.cat([labels for _, labels in batches()])
    assert first.acc1 == pytest.approx(100 * float((logits.argmax(1) == labels).float().mean()))
    assert first.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_evaluation_tells_of_each_batch_and_refuses_none() -> None:
    seen: list[int] = []
    diffrate.evaluate(small(), batches(), callback=lambda tally: seen.append(tally.scores().images))
    assert seen == [4, 8, 12]
    with pytest.raises(ValueError, match="loader: found no batch"):
        diffrate.evaluate(small(), [])


def test_evaluation_in_other_precisions() -> None:
    full = diffrate.evaluate(small(), batches())
    half = diffrate.evaluate(small(), batches(), precision=torch.bfloat16)
    weights = diffrate.evaluate(small().to(torch.bfloat16), batches())
    assert full.loss != half.loss != weights.loss
    assert half.loss == pytest.approx(full.loss, rel=0.1)
    assert weights.loss == pytest.approx(full.loss, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_benchmark_leaves_the_model_alone(dtype: torch.dtype) -> None:
    model = small().train()
    model.set_kept_num([17, 9, 9, 9], [17, 9, 5, 5])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    speed = diffrate.benchmark(model, batch_size=2, dtype=dtype, rounds=2)
    assert speed.ideal_speedup == pytest.approx(model.flops_at(model.dense_schedule()) / model.flops())
    assert speed.share_of_ideal == pytest.approx(speed.speedup / speed.ideal_speedup)
    assert speed.speedup_low <= speed.speedup <= speed.speedup_high
    assert speed.bound_speedup is not None
    assert speed.share_of_bound == pytest.approx(speed.speedup / speed.bound_speedup, rel=0.5)
    assert f"of the bound {speed.bound_speedup:.2f}" in speed.line()
    assert speed.dense_images_per_second == pytest.approx(1000 / speed.dense_ms_per_image)
    assert f"batch 2, {speed.precision}: dense" in speed.line()
    assert model.training
    assert model.get_kept_num() == ([17, 9, 9, 9], [17, 9, 5, 5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="rounds: found 0"):
        diffrate.benchmark(model, rounds=0)


# --- what a second look found ---------------------------------------------------------------------


def test_a_failed_search_gives_back_rates_and_granularity() -> None:
    model = small()
    model.compression.start_at(diffrate.Schedule((17, 9, 9, 9), (17, 9, 7, 5)))
    before, kept = rates(model), model.get_kept_num()
    with pytest.raises(ZeroDivisionError):
        diffrate.search(model, batches(), share=0.7, granularity=4, callback=lambda record: 1 / 0)
    assert same(rates(model), before)
    assert model.get_kept_num() == kept
    assert model.compression.granularity == {"prune": 1, "merge": 1}
    diffrate.search(model, batches(), share=0.7, granularity=4)
    assert all(rate.grad is None for rate in model.arch_parameters())


def test_a_model_that_was_evaluated_elsewhere_still_trains() -> None:
    """Moving it is what must not happen in inference mode: here to another device and back."""
    model = small().to("meta")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    diffrate.evaluate(model.to("cpu"), batches(), device="cpu")
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_images_that_a_loader_keeps_can_be_trained_on() -> None:
    class Kept:
        def __init__(self) -> None:
            self.cache: list[Batch] = []

        def __iter__(self) -> Any:
            self.cache = self.cache or [(images.clone(), labels) for images, labels in batches(1)]
            return iter(self.cache)

    model, asked = small(), []
    for call in (
        lambda loader: diffrate.evaluate(
            model, loader, callback=lambda _: asked.append(torch.is_inference_mode_enabled())
        ),
        lambda loader: diffrate.sensitivity(model, loader, shares=[0.5]),
    ):
        loader = Kept()
        call(loader)
        assert not loader.cache[0][0].is_inference()
    assert asked == [False]


def test_evaluation_takes_a_module_that_holds_a_compressed_model() -> None:
    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small()
            self.backbone.return_flop = False

        def forward(self, images: Tensor) -> Tensor:
            return 2 * self.backbone(images)

    assert diffrate.evaluate(Ours(), batches()).images == 12


def test_rates_are_where_the_model_is_and_search_in_float32() -> None:
    assert {rate.device.type for rate in diffrate.patch.vit(_plain().to("meta")).arch_parameters()} == {"meta"}
    model = small().to(torch.bfloat16)
    for rate in model.arch_parameters():
        rate.grad = torch.ones_like(rate)  # of a step by hand
    diffrate.search(model, batches(), share=0.7)
    assert {rate.dtype for rate in model.arch_parameters()} == {torch.float32}


def _plain() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SMALL)


def test_records_of_counts_are_those_that_schedules_are_rounded_from() -> None:
    model = small()
    model.compression.start_at(diffrate.Schedule((17, 9, 9, 9), (17, 9, 7, 5)))
    assert model.compression.expectations() == pytest.approx(model.compression.expected_counts(), rel=1e-6)


def test_a_loader_with_a_generator_of_its_own_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def own() -> DataLoader[Any]:
        loader = shuffled()
        return DataLoader(loader.dataset, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(7))

    whole = diffrate.search(small(), own(), share=0.7, epochs=2)
    file = tmp_path / "search.pth"

    class Stop(diffrate.Observer):
        stopping = False

        def on_step(self, record: diffrate.StepRecord) -> None:
            self.stopping = record.epoch == 1

        def stop(self) -> bool:
            return self.stopping

    with pytest.raises(diffrate.StoppedError):
        diffrate.search(small(), own(), share=0.7, epochs=2, checkpoint=file, callback=Stop())
    loader = own()
    assert diffrate.search(small(), loader, share=0.7, epochs=2, resume=file).history == whole.history
    assert loader.generator.initial_seed() == 7  # as it was


def test_notes_that_no_checkpoint_can_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchSettingError, match="notes: "):
        diffrate.search(small(), batches(), share=0.7, checkpoint=tmp_path / "a.pth", notes={"path": tmp_path})


def test_a_validation_loss_that_is_no_number_is_refused() -> None:
    broken = [(images * float("nan"), labels) for images, labels in batches(1)]
    with pytest.raises(diffrate.NonFiniteLossError, match="on the images to score"):
        diffrate.search(small(), batches(), share=0.7, val=broken)


def test_a_model_without_a_block_to_reduce_in_is_refused() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 1})
    with pytest.raises(diffrate.UnsupportedModelError, match="blocks: found 1; accepted: from 2"):
        diffrate.patch.vit(plain)


def test_minutes_are_steps_that_fit() -> None:
    fitting = [paced(3, 10, most) for most in (0, 4, 10, 22, 200)]
    assert fitting == [(1, 1), (1, 4), (1, 10), (2, 10), (3, 10)]


def test_minutes_and_batches_that_come_once() -> None:
    with pytest.raises(SearchSettingError, match="minutes: found 1 and a generator with steps"):
        diffrate.search(small(), iter(batches(4)), share=0.8, steps=2, minutes=1)
