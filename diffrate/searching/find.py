"""`diffrate.search`: from a patched model and images to the schedule that meets a budget."""

from __future__ import annotations

import io
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.forms import UnsupportedModelError
from diffrate.budgets.budget import Budget
from diffrate.budgets.schedule import Schedule
from diffrate.files import UNREADABLE, first_line
from diffrate.group import made_by_first
from diffrate.latency.confirm import Again, Confirmed
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.state import CompressionState
from diffrate.rates.rate import RateError
from diffrate.running.evaluation import (
    Batches,
    Scores,
    Tally,
    class_indices,
    evaluate,
    modes_kept,
    multi_hot,
)
from diffrate.running.precision import default_precision, place_of
from diffrate.searching.batches import updates_of, with_length
from diffrate.searching.calibrate import IMAGES, Calibrated, CalibrationObserver, Plan, calibrate, is_calibrated
from diffrate.searching.checkpoint import restore
from diffrate.searching.history import StepRecord
from diffrate.searching.loop import Checkpoint, Criterion, Means, Mixup, Observer, Search
from diffrate.searching.pace import paced_before, paced_here
from diffrate.searching.settings import METHODS, SMOOTHING, Course, SearchSettingError, SearchSettings, least_rate
from diffrate.searching.target import Asked, Goal, goal_of
from diffrate.searching.teacher import Teacher
from diffrate.seeds import generators_kept

SAVE_EVERY = 10  # steps
AGAIN = 0.3  # of the trials, where what was found is measured to be too slow
GRADIENT_SHARE = 0.5  # of the minutes, where there are two searches


@dataclass(frozen=True)
class Found:
    """What a search found.

    flops: of the schedule, in multiply-accumulates. scores: at it, None without `val`.
    history: a record per step of the gradient search, in order, those before a resumption included.
    calibrated: what the search at hard counts came to, None where there was none.
    speed: asked for, predicted and measured; None where FLOPs were asked for.
    """

    schedule: Schedule
    flops: int
    scores: Scores | None
    history: tuple[StepRecord, ...]
    calibrated: Calibrated | None = None
    speed: Confirmed | None = None


