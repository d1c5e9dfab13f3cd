"""The search by gradient: rate logits learn on frozen weights (paper, sections 3.3 and 3.4)."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from diffrate.atomic import UNREADABLE, first_line
from diffrate.blocks.rates import RateError
from diffrate.device import all_parts, all_sum, autocast, made_by_each, rank, seed_everything, step_seed, world
from diffrate.evaluation import Scores, Tally, class_indices, multi_hot, split_batch
from diffrate.latency.table import expected_seconds
from diffrate.schedule import Schedule, make_schedule
from diffrate.searching.checkpoint import (
    EpochRecord,
    NonFiniteLossError,
    SearchCheckpointError,
    StepRecord,
    StoppedError,
    Task,
    check_record,
    read_checkpoint,
)
from diffrate.searching.settings import SMOOTHING, TELLING, SearchSettingError
from diffrate.searching.teacher import Teacher

TIMED = 3  # steps, after one to warm up; the fastest counts
SILENT = 3  # steps without any gradient of the loss, after which a search gives up
SAVE_SECONDS = 5.0  # between checkpoints at most, where steps are slow


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


def batches_from(task: Task, epoch: int, batch: int) -> Iterator[Any]:
    """The batches of `epoch` from number `batch` on: by the loader's own `batches_from`, where it has one, else by
    `Task.epoch_of`, and the batches before are read and left out."""
    if hasattr(task.loader, "batches_from"):
        return task.loader.batches_from(epoch, batch)
    left = task.epoch_of(epoch)
    # Now, not at the first step, which draws from a seed of its own: a shuffling sampler draws its order here.
    batches = chain(list(islice(left, 1)), left)
    deque(islice(batches, batch), maxlen=0)
    return batches


def _an_epoch(task: Task) -> tuple[Any, int]:
    """The loader of every epoch, and its number of updates: `steps`, or as many as there are batches for, which are
    counted where the loader has no length, and kept in memory where it is an iterator."""
    steps, accumulate, minutes = task.settings.steps, task.settings.accumulate, task.settings.minutes
    once = isinstance(task.loader, Iterator)
    if once and steps is not None and minutes is not None:
        raise SearchSettingError(f"minutes: found {minutes!r} and a generator with steps; accepted: one of them")
    loader = list(task.loader) if once and steps is None else task.loader
    try:
        batches = len(loader)
    except TypeError:  # there is none; PyTorch's, of a stream, has a `__len__` all the same
        if steps is not None:
            return loader, steps
        batches = sum(1 for _ in loader)
    if batches == 0:
        raise SearchSettingError("loader: found no batch; accepted: batches of images and labels")
    if batches < accumulate:
        raise SearchSettingError(f"accumulate: found {accumulate}; accepted: up to {batches}, the batches of an epoch")
    most = batches // accumulate
    if steps is not None and steps > most:
        raise SearchSettingError(f"steps: found {steps}; accepted: 1 to {most}, the updates of an epoch")
    return loader, steps or most


def paced(epochs: int, steps: int, most: int) -> tuple[int, int]:
    """As many of the `epochs` of `steps` as come to `most` steps: fewer epochs, then fewer steps, one at least."""
    steps = max(1, min(steps, most))
    return max(1, min(epochs, most // steps)), steps


GAIN = 0.2  # of the value, a step, for each whole excess
STIFFNESS = 60.0  # an excess of 2 % weighs about as much as the classification loss
MOST = 0.1  # of an excess that the value takes in: far from the target, it would rise without end
MEMORY = 0.9  # of the running mean


@dataclass
class Multiplier:
    """What an excess costs: `value` in its `unit`, which is 0 before the first step."""

    value: float = 0.0
    unit: float = 0.0

    def add(self, gradient: Tensor, slope: Tensor, excess: float, scale: float) -> None:
        """Add the cost's part to the `gradient` of all rates, which is `scale` times that of the classification loss.

        `slope` is the gradient of the excess, as a share of the target. Gradients that are no numbers are left to the
        scaler, which passes the step over.
        """
        own, other = torch.stack([gradient.norm(), slope.norm()]).tolist()
        unit = own / scale / other if other else math.nan
        if not math.isfinite(unit):
            return
        self.unit = MEMORY * self.unit + (1 - MEMORY) * unit if self.unit else unit
        weight = self.unit * (self.value + STIFFNESS * excess)
        self.value += GAIN * max(-MOST, min(MOST, excess))
        gradient.add_(slope, alpha=weight * scale)


def search_by_gradient(
    task: Task, callback: Callable[[StepRecord], None] | Observer | None
) -> tuple[Schedule, Scores | None, tuple[StepRecord, ...]]:
    """The schedule that rates learn, its scores, and a record of each step; raises as `diffrate.search`."""
    observer = callback if isinstance(callback, Observer) else Observer()
    if callback is not None and callback is not observer:
        observer.on_step = callback  # type: ignore[method-assign]
    loader, steps = made_by_each(lambda: _an_epoch(task), task.place.group)
    running = Search(replace(task, loader=loader), min(all_parts(steps, task.place.group)), observer)
    if task.resume is not None:
        running.restore(task.resume)
    elif task.settings.minutes is not None:
        running.fit_into(60 * task.settings.minutes)
    schedule, scores = running.run()
    return schedule, scores, tuple(running.records)


class Search:
    """One search: a patched model whose weights are frozen, and the optimizer of its rates.

    epochs, steps: in all, and of an epoch. epoch, step: of the next update. sums: losses and GFLOPs of this epoch,
    added up. best: schedule and scores of the best epoch. records: of all steps. slope: the gradient of the cost's
    excess at the present rates, where the budget is held. silent: whether the loss has had no gradient so far, in this
    process.
    """

    def __init__(self, task: Task, steps: int, observer: Observer) -> None:
        self.task, self.model, self.settings, self.observer = task, task.model, task.settings, observer
        settings, self.target, compression = task.settings, task.budget.target, task.model.compression
        granularity = settings.granularity
        if granularity is not None and set(compression.granularity.values()) != {granularity}:
            compression.set_granularity(granularity, granularity)
        self.rates = self.model.arch_parameters()
        if min(map(len, self.rates)) < 2:
            found = max(compression.granularity.values())
            raise RateError(f"granularity: found {found}; accepted: from 1 to {compression.patches - 1}")
        compression.schedule = None
        if settings.rule is not None:
            compression.space = compression.space.ruled(settings.rule)
        self.model.requires_grad_(False)
        compression.reset()
        if settings.start is not None:
            compression.start_at(self.model.check(settings.start, "start: "), settings.start_spread)
        self.group, self.teacher = task.place.group, None
        if not settings.labelled:
            self.teacher = Teacher(task.model, settings.loss, settings.multi_label, self.group)
        self.criterion = settings.criterion or partial(default_criterion, multi_label=settings.multi_label)
        self.cost = None
        if settings.latency and task.budget.timed:
            self.cost = partial(expected_seconds, settings.latency, rules=compression.space.rules)
        self.optimizer = torch.optim.AdamW(self.rates, lr=settings.learning_rate, weight_decay=0)
        self.scaler = torch.amp.GradScaler(task.place.device.type, enabled=settings.precision == torch.float16)
        self.epochs, self.steps = settings.epochs, steps
        self.epoch, self.step, self.sums = 0, 0, [0.0, 0.0, 0.0]
        self.best: tuple[Schedule, Scores | None] | None = None
        self.records, self.multiplier = list[StepRecord](), Multiplier()
        self.slope = torch.empty(0)
        self.silent = True
        self.saved = time.monotonic()

    def run(self) -> tuple[Schedule, Scores | None]:
        """Search to the end; the schedule to report, which meets the budget, and its scores.

        That is the best of all epochs where there is something to score on, else the last. Raises as `_update`, and
        StoppedError where the observer asked to stop, after the state was saved.
        """
        self.observer.on_course(self.epochs, self.steps)
        while self.epoch < self.epochs:
            self._epoch()
            record = self._finished()
            if record.best:
                self.best = record.schedule, record.scores
            self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
            self._save()
            self.observer.on_epoch(record)
        self.optimizer.zero_grad(set_to_none=True)
        assert self.best is not None, "there is an epoch, and its schedule meets the budget"
        return self.best

    def record(self) -> dict[str, Any]:
        """The values with which alone the search goes on, for its checkpoint."""
        granularity = self.model.compression.granularity["merge"]
        own = {"epochs": self.epochs, "granularity": granularity, "target": self.target, "steps": self.steps}
        return {**self.settings.record(), **own}

    def fit_into(self, seconds: float) -> None:
        """Take as many steps as fit into `seconds`, by the first batches; the same in all processes."""
        batches, times = self._batches(), []
        for _ in range(min(1 + TIMED, self.steps)):
            begun = time.monotonic()
            for _ in range(self.settings.accumulate):
                self._backward(batches).tolist()  # waits for the device
            times.append(time.monotonic() - begun)
        self.optimizer.zero_grad(set_to_none=True)
        fitting = min(all_parts(int(seconds / max(1e-6, min(times))), self.group))
        self.epochs, self.steps = paced(self.epochs, self.steps, fitting)

    def restore(self, path: Path) -> None:
        """Go on where the checkpoint at `path` was written; with `minutes`, for as many steps as it was to take.
        SearchCheckpointError where it cannot be read, or is another search's."""
        content = read_checkpoint(path)
        if "calibrated" in content:
            raise SearchCheckpointError(
                f"{path}: found a calibrated search's; accepted: the checkpoint of a gradient search"
            )
        saved = content.get("settings", {})
        if self.settings.minutes is not None:
            total = saved.get("epochs", self.epochs) * saved.get("steps", self.steps)
            self.epochs, self.steps = paced(self.epochs, self.steps, total)
        check_record(path, saved, self.record())
        try:
            with torch.no_grad():
                for rate, values in zip(self.rates, content["rates"], strict=True):
                    rate.copy_(values)
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.epoch, self.step, self.sums = (content[name] for name in ("epoch", "step", "sums"))
            best, scores = content["best_schedule"], content["best_scores"]
            self.best = None if best is None else (make_schedule(*best), None if scores is None else Scores(**scores))
            self.records = [
                StepRecord(int(epoch), int(step), loss, flops_loss, flops, rate, tuple(counts))
                for epoch, step, loss, flops_loss, flops, rate, *counts in content["history"].tolist()
            ]
            self.multiplier = Multiplier(*content["multiplier"])
            self.silent = False  # its first steps were checked
        except UNREADABLE as error:
            raise SearchCheckpointError(f"{path}: does not fit this search ({first_line(error)})") from error
        if isinstance(self.task.loader, Iterator):  # which goes on from epoch to epoch
            deque(islice(self.task.loader, self.epoch * self.steps * self.settings.accumulate), maxlen=0)

    def _save(self) -> None:
        if self.task.file is None or rank(self.group) != 0:
            return
        settings, (best, scores) = self.settings, self.best or (None, None)
        rows = [[*list(vars(record).values())[:-1], *record.counts] for record in self.records]
        self.task.save(
            self._schedule(),
            best,
            settings=self.record(),
            rates=[rate.detach().cpu() for rate in self.rates],
            best_scores=None if scores is None else asdict(scores),
            optimizer=self.optimizer.state_dict(),
            scheduler={"rate": settings.learning_rate, "least_rate": settings.last_rate, "steps": self.steps},
            scaler=self.scaler.state_dict(),
            epoch=self.epoch,
            step=self.step,
            sums=self.sums,
            # Every step draws from a seed made of this one and its position: no generator state is left over.
            random={"seed": settings.seed},
            history=torch.tensor(rows, dtype=torch.float64),
            multiplier=astuple(self.multiplier),
        )
        self.saved = time.monotonic()

    def _schedule(self) -> Schedule:
        """The schedule of the present rates, rounded to the budget."""
        compression = self.model.compression
        return self.task.budget.rounded(compression.expected_counts(), compression.space)

    def _batches(self) -> Iterator[Any]:
        """The batches of the epoch that are left, with the model ready for them."""
        batches = batches_from(self.task, self.epoch, self.step * self.settings.accumulate)
        # No dropout in what is compared with the dense model.
        self.model.train_to_search() if self.teacher is None else self.model.eval()
        return batches

    def _epoch(self) -> None:
        """The steps of one epoch that are left."""
        settings, batches = self.settings, self._batches()
        self.observer.on_start(self.epoch, self.step)
        while self.step < self.steps:
            record, stop = self._update(batches)
            self.step += 1
            figures = record.loss, record.flops_loss, record.flops / 1e9
            self.sums = [total + value for total, value in zip(self.sums, figures, strict=True)]
            self.records.append(record)
            if self.step % settings.save_every == 0 or stop or time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()
            self.observer.on_step(record)
            if stop:
                raise StoppedError(f"stopped at epoch {self.epoch}, step {self.step}")

    def _update(self, batches: Iterator[Any]) -> tuple[StepRecord, bool]:
        """One update of the rates; its figures, and whether all processes are to stop.

        All figures are means over the processes, so that all of them stop after the same step, and for the same loss:
        NonFiniteLossError where it is no number, SearchSettingError where it has no gradient.
        """
        epoch, step, settings = self.epoch, self.step, self.settings
        seed_everything(step_seed(settings.seed, epoch, rank(self.group), step))
        # Cosine over all steps, from the first rate to the last step's.
        first, last = settings.learning_rate, settings.last_rate
        share = (epoch * self.steps + step) / max(1, self.epochs * self.steps - 1)
        learning_rate = last + (first - last) * (1 + math.cos(math.pi * share)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = tuple(self.model.compression.expectations())
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.tensor([0.0, 0.0, 0.0, float(self.observer.stop()), 0.0], device=self.task.place.device)
        for _ in range(settings.accumulate):
            totals[:3] += self._backward(batches) / settings.accumulate
        totals[4] = not self.silent
        loss, flops_loss, gflops, stop, told = (all_sum(totals, self.group) / world(self.group)).tolist()
        if not all(math.isfinite(value) for value in (loss, flops_loss, gflops)):
            good = "" if self.task.file is None else "; the last checkpoint is good"
            raise NonFiniteLossError(f"the loss is {loss} at epoch {epoch}, step {step}{good}")
        if not told and epoch == 0 and step + 1 == min(SILENT, self.steps):
            found = f"{loss:.6g} without a gradient in {step + 1} steps"
            raise SearchSettingError(f"loss: found {found}; accepted: {TELLING}")
        # The mean over all processes: a few kilobytes, and nothing for weights.
        gradients = [torch.zeros_like(rate) if rate.grad is None else rate.grad for rate in self.rates]
        gradient = all_sum(parameters_to_vector(gradients), self.group) / world(self.group)
        if settings.held:
            self.multiplier.add(gradient, self.slope, gflops * 1e9 / self.target - 1, self.scaler.get_scale())
        for rate, part in zip(self.rates, gradient.split([rate.numel() for rate in self.rates]), strict=True):
            rate.grad = part.view_as(rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepRecord(epoch, step, loss, flops_loss, gflops * 1e9, learning_rate, counts), stop > 0

    def _backward(self, batches: Iterator[Any]) -> Tensor:
        """Gradients of one batch; classification loss, cost loss and GFLOPs, `[3]`."""
        settings = self.settings
        images, labels = self._next(batches)
        if settings.mixup is not None:
            images, labels = settings.mixup(images.clone(), labels)  # timm's mixes in place
        with autocast(self.task.place.device, self.settings.precision):
            step = self.model.search_step if self.teacher is None else self.teacher.searching
            outputs, flops = step(images, self.cost)
        classification = self.criterion(outputs.float(), labels) if self.teacher is None else outputs
        if self.silent and classification.requires_grad:
            self.silent = not self._gradient(self.scaler.scale(classification)).any()
        # How far the cost is from the target, squared (paper, equation 9).
        unit = 1e9 if settings.flops_loss == "absolute" and not settings.held else self.target
        cost, loss = ((flops - self.target) / unit) ** 2, classification
        if settings.held:
            self.slope = self._gradient(flops / self.target)  # the same for every batch of a step
        else:
            weight = 0.0 if settings.warmup and self.epoch == 0 else settings.flops_weight
            loss = classification + weight * cost
        self.scaler.scale(loss / settings.accumulate).backward()
        return torch.stack([classification.detach(), cost.detach(), flops.detach() / 1e9])

    def _gradient(self, value: Tensor) -> Tensor:
        """The gradients of `value` by all rates, as one vector."""
        gradients = torch.autograd.grad(value, self.rates, retain_graph=True, materialize_grads=True)
        return parameters_to_vector(gradients)

    def _next(self, batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
        """The next images and labels on the search's device, zeros where labels are missing and not needed; ValueError
        where there is no batch left, or it has another form."""
        batch = next(batches, None)
        if batch is None:
            accepted = f"{self.steps * self.settings.accumulate} batches in every epoch"
            raise ValueError(f"loader: no batch left at epoch {self.epoch}, step {self.step}; accepted: {accepted}")
        images, labels = split_batch(batch)
        if not isinstance(labels, Tensor):
            if self.teacher is None:
                found = "images alone" if labels is None else f"labels of type {type(labels).__name__}"
                accepted = "images and labels, both tensors, or the loss 'distill'"
                raise ValueError(f"loader: found {found}; accepted: {accepted}")
            labels = torch.zeros(len(images), dtype=torch.int64)
        return self.task.place.take(images), labels.to(self.task.place.device, non_blocking=True)

    def _finished(self) -> EpochRecord:
        """The epoch that is over, scored with tokens really dropped where there are images for it."""
        schedule, scores = self._schedule(), None
        if self.task.val is not None:
            self.observer.on_score_start()
            try:
                scores = self.task.scores_at(schedule, self.observer.on_score)
            finally:
                self.model.compression.schedule = None  # back to searching
        if scores is not None and not math.isfinite(scores.loss):
            raise NonFiniteLossError(f"the loss is {scores.loss} on the images to score, epoch {self.epoch}")
        before = None if self.best is None else self.best[1]
        best = scores is None or before is None or scores.ranked[1] > before.ranked[1]
        loss, flops_loss, gflops = (total / self.step for total in self.sums)
        rate, flops = self.optimizer.param_groups[0]["lr"], self.model.flops_at(schedule)
        return EpochRecord(self.epoch, loss, flops_loss, gflops * 1e9, rate, schedule, flops, scores, best)


def default_criterion(logits: Tensor, labels: Tensor, multi_label: bool = False) -> Tensor:
    """Cross-entropy, with smoothing where labels are classes; labels that were mixed are smooth already. With
    `multi_label`, binary cross-entropy."""
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, multi_hot(labels, logits).to(logits.dtype))
    if logits.shape[-1] == 1:
        raise SearchSettingError(
            "loss: found 'labels' for a head with one output; accepted: a criterion, or the loss 'distill'"
        )
    if labels.is_floating_point() and labels.shape == logits.shape:
        return SoftTargetCrossEntropy()(logits, labels)
    return LabelSmoothingCrossEntropy(SMOOTHING)(logits, class_indices(labels, logits))
