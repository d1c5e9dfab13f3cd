"""Scores of a model on labelled images, on one process or summed over many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.forms import UnsupportedModelError
from diffrate.group import all_sum
from diffrate.patch.base import CompressedModel, has_classifier
from diffrate.running.precision import autocast, place_of, to_place

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent and mean loss (cross-entropy) over `images` images, each counted once."""

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


class Tally:
    """The scores of the batches so far. Sums stay on the device: no sync until somebody asks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1 hits, top-5 hits, images

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """One batch: `logits` `[B, K]` and `labels` `[B]`."""
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # of fewer classes: all
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(labels))])
        self.sums += counts.double()

    def scores(self) -> Scores:
        """Of this process's batches."""
        return _scores(self.sums)


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    callback: Callable[[Tally], None] | None = None,
) -> Scores:
    """Score `model` on batches of images `[B, 3, H, W]` and labels `[B]`; patched or plain.

    The model runs in evaluation mode, on `device` (by default where it is) and under autocast to
    `precision` (by default in its weights' own), and has its training mode back afterwards. Inside an
    initialised process group the images of all processes count. `callback` is told after each batch.

    Raises:
        UnsupportedModelError: the model has no head.
        ValueError: there is no batch.
    """
    if not has_classifier(model):
        raise UnsupportedModelError("found a model without a head; accepted: one with classes")
    place = place_of(model, device)
    options: dict[str, Any] = {"return_flop": False} if _is_compressed(model) else {}
    tally = Tally(place.device)
    model.to(place.device)  # outside inference mode: the weights stay fit for training
    with torch.inference_mode(), modes_kept(model):
        model.eval()
        for images, labels in loader:
            images, labels = to_place(images, labels, place)
            with autocast(place.device, precision):
                logits = model(images, **options)
            tally.add(logits.float(), labels)
            if callback is not None:
                callback(tally)
    total = all_sum(tally.sums)
    if total[3] == 0:
        raise ValueError("loader: found no batch; accepted: batches of images and labels")
    return _scores(total)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module of `model` in training or evaluation mode as before, after the block."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _is_compressed(model: nn.Module) -> bool:
    """Also compiled, distributed or filled up: then it is a module inside."""
    return any(isinstance(module, CompressedModel) for module in model.modules())


def _scores(sums: Tensor) -> Scores:
    loss, top1, top5, images = sums.tolist()
    return Scores(100 * top1 / images, 100 * top5 / images, loss / images, int(images))
