"""The loops that the command line drives: evaluation, the epochs of training, and the search."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import diffrate
from cli.log import Progress
from cli.runtime import STEPS, WORK, Runtime
from cli.settings import Mixing, TrainingSettings
from cli.training import BEST, LAST, Recipe, Teacher, TrainingCheckpoint, TrainingState, build_recipe
from datasets import ImageLoader
from diffrate.atomic import whole_file
from diffrate.budget import Budget
from diffrate.device import FixedBatch, all_sum, compile_model, seed_everything, step_seed, to_place
from diffrate.evaluation import Tally
from diffrate.schedule import fields_of
from diffrate.searching.hard_counts import UNIFORM, Calibrated, CalibrationObserver
from diffrate.searching.settings import CALIBRATED, GRADIENT, SearchSettings
from diffrate.searching.teacher import losses_at
from diffrate.searching.trials import TrialRecord
from utils import StopRequestedError, StopSignals

log = logging.getLogger(__name__)
TOLD_EVERY = 5.0  # seconds
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
        DataError: an image cannot be read.
        NonFiniteLossError: the loss is no number.
        ScoresError: as `diffrate.evaluate`.
    """
    shown = shown_scores(loader, runtime, between)
    scores = diffrate.evaluate(
        model, loader, multi_label=multi_label, device=runtime.device, precision=runtime.amp, callback=shown
    )
    if not math.isfinite(scores.loss):
        raise diffrate.NonFiniteLossError(
            f"the loss is {scores.loss} on the validation images; accepted: weights, and a precision, that give numbers"
        )
    return scores


def shown_scores(loader: ImageLoader, runtime: Runtime, between: Callable[[], None] | None = None) -> Any:
    """What to call after each batch of an evaluation: it tells progress and the scores so far, and calls `between`."""
    progress = Progress(len(loader), "Test", len(loader.dataset), runtime)  # type: ignore[arg-type]

    def show(tally: Tally) -> None:
        if between is not None:
            between()
        progress.advance(lambda: _so_far(tally))

    return show


@dataclass(frozen=True)
class Training:
    """What a training works with besides the model; `compiled` runs it as one graph.

    teacher: the dense model, frozen, where the settings weigh one beside the labels.
    """

    settings: TrainingSettings
    mixing: Mixing
    train: ImageLoader
    val: ImageLoader
    classes: int
    seed: int
    compiled: bool
    runtime: Runtime
    teacher: diffrate.CompressedModel | None = None

    @property
    def batch_size(self) -> int:
        """Images a step, on this process."""
        assert self.train.batch_size is not None
        return self.train.batch_size


def finetune(
    model: diffrate.CompressedModel, training: Training, flags: dict[str, Any], resume: Path | None
) -> diffrate.CompressedModel:
    """Train the weights of `model` at its fixed rates and score them after every epoch. Gives the model as its
    checkpoint loads: with the average of the weights, where they are averaged.

    Leaves `checkpoint.pth` (last, with `flags` and all that is needed to go on) and `model_best.pth` (best
    top-1) in the output folder. `resume` is a checkpoint to go on from, bit for bit on a CPU.

    Raises:
        NonFiniteLossError: the loss is no number; names the step.
        UsageError: `resume` does not fit.
        StopRequestedError: a signal asked to stop; the state was saved before.
    """
    runtime, settings = training.runtime, training.settings
    compiled: nn.Module = compile_model(model) if training.compiled else model
    evaluated = FixedBatch(compiled, training.val.batch_size or 1) if training.compiled else model
    trained = _distributed(compiled, runtime)
    recipe = build_recipe(
        settings,
        training.mixing,
        model,
        training.classes,
        training.batch_size * runtime.processes.world,
        len(training.train),
        runtime.amp,
        training.seed,
        _teacher(training),
    )
    state = TrainingState()
    checkpoint = TrainingCheckpoint(model, recipe, state, flags, runtime)
    if resume is not None:
        checkpoint.restore(resume)
        log.info("going on from %s at epoch %d, step %d", resume, state.epoch, state.step)
    scores = None
    with StopSignals() as signals:
        while state.epoch < settings.epochs:
            if state.step < len(training.train):  # else it was stopped while it was scored
                finetune_epoch(trained, model, recipe, training, checkpoint, signals)
            record = {"train_loss": state.losses / state.step, "train_lr": recipe.learning_rate()}
            between = partial(_stop_scoring, checkpoint, signals)
            scores = evaluate(evaluated, training.val, runtime, between)
            if recipe.ema is not None:
                record["ema_acc1"] = evaluate(recipe.ema.module, training.val, runtime, between).acc1
            named = {"mode": "finetune", "model": flags["model"], "epoch": state.epoch}
            runtime.record(record | named | scores.record(model.flops()))
            reached = scores.ranked[1]
            better = state.best is None or reached > state.best
            state.best = reached if better else state.best
            state.epoch, state.step, state.losses = state.epoch + 1, 0, 0.0
            checkpoint.save()
            if better:
                checkpoint.save_best()
            log.info("%s  best %.3f", scores.line(model.flops()), state.best)
            if signals.requested and state.epoch < settings.epochs:
                raise StopRequestedError(f"stopped after epoch {state.epoch - 1}: go on with --resume")
    if scores is None:  # resumed at its end
        scores = evaluate(evaluated, training.val, runtime)
        log.info("%s  best %.3f", scores.line(model.flops()), state.best)
    return model if recipe.ema is None else recipe.ema.module


