"""The loops that the command line drives: evaluation, and the epochs of training."""

from __future__ import annotations

import logging
import math
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
from cli.runtime import Runtime
from cli.settings import Mixing, TrainingSettings
from cli.training import Recipe, Teacher, build_recipe
from cli.training_checkpoint import TrainingCheckpoint, TrainingState
from datasets import ImageLoader
from diffrate.group import all_sum
from diffrate.running.compiled import FixedBatch, compile_model
from diffrate.running.evaluation import Tally
from diffrate.running.precision import to_place
from diffrate.seeds import seed_everything, step_seed
from utils import StopRequestedError, StopSignals

log = logging.getLogger(__name__)


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
    """Train the weights of `model` at its fixed rates and score them after every epoch.

    Gives the model as its checkpoint loads: with the average of the weights, where they are averaged.

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
