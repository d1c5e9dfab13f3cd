"""The search for kept counts: rate logits learn on frozen weights (paper, sections 3.3 and 3.4)."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

import diffrate
from diffrate.budget import meets_budget, round_to_budget
from diffrate.schedule import MERGE_FIELD, PRUNE_FIELD, Schedule
from engine import NonFiniteLossError, Scores, evaluate, to_device
from processes import all_sum
from progress import with_progress
from recipe import build_criterion, build_mixup
from samplers import SeededOrder, step_seed
from utils import Runtime, StopRequestedError, StopSignals, UsageError, seed_everything

log = logging.getLogger(__name__)
STEPS = "search_steps.txt"  # of the output folder: how the expected counts moved, a JSON line every few steps
FLOPS_LOSSES = ("absolute", "relative")


@dataclass
class SearchState:
    """All that changes while a search runs; what a checkpoint holds."""

    epoch: int = 0
    step: int = 0  # done in this epoch
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # losses and GFLOPs of this epoch
    best: tuple[Schedule, Scores] | None = None


@dataclass(frozen=True)
class SearchSettings:
    """What does not change: the target in multiply-accumulates, the loss, and the learning rate's course."""

    target: float
    flops_loss: str
    flops_weight: float
    free_first_epoch: bool
    epochs: int
    steps: int
    accumulate: int
    rate: float
    least_rate: float
    seed: int

    def learning_rate(self, epoch: int, step: int) -> float:
        """Cosine over all steps, from `rate` in the first to `least_rate` in the last."""
        total = self.epochs * self.steps
        share = (epoch * self.steps + step) / max(1, total - 1)
        return self.least_rate + (self.rate - self.least_rate) * (1 + math.cos(math.pi * share)) / 2

    def weight(self, epoch: int) -> float:
        """The cost's weight in the loss; 0 in the first epoch with `--warmup_compression_rate`."""
        return 0.0 if self.free_first_epoch and epoch == 0 else self.flops_weight


def settings_from(args: Namespace, target: float, batches: int) -> SearchSettings:
    """The settings that the flags ask for, for a target in GFLOPs and `batches` batches an epoch.

    Raises:
        UsageError: an update takes more batches than there are.
    """
    if args.accum_steps > batches:
        raise UsageError(f"--accum-steps {args.accum_steps}: accepted: up to {batches}, the batches of an epoch")
    return SearchSettings(
        target=target * 1e9,
        flops_loss=args.flops_loss,
        flops_weight=args.flops_weight,
        free_first_epoch=args.warmup_compression_rate,
        epochs=args.epochs,
        steps=batches // args.accum_steps,
        accumulate=args.accum_steps,
        rate=args.arch_lr,
        least_rate=args.arch_min_lr,
        seed=args.seed,
    )


def flops_loss(flops: Tensor, settings: SearchSettings) -> Tensor:
    """How far the expected cost is from the target (paper, equation 9): in GFLOPs, or as a share of it."""
    unit = 1e9 if settings.flops_loss == "absolute" else settings.target
    return ((flops - settings.target) / unit) ** 2


