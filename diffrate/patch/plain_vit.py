"""What all plain ViTs of timm share: a patch embedding, blocks that are alike, a pooling, a head.

A family is a subclass beside timm's class that states its differences; see `timm_families.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from timm.layers.patch_embed import PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError, check_block, check_methods
from diffrate.blocks.heads import Positions
from diffrate.blocks.reduction import IntoMostSimilarKept, Mean, ReceivedAttention, ReductionRule
from diffrate.blocks.tokens import TokenState, replaced
from diffrate.flops import BlockShape, Count, VitShape, vit_flops
from diffrate.patch.base import CompressedModel, PlannedCost, compress, mlps_of
from diffrate.patch.features import POOLS, as_map, pool_parts, pooled, restore
from diffrate.patch.parts import ClassAndMean
from diffrate.patch.shapes import (
    Size,
    as_size,
    block_shape,
    channels_of,
    check_layers,
    configured_size,
    pooling_flops,
    stem_flops,
    weights,
)
from diffrate.schedule import Schedule, SearchSpace

LEAST_PATCHES = 2  # one is nothing to choose from
# Typed as a ViT for the reader and the type checker; at run time the families mix it in themselves.
_Vit = VisionTransformer if TYPE_CHECKING else nn.Module


def _refusal(method: str) -> Any:
    """A method of timm's that changes what kept counts are for, refused."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise UnsupportedModelError(f"{method}: found a patched model; accepted: one not yet patched")

    return refuse


