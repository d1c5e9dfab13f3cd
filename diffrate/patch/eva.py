"""timm's Eva class: EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others with rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.eva import Eva
from torch import Tensor

from diffrate.blocks.positions import Positions
from diffrate.patch.rotary import RotaryVit


class CompressedEva(RotaryVit, Eva):
    """Angles of rotary embeddings go with the tokens; absolute ones, where there are any, are in the features."""

    def left_out(self) -> int:
        return 0 if self.global_pool == "map" else super().left_out()

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x, angles = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(x), self.turned_by(angles)
