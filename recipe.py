"""DeiT's training recipe from flags, through timm's factories: optimizer, schedule, loss, mixup, EMA."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer, list_optimizers
from timm.scheduler import create_scheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from transforms import Augmentation
from utils import UsageError

SCALED_BATCH = 512  # DeiT scales the learning rate by images per step / 512


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

    def learning_rate(self) -> float:
        """The rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]


def build_augmentation(args: Namespace) -> Augmentation:
    """The training transform's part of the flags."""
    return Augmentation(
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa in ("", "none") else args.aa,
        interpolation=args.train_interpolation,
        erase_probability=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        hflip=args.hflip,
        affine=None if args.affine is None else tuple(args.affine),
    )


def build_recipe(
    args: Namespace, model: nn.Module, classes: int, images_per_step: int, steps: int, amp: torch.dtype | None
) -> Recipe:
    """The recipe of `steps` steps an epoch at `images_per_step` images over all processes.

    Raises:
        UsageError: an optimizer or schedule that timm does not know.
    """
    optimizer = _optimizer(args, model, images_per_step)
    device = next(model.parameters()).device
    return Recipe(
        optimizer=optimizer,
        scheduler=_scheduler(args, optimizer, steps),
        criterion=build_criterion(args),
        mixup=build_mixup(args, classes),
        ema=ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        clip_grad=args.clip_grad,
    )


def build_criterion(args: Namespace) -> nn.Module:
    """The training loss: against mixed labels with mixup or cutmix, else with label smoothing."""
    if args.mixup > 0 or args.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def build_mixup(args: Namespace, classes: int) -> Mixup | None:
    """Mixup and cutmix, None when both are off."""
    if args.mixup == 0 and args.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=classes,
    )


def _optimizer(args: Namespace, model: nn.Module, images_per_step: int) -> Optimizer:
    known = list_optimizers()
    if args.opt.lower() not in known:
        raise UsageError(f"--opt {args.opt}: unknown to timm; accepted: {', '.join(map(str, known))}")
    rate = args.lr if args.unscale_lr else args.lr * images_per_step / SCALED_BATCH
    flags = Namespace(opt=args.opt, lr=rate, weight_decay=args.weight_decay, momentum=args.momentum)
    return create_optimizer(flags, model)


def _scheduler(args: Namespace, optimizer: Optimizer, steps: int) -> Scheduler | None:
    """Stepped on updates, so that the rate falls within epochs too and ends at `--min-lr`."""
    warmup = args.warmup_epochs
    if warmup is None:
        warmup = 5 if args.epochs > 5 else 0
    flags = Namespace(
        sched=args.sched,
        epochs=args.epochs,
        warmup_epochs=warmup,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        seed=args.seed,
        sched_on_updates=True,
    )
    return create_scheduler(flags, optimizer, updates_per_epoch=steps)[0]
