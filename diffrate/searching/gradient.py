"""The search by gradient: rate logits learn on frozen weights (paper, sections 3.3 and 3.4)."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from diffrate.atomic import UNREADABLE, first_line
from diffrate.blocks.rates import RateError
from diffrate.device import all_sum, autocast, least, rank, seed_everything, step_seed, to_place, world
from diffrate.evaluation import Scores, Tally, class_indices, modes_kept, multi_hot, split_batch
from diffrate.patch.base import CompressedModel
from diffrate.schedule import Schedule, make_schedule
from diffrate.searching.checkpoint import (
    EpochRecord,
    SearchCheckpointError,
    StepRecord,
    Task,
    check_record,
    read_checkpoint,
)
from diffrate.searching.settings import SMOOTHING, Course, SearchSettingError, SearchSettings
from diffrate.searching.target import Multiplier, expected_seconds
from diffrate.searching.teacher import Teacher

Batch = tuple[Tensor, Tensor]
TIMED = 3  # steps, after one to warm up; the fastest counts
SILENT = 3  # steps without any gradient of the loss, after which a search gives up
SAVE_SECONDS = 5.0  # between checkpoints at most, where steps are slow


class NonFiniteLossError(RuntimeError):
    """A loss that is no number."""


class StoppedError(Exception):
    """An observer asked a search to stop, which saved its state where it has a checkpoint; `saved` is False where
    there was nothing to save yet."""

    def __init__(self, message: str, saved: bool = True) -> None:
        super().__init__(message)
        self.saved = saved


class Observer:
    """Called while a search runs, in the process that runs it; override the methods of interest."""

    def on_course(self, epochs: int, steps: int) -> None:
        """The search is to take so many epochs of so many steps."""

    def on_start(self, epoch: int, step: int) -> None:
        """The steps of an epoch begin, or go on at `step`."""

    def on_step(self, record: StepRecord) -> None:
        """An update is done."""

    def on_score_start(self) -> None:
        """The steps of an epoch are done, and it is to be scored."""

    def on_score(self, tally: Tally) -> None:
        """A batch was scored at the end of an epoch."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch is done, scored, and saved if there is a checkpoint."""

    def stop(self) -> bool:
        """Asked before each step: whether all processes are to save and stop after it."""
        return False


def batches_from(loader: Any, epoch: int, batch: int, seed: int) -> Iterator[Any]:
    """The batches of `epoch` from number `batch` on: by the loader's own `batches_from`, where it has one.

    Any other loader begins anew, from a seed of its own for the epoch, as do the generators that it or its sampler
    holds, and the batches before are read and left out. A sampler with `set_epoch` gets the epoch. Loader processes
    that persist have generators out of reach.
    """
    if hasattr(loader, "batches_from"):
        return loader.batches_from(epoch, batch)
    sampler = getattr(loader, "sampler", None)
    if sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    drawn = step_seed(seed, epoch, rank())
    seed_everything(drawn)
    for owner in (loader, sampler):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(drawn)
    batches = iter(loader)
    # Now, not at the first step, which draws from a seed of its own: a shuffling sampler draws its order here.
    first = list(islice(batches, 1))
    for _ in islice(batches, max(0, batch - 1)):
        pass
    return chain(first, batches) if batch == 0 else batches


def _batches_an_epoch(task: Task) -> tuple[Any, int | None]:
    """What every epoch goes through, and its number of batches; None where only `steps` ends an epoch.

    A loader without a length is counted where there are no `steps`; an iterator is kept in memory for that.

    Raises:
        SearchSettingError: `minutes` for an iterator with `steps`.
    """
    settings, once = task.settings, isinstance(task.loader, Iterator)
    loader: Any = list(task.loader) if once and settings.steps is None else task.loader
    if loader is task.loader and once and settings.minutes is not None:
        raise SearchSettingError(
            f"minutes: found {settings.minutes!r} and a generator with steps; accepted: one of them"
        )
    try:
        return loader, len(loader)
    except TypeError:  # a generator, or a data set that streams
        return loader, None if settings.steps is not None else sum(1 for _ in loader)


