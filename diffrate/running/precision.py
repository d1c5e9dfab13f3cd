"""Where a model computes, and in which precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """The device of a model and the type of its weights, which its images take."""

    device: torch.device
    dtype: torch.dtype


def place_of(model: nn.Module, device: torch.device | str | None = None) -> Place:
    """Where `model` is, or is to be."""
    weight = next(model.parameters())
    return Place(weight.device if device is None else torch.device(device), weight.dtype)


def to_place(images: Tensor, labels: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """A batch where it is computed."""
    return images.to(place.device, place.dtype, non_blocking=True), labels.to(place.device, non_blocking=True)


def default_precision(device: torch.device) -> torch.dtype | None:
    """What to autocast to where nobody says: float16 on a GPU, as published, and nothing elsewhere."""
    return torch.float16 if device.type == "cuda" else None


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `precision`; None and float32 are none."""
    enabled = precision is not None and precision != torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else None, enabled=enabled)
