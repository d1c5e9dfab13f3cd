"""The search for kept counts: rate logits learn on frozen weights (paper, sections 3.3 and 3.4)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.budget import Budget
from diffrate.device import Place, all_sum, autocast, least, rank, seed_everything, step_seed, to_place, world
from diffrate.evaluation import Batches, Scores, Tally, evaluate, split_batch
from diffrate.patch.base import CompressedModel, PlannedCost
from diffrate.schedule import Schedule
from diffrate.searching.batches import Batch, batches_from
from diffrate.searching.checkpoint import EpochRecord, Parts, SearchState, StepRecord, read_checkpoint, write_checkpoint
from diffrate.searching.settings import Course
from diffrate.searching.teacher import Teacher

Criterion = Callable[[Tensor, Tensor], Tensor]
Mixup = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class NonFiniteLossError(RuntimeError):
    """A loss that is no number."""


class StoppedError(Exception):
    """Somebody asked a search to stop, and it saved its state where it has a checkpoint; `saved` is False where it had
    come to nothing that could be."""

    def __init__(self, message: str, saved: bool = True) -> None:
        super().__init__(message)
        self.saved = saved


class Observer:
    """Told how a search goes, in the process that runs it; override what you want to know."""

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


@dataclass(frozen=True)
class Checkpoint:
    """Where a search saves itself, every how many steps, and what else goes into the file."""

    path: Path
    every: int
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Means:
    """How a search computes.

    place: the model's device and the type of its weights. precision: of autocast, None for none.
    criterion: the loss of logits against labels, mixed or not. mixup: mixes a batch, None for nothing.
    teacher: the dense model, where its outputs take the place of labels.
    val: what to score each epoch on, None for nothing. cost: what a step is expected to cost, None for
    multiply-accumulates.
    """

    place: Place
    precision: torch.dtype | None
    criterion: Criterion
    mixup: Mixup | None
    val: Batches | None
    teacher: Teacher | None = None
    cost: PlannedCost | None = None


class Search:
    """One search: a patched model whose weights are frozen, and the optimizer of its rates."""

    def __init__(
        self, model: CompressedModel, course: Course, means: Means, observer: Observer, budget: Budget | None = None
    ) -> None:
        self.model, self.course, self.means, self.observer = model, course, means, observer
        self.budget = budget or Budget(model.flops_at, course.target)
        for weight in model.parameters():
            weight.requires_grad_(False)
        rates = model.arch_parameters()
        for rate in rates:
            rate.requires_grad_(True)
        optimizer = torch.optim.AdamW(rates, lr=course.settings.learning_rate, weight_decay=0)
        scaler = torch.amp.GradScaler(means.place.device.type, enabled=means.precision == torch.float16)
        self.slopes: tuple[Tensor, ...] = ()  # of the cost's excess at the present rates, where the budget is held
        self.parts = Parts(course, rates, optimizer, scaler, SearchState.fresh(len(rates)))

    def take(self, course: Course) -> None:
        """Run another course, before the first step."""
        self.course = self.parts.course = course

    @property
    def state(self) -> SearchState:
        """Where the search stands."""
        return self.parts.state

    def run(self, loader: Any, checkpoint: Checkpoint | None) -> tuple[Schedule, Scores | None]:
        """Search to the end; the schedule to report, which meets the budget, and its scores.

        That is the best of all epochs where there is something to score on, else the last.

        Raises:
            NonFiniteLossError: the loss is no number; names epoch and step.
            StoppedError: the observer asked to stop; the state was saved before.
        """
        self.observer.on_course(self.course.settings.epochs, self.course.steps)
        while self.state.epoch < self.course.settings.epochs:
            self._epoch(loader, checkpoint)
            record = self._finished(self.score())
            if record.best:
                self.state.best = record.schedule, record.scores
            self.state.epoch, self.state.step, self.state.sums = self.state.epoch + 1, 0, [0.0, 0.0, 0.0]
            self._save(checkpoint)
            self.observer.on_epoch(record)
        assert self.state.best is not None, "there is an epoch, and its schedule meets the budget"
        return self.state.best

    def schedule(self) -> Schedule:
        """The schedule of the present rates, rounded to the budget."""
        compression = self.model.compression
        return self.budget.rounded(compression.expected_counts(), compression.space)

    def score(self) -> Scores | None:
        """Scores at the schedule of the present rates, with tokens really dropped; None without images for it."""
        if self.means.val is None:
            return None
        chosen = self.schedule()
        self.model.set_kept_num(chosen.prune, chosen.merge)
        self.observer.on_score_start()
        try:
            scores = evaluate(
                self.model,
                self.means.val,
                multi_label=self.course.settings.multi_label,
                precision=self.means.precision,
                callback=self.observer.on_score,
            )
        finally:
            self.model.compression.schedule = None  # back to searching
        if not math.isfinite(scores.loss):
            raise NonFiniteLossError(f"the loss is {scores.loss} on the images to score, epoch {self.state.epoch}")
        return scores

    def seconds_a_step(self, loader: Any, count: int) -> float:
        """What an update takes on the first batches, the fastest of `count`; nothing is learnt."""
        accumulate = self.course.settings.accumulate
        batches, times = batches_from(loader, 0, 0, self.course.settings.seed), []
        self._set_modes()
        for _ in range(min(1 + count, self.course.steps)):
            begun = time.monotonic()
            for _ in range(accumulate):
                self._backward(batches).tolist()  # waits for the device
            times.append(time.monotonic() - begun)
        self.parts.optimizer.zero_grad(set_to_none=True)
        return min(times)

    def _set_modes(self) -> None:
        if self.means.teacher is None:
            self.model.train_to_search()
        else:
            self.model.eval()  # nothing is dropped at random in the one that is held against the other

    def _epoch(self, loader: Any, checkpoint: Checkpoint | None) -> None:
        """The steps of one epoch that are left."""
        state, course = self.state, self.course
        done = state.step * course.settings.accumulate
        batches = batches_from(loader, state.epoch, done, course.settings.seed)
        self._set_modes()
        self.observer.on_start(state.epoch, state.step)
        for step in range(state.step, course.steps):
            try:
                record, stop = self._step(batches, step)
            except NonFiniteLossError as error:
                good = "" if checkpoint is None else "; the last checkpoint is good"
                raise NonFiniteLossError(f"{error}{good}") from None
            state.step = step + 1
            figures = record.loss, record.flops_loss, record.flops / 1e9
            state.sums = [total + value for total, value in zip(state.sums, figures, strict=True)]
            state.history.append(record)
            if checkpoint is not None and (state.step % checkpoint.every == 0 or stop):
                self._save(checkpoint)
            self.observer.on_step(record)
            if stop:
                raise StoppedError(f"stopped at epoch {state.epoch}, step {state.step}")

    def _step(self, batches: Iterator[Batch], step: int) -> tuple[StepRecord, bool]:
        """One update of the rates; what it was made of, and whether all processes are to stop.

        All figures are means over the processes, so that all of them stop after the same step, and for
        the same loss.
        """
        epoch, course, device = self.state.epoch, self.course, self.means.place.device
        seed_everything(step_seed(course.settings.seed, epoch, rank(), step))
        learning_rate = course.learning_rate(epoch, step)
        for group in self.parts.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = tuple(self.model.compression.expectations())
        self.parts.optimizer.zero_grad(set_to_none=True)
        totals = torch.tensor([0.0, 0.0, 0.0, float(self.observer.stop())], device=device)
        for _ in range(course.settings.accumulate):
            totals[:3] += self._backward(batches) / course.settings.accumulate
        average_gradients(self.parts.rates)
        loss, flops_loss, gflops, stop = (all_sum(totals) / world()).tolist()
        if not all(math.isfinite(value) for value in (loss, flops_loss, gflops)):
            raise NonFiniteLossError(f"the loss is {loss} at epoch {epoch}, step {step}")
        if course.settings.held:
            excess = gflops * 1e9 / course.target - 1
            self.state.multiplier.add(self.parts.rates, self.slopes, excess, self.parts.scaler.get_scale())
        self.parts.scaler.step(self.parts.optimizer)
        self.parts.scaler.update()
        return StepRecord(epoch, step, loss, flops_loss, gflops * 1e9, learning_rate, counts), stop > 0

    def _backward(self, batches: Iterator[Batch]) -> Tensor:
        """Gradients of one batch; classification loss, cost loss and GFLOPs, `[3]`."""
        settings = self.course.settings
        images, labels = self._next(batches)
        classification, flops = self._classification(images, labels)
        cost = self.course.distance(flops)
        if settings.held:
            excess = flops / self.course.target  # the same for every batch of a step
            self.slopes = torch.autograd.grad(excess, self.parts.rates, retain_graph=True, materialize_grads=True)
            loss = classification
        else:
            loss = classification + self.course.weight(self.state.epoch) * cost
        self.parts.scaler.scale(loss / settings.accumulate).backward()
        return torch.stack([classification.detach(), cost.detach(), flops.detach() / 1e9])

    def _classification(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss against labels or against the dense model, and the expected cost."""
        means = self.means
        if means.mixup is not None:
            images, labels = means.mixup(images, labels)
        with autocast(means.place.device, means.precision):
            if means.teacher is not None:
                return means.teacher.searching(images, means.cost)
            logits, flops = self.model.search_step(images, means.cost)
        return means.criterion(logits.float(), labels), flops

    def _next(self, batches: Iterator[Any]) -> Batch:
        """The next images and labels where they are computed; zeros where there are none, and none are needed.

        Raises:
            ValueError: there is no batch left, or it has another form, or no labels to hold the outputs against.
        """
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"loader: no batch left at epoch {self.state.epoch}, step {self.state.step}; accepted: "
                f"{self.course.steps * self.course.settings.accumulate} batches in every epoch"
            )
        images, labels = split_batch(batch)
        if not isinstance(labels, Tensor):
            if self.means.teacher is None:
                found = "images alone" if labels is None else f"labels of type {type(labels).__name__}"
                raise ValueError(
                    f"loader: found {found}; accepted: images and labels, both tensors, or the loss 'distill'"
                )
            labels = torch.zeros(len(images), dtype=torch.int64)
        return to_place(images, labels, self.means.place)

    def _save(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None and rank() == 0:
            write_checkpoint(self.parts, self.schedule(), checkpoint.path, checkpoint.notes)

    def _finished(self, scores: Scores | None) -> EpochRecord:
        """The epoch that is over."""
        state, schedule = self.state, self.schedule()
        before = None if state.best is None else state.best[1]
        loss, flops_loss, gflops = (total / state.step for total in state.sums)
        return EpochRecord(
            epoch=state.epoch,
            loss=loss,
            flops_loss=flops_loss,
            expected_flops=gflops * 1e9,
            learning_rate=self.parts.optimizer.param_groups[0]["lr"],
            schedule=schedule,
            flops=self.model.flops_at(schedule),
            scores=scores,
            best=scores is None or before is None or scores.ranked[1] > before.ranked[1],
        )


def average_gradients(rates: list[nn.Parameter]) -> None:
    """The mean of the rates' gradients over all processes: a few kilobytes, and nothing for weights."""
    gradients = [rate.grad if rate.grad is not None else torch.zeros_like(rate) for rate in rates]
    flat = all_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world()
    parts = flat.split([rate.numel() for rate in rates])
    for rate, part in zip(rates, parts, strict=True):
        rate.grad = part.view_as(rate)


TIMED = 3  # steps, after one to warm up; the fastest counts


def paced(course: Course, seconds: float, a_step: float) -> Course:
    """As much of `course` as fits: fewer epochs, and at least one step."""
    fitting = max(1, int(seconds / a_step))
    steps = min(course.steps, fitting)
    epochs = max(1, min(course.settings.epochs, fitting // steps))
    return replace(course, settings=replace(course.settings, epochs=epochs), steps=steps)


def paced_here(search: Search, loader: Any, seconds: float) -> Course:
    """As much of the course of `search` as fits into `seconds` where it runs, on the first batches of `loader`.

    The same in all processes.
    """
    device = search.means.place.device
    a_step = max(1e-6, search.seconds_a_step(loader, TIMED))
    fitting = paced(search.course, seconds, a_step)
    total = least(fitting.settings.epochs * fitting.steps, device)
    return paced(search.course, float(total), 1.0)


def paced_before(course: Course, path: Path) -> Course:
    """As much of `course` as the search in a checkpoint was to run.

    Raises:
        SearchCheckpointError: as `read_checkpoint`.
    """
    before = read_checkpoint(path).get("settings", {})
    total = int(before.get("epochs", course.settings.epochs)) * int(before.get("steps", course.steps))
    return paced(course, float(total), 1.0)
