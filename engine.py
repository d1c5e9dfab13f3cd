"""The loops that the command line drives: evaluation, training, and what is reported of a search."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import diffrate
from cli.runtime import STEPS, WORK, Progress, Runtime
from cli.settings import Mixing, Settings, TrainingSettings
from datasets import ImageLoader
from diffrate.atomic import UNREADABLE, first_line, load_tensors, whole_file
from diffrate.budget import Budget
from diffrate.device import FixedBatch, all_sum, compile_model, seed_everything, step_seed
from diffrate.evaluation import Tally
from diffrate.schedule import fields_of
from diffrate.searching.hard_counts import UNIFORM, Calibrated, CalibrationObserver
from diffrate.searching.settings import CALIBRATED, GRADIENT, SearchSettings
from diffrate.searching.teacher import divergence
from diffrate.searching.trials import TrialRecord
from utils import StopRequestedError, StopSignals, UsageError

log = logging.getLogger(__name__)
LAST, BEST = "checkpoint.pth", "model_best.pth"
FINETUNE = "finetune"
SCALED_BATCH = 512  # DeiT scales the learning rate by images per step / 512
SAVE_SECONDS = 600.0  # between checkpoints within an epoch: each holds three times the weights
LOG_SECONDS = 5.0  # between lines about trials
STEP_WORK = 3  # dense forward passes that a step takes for an image: the teacher, the search's own, and back


def evaluate(
    model: nn.Module,
    loader: ImageLoader,
    runtime: Runtime,
    between: Callable[[], None] | None = None,
    multi_label: bool = False,
) -> diffrate.Scores:
    """`diffrate.evaluate` with progress; `between` is called after each batch.

    Raises:
        DataError, ScoresError: an image cannot be read, or its label does not fit the head.
        NonFiniteLossError: the loss is not finite.
    """
    show = shown_scores(loader, runtime, between)
    scores = diffrate.evaluate(
        model, loader, multi_label=multi_label, device=runtime.device, precision=runtime.amp, callback=show
    )
    if not math.isfinite(scores.loss):
        raise diffrate.NonFiniteLossError(
            f"the loss is {scores.loss} on the validation images; accepted: weights, and a precision, that give numbers"
        )
    return scores


def shown_scores(
    loader: ImageLoader, runtime: Runtime, between: Callable[[], None] | None = None
) -> Callable[[Tally], None]:
    """A callback for each batch of an evaluation: it shows progress with the scores so far, and calls `between`."""
    progress = Progress(len(loader), "Test", len(loader.dataset), runtime)  # type: ignore[arg-type]

    def describe(tally: Tally) -> str:
        if tally.kept:  # the other figures take all outputs so far, and time
            return f"loss {tally.loss:.4f}"
        scores = tally.scores()
        return f"loss {scores.loss:.4f}  acc@1 {scores.acc1:.3f}  acc@5 {scores.acc5:.3f}"

    def show(tally: Tally) -> None:
        if between is not None:
            between()
        progress.advance(lambda: describe(tally))

    return show


class Training:
    """The training of a model's weights at its fixed rates: its recipe, its position, and its checkpoints.

    teacher: the dense model, frozen, where its outputs count beside the labels. flags: what the training was started
    with, for its checkpoints. The output folder gets `checkpoint.pth`, the last one, with all that is needed to go on,
    and `model_best.pth`, the weights of the best top-1.

    Raises:
        UsageError: an optimizer that timm does not know, or cannot make here.
    """

    def __init__(
        self,
        model: diffrate.CompressedModel,
        teacher: diffrate.CompressedModel | None,
        train: ImageLoader,
        val: ImageLoader,
        settings: Settings,
        flags: Mapping[str, Any],
        runtime: Runtime,
    ) -> None:
        self.model, self.train, self.val, self.flags, self.runtime = model, train, val, flags, runtime
        self.settings, self.seed, self.compiled = settings.training, settings.run.seed, settings.run.compile
        called: nn.Module = compile_model(model) if self.compiled else model
        self.scored = FixedBatch(called, val.batch_size or 1) if self.compiled else called
        gpu = [runtime.device] if runtime.device.type == "cuda" else None
        several = runtime.processes.world > 1
        self.trained = DistributedDataParallel(called, device_ids=gpu) if several else called
        self.teacher = compile_model(teacher) if teacher is not None and self.compiled else teacher
        self.batch = (train.batch_size or 1) * runtime.processes.world  # images a step over all processes
        self.optimizer = _optimizer(self.settings, model, self.batch)
        self.scheduler = _scheduler(self.settings, self.optimizer, len(train), self.seed)
        self.criterion = build_criterion(settings.mixing)
        self.mixup = build_mixup(settings.mixing, model.num_classes)
        decay = self.settings.average_decay
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=True) if self.settings.average else None
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp == torch.float16)
        # The steps done in this epoch and the sum of their losses; the best top-1 so far.
        self.position: dict[str, Any] = {"epoch": 0, "step": 0, "losses": 0.0, "best": None}
        self.saved = time.monotonic()
        self.changing = threading.RLock()  # held while weights and position do not belong together

    def run(self) -> diffrate.CompressedModel:
        """Train the epochs that are left, and score each. Gives the model as its checkpoint loads: with the average
        of the weights, where they are averaged.

        Raises:
            NonFiniteLossError: the loss is not finite; names the step.
            StopRequestedError: a signal asked to stop; the state was saved before.
        """
        at, flops, scores = self.position, self.model.flops(), None
        with StopSignals(self._stop_late) as signals:
            while at["epoch"] < self.settings.epochs:
                if at["step"] < len(self.train):  # else it was stopped while it was scored
                    self._train_epoch(signals)
                rate = self.optimizer.param_groups[0]["lr"]  # of the last update
                record = {"train_loss": at["losses"] / at["step"], "train_lr": rate}
                scores = self._score(self.scored, signals)
                if self.ema is not None:
                    record["ema_acc1"] = self._score(self.ema.module, signals).acc1
                named = {"mode": FINETUNE, "model": self.flags["model"], "epoch": at["epoch"]}
                self.runtime.record(record | named | scores.record(flops))
                better = at["best"] is None or scores.ranked[1] > at["best"]
                best = scores.ranked[1] if better else at["best"]
                with self.changing:
                    at.update(epoch=at["epoch"] + 1, step=0, losses=0.0, best=best)
                self.save()
                if better:
                    self.runtime.save(self._weights(), BEST)
                log.info("%s  best %.3f", scores.line(flops), at["best"])
                if signals.requested and at["epoch"] < self.settings.epochs:
                    raise StopRequestedError(f"stopped after epoch {at['epoch'] - 1}: go on with --resume")
        if scores is None:  # resumed at its end
            scores = evaluate(self.scored, self.val, self.runtime)
            log.info("%s  best %.3f", scores.line(flops), at["best"])
        return self.model if self.ema is None else self.ema.module

    def save(self) -> None:
        """Write `checkpoint.pth`."""
        states = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        self.runtime.save(self._weights() | states | {"position": self.position}, LAST)
        self.saved = time.monotonic()

    def restore(self, path: Path) -> None:
        """Go back to where the training was that left the file; bit for bit on a CPU.

        Raises:
            UsageError: the file is missing, damaged, or of something else.
        """
        content = read_training(path)
        try:
            self.model.load_state_dict(content["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(content["model_ema"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            self.position.update(content["position"])
        except UNREADABLE as error:
            raise UsageError(f"--resume {path}: does not fit this training ({first_line(error)})") from error
        log.info("going on from %s at epoch %d, step %d", path, self.position["epoch"], self.position["step"])

    def _train_epoch(self, signals: StopSignals) -> None:
        """Train what is left of an epoch. Each step has a seed of its own: a resumed training draws the same."""
        at, processes, steps = self.position, self.runtime.processes, len(self.train)
        epoch, left = at["epoch"], steps - at["step"]
        self.trained.train()
        progress = Progress(left, f"Epoch [{epoch}]", left * self.batch, self.runtime)
        batches = self.train.batches_from(epoch, at["step"])
        for step in range(at["step"], steps):
            seed_everything(step_seed(self.seed, epoch, processes.rank, step))
            if self.scheduler is not None:
                self.scheduler.step_update(epoch * steps + step)
            loss = _train_step(self.trained, self, *next(batches))
            totals = torch.stack([loss, loss.new_tensor(float(signals.requested))])
            mean, stop = (all_sum(totals, None) / processes.world).tolist()
            if not math.isfinite(mean):
                raise diffrate.NonFiniteLossError(
                    f"the loss is {mean} at epoch {epoch}, step {step}; try a lower --lr or --amp off"
                )
            with self.changing:
                if self.settings.clip_grad is not None:
                    self.scaler.unscale_(self.optimizer)
                    dispatch_clip_grad(self.trained.parameters(), self.settings.clip_grad)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                if self.ema is not None:
                    self.ema.update(self.model, step=epoch * steps + step)
                at.update(step=step + 1, losses=at["losses"] + mean)
            if stop or time.monotonic() - self.saved > SAVE_SECONDS:
                self.save()
            rate = self.optimizer.param_groups[0]["lr"]
            progress.advance(lambda rate=rate: f"loss {at['losses'] / at['step']:.4f}  lr {rate:.2e}")
            if stop:
                progress.close()
                raise StopRequestedError(f"stopped at epoch {epoch}, step {at['step']}: go on with --resume")

    def _stop_late(self) -> str:
        """Save as after the last step, in the middle of another; nothing changes from here on."""
        self.changing.acquire()
        self.save()
        return f"stopped at epoch {self.position['epoch']}, step {self.position['step']}: go on with --resume"

    def _score(self, model: nn.Module, signals: StopSignals) -> diffrate.Scores:
        """Scores of an epoch. When a signal asks to stop, the resumed training has only these to compute again."""

        def stop() -> None:
            if signals.requested:
                self.save()
                epoch = self.position["epoch"]
                raise StopRequestedError(f"stopped while epoch {epoch} was scored: go on with --resume")

        return evaluate(model, self.val, self.runtime, stop)

    def _weights(self) -> dict[str, Any]:
        averaged = {} if self.ema is None else {"model_ema": self.ema.module.state_dict()}
        model, kept = self.model.state_dict(), self.model.get_kept_num()
        return {"mode": FINETUNE, "model": model, "kept": kept, "flags": dict(self.flags), **averaged}


def _train_step(model: nn.Module, training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients of the weights of `model` for one update; the loss, detached."""
    device, teacher = training.runtime.device, training.teacher
    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    if training.mixup is not None:
        images, labels = training.mixup(images, labels)
    with training.runtime.autocast():
        logits = model(images, return_flop=False)
        with torch.no_grad():
            taught = None if teacher is None else teacher(images, return_flop=False)
    loss = training.criterion(logits.float(), labels)
    if taught is not None:
        loss = distilled(loss, logits, taught, training.settings.distill or 0.0)
    training.optimizer.zero_grad(set_to_none=True)
    training.scaler.scale(loss).backward()
    return loss.detach()


