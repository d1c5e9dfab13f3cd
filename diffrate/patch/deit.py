"""DeiT: the class token speaks for the image."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate.blocks.tokens import TokenState
from diffrate.budgets.space import GRANULARITY
from diffrate.patch.plain_vit import CompressedVit, patch_vit


class CompressedDeit(CompressedVit, VisionTransformer):
    """A DeiT whose blocks prune and merge tokens."""

    reads_class_token_alone = True

    def classify(self, state: TokenState) -> Tensor:
        return self.forward_head(self.norm(state.x))


def deit(
    model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY
) -> CompressedDeit:
    """Patch a timm ViT with a class token, in place. The search leaves block 0 whole.

    The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: `model` is no plain ViT that classifies from its class token.
        RateError: a granularity below 1.
    """
    patch_vit(model, CompressedDeit, "token", {0}, (prune_granularity, merge_granularity))
    assert isinstance(model, CompressedDeit)
    return model
