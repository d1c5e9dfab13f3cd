"""`diffrate.search`: from a patched model and images to the schedule that meets a budget."""

from __future__ import annotations

import io
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.atomic import UNREADABLE, first_line
from diffrate.blocks.forms import UnsupportedModelError
from diffrate.blocks.rates import RateError
from diffrate.budget import Budget
from diffrate.device import Place, default_precision, generators_kept, made_by_first, place_of
from diffrate.evaluation import Batches, Scores, Tally, class_indices, evaluate, modes_kept, multi_hot
from diffrate.latency.confirm import Again, Confirmed
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.state import CompressionState
from diffrate.schedule import Schedule
from diffrate.searching.batches import updates_of, with_length
from diffrate.searching.checkpoint import StepRecord, restore
from diffrate.searching.gradient import Checkpoint, Criterion, Means, Observer, Search, paced_before, paced_here
from diffrate.searching.hard_counts import Calibrated, CalibrationObserver, Plan, calibrate
from diffrate.searching.settings import (
    GRADIENT,
    OPTIONS,
    SMOOTHING,
    Course,
    SearchSettingError,
    SearchSettings,
    help_of,
    settings_of,
)
from diffrate.searching.target import budget_of, confirmed_at, expected_seconds, table_for
from diffrate.searching.teacher import Teacher

AGAIN = 0.3  # of the trials, where what was found is measured to be too slow


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
    settings: SearchSettings | None = None,
    val: Batches | None = None,
    callback: Callable[[StepRecord], None] | Observer | None = None,
    checkpoint: str | Path | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> Found:
    """Search the kept counts with which a patched `model` meets a budget (paper, sections 3.3 and 3.4).

    Weights are frozen; rate logits learn from zero, or from `start`. The model is left at the schedule
    found, with the training mode of its modules and `requires_grad` of its weights as they were, also
    after an error (then with the schedule as it was). Inside an initialised process group every process
    brings its own part of the images, and gradients are averaged.

    One of `target_flops`, `share`, `target_speedup` and `target_latency` says what is to be met. What is found for a
    speed is measured, too, and searched on, or rounded again, where it is too slow. `minutes` are by the clock of the
    first process: measuring seconds and scoring come on top.

    Args:
        loader: batches of images `[B, 3, H, W]` and labels as `evaluate` takes them, gone through once an epoch: a
            DataLoader, a list, any iterable. Labels are classes `[B]`, or shares of classes `[B, K]`; a loss other
            than `labels` takes batches of images alone. Without `steps`, a generator is kept in memory, and what has
            no length is counted first.
        settings, options: the options below, as one or each by its name.
        val: batches to score each epoch's schedule on: the best epoch's is reported, else the last one's.
        callback: called with a record after each step, or an `Observer`.
        checkpoint: file that is written every `save_every` steps and after each epoch.
        resume: a file to go on from, bit for bit on a CPU unless loader processes that persist draw augmentation.

    Raises:
        TypeError: there is no such option.
        UnsupportedModelError: the model is not patched, or has no head for the default loss.
        SearchSettingError, BudgetError, RateError, ScheduleError: an option, the target, the granularity or
            the start makes no sense; or all schedules that `calibrated` tries come to the same loss.
        SearchCheckpointError: `resume` is missing, damaged, or another search's.
        NonFiniteLossError: the loss is no number.
        StoppedError: the observer asked to stop.
        ScoresError: labels do not fit the head, or `val` is to be scored without scikit-learn.
        ValueError: the loader ends before an epoch does, or a batch has another form.
    """
    require_patched(model)
    settings = settings_of(settings, options)
    target = settings.target
    _check(model, settings, resume is not None)
    place = place_of(model, settings.device)
    if val is not None:
        Tally(place.device, settings.multi_label)  # what it lacks, it says before the search
    if target.timed:
        table = table_for(model, target, place.device) if settings.latency is None else settings.latency
        settings = replace(settings, flops_loss="relative", latency=table)
    budget = budget_of(model, target, settings.latency)
    task = _Task(model, loader, settings, budget, place, val, *map(_path, (checkpoint, resume)), begun=time.monotonic())
    with generators_kept():
        if settings.method == GRADIENT:
            return _settled(task, _by_gradient(task, _observer(callback)), None)
        return _settled(task, *_at_hard_counts(task))