def finetune_epoch(
    trained: nn.Module,
    model: diffrate.CompressedModel,
    recipe: Recipe,
    training: Training,
    checkpoint: TrainingCheckpoint,
    signals: StopSignals,
) -> None:
    """Train the weights for what is left of an epoch at the model's fixed rates.

    `trained` is `model` as it is called: compiled, distributed, or itself. Every step draws from a seed of
    its own, so that a training goes on in the middle as if it had not stopped.

    Raises:
        NonFiniteLossError: the loss is no number; names the step.
        StopRequestedError: a signal asked to stop; the state was saved before.
    """
    state, runtime, steps = checkpoint.state, training.runtime, len(training.train)
    trained.train()
    left = steps - state.step
    images = left * training.batch_size * runtime.processes.world
    progress = Progress(left, f"Epoch [{state.epoch}]", images, runtime)
    batches = training.train.batches_from(state.epoch, state.step)
    for step in range(state.step, steps):
        seed_everything(step_seed(training.seed, state.epoch, runtime.processes.rank, step))
        if recipe.scheduler is not None:
            recipe.scheduler.step_update(state.epoch * steps + step)
        loss = _train_step(trained, recipe, *to_place(*next(batches), runtime.place), runtime)
        totals = torch.stack([loss, loss.new_tensor(float(signals.requested))])
        mean, stop = (all_sum(totals) / runtime.processes.world).tolist()
        if not math.isfinite(mean):
            raise diffrate.NonFiniteLossError(
                f"the loss is {mean} at epoch {state.epoch}, step {step}; try a lower --lr or --amp off"
            )
        if recipe.ema is not None:
            recipe.ema.update(model, step=state.epoch * steps + step)
        state.step, state.losses = step + 1, state.losses + mean
        if stop or checkpoint.due():
            checkpoint.save()
        progress.advance(lambda: f"loss {state.losses / state.step:.4f}  lr {recipe.learning_rate():.2e}")
        if stop:
            progress.close()
            raise StopRequestedError(f"stopped at epoch {state.epoch}, step {state.step}: go on with --resume")


def _stop_scoring(checkpoint: TrainingCheckpoint, signals: StopSignals) -> None:
    """Keep the epoch that is scored when a signal asks to stop: it is only to score when the training goes on.

    Raises:
        StopRequestedError: a signal did, and the state was saved before.
    """
    if signals.requested:
        checkpoint.save()
        raise StopRequestedError(f"stopped while epoch {checkpoint.state.epoch} was scored: go on with --resume")


def _train_step(model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, runtime: Runtime) -> Tensor:
    """One update of the weights; the loss before it, detached."""
    if recipe.mixup is not None:
        images, labels = recipe.mixup(images, labels)
    with runtime.autocast():
        logits = model(images, return_flop=False)
        taught = None if recipe.teacher is None else recipe.teacher.outputs(images)
    loss = recipe.criterion(logits.float(), labels)
    if recipe.teacher is not None and taught is not None:
        loss = recipe.teacher.mixed(loss, logits, taught)
    recipe.optimizer.zero_grad(set_to_none=True)
    recipe.scaler.scale(loss).backward()
    if recipe.clip_grad is not None:
        recipe.scaler.unscale_(recipe.optimizer)
        dispatch_clip_grad(model.parameters(), recipe.clip_grad)
    recipe.scaler.step(recipe.optimizer)
    recipe.scaler.update()
    return loss.detach()


def _teacher(training: Training) -> Teacher | None:
    """The dense model beside the labels, if there is to be one."""
    model, weight = training.teacher, training.settings.distill
    if model is None or weight is None:
        return None
    return Teacher(compile_model(model) if training.compiled else model, weight)


