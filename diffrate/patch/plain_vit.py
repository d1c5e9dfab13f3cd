"""What all plain ViTs of timm share: a patch embedding, blocks that are alike, a pooling, a head.

A family is a subclass beside timm's class that states its differences; see the short files beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate.blocks.forms import UnsupportedModelError, check_block, check_methods
from diffrate.blocks.heads import Positions
from diffrate.blocks.reduction import published_rule
from diffrate.blocks.tokens import TokenState, replaced
from diffrate.flops import Count, VitShape, vit_flops
from diffrate.patch.base import CompressedModel
from diffrate.patch.features import Features, restore
from diffrate.patch.pooling import POOLS, pool_parts, pooled
from diffrate.patch.shapes import Size, as_size, block_shape, channels_of, pool_shape, stem_flops, weights
from diffrate.patch.state import CompressionState
from diffrate.schedule import Schedule, SearchSpace

LEAST_PATCHES = 2  # one is nothing to choose from
# Typed as a ViT for the reader and the type checker; at run time the families mix it in themselves.
_Vit = VisionTransformer if TYPE_CHECKING else nn.Module


class CompressedVit(Features, CompressedModel, _Vit):
    """Mixed in before timm's class by the families. `shape` is what its cost depends on, but for the head."""

    blocks: Any  # typed by timm as plain modules
    shape: VitShape

    def compressible_blocks(self) -> Sequence[nn.Module]:
        return self.blocks

    @property
    def token_grid(self) -> Size:
        return self.grid_at(self.image_size)

    def grid_at(self, size: Size) -> Size:
        """Rows and columns of patches of images of `size`, height and width."""
        rows, columns = self.patch_embed.dynamic_feat_size(size)
        return rows, columns

    def patch_sides(self) -> Size:
        """Height and width of a patch, or of what a convolutional stem before the patches leaves of one: 1."""
        return as_size(self.patch_embed.patch_size, "patch_size")

    def pads(self) -> bool:
        """Whether images that patches do not tile are padded."""
        return bool(self.patch_embed.dynamic_img_pad)

    def built_for(self) -> Size | None:
        """Height and width of the only images that the model takes; None where it takes any."""
        return None if getattr(self, "dynamic_img_size", False) else self.usual_size()

    def usual_size(self) -> Size:
        """Height and width of the images that are meant when nobody says."""
        height, width = self.patch_embed.img_size
        return height, width

    def class_tokens(self) -> int:
        """How many of the first tokens stand for the whole image: none where the model has no class token."""
        return int(self.cls_token is not None)

    def left_out(self) -> int:
        """How many of the first tokens the pooling does not look at."""
        return 0 if getattr(self, "pool_include_prefix", False) else self.num_prefix_tokens

    @property
    def read(self) -> int | None:
        return 1 if self.global_pool == "token" else None

    def embedding_flops(self, size: Size) -> int:
        """Multiply-accumulates of making the tokens of an image of `size`, prefix counted too, as published."""
        stem = self.patch_embed
        if type(stem) is PatchEmbed:
            return self.tokens_at(size) * stem.proj.weight.numel()
        return stem_flops(stem, channels_of(self), size)

    def tokens_at(self, size: Size) -> int:
        """Tokens of an image of `size`, prefix included."""
        rows, columns = self.grid_at(size)
        return rows * columns + self.num_prefix_tokens

    def head_weights(self) -> int:
        """Weights of the classifier: each is used once an image, or once a position where there is no pooling."""
        return weights(self.head)

    def fewest(self) -> int:
        """The least that a block may keep: the prefix, and a patch where that says nothing of the image.

        A class token does, unless attention pooling does not look at it.
        """
        unseen = self.global_pool == "map" and self.left_out() == self.num_prefix_tokens
        return self.num_prefix_tokens + int(unseen or not self.class_tokens())

    def refused(self) -> list[str]:
        """What compression does not handle in this model, for a message."""
        dropped = getattr(self, "patch_drop", None)
        return pool_parts(self) + (["patch_drop"] if not isinstance(dropped, nn.Identity | None) else [])

    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        uses = 1 if self.global_pool else self.compression.space.limits[0]
        return vit_flops(self.shape, self.head_weights() * uses, counts)

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        return self.norm_pre(self._pos_embed(self.patch_embed(images))), self.no_positions()

    def reset_classifier(self, num_classes: int, *args: Any, **options: Any) -> None:
        """timm's: another head, and another pooling where one is given. The kept counts stay as they are.

        Raises:
            UnsupportedModelError: a pooling that compression does not handle.
            ScheduleError: the counts that are set leave too few tokens for the pooling.
        """
        super().reset_classifier(num_classes, *args, **options)
        _check(self)
        self.shape = _shape(self, self.image_size)
        space, before = _space(self, self.image_size), self.compression
        if space != before.space:  # other blocks may be searched now
            granularity = (before.granularity["prune"], before.granularity["merge"])
            self.compression = CompressionState(space, *granularity).to(next(self.parameters()).device)
            if before.schedule is not None:
                self.set_kept_num(before.schedule.prune, before.schedule.merge)

    def prune_intermediate_layers(self, *_: Any, **__: Any) -> Any:
        """timm's, which leaves out blocks that kept counts are for.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError("prune_intermediate_layers: found a patched model; accepted: one not yet patched")

    def set_input_size(self, *_: Any, **__: Any) -> None:
        """timm's, which changes the number of tokens that kept counts are for.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError("set_input_size: found a patched model; accepted: one not yet patched")

    def has_head(self) -> bool:
        return bool(self.global_pool) and super().has_head()

    def prepared(self, state: TokenState, schedule: Schedule | None) -> TokenState:
        """Where there is no pooling, the head looks at every position of the grid."""
        return state if self.global_pool else state.remembered()

    def classify(self, state: TokenState) -> Tensor:
        if self.global_pool:
            features = pooled(self, replaced(state, x=self.norm(state.x)), self.left_out())
        else:
            features = self.norm(restore(state))
        return self.head(self.head_drop(self.fc_norm(features)))