def _updates(batches: int | None, settings: SearchSettings) -> int:
    """Updates an epoch: `steps`, or as many as there are batches for.

    Raises:
        SearchSettingError: there is no batch, or none for an update.
    """
    steps, accumulate = settings.steps, settings.accumulate
    if batches == 0:
        raise SearchSettingError("loader: found no batch; accepted: batches of images and labels")
    if batches is not None and batches < accumulate:
        raise SearchSettingError(f"accumulate: found {accumulate}; accepted: up to {batches}, the batches of an epoch")
    most = math.inf if batches is None else batches // accumulate
    if steps is not None and not 1 <= steps <= most:
        accepted = "from 1" if batches is None else f"1 to {most}, the updates of an epoch"
        raise SearchSettingError(f"steps: found {steps}; accepted: {accepted}")
    return int(most if steps is None else steps)


def paced(course: Course, seconds: float, a_step: float) -> Course:
    """As much of `course` as fits: fewer epochs, and at least one step."""
    fitting = max(1, int(seconds / a_step))
    steps = min(course.steps, fitting)
    epochs = max(1, min(course.settings.epochs, fitting // steps))
    return replace(course, settings=replace(course.settings, epochs=epochs), steps=steps)


def search_by_gradient(
    task: Task, callback: Callable[[StepRecord], None] | Observer | None
) -> tuple[Schedule, Scores | None, tuple[StepRecord, ...]]:
    """The schedule that rates learn, its scores, and a record of each step.

    Raises:
        SearchCheckpointError, SearchSettingError, NonFiniteLossError, StoppedError: as `diffrate.search`.
    """
    model, settings = task.model, task.settings
    observer = callback if isinstance(callback, Observer) else Observer()
    if callback is not None and callback is not observer:
        observer.on_step = callback  # type: ignore[method-assign]
    teacher = None if settings.labelled else Teacher(model, settings.loss, settings.multi_label)
    loader, batches = _batches_an_epoch(task)
    steps = least(_updates(batches, settings), task.place.device)
    granularity = model.compression.granularity["merge"] if settings.granularity is None else settings.granularity
    course = Course(replace(settings, granularity=granularity), task.budget.target, steps)
    task.check_file()
    with _restored(model):
        model.to(task.place.device)
        _reset_rates(model, settings)
        running = Search(replace(task, loader=loader), course, teacher, observer)
        if settings.minutes is not None and task.resume is None:
            running.fit_into(60 * settings.minutes)
        if task.resume is not None:
            running.restore(task.resume)
        schedule, scores = running.run()
    for rate in running.rates:
        rate.grad = None
    records = (
        StepRecord(int(epoch), int(step), loss, flops_loss, flops, rate, tuple(counts))
        for epoch, step, loss, flops_loss, flops, rate, *counts in running.history().tolist()
    )
    return schedule, scores, tuple(records)


class Search:
    """One search: a patched model whose weights are frozen, and the optimizer of its rates.

    epoch, step: of the next update. sums: losses and GFLOPs of this epoch, added up. best: schedule and scores of the
    best epoch. rows: the figures of all steps, one after the other. slopes: gradients of the cost's excess at the
    present rates, where the budget is held. silent: whether the loss has had no gradient so far, in this process.
    """

    def __init__(self, task: Task, course: Course, teacher: Teacher | None, observer: Observer) -> None:
        self.task, self.model, self.course, self.teacher, self.observer = task, task.model, course, teacher, observer
        settings, device = task.settings, task.place.device
        self.criterion = settings.criterion or default_criterion(settings.multi_label)
        self.cost = None
        if settings.latency and task.budget.timed:
            self.cost = partial(expected_seconds, settings.latency, rules=task.model.compression.space.rules)
        self.model.requires_grad_(False)
        self.rates = self.model.arch_parameters()
        for rate in self.rates:
            rate.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.rates, lr=settings.learning_rate, weight_decay=0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=task.precision == torch.float16)
        self.epoch, self.step, self.sums = 0, 0, [0.0, 0.0, 0.0]
        self.best: tuple[Schedule, Scores | None] | None = None
        self.rows, self.multiplier = array("d"), Multiplier()
        self.slopes: tuple[Tensor, ...] = ()
        self.silent = True
        self.saved = time.monotonic()

    def run(self) -> tuple[Schedule, Scores | None]:
        """Search to the end; the schedule to report, which meets the budget, and its scores.

        That is the best of all epochs where there is something to score on, else the last.

        Raises:
            NonFiniteLossError: the loss is no number; names epoch and step.
            SearchSettingError: the loss is the same whatever the rates.
            StoppedError: the observer asked to stop; the state was saved before.
        """
        epochs = self.course.settings.epochs
        self.observer.on_course(epochs, self.course.steps)
        while self.epoch < epochs:
            self._epoch()
            record = self._finished()
            if record.best:
                self.best = record.schedule, record.scores
            self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
            self._save()
            self.observer.on_epoch(record)
        assert self.best is not None, "there is an epoch, and its schedule meets the budget"
        return self.best

    def history(self) -> Tensor:
        """The figures of all steps in float64, `[steps, 6 + choices]`."""
        return torch.from_numpy(np.array(self.rows)).reshape(-1, 6 + len(self.rates))

    def fit_into(self, seconds: float) -> None:
        """Shorten the course to what fits into `seconds`, by the first batches; the same in all processes."""
        course = self.course
        batches, times = batches_from(self.task.loader, 0, 0, course.settings.seed), []
        self._set_modes()
        for _ in range(min(1 + TIMED, course.steps)):
            begun = time.monotonic()
            for _ in range(course.settings.accumulate):
                self._backward(batches).tolist()  # waits for the device
            times.append(time.monotonic() - begun)
        self.optimizer.zero_grad(set_to_none=True)
        fitting = paced(course, seconds, max(1e-6, min(times)))
        self.course = paced(course, least(fitting.settings.epochs * fitting.steps, self.task.place.device), 1.0)

    def restore(self, path: Path) -> None:
        """Go on where the checkpoint at `path` was written; with `minutes`, for as many steps as it was to take.

        Raises:
            SearchCheckpointError: as `read_checkpoint`, or it is another search's; names what differs.
        """
        content = read_checkpoint(path)
        if "calibrated" in content:
            raise SearchCheckpointError(
                f"{path}: found a calibrated search's; accepted: the checkpoint of a gradient search"
            )
        saved, course = content.get("settings", {}), self.course
        if course.settings.minutes is not None:
            total = saved.get("epochs", course.settings.epochs) * saved.get("steps", course.steps)
            self.course = paced(course, total, 1.0)
        check_record(path, saved, self.course.record())
        try:
            with torch.no_grad():
                for rate, values in zip(self.rates, content["rates"], strict=True):
                    rate.copy_(values)
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.epoch, self.step, self.sums = (content[name] for name in ("epoch", "step", "sums"))
            best, scores = content["best_schedule"], content["best_scores"]
            self.best = None if best is None else (make_schedule(*best), None if scores is None else Scores(**scores))
            self.rows = array("d", content["history"].flatten().tolist())
            self.multiplier = Multiplier(*content["multiplier"])
            self.silent = False  # its first steps were looked at
        except UNREADABLE as error:
            raise SearchCheckpointError(f"{path}: does not fit this search ({first_line(error)})") from error

    def _save(self) -> None:
        if self.task.file is None or rank() != 0:
            return
        settings, (best, scores) = self.course.settings, self.best or (None, None)
        self.task.save(
            self._schedule(),
            best,
            settings=self.course.record(),
            rates=[rate.detach().cpu() for rate in self.rates],
            best_scores=None if scores is None else asdict(scores),
            optimizer=self.optimizer.state_dict(),
            scheduler={"rate": settings.learning_rate, "least_rate": settings.last_rate, "steps": self.course.steps},
            scaler=self.scaler.state_dict(),
            epoch=self.epoch,
            step=self.step,
            sums=self.sums,
            # Every step draws from a seed made of this one and its position: no generator state is left over.
            random={"seed": settings.seed},
            history=self.history(),
            multiplier=astuple(self.multiplier),
        )
        self.saved = time.monotonic()

    def _schedule(self) -> Schedule:
        """The schedule of the present rates, rounded to the budget."""
        compression = self.model.compression
        return self.task.budget.rounded(compression.expected_counts(), compression.space)

    def _score(self, schedule: Schedule) -> Scores | None:
        """Scores at `schedule`, with tokens really dropped; None without images for it."""
        if self.task.val is None:
            return None
        self.observer.on_score_start()
        try:
            scores = self.task.scores_at(schedule, self.observer.on_score)
        finally:
            self.model.compression.schedule = None  # back to searching
        if scores is not None and not math.isfinite(scores.loss):
            raise NonFiniteLossError(f"the loss is {scores.loss} on the images to score, epoch {self.epoch}")
        return scores

    def _set_modes(self) -> None:
        if self.teacher is None:
            self.model.train_to_search()
        else:
            self.model.eval()  # nothing is dropped at random in the one that is held against the other

    def _epoch(self) -> None:
        """The steps of one epoch that are left."""
        course, file = self.course, self.task.file
        settings = course.settings
        batches = batches_from(self.task.loader, self.epoch, self.step * settings.accumulate, settings.seed)
        self._set_modes()
        self.observer.on_start(self.epoch, self.step)
        for step in range(self.step, course.steps):
            try:
                record, stop = self._update(batches, step)
            except NonFiniteLossError as error:
                good = "" if file is None else "; the last checkpoint is good"
                raise NonFiniteLossError(f"{error}{good}") from None
            self.step = step + 1
            figures = record.loss, record.flops_loss, record.flops / 1e9
            self.sums = [total + value for total, value in zip(self.sums, figures, strict=True)]
            self.rows.extend((*list(vars(record).values())[:-1], *record.counts))
            if self.step % settings.save_every == 0 or stop or time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()
            self.observer.on_step(record)
            if stop:
                raise StoppedError(f"stopped at epoch {self.epoch}, step {self.step}")

    def _update(self, batches: Iterator[Any], step: int) -> tuple[StepRecord, bool]:
        """One update of the rates; its figures, and whether all processes are to stop.

        All figures are means over the processes, so that all of them stop after the same step, and for
        the same loss.
        """
        epoch, course, device = self.epoch, self.course, self.task.place.device
        seed_everything(step_seed(course.settings.seed, epoch, rank(), step))
        learning_rate = course.learning_rate(epoch, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = tuple(self.model.compression.expectations())
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.tensor([0.0, 0.0, 0.0, float(self.observer.stop()), 0.0], device=device)
        for _ in range(course.settings.accumulate):
            totals[:3] += self._backward(batches) / course.settings.accumulate
        totals[4] = not self.silent
        self._average_gradients()
        loss, flops_loss, gflops, stop, told = (all_sum(totals) / world()).tolist()
        if not all(math.isfinite(value) for value in (loss, flops_loss, gflops)):
            raise NonFiniteLossError(f"the loss is {loss} at epoch {epoch}, step {step}")
        if not told and epoch == 0 and step + 1 == min(SILENT, course.steps):
            raise SearchSettingError(
                f"loss: found {loss:.6g} without a gradient in {step + 1} steps; accepted: a model, and a loss, that "
                "tell schedules apart"
            )
        if course.settings.held:
            excess = gflops * 1e9 / course.target - 1
            self.multiplier.add(self.rates, self.slopes, excess, self.scaler.get_scale())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepRecord(epoch, step, loss, flops_loss, gflops * 1e9, learning_rate, counts), stop > 0

    def _average_gradients(self) -> None:
        """Replace the rates' gradients by their mean over all processes: a few kilobytes, and nothing for weights."""
        gradients = [torch.zeros_like(rate) if rate.grad is None else rate.grad for rate in self.rates]
        flat = all_sum(parameters_to_vector(gradients)) / world()
        for rate, part in zip(self.rates, flat.split([rate.numel() for rate in self.rates]), strict=True):
            rate.grad = part.view_as(rate)

    def _backward(self, batches: Iterator[Any]) -> Tensor:
        """Gradients of one batch; classification loss, cost loss and GFLOPs, `[3]`."""
        settings = self.course.settings
        images, labels = self._next(batches)
        if settings.mixup is not None:
            images, labels = settings.mixup(images, labels)
        with autocast(self.task.place.device, self.task.precision):
            step = self.model.search_step if self.teacher is None else self.teacher.searching
            outputs, flops = step(images, self.cost)
        classification = self.criterion(outputs.float(), labels) if self.teacher is None else outputs
        if self.silent and classification.requires_grad:
            felt = torch.autograd.grad(
                self.scaler.scale(classification), self.rates, retain_graph=True, materialize_grads=True
            )
            self.silent = not any(slope.any() for slope in felt)
        cost = self.course.distance(flops)
        if settings.held:
            excess = flops / self.course.target  # the same for every batch of a step
            self.slopes = torch.autograd.grad(excess, self.rates, retain_graph=True, materialize_grads=True)
            loss = classification
        else:
            weight = 0.0 if settings.warmup and self.epoch == 0 else settings.flops_weight
            loss = classification + weight * cost
        self.scaler.scale(loss / settings.accumulate).backward()
        return torch.stack([classification.detach(), cost.detach(), flops.detach() / 1e9])

    def _next(self, batches: Iterator[Any]) -> Batch:
        """The next images and labels on the search's device; zeros where labels are missing and not needed.

        Raises:
            ValueError: there is no batch left, or it has another form, or no labels to hold the outputs against.
        """
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"loader: no batch left at epoch {self.epoch}, step {self.step}; accepted: "
                f"{self.course.steps * self.course.settings.accumulate} batches in every epoch"
            )
        images, labels = split_batch(batch)
        if not isinstance(labels, Tensor):
            if self.teacher is None:
                found = "images alone" if labels is None else f"labels of type {type(labels).__name__}"
                raise ValueError(
                    f"loader: found {found}; accepted: images and labels, both tensors, or the loss 'distill'"
                )
            labels = torch.zeros(len(images), dtype=torch.int64)
        return to_place(images, labels, self.task.place)

    def _finished(self) -> EpochRecord:
        """The epoch that is over, scored where there are images for it."""
        schedule = self._schedule()
        scores, before = self._score(schedule), None if self.best is None else self.best[1]
        loss, flops_loss, gflops = (total / self.step for total in self.sums)
        return EpochRecord(
            epoch=self.epoch,
            loss=loss,
            flops_loss=flops_loss,
            expected_flops=gflops * 1e9,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            schedule=schedule,
            flops=self.model.flops_at(schedule),
            scores=scores,
            best=scores is None or before is None or scores.ranked[1] > before.ranked[1],
        )


def default_criterion(multi_label: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
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


def _reset_rates(model: CompressedModel, settings: SearchSettings) -> None:
    """Set the rates to those that a search begins with."""
    compression, granularity, start = model.compression, settings.granularity, settings.start
    if granularity is not None and set(compression.granularity.values()) != {granularity}:
        compression.set_granularity(granularity, granularity)
    if min(len(rate) for rate in model.arch_parameters()) < 2:
        limit = compression.patches
        found = max(compression.granularity.values())
        raise RateError(f"granularity: found {found}; accepted: from 1 to {limit - 1}")
    compression.schedule = None
    if settings.rule is not None:
        compression.space = compression.space.ruled(settings.rule)
    compression.reset()
    if start is not None:
        model.check(start, "start: ")
        compression.start_at(start, settings.start_spread)


@contextmanager
def _restored(model: CompressedModel) -> Iterator[None]:
    """Restore `requires_grad`, gradients and modes after the block; where it fails, rates and schedule, too."""
    compression = model.compression
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    schedule, granularity, space = compression.schedule, compression.granularity, compression.space
    rates = {name: (rate, rate.detach().clone()) for name, rate in compression.named_parameters()}
    try:
        with modes_kept(model):
            yield
    except BaseException:
        compression.schedule, compression.granularity = schedule, granularity
        for name, (rate, values) in rates.items():
            rate.data = values
            compression.register_parameter(name, rate)
        raise
    finally:
        compression.space = space
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