def distilled(loss: Tensor, outputs: Tensor, taught: Tensor, weight: float) -> Tensor:
    """The labels' `loss`, and at `weight`, from 0 to 1, the divergence of logits `[B, K]` from the teacher's, as Hinton
    et al. (2015) at a temperature of 1."""
    return (1 - weight) * loss + weight * divergence(outputs.float(), taught.float()).mean()


def step_rate(settings: TrainingSettings, images_per_step: int) -> float:
    """The learning rate that the schedule starts from, at so many images a step over all processes."""
    return settings.learning_rate * (1.0 if settings.unscaled else images_per_step / SCALED_BATCH)


def build_criterion(mixing: Mixing) -> nn.Module:
    """The training loss: against mixed labels with mixup or cutmix, else with label smoothing."""
    if mixing.mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(mixing.smoothing) if mixing.smoothing else nn.CrossEntropyLoss()


def build_mixup(mixing: Mixing, classes: int) -> Mixup | None:
    """Mixup and cutmix, None when both are off."""
    if not mixing.mixes:
        return None
    return Mixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        prob=mixing.probability,
        switch_prob=mixing.switch_probability,
        mode=mixing.mode,
        label_smoothing=mixing.smoothing,
        num_classes=classes,
    )


def _optimizer(settings: TrainingSettings, model: nn.Module, images_per_step: int) -> Optimizer:
    name = settings.optimizer
    known = [known for known in list_optimizers() if not get_optimizer_info(known).second_order]  # one gradient a step
    if name.lower() not in known:
        raise UsageError(f"--opt {name}: unknown to timm, or of second order; accepted: {', '.join(map(str, known))}")
    rates = {"lr": step_rate(settings, images_per_step), "weight_decay": settings.weight_decay}
    try:
        return create_optimizer_v2(model, opt=name, momentum=settings.momentum, **rates)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # it needs a GPU, or a momentum
        accepted = "one that runs here, at this --momentum"
        raise UsageError(f"--opt {name}: {first_line(error)}; accepted: {accepted}") from error


