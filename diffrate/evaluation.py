"""`diffrate.evaluate`: loss and accuracy over batches, and the accepted forms of batches and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.block import UnsupportedModelError
from diffrate.device import Group, all_parts, all_sum, autocast, place_for
from diffrate.patch.base import CompressedModel, has_classifier

IMAGES = ("pixel_values", "image", "images", "img", "input")
LABELS = ("labels", "label", "target", "targets")
ACCEPTED = (
    "images [B, channels, H, W] of floats, alone, in a tuple or list before labels, or in a mapping as "
    f"{', '.join(IMAGES)}, labels as {', '.join(LABELS)}"
)


def split_batch(batch: Any) -> tuple[Tensor, Any]:
    """The images `[B, channels, H, W]` of a batch, and its labels as they come; None where there are none.

    Raises:
        ValueError: the batch has another form, or its images have no batch dimension or are no floats.
    """
    whole = type(batch).__name__
    images, labels, inside = batch, None, ""
    if isinstance(batch, Mapping):
        images, labels = (next((batch[name] for name in names if name in batch), None) for names in (IMAGES, LABELS))
        inside = f" in a {whole} with the names {', '.join(map(repr, batch)) or 'none'}"
    elif isinstance(batch, tuple | list):
        images, labels = (*batch[:2], None, None)[:2]
        inside = f" in a {whole} of {len(batch)}"
    if not isinstance(images, Tensor):
        found = "no images" if images is None else type(images).__name__
    elif images.ndim != 4:
        found = f"images of the shape {list(images.shape)}"
    elif not images.is_floating_point():
        found = f"images of {str(images.dtype).removeprefix('torch.')}"
    else:
        return images, labels
    raise ValueError(f"batch: found {found}{inside}; accepted: {ACCEPTED}")


def require_batches(loader: Any) -> None:
    """Refuse what is neither iterable nor a loader with `batches_from`, with a ValueError."""
    if not any(hasattr(loader, name) for name in ("__iter__", "__getitem__", "batches_from")):
        raise ValueError(
            f"loader: found {type(loader).__name__}; accepted: a DataLoader, a list, any iterable of batches"
        )


Batches = Iterable[Any]  # as `split_batch` takes them, with labels


class ScoresError(ValueError):
    """Labels or outputs that cannot be scored, or a package that is missing for it."""


@dataclass(frozen=True)
class Scores:
    """Mean loss over `images` images, each counted once, and the figures of the head.

    acc1, acc5: accuracies in percent, of a softmax (the loss is cross-entropy); NaN for other heads.
    mae, r2: mean absolute error and coefficient of determination, of a head with one output (the loss is the mean
        squared error); None for other heads. r2 is NaN where all labels are the same.
    mean_average_precision: from 0 to 1, over the classes that occur, of several labels an image (the loss is binary
        cross-entropy); None for other heads.
    """

    acc1: float
    acc5: float
    loss: float
    images: int
    mae: float | None = None
    r2: float | None = None
    mean_average_precision: float | None = None

    @property
    def ranked(self) -> tuple[str, float]:
        """The name and the value of the figure that models are ranked by: the larger, the better."""
        if self.mean_average_precision is not None:
            return "mAP", self.mean_average_precision
        return ("top-1", self.acc1) if self.r2 is None else ("R2", self.r2)

    def line(self, flops: int) -> str:
        """The published closing line; `flops` in multiply-accumulates."""
        names = {"acc1": "Acc@1", "acc5": "Acc@5", "mae": "MAE", "r2": "R2", "mean_average_precision": "mAP"}
        figures = " ".join(f"{names[name]} {value:.3f}" for name, value in self._figures().items())
        return f"* {figures} loss {self.loss:.3f} flops {flops / 1e9:.3f}"

    def record(self, flops: int) -> dict[str, float]:
        """The same for a JSON line."""
        return self._figures() | {"loss": self.loss, "images": self.images, "gflops": flops / 1e9}

    def _figures(self) -> dict[str, float]:
        if self.mean_average_precision is not None:
            return {"mean_average_precision": self.mean_average_precision}
        if self.mae is not None and self.r2 is not None:
            return {"mae": self.mae, "r2": self.r2}
        return {"acc1": self.acc1, "acc5": self.acc5}


class Tally:
    """The scores of the batches so far. Sums stay on the device, which is not synchronised until they are read.

    group: the processes whose batches are `shared`, as `evaluate` takes it.
    kept: outputs and labels `[B, 2, K]` of each batch, for heads whose figures are no sums.

    Raises:
        ScoresError: `multi_label` is set, and scikit-learn is missing.
    """

    def __init__(self, device: torch.device, multi_label: bool = False, group: Group = None) -> None:
        # Loss, top-1 hits, top-5 hits, and images.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.kept: list[Tensor] = []
        self.group = group
        self.average_precision: Any = None
        if multi_label:
            try:
                self.average_precision = import_module("sklearn.metrics").average_precision_score
            except ImportError as error:
                accepted = "after pip install scikit-learn, or diffrate[multilabel]"
                raise ScoresError(f"multi_label: found no scikit-learn; accepted: {accepted}") from error

    @property
    def loss(self) -> float:
        """The mean of this process's batches."""
        return float(self.sums[0] / self.sums[3])

    def add(self, logits: Tensor, labels: Any) -> None:
        """One batch: `logits` `[B, K]`, and labels as `evaluate` takes them.

        Raises:
            ScoresError: the logits have another shape, or the labels do not fit them.
        """
        if logits.ndim != 2:
            raise ScoresError(f"outputs: found the shape {list(logits.shape)}; accepted: [B, classes], with a pooling")
        multi_label = self.average_precision is not None
        if multi_label or logits.shape[1] == 1:
            targets = multi_hot(labels, logits)
            wrong = targets[(targets != 0) & (targets != 1)] if multi_label else targets[:0]
            if wrong.numel():
                raise ScoresError(f"labels: found {wrong[0]:g} with multi_label; accepted: 0 and 1")
            measure = F.binary_cross_entropy_with_logits if multi_label else F.mse_loss
            loss = measure(logits.double(), targets, reduction="none").mean(1).sum()
            self.kept.append(torch.stack([logits.double(), targets], dim=1))
            counts = torch.stack([loss, *loss.new_tensor([0, 0, len(logits)])])
        else:
            classes = class_indices(labels, logits)
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]  # of fewer classes: all
            loss = F.cross_entropy(logits, classes, reduction="sum")
            counts = torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(classes))])
        self.sums += counts.double()

    def scores(self) -> Scores:
        """Of this process's batches."""
        return self._scores(self.sums, self._rows())

    def shared(self) -> Scores:
        """Of the batches of all processes; a ValueError where there is none."""
        sums = all_sum(self.sums.clone(), self.group)
        if sums[3] == 0:
            raise ValueError("loader: found no batch; accepted: batches of images and labels")
        return self._scores(sums, list(chain(*all_parts(self._rows(), self.group))))

    def _rows(self) -> list[Tensor]:
        return [torch.cat(self.kept).cpu()] if self.kept else []

    def _scores(self, sums: Tensor, rows: list[Tensor]) -> Scores:
        total, top1, top5, images = sums.tolist()
        loss, count = total / images, int(images)
        if not rows:
            return Scores(100 * top1 / images, 100 * top5 / images, loss, count)
        outputs, targets = torch.cat(rows).unbind(1)
        if self.average_precision is None:
            error = (targets - outputs).square().sum()
            around = (targets - targets.mean()).square().sum()
            r2 = float(1 - error / around) if around > 0 else math.nan
            return Scores(math.nan, math.nan, loss, count, mae=float((targets - outputs).abs().mean()), r2=r2)
        occurring = targets.any(0).nonzero().flatten().tolist()
        if not occurring:
            raise ScoresError("labels: found no 1 with multi_label; accepted: from one, for a mean average precision")
        mean = math.nan
        if math.isfinite(loss):
            each = (self.average_precision(targets[:, k].numpy(), outputs[:, k].numpy()) for k in occurring)
            mean = float(sum(each) / len(occurring))
        return Scores(math.nan, math.nan, loss, count, mean_average_precision=mean)


