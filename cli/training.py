"""DeiT's training recipe from settings, through timm's factories: optimizer, schedule, loss, mixup, EMA; and the dense
model as a teacher beside the labels: the weights that a training starts from, all tokens kept."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

import diffrate
from cli.runtime import Runtime
from cli.settings import Mixing, TrainingSettings
from diffrate.atomic import UNREADABLE, first_line
from diffrate.searching.teacher import divergence
from utils import UsageError

SCALED_BATCH = 512  # DeiT scales the learning rate by images per step / 512


@dataclass(frozen=True)
class Teacher:
    """`model` says what the trained one should, and `weight`, from 0 to 1, how much it counts beside the labels."""

    model: nn.Module
    weight: float

    def outputs(self, images: Tensor) -> Tensor:
        """The dense logits `[B, K]`, without gradients."""
        with torch.no_grad():
            return self.model(images, return_flop=False)

    def mixed(self, loss: Tensor, outputs: Tensor, taught: Tensor) -> Tensor:
        """The labels' `loss` and the divergence of `outputs` from what was `taught`, by their weights.

        It is that of Hinton et al. (2015) at a temperature of 1.
        """
        apart = divergence(outputs.float(), taught.float()).mean()
        return (1 - self.weight) * loss + self.weight * apart


@dataclass
class Recipe:
    """All that a training step needs besides model and data."""

    optimizer: Optimizer
    scheduler: Scheduler | None
    criterion: nn.Module
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    scaler: torch.amp.GradScaler
    clip_grad: float | None
    teacher: Teacher | None = None

    def learning_rate(self) -> float:
        """The rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]


def build_recipe(
    settings: TrainingSettings,
    mixing: Mixing,
    model: nn.Module,
    classes: int,
    images_per_step: int,
    steps: int,
    amp: torch.dtype | None,
    seed: int,
    teacher: Teacher | None = None,
) -> Recipe:
    """The recipe of `steps` steps an epoch at `images_per_step` images over all processes.

    Raises:
        UsageError: an optimizer that timm does not know, or cannot make here.
    """
    optimizer = _optimizer(settings, model, images_per_step)
    device = next(model.parameters()).device
    return Recipe(
        optimizer=optimizer,
        scheduler=_scheduler(settings, optimizer, steps, seed),
        criterion=build_criterion(mixing),
        mixup=build_mixup(mixing, classes),
        ema=ModelEmaV3(model, decay=settings.average_decay, use_warmup=True) if settings.average else None,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        clip_grad=settings.clip_grad,
        teacher=teacher,
    )


def step_rate(settings: TrainingSettings, images_per_step: int) -> float:
    """The learning rate that the schedule starts from, at so many images a step over all processes."""
    scale = 1.0 if settings.unscaled else images_per_step / SCALED_BATCH
    return settings.learning_rate * scale


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
    known = [name for name in list_optimizers() if not get_optimizer_info(name).second_order]  # one gradient a step
    if settings.optimizer.lower() not in known:
        raise UsageError(
            f"--opt {settings.optimizer}: unknown to timm, or of second order; accepted: {', '.join(map(str, known))}"
        )
    try:
        return create_optimizer_v2(
            model,
            opt=settings.optimizer,
            lr=step_rate(settings, images_per_step),
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # it needs a GPU, or a momentum
        raise UsageError(
            f"--opt {settings.optimizer}: {first_line(error)}; accepted: one that runs here, at this --momentum"
        ) from error


def _scheduler(settings: TrainingSettings, optimizer: Optimizer, steps: int, seed: int) -> Scheduler | None:
    """Stepped on updates, so that the rate falls within epochs too and ends at its minimum."""
    warmup = settings.warmup_epochs
    if warmup is None:
        warmup = 5 if settings.epochs > 5 else 0
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
    schedule = dense.dense_schedule()
    dense.set_kept_num(schedule.prune, schedule.merge)
    return dense.requires_grad_(False).eval()


def digest(model: nn.Module) -> str:
    """What tells the weights of `model` from others."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


KIND = "finetune"
LAST, BEST = "checkpoint.pth", "model_best.pth"
SAVE_SECONDS = 600.0  # in the middle of an epoch: a checkpoint holds three times the weights


@dataclass
class TrainingState:
    """Where a training stands: steps done in this epoch, their losses added up, the best top-1 so far."""

    epoch: int = 0
    step: int = 0
    losses: float = 0.0
    best: float | None = None


class TrainingCheckpoint:
    """The checkpoint of one training in the output folder; `flags` are what it was started with."""

    def __init__(
        self,
        model: diffrate.CompressedModel,
        recipe: Recipe,
        state: TrainingState,
        flags: Mapping[str, Any],
        runtime: Runtime,
    ) -> None:
        self.model, self.recipe, self.state, self.flags, self.runtime = model, recipe, state, flags, runtime
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether the last one is old enough for another in the middle of an epoch."""
        return time.monotonic() - self.saved > SAVE_SECONDS

    def save(self) -> None:
        """Write `checkpoint.pth`: all that is needed to go on."""
        recipe = self.recipe
        content = self._weights() | {
            "optimizer": recipe.optimizer.state_dict(),
            "scaler": recipe.scaler.state_dict(),
            "position": asdict(self.state),
        }
        self.runtime.save(content, LAST)
        self.saved = time.monotonic()

    def save_best(self) -> None:
        """Write `model_best.pth`: the weights."""
        self.runtime.save(self._weights(), BEST)

    def restore(self, path: Path) -> None:
        """Put the training back where the file left it.

        Raises:
            UsageError: the file is missing, damaged, or of something else.
        """
        content = read_training(path)
        try:
            self.model.load_state_dict(content["model"])
            if self.recipe.ema is not None:
                self.recipe.ema.module.load_state_dict(content["model_ema"])
            self.recipe.optimizer.load_state_dict(content["optimizer"])
            self.recipe.scaler.load_state_dict(content["scaler"])
            for name, value in content["position"].items():
                setattr(self.state, name, value)
        except UNREADABLE as error:
            raise UsageError(f"--resume {path}: does not fit this training ({first_line(error)})") from error

    def _weights(self) -> dict[str, Any]:
        content = {
            "mode": KIND,
            "model": self.model.state_dict(),
            "kept": self.model.get_kept_num(),
            "flags": dict(self.flags),
        }
        if self.recipe.ema is not None:
            content["model_ema"] = self.recipe.ema.module.state_dict()
        return content


def read_training(path: Path) -> dict[str, Any]:
    """The content of a training's checkpoint.

    Raises:
        UsageError: the file is missing, damaged, or of something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        where = f"--resume {path}: cannot be read ({first_line(error)})"
        raise UsageError(f"{where}; accepted: the {LAST} of --finetune") from error
    found = content.get("mode", "weights alone") if isinstance(content, dict) else type(content).__name__
    if found != KIND or "position" not in content:
        what = "weights alone" if found == KIND else found
        raise UsageError(f"--resume {path}: found a checkpoint of another kind ({what}); accepted: of --finetune")
    return content


def flags_in(path: str | Path) -> Mapping[str, Any] | None:
    """The flags of the training that left a file, None where it is no such file. Tensors are not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*UNREADABLE, SafetensorError):
        return None
    return content.get("flags") if isinstance(content, dict) and content.get("mode") == KIND else None
