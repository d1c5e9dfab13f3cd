"""The dense model as the teacher of the compressed one: no labels are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.block import UnsupportedModelError
from diffrate.device import all_sum, autocast, placement_of
from diffrate.evaluation import images_of, modes_kept
from diffrate.patch.base import CompressedModel, PlannedCost, has_classifier
from diffrate.patch.plain_vit import CompressedVit
from diffrate.schedule import Schedule

LEAST_SPREAD = 1e-9  # of outputs, as a share of their mean square: one image alone has none


def divergence(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far logits `[B, K]`, or those of all positions `[B, N0, K]`, are from the dense model's, per image, `[B]`.

    The cross-entropy of the dense outputs, less their own entropy: 0 where nothing was lost
    (Kullback and Leibler's divergence); its mean over positions where there are any.
    """
    dense = taught.float().log_softmax(-1)
    return _an_image((dense.exp() * (dense - outputs.float().log_softmax(-1))).sum(-1).clamp(min=0))


def sigmoid_divergence(outputs: Tensor, taught: Tensor) -> Tensor:
    """The same of outputs that each stand for a label of their own, a mean over them, `[B]`.

    The binary cross-entropy against the dense model's sigmoids, less their own entropy.
    """
    dense, found = taught.float(), outputs.float()
    with_label = dense.sigmoid() * (F.logsigmoid(dense) - F.logsigmoid(found))
    without = (-dense).sigmoid() * (F.logsigmoid(-dense) - F.logsigmoid(-found))
    return _an_image((with_label + without).mean(-1).clamp(min=0))


def squared_error(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far the numbers of a head with one output, `[B, 1]` or `[B, N0, 1]`, are from the dense model's, squared,
    `[B]`: to be divided by the variance of those (`spread_of`)."""
    return _an_image((outputs.float() - taught.float()).square().mean(-1))


def angle(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far features `[B, C]`, or those of all positions `[B, N0, C]`, are from the dense model's, per image, `[B]`.

    One less the cosine, its mean over positions where there are any.
    """
    return _an_image(1 - F.cosine_similarity(outputs.float(), taught.float(), dim=-1))


def _an_image(apart: Tensor) -> Tensor:
    """`[B]` as it is, and of positions `[B, N0]` their mean."""
    return apart if apart.ndim == 1 else apart.mean(1)


def spread_of(moments: Tensor) -> float:
    """The variance of numbers from their `Teacher.moments`, those of all processes, never 0; 1 where there are none."""
    count, total, squares = all_sum(moments).tolist()
    if count == 0:
        return 1.0
    return max(squares / count - (total / count) ** 2, LEAST_SPREAD * squares / count, 1e-12)


class Teacher:
    """The dense model, held against itself compressed: by its outputs (`distill`), or by its patches' features
    (`tokens`).

    multi_label: outputs are sigmoids' and not a softmax's. A head with one output is held by squared errors, which
    count relative to the variance of the dense outputs.

    Raises:
        UnsupportedModelError: features are asked for, and the model's family has none for every patch.
    """

    def __init__(self, model: CompressedModel, loss: str = "distill", multi_label: bool = False) -> None:
        self.model, self.multi_label, self.of_outputs = model, multi_label, loss != "tokens" and has_classifier(model)
        if loss != "tokens":
            self.at, self.step = model.outputs_at, model.search_step
        elif isinstance(model, CompressedVit):
            self.at, self.step = model.features_at, model.search_features
        else:
            raise UnsupportedModelError(
                f"loss: found 'tokens' for {type(model).__name__}, which has no features of every patch; accepted: "
                "'distill'"
            )

    def taught(self, images: Tensor) -> Tensor:
        """What the dense model makes of images; without gradients."""
        with torch.no_grad():
            return self.at(images, self.model.dense_schedule())

    def apart(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """How far outputs are from what was `taught`, per image, `[B]`; squared errors not yet relative."""
        if not self.of_outputs:
            return angle(outputs, taught)
        if self.multi_label:
            return sigmoid_divergence(outputs, taught)
        return (squared_error if self.relative(taught) else divergence)(outputs, taught)

    def relative(self, taught: Tensor) -> bool:
        """Whether `apart` is to be divided by the variance of what was taught."""
        return self.of_outputs and not self.multi_label and taught.shape[-1] == 1

    def moments(self, taught: Tensor) -> Tensor:
        """Number, sum, and sum of squares of what was taught, `[3]`, for `spread_of`; zeros where it is not asked."""
        values = taught.detach().double()
        if not self.relative(taught):
            return values.new_zeros(3)
        return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])

    def searching(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """How far a step of the search is from that, a mean that carries gradients, and its expected cost."""
        outputs, spent = self.step(images, cost)
        taught = self.taught(images)
        apart = self.apart(outputs, taught).mean()
        return apart / spread_of(self.moments(taught)) if self.relative(taught) else apart, spent


@torch.no_grad()
def losses_at(
    model: CompressedModel,
    schedules: Sequence[Schedule],
    loader: Iterable[Any],
    precision: torch.dtype | None = None,
    multi_label: bool = False,
) -> list[float]:
    """How far the outputs of `model` at each of the `schedules` are from the dense ones, a mean over all images.

    The batches are as `split_batch` takes them; labels are not looked at.

    Raises:
        ValueError: there is no batch.
    """
    teacher, place = Teacher(model, multi_label=multi_label), placement_of(model)
    sums = torch.zeros(len(schedules) + 1, dtype=torch.float64, device=place.device)
    moments = torch.zeros(3, dtype=torch.float64, device=place.device)
    with modes_kept(model):
        model.eval()
        for batch in loader:
            images = images_of(batch, place)
            with autocast(place.device, precision):
                dense = teacher.taught(images)
                found = [teacher.at(images, schedule) for schedule in schedules]
            rows = [teacher.apart(outputs, dense).sum() for outputs in found]
            sums += torch.stack([*rows, rows[0].new_tensor(len(images))]).double()
            moments += teacher.moments(dense)
    *totals, count = all_sum(sums).tolist()
    if count == 0:
        raise ValueError("loader: found no batch; accepted: batches of images")
    spread = spread_of(moments)
    return [total / count / spread for total in totals]
