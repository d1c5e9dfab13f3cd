"""timm's Eva class: EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others with rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.eva import Eva
from torch import Tensor

from diffrate.blocks.positions import Positions
from diffrate.patch.plain_vit import CompressedVit
from diffrate.patch.rotary import rotary_positions


class CompressedEva(CompressedVit, Eva):
    """Angles of rotary embeddings go with the tokens; absolute ones, where there are any, are in the features."""

    rope: Any

    def left_out(self) -> int:
        return 0 if self.global_pool == "map" else super().left_out()

    def train_to_search(self) -> None:
        """Without the shifted angles of training, which evaluation never has."""
        super().train_to_search()
        if self.rope is not None:
            self.rope.eval()

    @property
    def looks_up_places(self) -> bool:
        return self.rope is not None

    def positions(self) -> Sequence[Positions]:
        if self.rope is None:
            return super().positions()
        # With a fixed size timm has made the angles for it; other modules want to know the grid.
        cached = not self.dynamic_img_size and hasattr(self.rope, "feat_shape")
        angles = self.rope.get_embed() if cached else self.rope.get_embed(shape=list(self.token_grid))
        return rotary_positions(angles, self.blocks, self.num_prefix_tokens)

    def embed(self, images: Tensor) -> Tensor:
        x, _ = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(x)
