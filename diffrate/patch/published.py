"""The two plain forms that the paper compresses: a class token alone in front, and one of two poolings."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from diffrate.blocks.forms import UnsupportedModelError
from diffrate.patch.plain_vit import patch_vit
from diffrate.patch.vision_transformer import CompressedVisionTransformer


def published_vit(model: Any, pool: str, granularity: tuple[int, int]) -> CompressedVisionTransformer:
    """Patch a timm VisionTransformer with a class token alone in front, which pools by `pool`, in place.

    Raises:
        UnsupportedModelError: `model` is another.
        RateError: a granularity below 1.
    """
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
    patch_vit(model, CompressedVisionTransformer, granularity)
    assert isinstance(model, CompressedVisionTransformer)
    return model
