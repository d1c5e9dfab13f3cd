"""The loops: evaluation and the epochs of training."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import diffrate
from diffrate.compiled import FixedBatch, compile_model
from processes import all_sum
from progress import with_progress
from recipe import Recipe, build_recipe
from samplers import step_seed
from utils import Runtime, seed_everything

log = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """Training came to a loss that is no number."""


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent and mean loss over `images` images, each counted once."""

    acc1: float
    acc5: float
    loss: float
    images: int

    def line(self, flops: int) -> str:
        """The published closing line; `flops` in multiply-accumulates."""
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f} flops {flops / 1e9:.3f}"

    def record(self, flops: int) -> dict[str, float]:
        """The same for a JSON line."""
        return {
            "acc1": self.acc1,
            "acc5": self.acc5,
            "loss": self.loss,
            "images": self.images,
            "gflops": flops / 1e9,
        }


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader[Any], runtime: Runtime) -> Scores:
    """Score a compressed model on images and labels, summed over all processes.

    Raises:
        DataError: an image cannot be read.
    """
    model.eval()
    # Sums of loss, top-1 hits, top-5 hits and images stay on the device: no sync inside the loop.
    sums = torch.zeros(4, dtype=torch.float64, device=runtime.device)

    def describe() -> str:
        loss, top1, top5, images = sums.tolist()
        return f"loss {loss / images:.4f}  acc@1 {100 * top1 / images:.3f}  acc@5 {100 * top5 / images:.3f}"

    count = len(loader.dataset)  # type: ignore[arg-type]
    for images, labels in with_progress(loader, len(loader), "Test", count, describe, runtime):
        images, labels = to_device(images, labels, runtime)
        with runtime.autocast():
            logits = model(images, return_flop=False)
        sums += _batch_sums(logits.float(), labels)
    loss, top1, top5, images = all_sum(sums).tolist()
    return Scores(100 * top1 / images, 100 * top5 / images, loss / images, int(images))


def finetune(
    model: diffrate.CompressedModel,
    args: Namespace,
    train: DataLoader[Any],
    val: DataLoader[Any],
    classes: int,
    runtime: Runtime,
) -> Scores:
    """Train the weights of `model` at its fixed rates and score them after every epoch.

    Leaves `checkpoint.pth` (last) and `model_best.pth` (best top-1) in the output folder.

    Raises:
        NonFiniteLossError: the loss is no number; names the step.
    """
    seed_everything(step_seed(args.seed, runtime.processes.rank))  # mixup and drop path differ by process
    for rate in model.arch_parameters():  # fixed counts: only weights learn
        rate.requires_grad_(False)
    compiled: nn.Module = compile_model(model) if args.compile else model
    evaluated = FixedBatch(compiled, args.batch_size) if args.compile else model
    trained = _distributed(compiled, runtime)
    images_per_step = args.batch_size * runtime.processes.world
    recipe = build_recipe(args, model, classes, images_per_step, len(train), runtime.amp)
    scores = best = None
    for epoch in range(args.epochs):
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # both samplers of build.py have it
        record = finetune_epoch(trained, model, recipe, train, epoch, runtime)
        scores = evaluate(evaluated, val, runtime)
        record |= {"mode": "finetune", "model": args.model, "epoch": epoch, **scores.record(model.flops())}
        content = {"model": model.state_dict(), "kept": model.get_kept_num(), "epoch": epoch, "acc1": scores.acc1}
        if recipe.ema is not None:
            averaged = evaluate(recipe.ema.module, val, runtime)
            record["ema_acc1"] = averaged.acc1
            content["model_ema"] = recipe.ema.module.state_dict()
        runtime.record(record)
        runtime.save(content, "checkpoint.pth")
        if best is None or scores.acc1 > best.acc1:
            best = scores
            runtime.save(content, "model_best.pth")
        log.info("%s  best %.3f", scores.line(model.flops()), best.acc1)
    assert scores is not None, "flags make sure of an epoch"
    return scores


def finetune_epoch(
    trained: nn.Module,
    model: diffrate.CompressedModel,
    recipe: Recipe,
    loader: DataLoader[Any],
    epoch: int,
    runtime: Runtime,
) -> dict[str, Any]:
    """Train the weights for one epoch at the model's fixed rates; mean loss and last learning rate.

    `trained` is `model` as it is called: compiled, distributed, or itself.

    Raises:
        NonFiniteLossError: the loss is no number; names the step.
    """
    trained.train()
    total, done = 0.0, 0

    def describe() -> str:
        return f"loss {total / done:.4f}  lr {recipe.learning_rate():.2e}"

    count = len(loader) * (loader.batch_size or 1) * runtime.processes.world
    progress = with_progress(loader, len(loader), f"Epoch [{epoch}]", count, describe, runtime)
    for step, (images, labels) in enumerate(progress):
        update = epoch * len(loader) + step
        if recipe.scheduler is not None:
            recipe.scheduler.step_update(update)
        loss = _train_step(trained, recipe, *to_device(images, labels, runtime), runtime).item()
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss} at epoch {epoch}, step {step}; try a lower --lr or --amp off")
        if recipe.ema is not None:
            recipe.ema.update(model, step=update)
        total, done = total + loss, done + 1
    summed, steps = all_sum(torch.tensor([total, done], dtype=torch.float64, device=runtime.device)).tolist()
    return {"train_loss": summed / steps, "train_lr": recipe.learning_rate()}


def _train_step(model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, runtime: Runtime) -> Tensor:
    """One update of the weights; the loss before it, detached."""
    if recipe.mixup is not None:
        images, labels = recipe.mixup(images, labels)
    with runtime.autocast():
        logits = model(images, return_flop=False)
    loss = recipe.criterion(logits.float(), labels)
    recipe.optimizer.zero_grad(set_to_none=True)
    recipe.scaler.scale(loss).backward()
    if recipe.clip_grad is not None:
        recipe.scaler.unscale_(recipe.optimizer)
        dispatch_clip_grad(model.parameters(), recipe.clip_grad)
    recipe.scaler.step(recipe.optimizer)
    recipe.scaler.update()
    return loss.detach()


def _batch_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, top-1 hits, top-5 hits (of fewer classes: all) and images of one batch, `[4]`."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    counts = torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(labels))])
    return counts.double()


def to_device(images: Tensor, labels: Tensor, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """A batch on the device that computes."""
    images = images.to(runtime.device, runtime.dtype, non_blocking=True)
    return images, labels.to(runtime.device, non_blocking=True)


def _distributed(model: nn.Module, runtime: Runtime) -> nn.Module:
    """`model` with gradients averaged over all processes; itself on a single one."""
    if runtime.processes.world == 1:
        return model
    return DistributedDataParallel(model, device_ids=[runtime.device] if runtime.device.type == "cuda" else None)