def search(
    model: CompressedModel,
    loader: Iterable[Any],
    *,
    target_flops: float | None = None,
    share: float | None = None,
    target_speedup: float | None = None,
    target_latency: float | None = None,
    latency: LatencyTable | None = None,
    method: str = "gradient",
    epochs: int = 1,
    val: Batches | None = None,
    calibration: Iterable[Any] | None = None,
    images: int = IMAGES,
    work: float | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    criterion: Criterion | None = None,
    mixup: Mixup | None = None,
    loss: str = SearchSettings.loss,
    multi_label: bool = SearchSettings.multi_label,
    budget: str = SearchSettings.budget,
    flops_loss: str = SearchSettings.flops_loss,
    flops_weight: float = SearchSettings.flops_weight,
    warmup: bool = SearchSettings.warmup,
    learning_rate: float = SearchSettings.learning_rate,
    least_learning_rate: float | None = None,
    granularity: int | None = None,
    accumulate: int = SearchSettings.accumulate,
    start: Schedule | None = None,
    start_spread: float | None = None,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    seed: int = SearchSettings.seed,
    callback: Callable[[StepRecord], None] | Observer | None = None,
    trials: CalibrationObserver | None = None,
    checkpoint: str | Path | None = None,
    resume: str | Path | None = None,
    save_every: int = SAVE_EVERY,
    notes: Mapping[str, Any] | None = None,
) -> Found:
    """Search the kept counts with which a patched `model` meets a budget (paper, sections 3.3 and 3.4).

    Weights are frozen; rate logits learn from zero, or from `start`. The model is left at the schedule
    found, with the training mode of its modules and `requires_grad` of its weights as they were, also
    after an error (then with the schedule as it was). Inside an initialised process group every process
    brings its own part of the images, and gradients are averaged.

    Args:
        loader: batches of images `[B, 3, H, W]` and labels as `evaluate` takes them, gone through once an epoch: a
            DataLoader, a list, any iterable. Labels are classes `[B]`, or shares of classes `[B, K]`. Without
            `steps`, a generator is kept in memory, and what has no length is counted first.
        target_flops: the budget in multiply-accumulates of an image; or `share`, of the dense model's; or
            `target_speedup`, how many times as fast as dense; or `target_latency`, seconds of an image.
        latency: what schedules take, of `measure_latency`: for the batch size, precision and mode that a speed is
            asked for; by default measured with its defaults. What is found is measured, too, and searched on,
            or rounded again, where it is too slow.
        method: `gradient`, the paper's; or `calibrated`, which tries schedules of the budget at really fixed counts,
            on images without labels, against the dense model's outputs; or `both`, one after the other.
        calibration: what `calibrated` takes its images from, by default `loader`; `images` of them at most.
        work: of `calibrated`, in forward passes of the dense model on one image; by default 22,000, or fewer where
            there are few images. minutes: to end within, by the clock of the first process, with fewer steps, trials
            and images; measuring seconds and scoring come on top.
        trials: told how `calibrated` goes on.
        val: batches to score each epoch's schedule on: the best epoch's is reported, else the last one's.
        steps: updates an epoch, where the loader has no length or is longer than wanted.
        criterion: loss of logits `[B, K]` against labels; by default cross-entropy with labels smoothed by 0.1, and
            with `multi_label` binary cross-entropy. A head with one output has no default.
        loss: `labels`; or what needs none, and takes batches of images alone: `distill`, how far the outputs are
            from the dense model's (the pooled features of a model without a head), or `tokens`, how far the
            features of every patch are. `distill` of a head with one output is the squared error relative to the
            variance of the dense outputs, on the calibration images or those of a step.
        multi_label: outputs stand for labels of their own, by a sigmoid each: losses, `distill` too, are binary
            cross-entropies, and `val` is scored by `evaluate` with it.
        budget: `penalty`, the cost in the loss, as `flops_loss` and `flops_weight` say; or `held`, on the target by
            a multiplier that is learnt, which those two have no part in.
        mixup: mixes images and labels of a batch, such as timm's `Mixup`; by default nothing does.
        least_learning_rate: of the last step; by default a tenth of `learning_rate`.
        granularity: tokens between the candidates of a count; by default that of the patch.
        start_spread: how wide the candidates around `start` are in play, a deviation as a share of the patches; by
            default as wide as the counts of `start` allow.
        device: where to search and leave the model; by default where it is.
        precision: of autocast; by default float16 on a GPU and none elsewhere.
        seed: of everything drawn; the generators go on as before afterwards.
        callback: called with a record after each step, or an `Observer`.
        checkpoint: file that is written every `save_every` steps and after each epoch, with the plain values
            in `notes` beside the search's own; `resume` is a file to go on from, bit for bit on a CPU unless
            loader processes that persist draw augmentation.

    Raises:
        UnsupportedModelError: the model is not patched, or has no head for the default loss.
        SearchSettingError, BudgetError, RateError, ScheduleError: a setting, the target, the granularity or
            the start makes no sense; or all schedules that `calibrated` tries come to the same loss.
        SearchCheckpointError: `resume` is missing, damaged, or another search's.
        NonFiniteLossError: the loss is no number.
        StoppedError: the observer asked to stop.
        ScoresError: labels do not fit the head, or scikit-learn is not there to score `multi_label` on `val`.
        ValueError: the loader ends before an epoch does, or a batch has another form.
    """
    require_patched(model)
    if criterion is not None and loss != SearchSettings.loss:
        raise SearchSettingError(f"criterion: found one with the loss {loss!r}; accepted: none, or the loss 'labels'")
    if method == METHODS[0] and criterion is None and loss == SearchSettings.loss and not model.has_head():
        raise UnsupportedModelError(
            "found a model without a head; accepted: one with classes and a pooling, a criterion, or the loss 'distill'"
        )
    if start_spread is not None and not 0 < start_spread < math.inf:
        raise SearchSettingError(f"start_spread: found {start_spread!r}; accepted: above 0, or none")
    if method not in METHODS:
        raise SearchSettingError(f"method: found {method!r}; accepted: {', '.join(METHODS)}")
    if images < 2:
        raise SearchSettingError(f"images: found {images!r}; accepted: from 2")
    for name, value in (("work", work), ("minutes", minutes)):
        if value is not None and not 0 < value < math.inf:
            raise SearchSettingError(f"{name}: found {value!r}; accepted: above 0, or none")
    for name, value, kind in (("latency", latency, LatencyTable), ("start", start, Schedule)):
        if value is not None and not isinstance(value, kind):
            raise SearchSettingError(f"{name}: found {type(value).__name__}; accepted: a {kind.__name__}, or none")
    asked = Asked(target_flops, share, target_speedup, target_latency)
    asked.check()
    if asked.timed and resume is not None and latency is None:
        raise SearchSettingError("latency: found none to resume with; accepted: the table of the search that goes on")
    place = place_of(model, device)
    settings = SearchSettings(
        epochs=epochs,
        flops_loss="relative" if asked.timed else flops_loss,
        flops_weight=flops_weight,
        warmup=warmup,
        learning_rate=learning_rate,
        least_learning_rate=least_rate(learning_rate) if least_learning_rate is None else least_learning_rate,
        granularity=model.compression.granularity["merge"] if granularity is None else granularity,
        accumulate=accumulate,
        seed=seed,
        loss=loss,
        budget=budget,
        multi_label=multi_label,
    )
    if val is not None:
        Tally(place.device, multi_label)  # what it lacks, it says before the search
    goal = goal_of(model, asked, latency, place.device)
    target = goal.budget.target
    precision = precision or default_precision(place.device)
    going_on = None if resume is None else Path(resume)
    file = None if checkpoint is None else Path(checkpoint)
    found, given, again, begun = None, {}, None, time.monotonic()
    with generators_kept():
        if method != "calibrated" and not (method == "both" and going_on is not None and is_calibrated(going_on)):
            teacher = None if loss == SearchSettings.loss else Teacher(model, loss, multi_label)
            loader, batches = with_length(loader, steps)
            if minutes is not None and isinstance(loader, Iterator):
                raise SearchSettingError(
                    f"minutes: found {minutes!r} and a generator with steps; accepted: one of them"
                )
            course = Course(settings, target, updates_of(batches, steps, accumulate, place.device))
            means = Means(place, precision, criterion or default_criterion(multi_label), mixup, val, teacher, goal.cost)
            saved = None if file is None else _checkpoint(file, save_every, notes or {})
            with modes_kept(model), _gradients_kept(model), _compression_kept(model.compression):
                model.to(place.device)
                _fresh_rates(model, granularity, start, start_spread)
                running = Search(model, course, means, _observer(callback), goal.budget)
                if minutes is not None:
                    seconds = 60 * minutes * (1 if method == "gradient" else GRADIENT_SHARE)
                    running.take(
                        paced_here(running, loader, seconds) if going_on is None else paced_before(course, going_on)
                    )
                if going_on is not None:
                    restore(running.parts, going_on)
                    going_on = None
                schedule, scores = running.run(loader, saved)
            for rate in model.arch_parameters():
                rate.grad = None
            found = Found(schedule, model.flops_at(schedule), scores, running.state.history.records())
            given = {"gradient": schedule}
        if method != "gradient":
            if file is not None:
                _checkpoint(file, save_every, notes or {})
            model.to(place.device)
            left = minutes
            if minutes is not None:
                left = made_by_first(partial(_left, minutes, begun, asked.timed, method))
            plan, source = Plan(seed, images, work, left), loader if calibration is None else calibration
            run = partial(
                calibrate,
                model,
                source,
                goal.budget.cost,
                place=place,
                loss="tokens" if loss == "tokens" else "distill",
                multi_label=multi_label,
                precision=precision,
            )
            if asked.timed:  # a speed may be out of reach of every uniform schedule
                space = model.compression.space
                given["at once"] = goal.budget.rounded([space.least] * len(space.searchable) * len(space.kinds), space)
            if not isinstance(source, Iterator):  # whose images are gone
                less = replace(plan, share=AGAIN)
                ends = math.inf if minutes is None else begun + 60 * minutes
                again = partial(_searched_on, run, less, _Stopping(trials), ends)
            came_to = run(
                target,
                plan,
                given=given | ({} if start is None else {"start": start}),
                observer=trials,
                checkpoint=file,
                notes=notes,
                resume=going_on,
            )
            best = came_to.schedule
            scores = None if val is None else evaluate_at(model, best, val, precision, multi_label)
            found = Found(best, model.flops_at(best), scores, () if found is None else found.history, came_to)
    assert found is not None, "there is a method"
    return _settled(model, found, goal, again, val, precision, multi_label)