class CompressedVit(CompressedModel, _Vit):
    """Mixed in before timm's class by the families. `shape` is what its cost depends on, but for the head.

    Its features are those of the present kept counts: every position has the features of the token that stands for
    it; where it was pruned, what its token was when it went.
    """

    blocks: Any  # typed by timm as plain modules
    shape: VitShape
    uncalled = ("forward_features", "forward_head", "pool", "_pool", "_forward_embeds")

    def compressible_blocks(self) -> Sequence[nn.Module]:
        return self.blocks

    @property
    def token_grid(self) -> Size:
        return self.grid_at(self.image_size)

    @property
    def stem(self) -> Any:
        """The module that makes patches of images."""
        return self.patch_embed

    def grid_at(self, size: Size) -> Size:
        rows, columns = self.stem.dynamic_feat_size(size)
        return rows, columns

    def class_tokens(self) -> int:
        """How many of the first tokens stand for the whole image."""
        return int(self.cls_token is not None)

    def left_out(self) -> int:
        """How many of the first tokens the pooling does not look at."""
        return 0 if getattr(self, "pool_include_prefix", False) else self.num_prefix_tokens

    @property
    def read(self) -> int | None:
        return 1 if self.global_pool == "token" else None

    def embedding_flops(self, size: Size) -> int:
        """Multiply-accumulates of making the tokens of an image of `size`, prefix counted too, as published."""
        if type(self.stem) in (PatchEmbed, NaFlexEmbeds):
            return self.tokens_at(size) * self.stem.proj.weight.numel()
        return stem_flops(self.stem, channels_of(self), size)

    def tokens_at(self, size: Size) -> int:
        """Tokens of an image of `size`, prefix included."""
        return prod(self.grid_at(size)) + self.num_prefix_tokens

    def head_weights(self) -> int:
        """Weights of the classifier: each is used once an image, or once a position where there is no pooling."""
        return weights(self.head)

    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        uses = 1 if self.global_pool else self.compression.space.limits[0]
        return vit_flops(self.shape, self.head_weights() * uses, counts)

    def check_around(self) -> None:
        super().check_around()
        refused = pool_parts(self)
        if not isinstance(getattr(self, "patch_drop", None), nn.Identity | None):
            refused.append("patch_drop")
        if refused:
            accepted = f"global_pool of {', '.join(map(repr, ('', *POOLS)))}, and no patch_drop"
            raise UnsupportedModelError(f"found {', '.join(refused)}; accepted: {accepted}")
        if isinstance(pool := getattr(self, "attn_pool", None), nn.Module):
            check_methods(pool, "attn_pool")

    def embed(self, images: Tensor) -> tuple[Tensor, Sequence[Positions]]:
        return self.norm_pre(self._pos_embed(self.patch_embed(images))), self.no_positions()

    def reset_classifier(self, num_classes: int, *args: Any, **options: Any) -> None:
        """timm's: another head, and another pooling where one is given. The kept counts stay as they are.

        Raises:
            UnsupportedModelError: a pooling that compression does not handle, or parts that were replaced.
            ScheduleError: the counts that are set leave too few tokens for the pooling.
        """
        self.check_parts()
        super().reset_classifier(num_classes, *args, **options)
        _check_parts(self)
        space, self.shape = _described(self, self.image_size, self.shape.blocks)  # whose layers may be others by now
        before = self.compression
        if space != before.space:  # other blocks may be searched now
            compress(self, space, (before.granularity["prune"], before.granularity["merge"]))
            if before.schedule is not None:
                self.schedule = before.schedule

    prune_intermediate_layers = _refusal("prune_intermediate_layers")
    set_input_size = _refusal("set_input_size")

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised features `[B, N0, C]` of images `x` `[B, 3, H, W]`, prefix tokens first.

        Raises:
            ValueError: a mask is asked for, or the images make another grid of tokens.
        """
        _refuse_masks(attn_mask, is_causal)
        return self._features(x, self.schedule)

    def features_at(self, images: Tensor, schedule: Schedule) -> Tensor:
        """Normalised features `[B, N0, C]` of the patches alone at `schedule`, whatever the model is set to."""
        return self._features(images, schedule)[:, self.num_prefix_tokens :]

    def search_features(self, images: Tensor, cost: PlannedCost | None = None) -> tuple[Tensor, Tensor]:
        """The same in a step of the search, with the expected cost as in `search_step`; both carry gradients."""
        entry = self.enter(images, TokenState.remembered)
        state, spent = self._search(entry.state.masked(), entry.positions, None, cost)
        return self.norm(restore(state))[:, self.num_prefix_tokens :], spent

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """What some blocks leave of images `x` `[B, 3, H, W]`, and normalised features of the last, as in timm.

        `indices` are the blocks, or how many of the last; `norm` normalises; maps are `[B, C, rows, columns]`,
        or tokens `[B, N, C]` for the format "NLC", paired with the prefix tokens on request where there are any.
        Only the maps with `intermediates_only`; no block after the last that was asked for runs with
        `stop_early`; under timm's names with `output_dict`.

        Raises:
            ValueError: another format, a mask, or images of another grid of tokens.
        """
        _refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: found {output_fmt!r}; accepted: 'NCHW' or 'NLC'")
        taken, highest = feature_take_indices(len(self.compressible_blocks()), indices)
        states = self.run_blocks(self.enter(x, TokenState.remembered), highest + 1 if stop_early else None)
        tokens = [self.norm(restore(states[i])) if norm else restore(states[i]) for i in taken]
        prefix = self.num_prefix_tokens
        prefixes, maps = ([one[:, part] for one in tokens] for part in (slice(prefix), slice(prefix, None)))
        if output_fmt == "NCHW":
            maps = [as_map(patches, self.token_grid).contiguous() for patches in maps]
        last = None if intermediates_only else self.norm(restore(states[-1]))
        with_prefix = return_prefix_tokens and prefix > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            found |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            return found if last is None else found | {"image_features": last}
        left = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
        return left if last is None else (last, left)

    def _features(self, images: Tensor, schedule: Schedule) -> Tensor:
        entry = self.enter(images, TokenState.remembered)
        return self.norm(restore(self.run(self.steps(entry, schedule, whole=True), entry.state)))

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


Vit = TypeVar("Vit", bound=CompressedVit)


def _refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask, is_causal: found a mask; accepted: none, tokens are compressed for whole images")


def patch_vit(
    model: Any, kind: type[Vit], granularity: tuple[int, int], input_size: Size | None = None, return_flop: bool = True
) -> Vit:
    """Turn `model`, in place, into a compressed one of `kind`, for images of `input_size` where it takes any.

    The search by gradient leaves the first block whole; also the last one where all that it leaves is read.
    `granularity` is that of pruning and of merging.

    Raises:
        UnsupportedModelError: a part of the model is not handled, or the size is not its own.
        RateError: a granularity below 1.
    """
    original = type(model)
    model.__class__ = kind  # the family's methods say what there is to know
    try:
        _check_parts(model)
        check_layers(model)
        size = _image_size(model, input_size)
        space, shape = _described(model, size, tuple(map(block_shape, model.blocks)))
        prefix, importance = model.num_prefix_tokens, ReceivedAttention(model.class_tokens())
        rule = ReductionRule(prefix, importance, IntoMostSimilarKept(spared=prefix), Mean(cosine_sizes=True))
        compress(model, space, granularity, rule=rule, image_size=size, shape=shape, return_flop=return_flop)
        model.mlps = mlps_of(model)
    except Exception:
        model.__class__ = original  # nothing half-patched is left behind
        raise
    return model


def _image_size(model: CompressedVit, wanted: Size | None) -> Size:
    """Height and width of the images that `model` is for: its own, or those `wanted`, which are refused where it does
    not take them."""
    own = getattr(model.stem, "img_size", None)
    height, width = configured_size(model) if own is None else own
    usual, any_size = (height, width), own is None or getattr(model, "dynamic_img_size", False)
    if wanted is None or (wanted == usual and not any_size):  # also where patches do not tile it: timm drops the rest
        return usual
    found = f"input_size: found {_sides(wanted)}"
    if not any_size:
        raise UnsupportedModelError(f"{found}; accepted: {_sides(usual)}, which the model is built for")
    if prod(model.grid_at(wanted)) < LEAST_PATCHES:
        raise UnsupportedModelError(f"{found}; accepted: {LEAST_PATCHES} patches at least")
    patch = as_size(model.stem.patch_size, "patch_size")  # 1 after a convolutional stem
    if not model.stem.dynamic_img_pad and any(side % step for side, step in zip(wanted, patch, strict=True)):
        raise UnsupportedModelError(f"{found}; accepted: multiples of {_sides(patch)}, a patch's sides")
    return wanted


def _sides(size: Size) -> str:
    return " x ".join(map(str, size))


def _check_parts(model: CompressedVit) -> None:
    """Refuse a model with parts that are not handled, by their names."""
    model.check_around()
    check_methods(model, "model")
    for index, block in enumerate(model.blocks):
        check_block(block, f"blocks.{index}")


def _described(model: CompressedVit, size: Size, blocks: tuple[BlockShape, ...]) -> tuple[SearchSpace, VitShape]:
    """What there is to choose in a model, and what its cost depends on. Refuses one with too few blocks."""
    depth, prefix, left_out = len(model.blocks), model.num_prefix_tokens, model.left_out()
    whole = {0} if model.read is not None else {0, depth - 1}
    searchable = tuple(block for block in range(depth) if block not in whole)
    if not searchable:
        raise UnsupportedModelError(f"blocks: found {depth}; accepted: from {len(whole) + 1}")
    # A patch stays where the prefix says nothing of the image. A class token does, unless the pooling leaves it out.
    pool = getattr(model, "attn_pool", None)
    unseen = model.global_pool == "map" and (left_out == prefix or isinstance(pool, ClassAndMean))
    least = prefix + int(unseen or not model.class_tokens())
    space = SearchSpace((model.tokens_at(size),) * depth, searchable, prunes=True, prefix=prefix, least=least)
    return space, VitShape(model.embedding_flops(size), blocks, pooling_flops(model), left_out)
