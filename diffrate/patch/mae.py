"""Fine-tuned MAE: the mean over the patch tokens speaks for the image."""

from __future__ import annotations

from torch import nn

from diffrate.budgets.space import GRANULARITY
from diffrate.patch.published import published_vit
from diffrate.patch.vision_transformer import CompressedVisionTransformer


def mae(
    model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY
) -> CompressedVisionTransformer:
    """Patch a timm ViT with mean pooling, in place. The search leaves the first and last block whole.

    The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: `model` is no plain ViT with a class token and mean pooling.
        RateError: a granularity below 1.
    """
    return published_vit(model, "avg", (prune_granularity, merge_granularity))
