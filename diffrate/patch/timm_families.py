"""A class per family of timm's ViTs over `CompressedVit`, and the functions that patch a model by its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.metaformer import MetaFormer
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError
from diffrate.blocks.heads import NO_POSITIONS, PairBias, Positions, Rotary
from diffrate.blocks.tokens import TokenState
from diffrate.patch.base import CompressedModel
from diffrate.patch.caformer import caformer
from diffrate.patch.plain_vit import CompressedVit, patch_vit
from diffrate.patch.shapes import Size, as_size, configured_size, weights
from diffrate.schedule import GRANULARITY


class CompressedVisionTransformer(CompressedVit, VisionTransformer):
    """Positions are in the embeddings; any pooling."""


class CompressedDistilled(CompressedVit, VisionTransformerDistilled):
    """Importance is the mean of the two tokens' attention; the logits are the mean of their two heads'."""

    uncalled = ("forward_features",)

    def class_tokens(self) -> int:
        return 2

    @property
    def read(self) -> int | None:
        return 2

    def head_weights(self) -> int:
        return weights(self.head) + weights(self.head_dist)

    def classify(self, state: TokenState) -> Tensor:
        return self.forward_head(self.norm(state.x))


class RotaryVit(CompressedVit):
    """A ViT with a module for rotary embeddings, or none."""

    rope: Any

    def train_to_search(self) -> None:
        """Without the shifted angles of training, which evaluation never has."""
        super().train_to_search()
        if self.rope is not None:
            self.rope.eval()

    def turned_by(self, angles: Tensor | None) -> Sequence[Positions]:
        """What each block knows of positions, of sines and cosines of the grid's patches.

        `angles` are the same for all blocks, `[N, 2 D]`, or mixed: each block and head has its own,
        `[blocks, H, N, 2 D]`; None for no rotary embedding. The prefix tokens in front are not turned.
        """
        if angles is None:
            return self.no_positions()
        if self.num_prefix_tokens:
            sines, cosines = torch.zeros_like(angles[..., : self.num_prefix_tokens, :]).chunk(2, dim=-1)
            angles = torch.cat([torch.cat([sines, cosines + 1], dim=-1), angles], dim=-2)
        tables = list(angles) if angles.ndim == 4 else [angles] * len(self.blocks)
        # timm reads the layout off the attention, too: the rotary module does not always have it.
        halves = (bool(getattr(block.attn, "rotate_half", False)) for block in self.blocks)
        return [Rotary(own, half) for own, half in zip(tables, halves, strict=True)]


class CompressedEva(RotaryVit, Eva):
    """Angles of rotary embeddings go with the tokens; absolute ones, where there are any, are in the features."""

    def left_out(self) -> int:
        return 0 if self.global_pool == "map" else super().left_out()

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x, angles = self._pos_embed(self.patch_embed(images))
        return self.norm_pre(x), self.turned_by(angles)


class CompressedBeit(CompressedVit, Beit):
    """The bias belongs to pairs of positions: of the tokens that are left, each pair has its own."""

    cls_token: Any
    rel_pos_bias: Any

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return x, [_beit_positions(block.attn, shared) for block in self.blocks]


def _beit_positions(attention: Any, shared: Tensor | None) -> Positions:
    """The bias of one block: its own, the `shared` one `[H, N0, N0]`, both added up, or none."""
    if attention.relative_position_bias_table is None:
        return NO_POSITIONS if shared is None else PairBias(lambda: shared)
    own = attention._get_rel_pos_bias
    return PairBias(lambda: own()[0] if shared is None else own()[0] + shared)


class CompressedRelPos(CompressedVit, VisionTransformerRelPos):
    """The bias belongs to pairs of positions: of the tokens that are left, each pair has its own."""

    shared_rel_pos: Any

    def train_to_search(self) -> None:
        """Without the dropout of the networks that make biases."""
        super().train_to_search()
        for maker in self._makers():
            maker.eval()

    def _makers(self) -> set[Any]:
        """What makes the biases: a module for each block, or one for all."""
        return {block.attn.rel_pos or self.shared_rel_pos for block in self.blocks}

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        x = self.patch_embed(images)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.shared_rel_pos is None:
            return x, [PairBias(lambda own=block.attn.rel_pos: own.get_bias()[0]) for block in self.blocks]
        shared = self.shared_rel_pos.get_bias()[0]
        return x, [PairBias(lambda: shared)] * len(self.blocks)

    def embedding_flops(self, size: Size) -> int:
        """The networks that make biases are counted here: they run once, on each distance that there is. Tables cost
        nothing."""
        networks = (maker for maker in self._makers() if hasattr(maker, "rel_coords_log"))
        biases = sum(maker.rel_coords_log.shape[:-1].numel() * weights(maker.mlp) for maker in networks)
        return super().embedding_flops(size) + biases


class CompressedNaFlex(RotaryVit, NaFlexVit):
    """Takes images alone, all of one size; batches of patches of several sizes are not compressed."""

    embeds: Any

    @property
    def stem(self) -> Any:
        return self.embeds

    def class_tokens(self) -> int:
        return int(self.embeds.cls_token is not None)

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


def published_vit(model: Any, pool: str, granularity: tuple[int, int]) -> CompressedVisionTransformer:
    """Patch a timm VisionTransformer with a class token alone in front, which pools by `pool`; refuse any other."""
    if type(model) is not VisionTransformer:
        raise UnsupportedModelError(f"found {type(model).__name__}; accepted: a timm VisionTransformer not yet patched")
    refused = {
        f"global_pool={model.global_pool!r}": model.global_pool != pool,
        "attn_pool": model.attn_pool is not None,
        f"num_prefix_tokens={model.num_prefix_tokens}": model.num_prefix_tokens != 1 or model.cls_token is None,
        "dynamic_img_size": model.dynamic_img_size,
        "patch_drop": not isinstance(model.patch_drop, nn.Identity),
    }
    found = [name for name, is_there in refused.items() if is_there]
    if found:
        raise UnsupportedModelError(f"found {', '.join(found)}; accepted: a plain ViT with global_pool={pool!r}")
    return patch_vit(model, CompressedVisionTransformer, granularity)


def deit(
    model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY
) -> CompressedVisionTransformer:
    """Patch a timm ViT with a class token, in place. The search leaves block 0 whole.

    The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: `model` is no plain ViT that classifies from its class token.
        RateError: a granularity below 1.
    """
    return published_vit(model, "token", (prune_granularity, merge_granularity))


def mae(
    model: nn.Module, prune_granularity: int = GRANULARITY, merge_granularity: int = GRANULARITY
) -> CompressedVisionTransformer:
    """Patch a timm ViT with mean pooling, in place. The search by gradient leaves the first and last block whole.

    The granularities are the steps between the candidates of a count.

    Raises:
        UnsupportedModelError: `model` is no plain ViT with a class token and mean pooling.
        RateError: a granularity below 1.
    """
    return published_vit(model, "avg", (prune_granularity, merge_granularity))


PLAIN: Mapping[type[nn.Module], type[CompressedVit]] = {
    VisionTransformer: CompressedVisionTransformer,
    VisionTransformerDistilled: CompressedDistilled,
    Eva: CompressedEva,
    Beit: CompressedBeit,
    VisionTransformerRelPos: CompressedRelPos,
    NaFlexVit: CompressedNaFlex,
}


def families() -> tuple[type[nn.Module], ...]:
    """timm's classes that `vit` knows; of some, models with certain parts are refused."""
    return (*PLAIN, MetaFormer)


def vit(
    model: nn.Module,
    prune_granularity: int = GRANULARITY,
    merge_granularity: int = GRANULARITY,
    input_size: int | Size | None = None,
    return_flop: bool = True,
) -> CompressedModel:
    """Patch a timm ViT in place, by the family that its class shows.

    `input_size`, height and width or a side, is for models that take images of any size: one size is what kept counts
    are for; by default what the model was built for, or what its `pretrained_cfg` says. The granularities
    are the steps between the candidates of a count. Without `return_flop` the model's forward gives logits alone, as
    that of a timm model does, so that it can take the place of one inside other modules.

    Raises:
        UnsupportedModelError: no family handles `model`, or it takes images of another size only.
        RateError: a granularity below 1.
    """
    kind = type(model)
    size = None if input_size is None else as_size(input_size)
    if kind is MetaFormer:
        return caformer(model, prune_granularity, merge_granularity, size or configured_size(model), return_flop)
    if kind not in PLAIN:
        accepted = ", ".join(sorted(known.__name__ for known in families()))
        raise UnsupportedModelError(f"found {kind.__name__}; accepted: a model of timm not yet patched, {accepted}")
    return patch_vit(model, PLAIN[kind], (prune_granularity, merge_granularity), size, return_flop)
