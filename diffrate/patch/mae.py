"""Fine-tuned MAE: the mean over the patch tokens speaks for the image."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate.blocks.tokens import TokenState
from diffrate.budgets.space import GRANULARITY
from diffrate.patch.plain_vit import CompressedVit, patch_vit


class CompressedMae(CompressedVit, VisionTransformer):
    """A fine-tuned MAE whose blocks prune and merge tokens."""

    def classify(self, state: TokenState) -> Tensor:
        pooled = mean_patch(self.norm(state.x), state.sizes(), state.mask)
        return self.head(self.head_drop(self.fc_norm(pooled)))


def mean_patch(x: Tensor, size: Tensor, mask: Tensor | None) -> Tensor:
    """The mean `[B, C]` of the patch tokens of `x` `[B, N, C]`, weighted by `size` `[B, N]`.

    The class token is left out, as in MAE's fine-tuning. Where a schedule leaves nothing else,
    it stands in: there is no other token that has seen the image. In search the `mask` `[B, N]`
    weighs as well, and the sum of the weights takes no gradient, as in the published code.
    """
    if x.shape[1] == 1:
        return x[:, 0]
    weight = (size if mask is None else size * mask)[:, 1:, None]
    total = weight.sum(1)
    return ((x[:, 1:] * weight).sum(1) / (total if mask is None else total.detach())).to(x.dtype)


def mae(model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY) -> CompressedMae:
    """Patch a timm ViT with mean pooling, in place. The search leaves the first and last block whole.

    The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: `model` is no plain ViT with a class token and mean pooling.
        RateError: a granularity below 1.
    """
    patch_vit(model, CompressedMae, "avg", {0, -1}, (prune_granularity, merge_granularity))
    assert isinstance(model, CompressedMae)
    return model
