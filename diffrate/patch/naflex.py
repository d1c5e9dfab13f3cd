"""timm's NaFlexVit at one size of images: any grid, with or without rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from diffrate.blocks.positions import Positions
from diffrate.patch.plain_vit import CompressedVit, Size
from diffrate.patch.rotary import rotary_positions
from diffrate.patch.sizes import configured_size


class CompressedNaFlex(CompressedVit, NaFlexVit):
    """Takes images alone, all of one size; batches of patches of several sizes are not compressed."""

    rope: Any
    embeds: Any

    def built_for(self) -> Size | None:
        return None

    def usual_size(self) -> Size:
        return configured_size(self)

    def grid_at(self, size: Size) -> Size:
        rows, columns = self.embeds.dynamic_feat_size(size)
        return rows, columns

    def speakers(self) -> int:
        return int(self.embeds.cls_token is not None)

    def embedding_flops(self, size: Size) -> int:
        return self.tokens_at(size) * self.embeds.proj.weight.numel()

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
        angles = self.rope.get_embed(shape=list(self.token_grid))
        return rotary_positions(angles, self.blocks, self.num_prefix_tokens)

    def embed(self, images: Tensor) -> Tensor:
        x, _ = self.embeds(images)
        return self.norm_pre(x)
