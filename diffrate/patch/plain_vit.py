"""What DeiT and MAE share: a plain timm ViT with a class token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from diffrate.blocks.block import BlockNames, ReductionRules, UnsupportedModelError, check_block
from diffrate.budgets.flops import Count, VitShape, vit_flops
from diffrate.budgets.space import SearchSpace
from diffrate.patch.base import CompressedModel
from diffrate.patch.state import CompressionState

# Typed as a ViT for the reader and the type checker; at run time the families mix it in themselves.
_Vit = VisionTransformer if TYPE_CHECKING else nn.Module


class CompressedVit(CompressedModel, _Vit):
    """Mixed in before timm's VisionTransformer by the families."""

    names = BlockNames(attention="attn", branch1=("ls1", "drop_path1"), branch2=("ls2", "drop_path2"))
    rules = ReductionRules(class_token=True, weigh_by_similarity=True)
    blocks: Any  # typed by timm as plain modules

    def compressible_blocks(self) -> Sequence[nn.Module]:
        return self.blocks

    @property
    def token_grid(self) -> tuple[int, int]:
        rows, columns = self.patch_embed.grid_size
        return rows, columns

    def cost(self, counts: Iterable[tuple[Count, Count]]) -> Count | int:
        return vit_flops(_shape(self), counts)

    def embed(self, images: Tensor) -> Tensor:
        return self.norm_pre(self._pos_embed(self.patch_embed(images)))


def patch_vit(
    model: nn.Module, compressed: type[CompressedVit], pool: str, whole: set[int], granularity: tuple[int, int]
) -> None:
    """Turn `model`, in place, into a `compressed`.

    `whole` are the blocks that the search leaves alone, counted from the end when negative;
    `granularity` is that of pruning and of merging.

    Raises:
        UnsupportedModelError: `model` is not a plain ViT that pools by `pool`, or has too few blocks.
        RateError: a granularity below 1.
    """
    _check_vit(model, pool, compressed.names)
    assert isinstance(model, VisionTransformer)
    depth = len(model.blocks)
    space = SearchSpace(
        limits=(model.patch_embed.num_patches + 1,) * depth,
        searchable=tuple(block for block in range(depth) if not {block, block - depth} & whole),
        prunes=True,
        class_token=True,
    )
    if not space.searchable:
        raise UnsupportedModelError(f"found {depth} blocks; accepted: one at least that may reduce tokens")
    compression = CompressionState(space, *granularity).to(next(model.parameters()).device)
    model.__class__ = compressed
    assert isinstance(model, CompressedVit)
    height, width = model.patch_embed.img_size
    model.image_size = height, width
    model.add_module("compression", compression)


def _check_vit(model: Any, pool: str, names: BlockNames) -> None:
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
    for index, block in enumerate(model.blocks):
        where = f"blocks.{index}"
        if type(block) is not Block or type(block.attn) is not Attention:
            kinds = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            raise UnsupportedModelError(f"{where}: found {kinds}; accepted: timm's Block with Attention")
        check_block(block, names, where)


def _shape(model: CompressedVit) -> VitShape:
    patch = model.patch_embed.proj
    return VitShape(
        tokens=model.compression.space.limits[0],
        width=model.embed_dim,
        hidden=model.blocks[0].mlp.fc1.out_features,
        patch_inputs=patch.in_channels * patch.kernel_size[0] * patch.kernel_size[1],
        classes=model.num_classes,
    )