class _Stopping(CalibrationObserver):
    """Of a search that goes on after its end: nothing is told, but it may be stopped."""

    def __init__(self, first: CalibrationObserver | None) -> None:
        self.first = first or CalibrationObserver()

    def after_trials(self) -> None:
        self.first.after_trials()

    def stop(self) -> bool:
        return self.first.stop()


def _left(minutes: float, begun: float, timed: bool, method: str) -> float:
    """Of the `minutes`, for a search at hard counts: without what a corrected speed may take, and half of `both`."""
    usual = minutes * (1 - AGAIN if timed else 1) * (1 if method == "calibrated" else 1 - GRADIENT_SHARE)
    return max(0.0, min(usual, minutes - (time.monotonic() - begun) / 60))


def _searched_on(
    run: Callable[..., Calibrated],
    plan: Plan,
    observer: CalibrationObserver,
    ends: float,
    budget: Budget,
    before: Schedule,
    rounded: Schedule,
) -> Schedule:
    """A schedule of a corrected budget, from the one before, where that costs no more, and the same rounded to it;
    that alone where the time `ends`."""
    if plan.minutes is not None:
        most = AGAIN * plan.minutes
        minutes = made_by_first(lambda: min(most, (ends - time.monotonic()) / 60))
        if minutes <= 0:
            return rounded
        plan = replace(plan, minutes=minutes)
    given = {"rounded": rounded} | ({"before": before} if budget.cost(before) <= budget.target else {})
    return run(budget.target, plan, given=given, observer=observer).schedule