search.__doc__ = f"{search.__doc__}\n    Options:\n" + "".join(
    f"        {name}: {help_of(item)}\n" for name, item in OPTIONS.items()
)


@dataclass(frozen=True)
class _Task:
    """A search to do: of a model for a budget, as its settings say, begun at a time of the clock."""

    model: CompressedModel
    loader: Any
    settings: SearchSettings
    budget: Budget
    place: Place
    val: Batches | None
    file: Path | None
    resume: Path | None
    begun: float

    @property
    def precision(self) -> torch.dtype | None:
        """Of autocast."""
        return self.settings.precision or default_precision(self.place.device)

    def checkpoint(self) -> Checkpoint | None:
        """Where the search saves itself, if it does.

        Raises:
            SearchSettingError: there is no such folder, or the notes cannot be saved.
        """
        if self.file is None:
            return None
        if self.file.is_dir() or not self.file.parent.is_dir():
            raise SearchSettingError(f"checkpoint: found {self.file}; accepted: a file in a folder that is there")
        trial, notes = io.BytesIO(), dict(self.settings.notes or {})
        try:
            torch.save(notes, trial)
            trial.seek(0)
            torch.load(trial, weights_only=True)
        except (*UNREADABLE, pickle.PicklingError) as error:
            raise SearchSettingError(f"notes: {first_line(error)}; accepted: plain values and tensors") from error
        return Checkpoint(self.file, self.settings.save_every, notes)

    def left(self) -> float | None:
        """Minutes for a search at hard counts, without what a corrected speed may take; None for any."""
        minutes = self.settings.minutes
        if minutes is None:
            return None
        usual = minutes * (1 - AGAIN if self.budget.timed else 1)
        return made_by_first(lambda: max(0.0, min(usual, minutes - (time.monotonic() - self.begun) / 60)))

    def scores_at(self, schedule: Schedule) -> Scores | None:
        """The scores of the model at `schedule`, which it is left at; None without images for it."""
        if self.val is None:
            return None
        self.model.set_kept_num(schedule.prune, schedule.merge)
        return evaluate(self.model, self.val, multi_label=self.settings.multi_label, precision=self.precision)


def _check(model: CompressedModel, settings: SearchSettings, resumed: bool) -> None:
    """Refuse what does not go with the model, or with a checkpoint to go on from."""
    needs_head = settings.method == GRADIENT and settings.criterion is None and settings.labelled
    if needs_head and not model.has_head():
        raise UnsupportedModelError(
            "found a model without a head; accepted: one with classes and a pooling, a criterion, or the loss 'distill'"
        )
    if settings.target.timed and resumed and settings.latency is None:
        raise SearchSettingError("latency: found none to resume with; accepted: the table of the search that goes on")


def _by_gradient(task: _Task, observer: Observer) -> Found:
    """What rates learn."""
    model, settings, place = task.model, task.settings, task.place
    teacher = None if settings.labelled else Teacher(model, settings.loss, settings.multi_label)
    loader, batches = with_length(task.loader, settings.steps)
    if settings.minutes is not None and isinstance(loader, Iterator):
        raise SearchSettingError(
            f"minutes: found {settings.minutes!r} and a generator with steps; accepted: one of them"
        )
    granularity = model.compression.granularity["merge"] if settings.granularity is None else settings.granularity
    course = Course(
        replace(settings, granularity=granularity),
        task.budget.target,
        updates_of(batches, settings.steps, settings.accumulate, place.device),
    )
    criterion = settings.criterion or default_criterion(settings.multi_label)
    cost = partial(expected_seconds, settings.latency) if settings.latency and task.budget.timed else None
    means = Means(place, task.precision, criterion, settings.mixup, task.val, teacher, cost)
    saved = task.checkpoint()
    with modes_kept(model), _gradients_kept(model), _compression_kept(model.compression):
        model.to(place.device)
        _fresh_rates(model, settings)
        running = Search(model, course, means, observer, task.budget)
        if settings.minutes is not None:
            fits = partial(paced_here, running, loader, 60 * settings.minutes)
            running.take(fits() if task.resume is None else paced_before(course, task.resume))
        if task.resume is not None:
            restore(running.parts, task.resume)
        schedule, scores = running.run(loader, saved)
    for rate in model.arch_parameters():
        rate.grad = None
    return Found(schedule, model.flops_at(schedule), scores, running.state.history.records())


