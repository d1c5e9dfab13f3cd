"""`diffrate.search`: from a patched model and images to the schedule that meets a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffrate.blocks.block import UnsupportedModelError
from diffrate.device import Group, default_precision, generators_kept, place_for
from diffrate.evaluation import Batches, Scores, Tally, evaluating, require_batches
from diffrate.latency.measure import Confirmed, confirmed, measure_latency
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.schedule import Schedule
from diffrate.searching.checkpoint import StepRecord, Task, budget_of
from diffrate.searching.gradient import Observer, search_by_gradient
from diffrate.searching.hard_counts import Calibrated, search_at_hard_counts
from diffrate.searching.settings import GRADIENT, OF_METHOD, OPTIONS, SearchSettingError, SearchSettings, help_of


@dataclass(frozen=True)
class Found:
    """What a search found.

    flops: of the schedule, in multiply-accumulates. scores: at it, None without `val`.
    history: a record per step of the gradient search, in order, those before a resumption included.
    calibrated: the outcome of a search at hard counts, None for one by gradient.
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
    group: Group = None,
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
        group: of torch.distributed: the processes that search together. All of them call this. Seeds go by a process's
            number within it, and its first one writes the checkpoint. None: the default group.

    Raises:
        TypeError: there is no such option; or settings, callback, criterion or group are of another type.
        UnsupportedModelError: the model is not patched, or has no head for the default loss.
        SearchSettingError, BudgetError, RateError, ScheduleError: an option, the target, the granularity or the start
            makes no sense, an option is of the other method, or the loss is the same whatever the schedule.
        SearchCheckpointError: `resume` is missing, damaged, or another search's.
        NonFiniteLossError: the loss is no number.
        StoppedError: the observer asked to stop.
        ScoresError: labels do not fit the head, or `val` is to be scored without scikit-learn.
        ValueError: the loader ends before an epoch does, a batch has another form, or this process is not in `group`.
    """
    require_patched(model)
    require_batches(loader)
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{name}: no option of a search; accepted: {', '.join(OPTIONS)}")
    if not isinstance(settings, SearchSettings | None):
        raise TypeError(f"settings: found {type(settings).__name__}; accepted: SearchSettings, or options by name")
    settings = replace(settings or SearchSettings(), **options)
    for name, given in {"callback": callback, **options}.items():
        default = None if name == "callback" else OPTIONS[name].default
        of = next((method for method, names in OF_METHOD.items() if name in names), settings.method)
        if of != settings.method and given != default:
            raise SearchSettingError(f"{name}: found with the method {settings.method!r}; accepted: {of!r}")
    for name, given in (("callback", callback), ("criterion", settings.criterion)):
        if not (given is None or callable(given) or isinstance(given, Observer)):
            raise TypeError(f"{name}: found {type(given).__name__}; accepted: a function, or none")
    if settings.method == GRADIENT and settings.rule == "pitome":  # it takes no notice of what a block is to prune
        raise SearchSettingError("rule: found 'pitome' by gradient; accepted: another, or the method 'calibrated'")
    target = settings.target
    needs_head = settings.method == GRADIENT and settings.criterion is None and settings.labelled
    if needs_head and not model.has_head():
        raise UnsupportedModelError(
            "found a model without a head; accepted: one with classes and a pooling, a criterion, or the loss 'distill'"
        )
    if target.timed and resume is not None and settings.latency is None:
        raise SearchSettingError("latency: found none to resume with; accepted: the table of the search that goes on")
    place = place_for(model, settings.device, group)
    settings = replace(settings, precision=settings.precision or default_precision(place.device))
    if val is not None:
        require_batches(val)
        val = list(val) if isinstance(val, Iterator) else val  # for every epoch
        Tally(place.device, settings.multi_label)  # raises before the search where scikit-learn is missing
    if target.timed:
        table = settings.latency or measure_latency(model, device=place.device, targets=[target], group=group)
        settings = replace(settings, flops_loss="relative", latency=table)
    budget = budget_of(model, target, settings.latency)
    files = (None if path is None else Path(path) for path in (checkpoint, resume))
    task = Task(model, loader, settings, budget, place, val, *files)
    budget.check(task.space)
    task.check_file()
    # The search takes gradients where its caller has switched them off.
    with generators_kept(*task.generators()), torch.inference_mode(False):
        with _restored(model):
            model.to(place.device)
            found = _found(task, callback)
        model.schedule = found.schedule
    return found


def _found(task: Task, callback: Callable[[StepRecord], None] | Observer | None) -> Found:
    """The outcome of a task."""
    model, calibrated, again, scores, history = task.model, None, None, None, ()
    if task.settings.method == GRADIENT:
        found, scores, history = search_by_gradient(task, callback)
    else:
        calibrated, again = search_at_hard_counts(task)
        found = calibrated.schedule
    schedule, speed, table = found, None, task.settings.latency
    if table is not None and task.budget.timed:
        schedule, speed = confirmed(model, found, task.space, task.budget, table, again, task.place.group)
    if scores is None or schedule != found:
        scores = task.scores_at(schedule)
    return Found(schedule, model.flops_at(schedule), scores, history, calibrated, speed)


@contextmanager
def _restored(model: CompressedModel) -> Iterator[None]:
    """Restore `requires_grad`, gradients and modes after the block; where it fails, rates and schedule, too."""
    compression = model.compression
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    schedule, granularity, space = compression.schedule, compression.granularity, compression.space
    rates = {name: (rate, rate.detach().clone()) for name, rate in compression.named_parameters()}
    try:
        with evaluating(model):  # until the search asks for another mode
            yield
    except BaseException:
        compression.schedule, compression.granularity = schedule, granularity
        for name, (rate, values) in rates.items():
            rate.data = values.to(rate.device)
            compression.register_parameter(name, rate)
        raise
    finally:
        compression.space = space
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient if gradient is None or gradient.dtype == parameter.dtype else None


search.__doc__ = f"{search.__doc__}\n    Options:\n" + "".join(
    f"        {name}: {help_of(item)}\n" for name, item in OPTIONS.items()
)