def patch_vit(
    model: Any,
    compressed: type[CompressedVit],
    granularity: tuple[int, int],
    input_size: Size | None = None,
    return_flop: bool = True,
) -> None:
    """Turn `model`, in place, into a `compressed`, for images of `input_size` where it takes any.

    The search leaves the first block whole; also the last one where all that it leaves is read.
    `granularity` is that of pruning and of merging.

    Raises:
        UnsupportedModelError: a part of the model is not handled, or the size is not its own.
        RateError: a granularity below 1.
    """
    original = type(model)
    model.__class__ = compressed  # the family's methods say what there is to know
    try:
        _check(model)
        size = _image_size(model, input_size)
        space, shape = _space(model, size), _shape(model, size)
        compression = CompressionState(space, *granularity).to(next(model.parameters()).device)
    except Exception:
        model.__class__ = original  # nothing half-patched is left behind
        raise
    model.rule = published_rule(model.num_prefix_tokens, model.class_tokens())
    model.image_size, model.shape, model.return_flop = size, shape, return_flop
    model.add_module("compression", compression)


def _check(model: CompressedVit) -> None:
    refused = model.refused()
    if refused:
        pools = ", ".join(map(repr, ("", *POOLS)))
        raise UnsupportedModelError(f"found {', '.join(refused)}; accepted: global_pool of {pools}, and no patch_drop")
    check_methods(model, "model")
    for index, block in enumerate(model.blocks):
        check_block(block, f"blocks.{index}")


def _image_size(model: CompressedVit, wanted: Size | None) -> Size:
    built = model.built_for()
    if wanted is None or wanted == built:  # also where patches do not tile it: timm drops what is left over
        return built or model.usual_size()
    if built is not None:
        raise UnsupportedModelError(f"{_named(wanted)}; accepted: {_sides(built)}, which the model is built for")
    if model.grid_at(wanted)[0] * model.grid_at(wanted)[1] < LEAST_PATCHES:
        raise UnsupportedModelError(f"{_named(wanted)}; accepted: {LEAST_PATCHES} patches at least")
    patch, pads = model.patch_sides(), model.pads()
    if not pads and any(side % step for side, step in zip(wanted, patch, strict=True)):
        raise UnsupportedModelError(f"{_named(wanted)}; accepted: multiples of {_sides(patch)}, a patch's sides")
    return wanted


def _named(size: Size) -> str:
    return f"input_size: found {_sides(size)}"


def _sides(size: Size) -> str:
    return " x ".join(map(str, size))


def _space(model: CompressedVit, size: Size) -> SearchSpace:
    depth, prefix = len(model.blocks), model.num_prefix_tokens
    whole = {0} if model.read is not None else {0, depth - 1}
    searchable = tuple(block for block in range(depth) if block not in whole)
    if not searchable:
        raise UnsupportedModelError(f"blocks: found {depth}; accepted: from {len(whole) + 1}")
    return SearchSpace(
        limits=(model.tokens_at(size),) * depth,
        searchable=searchable,
        prunes=True,
        prefix=prefix,
        least=model.fewest(),
    )


def _shape(model: CompressedVit, size: Size) -> VitShape:
    return VitShape(
        embedding=model.embedding_flops(size),
        blocks=tuple(block_shape(block) for block in model.blocks),
        pool=pool_shape(model),
        left_out=model.left_out(),
    )
