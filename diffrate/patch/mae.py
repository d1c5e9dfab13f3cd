"""Fine-tuned MAE: the mean over the patch tokens speaks for the image."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate.patch.vit import CompressedVit, patch_vit
from diffrate.tokens import TokenState


class CompressedMae(CompressedVit, VisionTransformer):
    """A fine-tuned MAE whose blocks prune and merge tokens."""

    def classify(self, state: TokenState) -> Tensor:
        pooled = mean_patch(self.norm(state.x), state.sizes())
        return self.head(self.head_drop(self.fc_norm(pooled)))


def mean_patch(x: Tensor, size: Tensor) -> Tensor:
    """The mean `[B, C]` of the patch tokens of `x` `[B, N, C]`, weighted by `size` `[B, N]`.

    The class token is left out, as in MAE's fine-tuning. Where a schedule leaves nothing else,
    it stands in: there is no other token that has seen the image.
    """
    if x.shape[1] == 1:
        return x[:, 0]
    weight = size[:, 1:, None]
    return ((x[:, 1:] * weight).sum(1) / weight.sum(1)).to(x.dtype)


def mae(model: nn.Module) -> CompressedMae:
    """Patch a timm ViT with mean pooling, in place; it keeps every token until `set_kept_num`.

    Raises:
        UnsupportedModelError: `model` is no plain ViT with a class token and mean pooling.
    """
    patch_vit(model, CompressedMae, pool="avg")
    assert isinstance(model, CompressedMae)
    return model