class Search:
    """One search: a patched model whose weights are frozen, and the optimizer of its rates."""

    def __init__(
        self, model: diffrate.CompressedModel, args: Namespace, settings: SearchSettings, classes: int, runtime: Runtime
    ) -> None:
        self.model, self.settings, self.runtime = model, settings, runtime
        for weight in model.parameters():
            weight.requires_grad_(False)
        self.rates = model.arch_parameters()
        for rate in self.rates:
            rate.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.rates, lr=settings.rate, weight_decay=0)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp == torch.float16)
        self.criterion: nn.Module = build_criterion(args)
        self.mixup: Mixup | None = build_mixup(args, classes)
        self.state = SearchState()

    def run(
        self, train: DataLoader[Any], val: DataLoader[Any], save: Callable[[Search, bool], None]
    ) -> tuple[Schedule, Scores]:
        """Search to the end; the best schedule that meets the budget, and its scores.

        `save` is called after every epoch and every few steps; with True when the schedule is the
        best so far.

        Raises:
            NonFiniteLossError: the loss is no number; names epoch and step.
            StopRequestedError: a signal asked to stop; the state was saved before.
        """
        while self.state.epoch < self.settings.epochs:
            with StopSignals() as signals:
                self._epoch(train, save, signals)
            scores = self.score(val)
            better = self.state.best is None or scores.acc1 > self.state.best[1].acc1
            if better:
                self.state.best = self.schedule(), scores
            self._record(scores)
            self.state.epoch, self.state.step, self.state.sums = self.state.epoch + 1, 0, [0.0, 0.0, 0.0]
            save(self, better)
        assert self.state.best is not None, "there is an epoch, and its schedule meets the budget"
        return self.state.best

    def schedule(self) -> Schedule:
        """The schedule of the present rates, rounded to the budget."""
        space = self.model.compression.space
        expected = self.model.compression.expected_counts()
        return round_to_budget(expected, space, self.model.flops_at, self.settings.target)

    def _epoch(self, loader: DataLoader[Any], save: Callable[[Search, bool], None], signals: StopSignals) -> None:
        """The steps of one epoch that are left."""
        state, settings, every = self.state, self.settings, self.runtime.print_freq
        order = loader.sampler
        assert isinstance(order, SeededOrder)
        order.set_epoch(state.epoch, start=state.step * (loader.batch_size or 1) * settings.accumulate)
        self.model.train()
        batches = iter(loader)
        steps = range(state.step, settings.steps)
        header = f"Search [{state.epoch}]"
        images = len(steps) * settings.accumulate * (loader.batch_size or 1) * self.runtime.processes.world
        for step in with_progress(steps, len(steps), header, images, self._describe, self.runtime):
            expected = self._expected_counts() if step % every == 0 else None
            *losses, stop = self._step(batches, state.epoch, step, signals.requested)
            if expected is not None:
                place = {"epoch": state.epoch, "step": step, "done": state.epoch * settings.steps + step}
                costs = {"gflops": losses[2], "target_gflops": settings.target / 1e9}
                self.runtime.append(place | expected | costs, STEPS)
            state.step = step + 1
            state.sums = [total + loss for total, loss in zip(state.sums, losses, strict=True)]
            if state.step % every == 0 or stop:
                save(self, False)
            if stop:
                raise StopRequestedError(f"stopped at epoch {state.epoch}, step {state.step}: go on with --resume")

    def _step(self, batches: Any, epoch: int, step: int, stop: bool) -> list[float]:
        """One update of the rates; classification loss, cost loss and GFLOPs before it, and whether to stop.

        All are means over the processes, so that all of them stop after the same step, and for the
        same loss.
        """
        settings = self.settings
        seed_everything(step_seed(settings.seed, epoch, self.runtime.processes.rank, step))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(epoch, step)
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.tensor([0.0, 0.0, 0.0, float(stop)], device=self.runtime.device)
        for _ in range(settings.accumulate):
            images, labels = to_device(*next(batches), self.runtime)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with self.runtime.autocast():
                logits, flops = self.model(images)
            classification = self.criterion(logits.float(), labels)
            cost = flops_loss(flops, settings)
            loss = classification + settings.weight(epoch) * cost
            self.scaler.scale(loss / settings.accumulate).backward()
            parts = torch.stack([classification.detach(), cost.detach(), flops.detach() / 1e9])
            totals[:3] += parts / settings.accumulate
        world = self.runtime.processes.world
        average_gradients(self.rates, world)
        values = (all_sum(totals) / world).tolist()
        if not all(math.isfinite(value) for value in values):
            where = f"epoch {epoch}, step {step}"
            raise NonFiniteLossError(f"the loss is {values[0]} at {where}; the last checkpoint is good")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return values

    def score(self, val: DataLoader[Any], schedule: Schedule | None = None) -> Scores:
        """Scores at `schedule`, or at that of the present rates, with tokens really dropped."""
        chosen = schedule or self.schedule()
        self.model.set_kept_num(chosen.prune, chosen.merge)
        try:
            return evaluate(self.model, val, self.runtime)
        finally:
            self.model.compression.schedule = None  # back to searching

    def _expected_counts(self) -> dict[str, Sequence[float] | None]:
        """What the rates expect to keep in each block, before rounding."""
        schedule = self.model.compression.space.schedule(self.model.compression.expected_counts())  # type: ignore[arg-type]
        return {PRUNE_FIELD: schedule.prune, MERGE_FIELD: schedule.merge}

    def _means(self) -> list[float]:
        return [total / self.state.step for total in self.state.sums]

    def _describe(self) -> str:
        loss, cost, gflops = self._means()
        rate = self.optimizer.param_groups[0]["lr"]
        return f"loss {loss:.4f}  cost loss {cost:.5f}  GFLOPs {gflops:.4f}  lr {rate:.2e}"

    def _record(self, scores: Scores) -> None:
        """The epoch in the log, for people and as a JSON line."""
        schedule, flops = self.schedule(), self.model.flops_at(self.schedule())
        assert meets_budget(flops, self.settings.target)
        loss, cost, gflops = self._means()
        counts = {PRUNE_FIELD: schedule.prune, MERGE_FIELD: schedule.merge}
        figures = {
            "train_loss": loss,
            "train_flops_loss": cost,
            "train_gflops": gflops,
            "lr": self.optimizer.param_groups[0]["lr"],
            "target_gflops": self.settings.target / 1e9,
        }
        epoch = self.state.epoch
        self.runtime.record({"mode": "search", "epoch": epoch, **figures, **scores.record(flops), **counts})
        for name, values in counts.items():
            if values is not None:
                log.info("%s %s", name, list(values))
        log.info(scores.line(flops))


def average_gradients(rates: list[nn.Parameter], world: int) -> None:
    """The mean of the rates' gradients over `world` processes: a few kilobytes, and nothing for weights."""
    gradients = [rate.grad if rate.grad is not None else torch.zeros_like(rate) for rate in rates]
    flat = all_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world
    parts = flat.split([rate.numel() for rate in rates])
    for rate, part in zip(rates, parts, strict=True):
        rate.grad = part.view_as(rate)
