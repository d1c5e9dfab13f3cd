"""The dense model as the teacher of the compressed one: no labels are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.forms import UnsupportedModelError
from diffrate.budgets.schedule import Schedule
from diffrate.group import all_sum
from diffrate.patch.base import CompressedModel, PlannedCost, has_classifier
from diffrate.patch.features import Features
from diffrate.running.evaluation import modes_kept
from diffrate.running.precision import Place, autocast, place_of


def divergence(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far logits `[B, K]`, or those of all positions `[B, N0, K]`, are from the dense model's, per image, `[B]`.

    The cross-entropy of the dense outputs, less their own entropy: 0 where nothing was lost
    (Kullback and Leibler's divergence); its mean over positions where there are any.
    """
    dense = taught.float().log_softmax(-1)
    apart = (dense.exp() * (dense - outputs.float().log_softmax(-1))).sum(-1).clamp(min=0)
    return apart if apart.ndim == 1 else apart.mean(1)


def angle(outputs: Tensor, taught: Tensor) -> Tensor:
    """How far features `[B, C]`, or those of all positions `[B, N0, C]`, are from the dense model's, per image, `[B]`.

    One less the cosine, its mean over positions where there are any.
    """
    apart = 1 - F.cosine_similarity(outputs.float(), taught.float(), dim=-1)
    return apart if apart.ndim == 1 else apart.mean(1)


class Teacher:
    """The dense model, held against itself compressed: by its outputs (`distill`), or by its patches' features
    (`tokens`).

    Raises:
        UnsupportedModelError: features are asked for, and the model's family has none for every patch.
    """

    def __init__(self, model: CompressedModel, loss: str = "distill") -> None:
        self.model = model
        if loss != "tokens":
            self.at, self.step = model.outputs_at, model.search_step
            self.apart = divergence if has_classifier(model) else angle
        elif isinstance(model, Features):
            self.at, self.step, self.apart = model.features_at, model.search_features, angle
        else:
            raise UnsupportedModelError(
                f"loss: found 'tokens' for {type(model).__name__}, which has no features of every patch; accepted: "
                "'distill'"
            )

    def taught(self, images: Tensor) -> Tensor:
        """What the dense model makes of images; without gradients."""
        with torch.no_grad():
            return self.at(images, self.model.dense_schedule())

    def searching(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """How far a step of the search is from that, a mean that carries gradients, and its expected cost."""
        outputs, spent = self.step(images, cost)
        return self.apart(outputs, self.taught(images)).mean(), spent


@torch.no_grad()
def losses_at(
    model: CompressedModel, schedules: Sequence[Schedule], loader: Iterable[Any], precision: torch.dtype | None = None
) -> list[float]:
    """How far the outputs of `model` at each of the `schedules` are from the dense ones, a mean over all images.

    The batches are images `[B, 3, H, W]`, or pairs of them and labels, which are not looked at.

    Raises:
        ValueError: there is no batch.
    """
    teacher, place = Teacher(model), place_of(model)
    sums = torch.zeros(len(schedules) + 1, dtype=torch.float64, device=place.device)
    with modes_kept(model):
        model.eval()
        for batch in loader:
            images = images_of(batch, place)
            with autocast(place.device, precision):
                dense = teacher.taught(images)
                found = [teacher.at(images, schedule) for schedule in schedules]
            rows = [teacher.apart(outputs, dense).sum() for outputs in found]
            sums += torch.stack([*rows, rows[0].new_tensor(len(images))]).double()
    *totals, count = all_sum(sums).tolist()
    if count == 0:
        raise ValueError("loader: found no batch; accepted: batches of images")
    return [total / count for total in totals]


def images_of(batch: Any, place: Place) -> Tensor:
    """The images of a batch, alone or before labels, where they are computed."""
    images = batch if isinstance(batch, Tensor) else batch[0]
    return images.to(place.device, place.dtype, non_blocking=True)
