"""Any ViT that one of the families knows."""

from __future__ import annotations

from typing import Any

from timm.models.metaformer import MetaFormer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from diffrate.blocks.block import UnsupportedModelError
from diffrate.budgets.space import GRANULARITY
from diffrate.patch.base import CompressedModel
from diffrate.patch.caformer import caformer
from diffrate.patch.deit import deit
from diffrate.patch.mae import mae

DEFAULT_INPUT = (3, 224, 224)
POOLS = {"token": deit, "avg": mae}


def vit(
    model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY
) -> CompressedModel:
    """Patch a timm ViT in place, by the family that its structure shows.

    A VisionTransformer that classifies from its class token is `deit`'s, one that pools by the mean `mae`'s, and
    a MetaFormer `caformer`'s, for images of the size in its `pretrained_cfg` (224 pixels where there is
    none). The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: no family handles `model`.
        RateError: a granularity below 1.
    """
    family = FAMILIES.get(type(model))
    if family is None:
        accepted = " or ".join(kind.__name__ for kind in FAMILIES)
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a timm {accepted} not yet patched")
    return family(model, prune_granularity, merge_granularity)


def _plain_vit(model: Any, prune_granularity: int, merge_granularity: int) -> CompressedModel:
    family = POOLS.get(model.global_pool)
    if family is None:
        accepted = " or ".join(map(repr, POOLS))
        raise UnsupportedModelError(f"found global_pool={model.global_pool!r}; accepted: {accepted}")
    return family(model, prune_granularity, merge_granularity)


def _metaformer(model: Any, prune_granularity: int, merge_granularity: int) -> CompressedModel:
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or DEFAULT_INPUT
    if height != width:
        raise UnsupportedModelError(f"found images of {height} by {width} pixels; accepted: square ones")
    return caformer(model, prune_granularity, merge_granularity, input_size=height)


FAMILIES = {VisionTransformer: _plain_vit, MetaFormer: _metaformer}
