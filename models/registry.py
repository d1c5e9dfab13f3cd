"""Register the zoo's names with timm and build models from them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import is_model, register_model
from torch import nn

from models.checkpoint import load_weights
from models.download import official_file
from models.errors import InputSizeError
from models.zoo import ModelEntry


def create(entry: ModelEntry, input_size: int | None = None, **options: Any) -> nn.Module:
    """The dense timm model of a zoo entry with fresh weights, for square images of `input_size`.

    `options` override the entry's. What the model's inputs are like is in its `pretrained_cfg`.

    Raises:
        InputSizeError: the patches of a ViT do not tile the input, or it is smaller than a convolution.
    """
    # The class count is given always: timm's default for ViT-H has no head.
    options = {"num_classes": entry.num_classes, **entry.options, **options}
    given = options.pop("img_size", entry.input_size)
    size = input_size or (given if isinstance(given, int) else given[0])
    # timm's ViTs take their size from here, too; the convolutions of CAFormer take any.
    inputs = {
        "input_size": (3, size, size),
        "crop_pct": entry.crop_pct,
        "mean": entry.mean,
        "std": entry.std,
        "interpolation": entry.interpolation,
    }
    model: Any = timm.create_model(entry.architecture, pretrained=False, pretrained_cfg_overlay=inputs, **options)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0]
    if hasattr(model, "stem"):
        conv = model.stem.conv
        least = conv.kernel_size[0] - 2 * conv.padding[0]
        if size < least:
            raise InputSizeError(f"--input-size {size}: accepted: from {least}, what the first convolution takes")
    if size % patch:
        raise InputSizeError(f"--input-size {size}: accepted: a multiple of {patch}, the side of a patch")
    return model


def register(zoo: Mapping[str, ModelEntry]) -> None:
    """Make each name of `zoo` known to `timm.create_model`; names that timm has itself stay timm's."""
    for entry in zoo.values():
        if not is_model(entry.name):
            _register_one(entry)


def _register_one(entry: ModelEntry) -> None:
    def build(
        pretrained: bool = False,
        pretrained_cfg: object = None,  # timm passes both; the zoo says where weights come from
        pretrained_cfg_overlay: object = None,
        **options: Any,
    ) -> nn.Module:
        model = create(entry, **options)
        if pretrained:
            load_weights(model, official_file(entry))
        return model

    build.__name__ = build.__qualname__ = entry.name
    setattr(sys.modules[__name__], entry.name, build)  # timm looks builders up in their module
    register_model(build)