def class_indices(labels: Any, logits: Tensor) -> Tensor:
    """Labels `[B]`, class indices for logits `[B, K]`, on the device of the logits; a ScoresError for any others."""
    accepted = f"class indices [{len(logits)}], integers from 0 to {logits.shape[-1] - 1}"
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or labels.shape != logits.shape[:1]:
        raise ScoresError(f"labels: found {_described(labels)}; accepted: {accepted}")
    classes = labels.long()
    outside = (classes < 0) | (classes >= logits.shape[-1])
    if outside.any():
        raise ScoresError(f"labels: found {int(classes[outside][0])}; accepted: {accepted}")
    return classes.to(logits.device, non_blocking=True)


def multi_hot(labels: Any, logits: Tensor) -> Tensor:
    """Labels `[B, K]`, or class indices `[B]` as one-hot, in float64 on the device of the logits `[B, K]`; for one
    output, `[B]` are its labels. A ScoresError for any others."""
    count, one = len(logits), logits.shape[1] == 1
    if isinstance(labels, Tensor) and labels.ndim == 1 and not one:
        return F.one_hot(class_indices(labels, logits), logits.shape[1]).double()
    shapes, accepted = [logits.shape], f"{list(logits.shape)} of 0 and 1, or class indices [{count}]"
    if one:
        shapes, accepted = [logits.shape, logits.shape[:1]], f"numbers [{count}] or [{count}, 1]"
    if not isinstance(labels, Tensor) or labels.is_complex() or labels.shape not in shapes:
        raise ScoresError(f"labels: found {_described(labels)}; accepted: {accepted}")
    return labels.to(logits.device, torch.float64, non_blocking=True).view_as(logits)


