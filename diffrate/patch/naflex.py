"""timm's NaFlexVit at one size of images: any grid, with or without rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from diffrate.blocks.positions import Positions
from diffrate.patch.rotary import RotaryVit
from diffrate.patch.sizes import Size, as_size, configured_size


class CompressedNaFlex(RotaryVit, NaFlexVit):
    """Takes images alone, all of one size; batches of patches of several sizes are not compressed."""

    embeds: Any

    def built_for(self) -> Size | None:
        return None

    def usual_size(self) -> Size:
        return configured_size(self)

    def grid_at(self, size: Size) -> Size:
        rows, columns = self.embeds.dynamic_feat_size(size)
        return rows, columns

    def patch_sides(self) -> Size:
        return as_size(self.embeds.patch_size, "patch_size")

    def pads(self) -> bool:
        return bool(self.embeds.dynamic_img_pad)

    def class_tokens(self) -> int:
        return int(self.embeds.cls_token is not None)

    def embedding_flops(self, size: Size) -> int:
        return self.tokens_at(size) * self.embeds.proj.weight.numel()

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x, _ = self.embeds(images)
        angles = None if self.rope is None else self.rope.get_embed(shape=list(self.token_grid))
        return self.norm_pre(x), self.turned_by(angles)

    def settle(self) -> None:
        embeds = self.embeds
        if embeds.pos_embed is None or tuple(embeds.pos_embed.shape[1:3]) == self.token_grid:
            return
        rows, columns = self.token_grid
        positions = embeds.pos_embed.new_zeros(1, rows * columns, embeds.pos_embed.shape[-1])
        embeds._apply_learned_pos_embed(positions, [rows, columns])
        embeds.pos_embed = nn.Parameter(positions.view(1, rows, columns, -1), requires_grad=False)
