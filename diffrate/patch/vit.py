"""What DeiT and MAE share: a plain timm ViT with a class token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from diffrate.block import BlockNames, ReductionRules, UnsupportedModelError, check_block, fixed_block
from diffrate.flops import VitShape, vit_flops
from diffrate.kept import KeptCounts
from diffrate.patch.base import CompressedModel
from diffrate.schedule import Schedule, running_counts
from diffrate.tokens import TokenState

NAMES = BlockNames(attention="attn", branch1=("ls1", "drop_path1"), branch2=("ls2", "drop_path2"))
RULES = ReductionRules(class_token=True, weigh_by_similarity=True)

# Typed as a ViT for the reader and the type checker; at run time the families mix it in themselves.
_Vit = VisionTransformer if TYPE_CHECKING else nn.Module


class CompressedVit(CompressedModel, _Vit):
    """Mixed in before timm's VisionTransformer by the families."""

    blocks: Any  # typed by timm as plain modules

    @property
    def token_limits(self) -> tuple[int, ...]:
        return (self.patch_embed.num_patches + 1,) * len(self.blocks)

    @property
    def prunes(self) -> bool:
        return True

    def flops_at(self, schedule: Schedule) -> int:
        tokens = self.token_limits[0]
        counts = [(kept.entering, kept.merged) for kept in running_counts(schedule, tokens)]
        return vit_flops(_shape(self), counts)

    def compress(self, images: Tensor, schedule: Schedule, trace: bool) -> TokenState:
        x = self.norm_pre(self._pos_embed(self.patch_embed(images)))
        state = TokenState(x)
        if trace:
            state = state.traced()
        for block, kept in zip(self.blocks, running_counts(schedule, x.shape[1]), strict=True):
            state = fixed_block(block, NAMES, RULES, state, kept)
        return state


def patch_vit(model: nn.Module, compressed: type[CompressedVit], pool: str) -> nn.Module:
    """Turn `model`, in place, into a `compressed` that keeps every token until told otherwise.

    Raises:
        UnsupportedModelError: `model` is not a plain ViT that pools by `pool`.
    """
    _check_vit(model, pool)
    model.__class__ = compressed
    assert isinstance(model, compressed)
    model.add_module("compression", KeptCounts(model.dense_schedule()))
    return model


def _check_vit(model: Any, pool: str) -> None:
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
        check_block(block, NAMES, where)


def _shape(model: CompressedVit) -> VitShape:
    patch = model.patch_embed.proj
    return VitShape(
        tokens=model.token_limits[0],
        width=model.embed_dim,
        hidden=model.blocks[0].mlp.fc1.out_features,
        patch_inputs=patch.in_channels * patch.kernel_size[0] * patch.kernel_size[1],
        classes=model.num_classes,
    )
