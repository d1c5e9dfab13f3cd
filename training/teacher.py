"""The dense model as a teacher beside the labels: the weights that a training starts from, all tokens kept."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diffrate
from diffrate.searching.teacher import divergence

TEMPERATURE = 1.0


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

        Both outputs are divided by the temperature, and gradients keep their size by its square (Hinton et al., 2015).
        """
        apart = divergence(outputs.float() / TEMPERATURE, taught.float() / TEMPERATURE).mean() * TEMPERATURE**2
        return (1 - self.weight) * loss + self.weight * apart


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
