"""One small model of every construction of timm's ViTs, plain, in double precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

SIDE = 32
_SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
_SIZED = _SMALL | {"img_size": SIDE, "patch_size": 8}
_NAFLEX = _SMALL | {"patch_size": 8, "pos_embed_grid_size": (3, 3)}  # interpolated to the grid of 4 x 4

# timm's name, and what makes it small; the grid is 4 x 4, of stems that pool 2 x 2 or more.
CONSTRUCTIONS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "class_token": ("vit_tiny_patch16_224", _SIZED),
        "class_token_avg": ("vit_tiny_patch16_224", _SIZED | {"global_pool": "avg"}),
        "no_class_token": ("vit_base_patch16_gap_224", _SIZED),
        "avgmax": ("vit_base_patch16_gap_224", _SIZED | {"global_pool": "avgmax"}),
        "max": ("vit_base_patch16_gap_224", _SIZED | {"global_pool": "max"}),
        "no_pool": ("vit_base_patch16_gap_224", _SIZED | {"global_pool": ""}),
        "registers": ("vit_small_patch14_reg4_dinov2", _SIZED),
        "registers_alone": ("vit_base_patch16_reg4_gap_256", _SIZED),
        "pool_with_prefix": ("vit_base_patch16_reg4_gap_256", _SIZED | {"pool_include_prefix": True}),
        "distilled": ("deit_tiny_distilled_patch16_224", _SIZED),
        "layer_scale": ("deit3_small_patch16_224", _SIZED),
        "qk_norm": ("vit_tiny_patch16_224", _SIZED | {"qk_norm": True}),
        "scale_norms": ("vit_tiny_patch16_224", _SIZED | {"scale_attn_norm": True, "scale_mlp_norm": True}),
        "pre_norm": ("vit_base_patch32_clip_224", _SIZED),
        "swiglu": ("aimv2_large_patch14_224", _SIZED),
        "swiglu_packed": ("vit_giant_patch14_dinov2", _SIZED),
        "post_norm": ("vit_base_patch16_rpn_224", _SIZED | {"block_fn": ResPostBlock}),
        "gated": ("vit_tiny_patch16_224", _SIZED),
        "no_pool_class_token": ("vit_tiny_patch16_224", _SIZED | {"global_pool": ""}),
        "attention_pool_class_token": ("vit_tiny_patch16_224", _SIZED | {"global_pool": "map"}),
        "differential": ("vit_dlittle_patch16_reg1_gap_256", _SIZED),
        "attention_pool": ("vit_base_patch16_siglip_224", _SIZED),
        "attention_pool_with_prefix": ("test_vit3", _SIZED),
        "dynamic_size": ("vit_tiny_patch16_224", _SIZED | {"dynamic_img_size": True}),
        "hybrid": ("vit_tiny_r_s16_p8_224", _SMALL | {"img_size": 64, "patch_size": 2}),
        "hybrid_batch_norm": ("vit_small_resnet50d_s16_224", _SMALL | {"img_size": 64, "patch_size": 1}),
        "eva": ("eva_giant_patch14_224", _SIZED),
        "rope": ("eva02_tiny_patch14_224", _SIZED),
        "rope_swiglu_norm": ("eva02_base_patch14_224", _SIZED),
        "rope_without_absolute": ("vit_small_patch16_rope_224", _SIZED),
        "rope_registers_alone": ("vit_medium_patch16_rope_reg1_gap_256", _SIZED),
        "rope_mixed": ("vit_small_patch16_rope_mixed_ape_224", _SIZED),
        "rope_dinov3": ("vit_small_patch16_dinov3", _SIZED),
        "rope_dinov3_biases": ("vit_small_plus_patch16_dinov3_qkvb", _SIZED),
        "rope_attention_pool": ("vit_pe_core_base_patch16_224", _SIZED),
        "rope_fewer_keys": (
            "vit_base_patch16_sapiens2",
            _SIZED | {"num_heads": 4, "num_kv_heads": (4, 2, 2, 4), "rope_rotate_half": True},
        ),
        "eva_post_norm": ("eva02_enormous_patch14_clip_224", _SIZED),
        "relative_table": ("beit_base_patch16_224", _SIZED),
        "relative_shared_table": ("beit_base_patch16_224", _SIZED | {"use_shared_rel_pos_bias": True}),
        "relative_network": ("vit_relpos_small_patch16_224", _SIZED),
        "relative_network_class": ("vit_relpos_medium_patch16_cls_224", _SIZED),
        "relative_shared_network": ("vit_srelpos_small_patch16_224", _SIZED),
        "relative_post_norm": ("vit_relpos_medium_patch16_rpn_224", _SIZED),
        "relative_bias": ("vit_relpos_small_patch16_224", _SIZED | {"rel_pos_type": "bias"}),
        "relative_swin_network": ("vit_relpos_small_patch16_224", _SIZED | {"rel_pos_type": "mlp-swin"}),
        "relative_class_token": ("beit_base_patch16_224", _SIZED | {"global_pool": "token"}),
        "rope_multimodal": (
            "vit_small_patch16_rope_224",
            _SIZED | {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3), "rope_grid_indexing": "ij"},
        ),
        "oblong": ("vit_small_patch16_rope_ape_224", _SMALL | {"img_size": (32, 48), "patch_size": (8, 4)}),
        "oblong_relative": ("beit_base_patch16_224", _SMALL | {"img_size": (48, 32), "patch_size": 8}),
        "naflex": ("naflexvit_base_patch16_gap", _NAFLEX),
        "naflex_attention_pool": ("naflexvit_so150m2_patch16_reg1_map", _NAFLEX),
        "naflex_rope": ("naflexvit_base_patch16_gap", _NAFLEX | {"rope_type": "axial"}),
        "naflex_rope_mixed": ("naflexvit_base_patch16_gap", _NAFLEX | {"rope_type": "mixed"}),
        "naflex_factorised": ("naflexvit_base_patch16_parfac_gap", _NAFLEX),
    }
)

# The first timm with it: of mixed angles, with those in double precision, made by no product that counts as a cost.
_SINCE = MappingProxyType(
    {
        "differential": "1.0.23",
        "gated": "1.0.28",
        "rope_fewer_keys": "1.0.30",
        "rope_mixed": "1.0.31",
        "naflex_rope_mixed": "1.0.31",
        "rope_multimodal": "1.0.31",
    }
)


def lacking(least: str, package: str = "timm") -> str:
    """Why a test that needs the version `least` of a package is skipped; nothing where it need not be."""
    found = version(package)
    older = [int(part) for part in re.findall(r"\d+", found)[:3]] < [int(part) for part in least.split(".")]
    return f"needs {package} {least}; found {found}" if older else ""


def since(least: str, package: str = "timm") -> pytest.MarkDecorator:
    """The mark of what needs the version `least` of a package."""
    return pytest.mark.skipif(bool(lacking(least, package)), reason=lacking(least, package))


def build(name: str, **options: Any) -> nn.Module:
    """The plain model of a construction, no two of its parts alike, in evaluation mode; skips the test where the
    installed timm is too old for it."""
    if reason := lacking(_SINCE.get(name, "0")):
        pytest.skip(reason)
    architecture, small = CONSTRUCTIONS[name]
    torch.manual_seed(0)
    model: Any = timm.create_model(architecture, **{**small, **options}).double().eval()
    if name == "gated":  # no name of timm's has one
        for block in model.blocks:
            block.attn.gate = nn.Linear(48, 48).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases, scales and class tokens start at zero or one: then nobody would see one left out. Matrices
            # get less: where attention is all or nothing, importances tie.
            parameter.add_((0.2 if parameter.ndim < 2 else 0.08) * torch.randn_like(parameter))
    return model.requires_grad_(False)


def size_of(name: str) -> tuple[int, int]:
    """Height and width of its images."""
    size = CONSTRUCTIONS[name][1].get("img_size", SIDE)
    return (size, size) if isinstance(size, int) else size


def images_for(name: str, count: int = 2) -> Tensor:
    """Images `[count, 3, H, W]`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *size_of(name), generator=generator, dtype=torch.float64)
