"""Which images a model is meant for."""

from __future__ import annotations

from torch import nn

DEFAULT_INPUT = (3, 224, 224)


def configured_size(model: nn.Module) -> tuple[int, int]:
    """Height and width in the model's `pretrained_cfg`; 224 pixels where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or DEFAULT_INPUT
    return height, width
