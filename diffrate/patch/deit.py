"""DeiT: the class token speaks for the image."""

from __future__ import annotations

from torch import nn

from diffrate.budgets.space import GRANULARITY
from diffrate.patch.published import published_vit
from diffrate.patch.vision_transformer import CompressedVisionTransformer


def deit(
    model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY
) -> CompressedVisionTransformer:
    """Patch a timm ViT with a class token, in place. The search leaves block 0 whole.

    The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: `model` is no plain ViT that classifies from its class token.
        RateError: a granularity below 1.
    """
    return published_vit(model, "token", (prune_granularity, merge_granularity))
