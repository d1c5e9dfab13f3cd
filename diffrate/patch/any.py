"""Any ViT that one of the families knows."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.metaformer import MetaFormer
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from diffrate.blocks.forms import UnsupportedModelError
from diffrate.budgets.space import GRANULARITY
from diffrate.patch.base import CompressedModel
from diffrate.patch.beit import CompressedBeit
from diffrate.patch.caformer import caformer
from diffrate.patch.distilled import CompressedDistilled
from diffrate.patch.eva import CompressedEva
from diffrate.patch.naflex import CompressedNaFlex
from diffrate.patch.plain_vit import CompressedVit, patch_vit
from diffrate.patch.relative import CompressedRelPos
from diffrate.patch.sizes import Size, as_size, configured_size
from diffrate.patch.vision_transformer import CompressedVisionTransformer

PLAIN: Mapping[type[nn.Module], type[CompressedVit]] = MappingProxyType(
    {
        VisionTransformer: CompressedVisionTransformer,
        VisionTransformerDistilled: CompressedDistilled,
        Eva: CompressedEva,
        Beit: CompressedBeit,
        VisionTransformerRelPos: CompressedRelPos,
        NaFlexVit: CompressedNaFlex,
    }
)


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
    patch_vit(model, PLAIN[kind], (prune_granularity, merge_granularity), size, return_flop)
    assert isinstance(model, CompressedModel)
    return model