def _settled(
    model: CompressedModel,
    found: Found,
    goal: Goal,
    again: Again | None,
    val: Batches | None,
    precision: torch.dtype | None,
    multi_label: bool,
) -> Found:
    """What was found, with its speed where that was asked for; the model is left at its schedule."""
    with generators_kept():
        schedule, speed = goal.confirmed(model, found.schedule, place_of(model).device, again)
    if schedule != found.schedule:
        scores = None if val is None else evaluate_at(model, schedule, val, precision, multi_label)
        found = replace(found, schedule=schedule, flops=model.flops_at(schedule), scores=scores)
    model.set_kept_num(schedule.prune, schedule.merge)
    return replace(found, speed=speed)


def evaluate_at(
    model: CompressedModel, schedule: Schedule, val: Batches, precision: torch.dtype | None, multi_label: bool
) -> Scores:
    """The scores of `model` at `schedule`, which it is left at."""
    model.set_kept_num(schedule.prune, schedule.merge)
    return evaluate(model, val, multi_label=multi_label, precision=precision)


def default_criterion(multi_label: bool = False) -> Criterion:
    """Cross-entropy, with smoothing where labels are classes; labels that were mixed are smooth already. With
    `multi_label`, binary cross-entropy."""
    hard, soft = LabelSmoothingCrossEntropy(SMOOTHING), SoftTargetCrossEntropy()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if multi_label:
            return F.binary_cross_entropy_with_logits(logits, multi_hot(labels, logits).to(logits.dtype))
        if logits.shape[-1] == 1:
            raise SearchSettingError(
                "loss: found 'labels' for a head with one output; accepted: a criterion, or the loss 'distill'"
            )
        if labels.is_floating_point() and labels.shape == logits.shape:
            return soft(logits, labels)
        return hard(logits, class_indices(labels, logits))

    return loss


def _fresh_rates(model: CompressedModel, granularity: int | None, start: Schedule | None, spread: float | None) -> None:
    """Rates as a search begins with them, searching."""
    compression = model.compression
    if granularity is not None:
        compression.set_granularity(granularity, granularity)
    if min(len(rate) for rate in model.arch_parameters()) < 2:
        limit = compression.patches(compression.space.searchable[0])
        found = max(compression.granularity.values())
        raise RateError(f"granularity: found {found}; accepted: from 1 to {limit - 1}")
    compression.schedule = None
    compression.reset()
    if start is not None:
        model.check(start, "start: ")
        compression.start_at(start, spread)


def _checkpoint(path: Path, every: int, notes: Mapping[str, Any]) -> Checkpoint:
    if path.is_dir() or not path.parent.is_dir():
        raise SearchSettingError(f"checkpoint: found {path}; accepted: a file in a folder that is there")
    if every < 1:
        raise SearchSettingError(f"save_every: found {every}; accepted: from 1, in steps")
    trial = io.BytesIO()
    try:
        torch.save(dict(notes), trial)
        trial.seek(0)
        torch.load(trial, weights_only=True)
    except (*UNREADABLE, pickle.PicklingError) as error:
        raise SearchSettingError(f"notes: {first_line(error)}; accepted: plain values and tensors") from error
    return Checkpoint(path, every, notes)


def _observer(callback: Callable[[StepRecord], None] | Observer | None) -> Observer:
    if isinstance(callback, Observer):
        return callback
    observer = Observer()
    if callback is not None:
        observer.on_step = callback  # type: ignore[method-assign]
    return observer


@contextmanager
def _compression_kept(compression: CompressionState) -> Iterator[None]:
    """The schedule, the granularity and the rates as before, after a block that fails."""
    schedule, granularity = compression.schedule, compression.granularity
    rates = {name: (rate, rate.detach().clone()) for name, rate in compression.named_parameters()}
    try:
        yield
    except BaseException:
        compression.schedule, compression.granularity = schedule, granularity
        for name, (rate, values) in rates.items():
            rate.data = values
            compression.register_parameter(name, rate)
        raise


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """`requires_grad` and gradients of the parameters that are there now as before, after the block."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
