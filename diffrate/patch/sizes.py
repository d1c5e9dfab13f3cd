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


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a patched `model` takes."""
    height, width = model.image_size
    return getattr(model, "in_chans", 3), height, width


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
