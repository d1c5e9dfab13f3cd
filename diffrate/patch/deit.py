"""DeiT: the class token speaks for the image."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate.patch.vit import CompressedVit, patch_vit
from diffrate.tokens import TokenState


class CompressedDeit(CompressedVit, VisionTransformer):
    """A DeiT whose blocks prune and merge tokens."""

    def classify(self, state: TokenState) -> Tensor:
        return self.forward_head(self.norm(state.x))


def deit(model: nn.Module) -> CompressedDeit:
    """Patch a timm ViT with a class token, in place; it keeps every token until `set_kept_num`.

    Raises:
        UnsupportedModelError: `model` is no plain ViT that classifies from its class token.
    """
    patch_vit(model, CompressedDeit, pool="token")
    assert isinstance(model, CompressedDeit)
    return model