def _at_hard_counts(task: _Task) -> tuple[Found, Again | None]:
    """What trials at fixed counts come to, and how to go on where that is too slow, if it can be."""
    model, settings, budget = task.model, task.settings, task.budget
    task.checkpoint()  # what is wrong with it, it says before the search
    model.to(task.place.device)
    plan = Plan(settings.seed, settings.images, settings.work, task.left())
    source = task.loader if settings.calibration is None else settings.calibration
    run = partial(
        calibrate,
        model,
        source,
        budget.cost,
        place=task.place,
        loss="tokens" if settings.loss == "tokens" else "distill",
        multi_label=settings.multi_label,
        precision=task.precision,
    )
    given, again = {}, None
    if budget.timed:  # a speed may be out of reach of every uniform schedule
        space = model.compression.space
        given["at once"] = budget.rounded([space.least] * len(space.choices), space)
    if settings.start is not None:
        given["start"] = settings.start
    if not isinstance(source, Iterator):  # whose images are gone
        ends = math.inf if settings.minutes is None else task.begun + 60 * settings.minutes
        again = partial(_searched_on, run, replace(plan, share=AGAIN), _Stopping(settings.trials), ends)
    came_to = run(
        budget.target,
        plan,
        given=given,
        observer=settings.trials,
        checkpoint=task.file,
        notes=settings.notes,
        resume=task.resume,
    )
    best = came_to.schedule
    return Found(best, model.flops_at(best), task.scores_at(best), (), came_to), again


def _settled(task: _Task, found: Found, again: Again | None) -> Found:
    """What was found, with its speed where that was asked for; the model is left at its schedule."""
    model = task.model
    schedule, speed = confirmed_at(
        model, found.schedule, task.budget, task.settings.latency, place_of(model).device, again
    )
    if schedule != found.schedule:
        found = replace(found, schedule=schedule, flops=model.flops_at(schedule), scores=task.scores_at(schedule))
    model.set_kept_num(schedule.prune, schedule.merge)
    return replace(found, speed=speed)


class _Stopping(CalibrationObserver):
    """Of a search that goes on after its end: nothing is told, but it may be stopped."""

    def __init__(self, first: CalibrationObserver | None) -> None:
        self.first = first or CalibrationObserver()

    def after_trials(self) -> None:
        self.first.after_trials()

    def stop(self) -> bool:
        return self.first.stop()


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


def _fresh_rates(model: CompressedModel, settings: SearchSettings) -> None:
    """Rates as a search begins with them, searching."""
    compression, granularity, start = model.compression, settings.granularity, settings.start
    if granularity is not None and compression.granularity != {"prune": granularity, "merge": granularity}:
        compression.set_granularity(granularity, granularity)
    if min(len(rate) for rate in model.arch_parameters()) < 2:
        limit = compression.patches(compression.space.searchable[0])
        found = max(compression.granularity.values())
        raise RateError(f"granularity: found {found}; accepted: from 1 to {limit - 1}")
    compression.schedule = None
    compression.reset()
    if start is not None:
        model.check(start, "start: ")
        compression.start_at(start, settings.start_spread)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


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