def _described(labels: Any) -> str:
    if isinstance(labels, Tensor):
        return f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
    return "none" if labels is None else f"a {type(labels).__name__}"


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    multi_label: bool = False,
    device: torch.device | str | None = None,
    precision: torch.dtype | None = None,
    callback: Callable[[Tally], None] | None = None,
    group: Group = None,
) -> Scores:
    """Score `model`, patched or plain, on batches of images `[B, 3, H, W]` and labels.

    The model runs in evaluation mode, on `device` (default: its own) and under autocast to `precision` (default:
    that of its weights); its training mode is restored afterwards. Inside an initialised process group the images of
    all processes count. `callback` is called with the scores so far after each batch.

    Args:
        loader: batches that are tuples or lists, images first and labels second, or mappings with `pixel_values`,
            `image`, `images`, `img` or `input`, and `labels`, `label`, `target` or `targets`. Labels are class
            indices `[B]`; of a head with one output numbers, `[B]` or `[B, 1]`.
        multi_label: each output is a label of its own, by a sigmoid: labels are 0 and 1, `[B, K]`, or class indices
            `[B]`. Needs scikit-learn.
        group: of torch.distributed: the processes whose images count. All of them call this. None: the default group.

    Raises:
        UnsupportedModelError: the model has no head.
        ScoresError: labels do not fit the head, the model gives no logits, or scikit-learn is missing.
        TypeError: the model is none of torch, or `group` no process group.
        ValueError: there is no batch, or one of another form; no such device or precision, or weights without
            storage; or this process is not in `group`.
    """
    require_batches(loader)
    place = place_for(model, device, group)
    if not has_classifier(model):
        raise UnsupportedModelError("found a model without a head; accepted: one with classes")
    options: dict[str, Any] = {}
    # A compressed model may be inside a compiled, a distributed or a filled-up one: these hand on what they are told.
    if any(isinstance(module, CompressedModel) for module in model.modules()):
        taken = signature(model.forward).parameters
        if "return_flop" in taken or any(one.kind is Parameter.VAR_KEYWORD for one in taken.values()):
            options["return_flop"] = False
    tally = Tally(place.device, multi_label, group)
    # Outside inference mode weights stay fit for training, and so do images that the loader keeps.
    model.to(place.device)
    with evaluating(model):
        for batch in loader:
            images, labels = split_batch(batch)
            with torch.inference_mode(), autocast(place.device, precision):
                found = model(place.take(images), **options)
                logits = getattr(found, "logits", found)  # of transformers' outputs
                if not isinstance(logits, Tensor):
                    accepted = "logits [B, K]; from a patched model inside another, by return_flop=False at patching"
                    raise ScoresError(f"outputs: found a {type(found).__name__}; accepted: {accepted}")
                tally.add(logits.float(), labels)
            if callback is not None:
                callback(tally)
    return tally.shared()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; after it every module of `model` has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
