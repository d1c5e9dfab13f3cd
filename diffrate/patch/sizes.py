"""Which images a model is meant for."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn

from diffrate.blocks.forms import UnsupportedModelError

DEFAULT_INPUT = (3, 224, 224)
Size = tuple[int, int]


def configured_size(model: nn.Module) -> Size:
    """Height and width in the model's `pretrained_cfg`; 224 pixels where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or DEFAULT_INPUT
    return height, width


def channels_of(model: Any) -> int:
    """Channels of the images that a model takes: timm says it on the model from 1.0.26 on, else its stem shows it."""
    for part in (model, getattr(model, "embeds", None)):
        channels = getattr(part, "in_chans", None)
        if channels is not None:
            return channels
    return next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), DEFAULT_INPUT[0])


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a patched `model` takes."""
    height, width = model.image_size
    return channels_of(model), height, width


def as_size(size: Any, name: str = "input_size") -> Size:
    """Height and width in pixels, of both or of one side; `name` stands for them in messages.

    Raises:
        UnsupportedModelError: `size` is neither.
    """
    try:
        sides = [operator.index(side) for side in (size if isinstance(size, list | tuple) else (size, size))]
    except TypeError:
        sides = []
    if len(sides) != 2 or min(sides) < 1:
        raise UnsupportedModelError(f"{name}: found {size!r}; accepted: height and width in pixels, or a side")
    return sides[0], sides[1]