def _scheduler(settings: TrainingSettings, optimizer: Optimizer, steps: int, seed: int) -> Scheduler | None:
    """Stepped on updates, so that the rate falls within epochs too and ends at its minimum."""
    usual = 5 if settings.epochs > 5 else 0
    warmup = usual if settings.warmup_epochs is None else settings.warmup_epochs
    return create_scheduler_v2(
        optimizer,
        sched=settings.schedule,
        num_epochs=settings.epochs,
        warmup_epochs=warmup,
        min_lr=settings.least_learning_rate,
        warmup_lr=settings.warmup_learning_rate,
        noise_seed=seed,
        step_on_epochs=False,
        updates_per_epoch=steps,
        # timm's own training script has these, and its function others.
        decay_epochs=30,
        decay_milestones=[30, 60],
    )[0]


def dense_copy(model: diffrate.CompressedModel) -> diffrate.CompressedModel:
    """`model` with the same weights and all tokens kept: frozen, and in evaluation mode."""
    dense = copy.deepcopy(model)
    dense.schedule = dense.dense_schedule()
    return dense.requires_grad_(False).eval()


def digest(model: nn.Module) -> str:
    """A hash that differs between models of different weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def read_training(path: Path) -> dict[str, Any]:
    """The content of a training's checkpoint.

    Raises:
        UsageError: the file is missing, damaged, or of something else.
    """
    try:
        content = load_tensors(path)
    except UNREADABLE as error:
        reason = first_line(error)
        raise UsageError(f"--resume {path}: cannot be read ({reason}); accepted: the {LAST} of --finetune") from error
    found = content.get("mode", "weights alone") if isinstance(content, dict) else type(content).__name__
    if found != FINETUNE or "position" not in content:
        what = "weights alone" if found == FINETUNE else found
        raise UsageError(f"--resume {path}: found a checkpoint of another kind ({what}); accepted: of --finetune")
    return content


def flags_in(path: str | Path) -> Mapping[str, Any] | None:
    """The flags of the training that left a file, None where none did. Tensors are not read."""
    if Path(path).suffix == ".safetensors":
        return None
    try:
        content = load_tensors(path, mmap=True)
    except (*UNREADABLE, SafetensorError):
        return None
    return content.get("flags") if isinstance(content, dict) and content.get("mode") == FINETUNE else None


class Reporter(diffrate.Observer, CalibrationObserver):
    """Of a search of `model`: progress, records in the output folder, the best checkpoint.

    budget: what its target is for the model. val: None where nothing can be scored.
    """

    def __init__(
        self,
        model: diffrate.CompressedModel,
        settings: SearchSettings,
        budget: Budget,
        train: ImageLoader,
        val: ImageLoader | None,
        runtime: Runtime,
        signals: StopSignals,
    ) -> None:
        self.model, self.budget, self.val, self.runtime, self.signals = model, budget, val, runtime, signals
        # Without labels, losses are against the dense model, as those of a search at hard counts.
        self.taught = not settings.labelled
        self.images = settings.accumulate * (train.batch_size or 1) * runtime.processes.world  # of a step
        self.epoch: list[diffrate.StepRecord] = []  # steps of this epoch that this process has seen
        self.logged = 0.0  # seconds of the search, at the last line about trials

    def stop(self) -> bool:
        return self.signals.requested

    def on_course(self, epochs: int, steps: int) -> None:
        self.steps = steps

    def on_start(self, epoch: int, step: int) -> None:
        left = self.steps - step
        self.epoch, self.progress = [], Progress(left, f"Search [{epoch}]", left * self.images, self.runtime)

    def on_step(self, record: diffrate.StepRecord) -> None:
        self.epoch.append(record)
        self.progress.advance(self._describe)
        if record.step % self.runtime.print_freq == 0:
            done = record.epoch * self.steps + record.step
            position = {"epoch": record.epoch, "step": record.step, "done": done}
            expected = self.model.compression.space.schedule(record.counts)  # type: ignore[arg-type]  # not rounded
            self.runtime.append(position | fields_of(expected) | self._costs("", record.flops), STEPS)
            if self.taught:
                recent = self.epoch[-self.runtime.print_freq :]  # since the last record
                loss = sum(record.loss for record in recent) / len(recent)
                work = float(STEP_WORK * self.images * (done + 1))
                self.runtime.append({"search": GRADIENT, "stage": "steps", "work": work, "loss": loss}, WORK)

    def on_score_start(self) -> None:
        assert self.val is not None, "there is something to score on"
        self.show = shown_scores(self.val, self.runtime)

    def on_score(self, tally: Tally) -> None:
        if self.signals.requested:  # what is scored is in the last checkpoint, or a few steps from it
            raise StopRequestedError("stopped while an epoch was scored: go on with --resume")
        self.show(tally)

    def on_epoch(self, record: diffrate.EpochRecord) -> None:
        counts, scores = fields_of(record.schedule), record.scores
        losses = {"train_loss": record.loss, "train_flops_loss": record.flops_loss}
        costs = self._costs("train_", record.expected_flops) | {"lr": record.learning_rate}
        figures = {"gflops": record.flops / 1e9} if scores is None else scores.record(record.flops)
        self.runtime.record({"mode": "search", "epoch": record.epoch, **losses, **costs, **figures, **counts})
        log_counts(counts)
        loss = f"* loss {record.loss:#.3g} flops {record.flops / 1e9:.3f}"
        log.info(loss if scores is None else scores.line(record.flops))
        folder = self.runtime.output_dir
        if record.best and folder is not None and self.runtime.writes:
            with (folder / LAST).open("rb") as last, whole_file(folder / BEST) as best:
                shutil.copyfileobj(last, best)

    def on_plan(self, images: int, work: float, speed: float) -> None:
        self.work = work
        passes = f"up to {work:.0f} forward passes of the dense model"
        took = f"about {work / speed / 60:.1f} minutes at {speed:.0f} images/s"
        log.info("calibrated search: %d images, %s, %s", images, passes, took)

    def on_trials(self, record: TrialRecord) -> None:
        figures = {"work": record.work, "loss": record.loss, "seconds": record.seconds}
        self.runtime.append({"search": CALIBRATED, "stage": "trials"} | figures, WORK)
        if record.seconds - self.logged >= LOG_SECONDS:
            self.logged = record.seconds
            done = f"[{record.work:.0f}/{self.work:.0f}]  {record.trials} schedules"
            log.info("Calibrate: %s  loss %#.3g  %.0f s", done, record.loss, record.seconds)

    def _describe(self) -> str:
        """Means of the epoch so far."""
        rows = [(record.loss, record.flops_loss, record.flops) for record in self.epoch]
        loss, cost, spent = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        gflops = f"ms an image {1000 * spent:.3f}" if self.budget.timed else f"GFLOPs {spent / 1e9:.4f}"
        return f"loss {loss:#.3g}  cost loss {cost:.5f}  {gflops}  lr {self.epoch[-1].learning_rate:.2e}"

    def _costs(self, before: str, spent: float) -> dict[str, float]:
        """An expected cost and its target, for records: in GFLOPs, or in seconds of an image."""
        name, per = ("seconds", 1.0) if self.budget.timed else ("gflops", 1e9)
        return {f"{before}{name}": spent / per, f"target_{name}": self.budget.target / per}


def log_counts(counts: Mapping[str, Any], before: str = "") -> None:
    """A line for each of a schedule's fields that is not None, which begins with `before`."""
    for name, values in counts.items():
        if values is not None:
            log.info("%s%s %s", before, name, values)


def log_calibrated(found: Calibrated, runtime: Runtime) -> float:
    """Log what each stage took, and whose schedule was chosen; its loss on the images held back."""
    for stage in found.stages:
        log.info("took: %-17s %6.0f forward passes of the dense model, %.1f s", stage.name, stage.work, stage.seconds)
    best: dict[str, float] = {}
    for name, loss in found.losses:
        best[name] = min(loss, best.get(name, loss))
    log.info("on images held back: %s", ", ".join(f"{name} {loss:#.3g}" for name, loss in best.items()))
    reason = ""
    if len(found.alike) > 1:
        noise = f"their losses differ by less than the noise of measurement ({found.noise:#.3g})"
        reason = f", the simplest of {', '.join(found.alike)}: {noise}"
    log.info("chosen: %s%s", found.chosen, reason)
    for name, loss in best.items():
        if name.startswith(UNIFORM):
            stage = name.removeprefix(UNIFORM).strip()
            runtime.append({"search": UNIFORM, "stage": stage, "work": 0.0, "loss": loss}, WORK)
    return best[found.chosen]