def _so_far(tally: Tally) -> str:
    if tally.kept:  # all that was kept makes the other figures, which takes time
        return f"loss {tally.loss:.4f}"
    scores = tally.scores()
    return f"loss {scores.loss:.4f}  acc@1 {scores.acc1:.3f}  acc@5 {scores.acc5:.3f}"


def _distributed(model: nn.Module, runtime: Runtime) -> nn.Module:
    """`model` with gradients averaged over all processes; itself on a single one."""
    if runtime.processes.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[runtime.device] if runtime.device.type == "cuda" else None)


@dataclass(frozen=True)
class Searching:
    """What a search works with besides the model.

    budget: what its target is for the model. val: None where nothing can be scored. part: a part of the training
    images, as in evaluation, to hold outputs against the dense ones on.
    """

    settings: SearchSettings
    budget: Budget
    train: ImageLoader
    val: ImageLoader | None
    part: ImageLoader
    runtime: Runtime


def search(model: diffrate.CompressedModel, searching: Searching, resume: Path | None) -> diffrate.Found:
    """`diffrate.search` with progress, its records and checkpoints in the output folder; `resume` is one of them.

    Raises:
        StopRequestedError, StoppedError: a signal asked to stop; the state was saved before.
        NonFiniteLossError, SearchCheckpointError: as `diffrate.search`.
    """
    runtime, labelled = searching.runtime, searching.settings.labelled
    assert runtime.output_dir is not None, "flags make sure of a folder"
    with StopSignals() as signals:
        return diffrate.search(
            model,
            searching.train,
            settings=searching.settings,
            # The best epoch is that of the paper's recipe; without labels nothing but the images is looked at.
            val=searching.val if labelled else None,
            callback=Reporter(model, searching, signals),
            trials=TrialReporter(runtime, signals),
            precision=runtime.amp or torch.float32,
            checkpoint=runtime.output_dir / LAST,
            save_every=runtime.print_freq,
            resume=resume,
        )


def found_scores(
    model: diffrate.CompressedModel, found: diffrate.Found, searching: Searching
) -> tuple[diffrate.Scores, diffrate.Scores] | None:
    """Of the model at what was found, where it is left, and of the dense one; None where there is nothing to score."""
    val, runtime, multi_label = searching.val, searching.runtime, searching.settings.multi_label
    if val is None:
        return None
    scores = found.scores or evaluate(model, val, runtime, multi_label=multi_label)
    dense = model.dense_schedule()
    model.set_kept_num(dense.prune, dense.merge)
    whole = evaluate(model, val, runtime, multi_label=multi_label)
    model.set_kept_num(found.schedule.prune, found.schedule.merge)
    return scores, whole


def loss_apart(model: diffrate.CompressedModel, found: diffrate.Found, searching: Searching) -> float | None:
    """How far the outputs are from the dense ones at what was found; None where the search did not look at them."""
    settings, calibrated = searching.settings, found.calibrated
    apart = None if calibrated is None else log_calibrated(calibrated, searching.runtime)
    if not settings.labelled and (calibrated is None or found.schedule != calibrated.schedule):
        apart = losses_at(model, [found.schedule], searching.part, searching.runtime.amp, settings.multi_label)[0]
    return apart


