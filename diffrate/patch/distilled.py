"""DeiT with a distillation token beside the class token: both stand for the image."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

from diffrate.blocks.tokens import TokenState
from diffrate.patch.plain_vit import CompressedVit
from diffrate.patch.shapes import weights


class CompressedDistilled(CompressedVit, VisionTransformerDistilled):
    """Importance is the mean of the two tokens' attention; the logits are the mean of their two heads'."""

    def class_tokens(self) -> int:
        return 2

    @property
    def read(self) -> int | None:
        return 2

    def head_weights(self) -> int:
        return weights(self.head) + weights(self.head_dist)

    def classify(self, state: TokenState) -> Tensor:
        return self.forward_head(self.norm(state.x))