class Reporter(diffrate.Observer):
    """Of the search of `model`: progress, records in the output folder, the best checkpoint."""

    def __init__(self, model: diffrate.CompressedModel, searching: Searching, signals: StopSignals) -> None:
        self.model, self.signals = model, signals
        self.runtime, self.budget, self.val = searching.runtime, searching.budget, searching.val
        # Only against the dense model are losses those of a search at hard counts.
        self.taught = not searching.settings.labelled
        batch = searching.settings.accumulate * (searching.train.batch_size or 1)
        self.images = batch * self.runtime.processes.world  # of a step
        self.epoch: list[diffrate.StepRecord] = []  # steps of this epoch that this process has seen

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
            place = {"epoch": record.epoch, "step": record.step, "done": record.epoch * self.steps + record.step}
            costs = self._costs("", record.flops)
            expected = self.model.compression.space.schedule(record.counts)  # type: ignore[arg-type]  # not rounded
            self.runtime.append(place | fields_of(expected) | costs, STEPS)
            if self.taught:
                figures = {"work": float(STEP_WORK * self.images * (place["done"] + 1)), "loss": self._recent_loss()}
                self.runtime.append({"search": GRADIENT, "stage": "steps"} | figures, WORK)

    def on_score_start(self) -> None:
        assert self.val is not None, "there is something to score on"
        self.show = shown_scores(self.val, self.runtime)

    def on_score(self, tally: Tally) -> None:
        if self.signals.requested:  # what is scored is in the last checkpoint, or a few steps from it
            raise StopRequestedError("stopped while an epoch was scored: go on with --resume")
        self.show(tally)

    def on_epoch(self, record: diffrate.EpochRecord) -> None:
        counts = fields_of(record.schedule)
        figures = {
            "train_loss": record.loss,
            "train_flops_loss": record.flops_loss,
            **self._costs("train_", record.expected_flops),
            "lr": record.learning_rate,
        }
        scores = {"gflops": record.flops / 1e9} if record.scores is None else record.scores.record(record.flops)
        self.runtime.record({"mode": "search", "epoch": record.epoch, **figures, **scores, **counts})
        for name, values in counts.items():
            if values is not None:
                log.info("%s %s", name, list(values))
        if record.scores is not None:
            log.info(record.scores.line(record.flops))
        else:
            log.info("* loss %#.3g flops %.3f", record.loss, record.flops / 1e9)
        if record.best and self.runtime.writes:
            assert self.runtime.output_dir is not None
            with (
                (self.runtime.output_dir / LAST).open("rb") as last,
                whole_file(self.runtime.output_dir / BEST) as best,
            ):
                shutil.copyfileobj(last, best)

    def _recent_loss(self) -> float:
        """The mean over the steps since the last record."""
        recent = self.epoch[-self.runtime.print_freq :]
        return sum(record.loss for record in recent) / len(recent)

    def _describe(self) -> str:
        """Means of the epoch so far."""
        count = len(self.epoch)
        loss = sum(record.loss for record in self.epoch) / count
        cost = sum(record.flops_loss for record in self.epoch) / count
        spent = sum(record.flops for record in self.epoch) / count
        gflops = f"GFLOPs {spent / 1e9:.4f}" if not self.budget.timed else f"ms an image {1000 * spent:.3f}"
        rate = self.epoch[-1].learning_rate
        return f"loss {loss:#.3g}  cost loss {cost:.5f}  {gflops}  lr {rate:.2e}"

    def _costs(self, before: str, spent: float) -> dict[str, float]:
        """An expected cost and its target, for records: in GFLOPs, or in seconds of an image."""
        name, per = ("gflops", 1e9) if not self.budget.timed else ("seconds", 1.0)
        return {f"{before}{name}": spent / per, f"target_{name}": self.budget.target / per}


class TrialReporter(CalibrationObserver):
    """Of a search at hard counts: how far it is, and records of the loss against the work."""

    def __init__(self, runtime: Runtime, signals: StopSignals) -> None:
        self.runtime, self.signals, self.told = runtime, signals, 0.0

    def on_plan(self, images: int, work: float, speed: float) -> None:
        self.work = work
        minutes = work / speed / 60
        log.info(
            "calibrated search: %d images, up to %.0f forward passes of the dense model, about %.1f minutes at %.0f "
            "images/s",
            *(images, work, minutes, speed),
        )

    def on_trials(self, record: TrialRecord) -> None:
        figures = {"work": record.work, "loss": record.loss, "seconds": record.seconds}
        self.runtime.append({"search": CALIBRATED, "stage": "trials"} | figures, WORK)
        if record.seconds - self.told >= TOLD_EVERY:
            self.told = record.seconds
            log.info(
                "Calibrate: [%.0f/%.0f]  %d schedules  loss %#.3g  %.0f s",
                *(record.work, self.work, record.trials, record.loss, record.seconds),
            )

    def stop(self) -> bool:
        return self.signals.requested


def log_calibrated(found: Calibrated, runtime: Runtime) -> float:
    """What each stage took, and whose schedule it is; its loss on the images held back.

    The uniform schedules' losses stay as records.
    """
    for stage in found.stages:
        log.info("took: %-17s %6.0f forward passes of the dense model, %.1f s", stage.name, stage.work, stage.seconds)
    best: dict[str, float] = {}
    for name, loss in found.losses:
        best[name] = min(loss, best.get(name, loss))
    log.info("on images held back: %s", ", ".join(f"{name} {loss:#.3g}" for name, loss in best.items()))
    if len(found.alike) > 1:
        log.info(
            "chosen: %s, the simplest of %s: their losses differ by less than the noise of measurement (%#.3g)",
            *(found.chosen, ", ".join(found.alike), found.noise),
        )
    else:
        log.info("chosen: %s", found.chosen)
    for name, loss in best.items():
        if name.startswith(UNIFORM):
            stage = name.removeprefix(UNIFORM).strip()
            runtime.append({"search": UNIFORM, "stage": stage, "work": 0.0, "loss": loss}, WORK)
    return best[found.chosen]
