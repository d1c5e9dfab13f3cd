"""Small models of other libraries, no two of whose parts are alike, and what they give of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

try:
    import transformers as hf
except ImportError:
    hf: Any = None
try:
    import open_clip
except ImportError:
    open_clip: Any = None

SIDE, PATCH = 32, 8
_SIZED = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}
_SMALL = _SIZED | {"intermediate_size": 64}
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT |= {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PATCHES = {name: value for name, value in _SMALL.items() if name != "image_size"} | {"num_patches": 16}
_TOWER = {"image_size": SIDE, "patch_size": PATCH, "width": 32, "layers": 3, "heads": 4, "mlp_ratio": 2.0}
_CLIP = {"layers": 3, "width": 32, "head_width": 8, "patch_size": PATCH, "image_size": SIDE}
_WORDS = {"width": 32, "heads": 4, "layers": 1, "vocab_size": 99, "context_length": 8}


def of_transformers(model: str, config: str, options: Mapping[str, Any] = _SMALL, /, **more: Any) -> nn.Module:
    """The class `model` with a configuration; other arguments of its constructor as `made_with`."""
    made_with = more.pop("made_with", {})
    return getattr(hf, model)(getattr(hf, config)(**{**options, **more}), **made_with)


def two_towers(model: str, family: str, options: Mapping[str, Any] = _SMALL, /, **more: Any) -> nn.Module:
    """The class `model` of a family with a text tower."""
    vision = getattr(hf, f"{family}VisionConfig")(**{**options, **more.pop("vision", {})}).to_dict()
    return of_transformers(model, f"{family}Config", {"text_config": _TEXT, "vision_config": vision}, **more)


def _torchvision(heads: nn.Module) -> nn.Module:
    model = VisionTransformer(SIDE, PATCH, 3, 4, 32, 64)
    model.heads = heads  # type: ignore[reportAttributeAccessIssue]
    return model


def _open_clip(**options: Any) -> nn.Module:
    return open_clip.transformer.VisionTransformer(**{**_TOWER, "output_dim": 16, **options})


_RELATIVE, _SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
_VIT, _HF = partial(of_transformers, "ViTModel", "ViTConfig"), of_transformers
TRANSFORMERS: Mapping[str, Callable[[], nn.Module]] = {
    "vit": lambda: _HF("ViTForImageClassification", "ViTConfig", num_labels=5),
    "vit_oblong": lambda: _HF("ViTForImageClassification", "ViTConfig", image_size=(32, 48), patch_size=(8, 4)),
    "vit_pooler": lambda: _VIT(pooler_output_size=24),
    "vit_no_pooler": lambda: _VIT(made_with={"add_pooling_layer": False}, qkv_bias=False, hidden_act="quick_gelu"),
    "deit": lambda: _HF("DeiTForImageClassification", "DeiTConfig", num_labels=5),
    "deit_teacher": lambda: _HF("DeiTForImageClassificationWithTeacher", "DeiTConfig", num_labels=5),
    "deit_pooler": lambda: _HF("DeiTModel", "DeiTConfig"),
    "mae_unmasked": lambda: _HF("ViTMAEModel", "ViTMAEConfig", mask_ratio=0.0),
    "beit": lambda: _HF("BeitForImageClassification", "BeitConfig", num_labels=5, **_RELATIVE),
    "beit_shared": lambda: _HF("BeitModel", "BeitConfig", layer_scale_init_value=0.0, **_RELATIVE, **_SHARED),
    "beit_class_token": lambda: _HF(
        "BeitForImageClassification", "BeitConfig", use_mean_pooling=False, use_absolute_position_embeddings=True
    ),
    "dinov2": lambda: _HF("Dinov2ForImageClassification", "Dinov2Config", _SIZED, mlp_ratio=2, num_labels=5),
    "dinov2_swiglu": lambda: _HF("Dinov2Model", "Dinov2Config", _SIZED, use_swiglu_ffn=True),
    "dinov2_registers": lambda: _HF("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _SIZED),
    "dinov2_registers_head": lambda: _HF(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _SIZED, num_labels=5
    ),
    "dinov3": lambda: _HF("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=3),
    "dinov3_gated": lambda: _HF(
        "DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, key_bias=True, hidden_act="silu"
    ),
    "clip_vision": lambda: _HF("CLIPVisionModel", "CLIPVisionConfig"),
    "clip_projection": lambda: _HF("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16),
    "clip": lambda: two_towers("CLIPModel", "CLIP", projection_dim=16),
    "clip_head": lambda: two_towers("CLIPForImageClassification", "CLIP", num_labels=5),
    "siglip_vision": lambda: _HF("SiglipVisionModel", "SiglipVisionConfig"),
    "siglip": lambda: two_towers("SiglipModel", "Siglip"),
    "siglip_head": lambda: two_towers("SiglipForImageClassification", "Siglip", num_labels=5),
    "siglip2": lambda: two_towers("Siglip2Model", "Siglip2", _PATCHES),
    "siglip2_head": lambda: two_towers("Siglip2ForImageClassification", "Siglip2", _PATCHES, num_labels=5),
    "timm_wrapper": lambda: _HF(
        "TimmWrapperForImageClassification", "TimmWrapperConfig", {"architecture": "test_vit", "num_labels": 5}
    ),
    "siglip2_vision": lambda: _HF("Siglip2VisionModel", "Siglip2VisionConfig", _PATCHES),
}
OTHERS: Mapping[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: VisionTransformer(SIDE, PATCH, 3, 4, 32, 64, num_classes=5),
    "torchvision_no_head": lambda: _torchvision(nn.Identity()),
    "torchvision_other_head": lambda: _torchvision(nn.Linear(32, 7)),
    "open_clip": lambda: _open_clip(ls_init_value=0.5),
    "open_clip_avg": lambda: _open_clip(pool_type="avg", no_ln_pre=True, pos_embed_type="sin_cos_2d"),
    "open_clip_avg_after": lambda: _open_clip(pool_type="avg", final_ln_after_pool=True, output_tokens=True),
    "open_clip_quick": lambda: open_clip.CLIP(16, _CLIP, _WORDS, quick_gelu=True),
    "open_clip_custom": lambda: open_clip.CustomTextCLIP(16, _CLIP, _WORDS),
    "open_clip_timm": lambda: open_clip.timm_model.TimmModel("test_vit", 16, 160, pool="token", proj="linear"),
}


ROWS: Mapping[str, str] = {  # every class in the table of docs/convert.md, and a layout of it
    "ViTForImageClassification": "vit",
    "DeiTForImageClassification": "deit",
    "BeitForImageClassification": "beit",
    "DeiTForImageClassificationWithTeacher": "deit_teacher",
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_registers_head",
    "CLIPForImageClassification": "clip_head",
    "SiglipForImageClassification": "siglip_head",
    "Siglip2ForImageClassification": "siglip2_head",
    "ViTModel": "vit_pooler",
    "DeiTModel": "deit_pooler",
    "BeitModel": "beit_shared",
    "Dinov2Model": "dinov2_swiglu",
    "Dinov2WithRegistersModel": "dinov2_registers",
    "DINOv3ViTModel": "dinov3",
    "CLIPVisionModel": "clip_vision",
    "SiglipVisionModel": "siglip_vision",
    "Siglip2VisionModel": "siglip2_vision",
    "CLIPVisionModelWithProjection": "clip_projection",
    "CLIPModel": "clip",
    "SiglipModel": "siglip",
    "Siglip2Model": "siglip2",
    "ViTMAEModel": "mae_unmasked",
    "TimmWrapperForImageClassification": "timm_wrapper",
    "open_clip VisionTransformer": "open_clip",
    "open_clip TimmModel": "open_clip_timm",
    "open_clip CLIP": "open_clip_quick",
    "open_clip CustomTextCLIP": "open_clip_custom",
    "torchvision VisionTransformer": "torchvision",
}


def foreign(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a layout, in evaluation mode; skips the test where its library is not installed."""
    if name in TRANSFORMERS:
        pytest.importorskip("transformers")
    elif not name.startswith("torchvision"):
        pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return varied(({**TRANSFORMERS, **OTHERS})[name]()).to(dtype).eval()


@torch.no_grad()
def varied(model: nn.Module) -> nn.Module:
    """`model` with other parameters: biases, scales and tokens start at zero or one, where none would be missed."""
    for parameter in model.parameters():
        parameter.add_((0.2 if parameter.ndim < 2 else 0.08) * torch.randn_like(parameter))
    return model


def images_for(model: Any, dtype: torch.dtype = torch.float32, count: int = 2) -> Tensor:
    """Images `[count, 3, H, W]` of the size of a timm model."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator, dtype=torch.float64).to(dtype)


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What a forward of transformers takes for `images`: of SigLIP 2, their patches."""
    if not type(model).__name__.startswith("Siglip2"):
        return {"pixel_values": images}
    patches = (
        images.unflatten(3, (4, PATCH)).unflatten(2, (4, PATCH)).permute(0, 2, 4, 3, 5, 1).reshape(len(images), 16, -1)
    )
    shapes = torch.tensor([[4, 4]] * len(images))
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2]), "spatial_shapes": shapes}


@torch.no_grad()
def outputs_of(model: Any, images: Tensor, **options: bool) -> Tensor:
    """What the converted model gives in another library's own words: logits, or pooled output."""
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(**inputs_of(model, images))
        return found if isinstance(found, Tensor) else found.pooler_output  # transformers 4 and 5
    if hasattr(model, "encode_image"):
        return model.encode_image(images)
    if not hasattr(model, "config"):
        found = model(images)
        return found[0] if isinstance(found, tuple) else found
    found = model(**inputs_of(model, images), **options)
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(found, name, None) is not None:
            return found[name]
    return found.last_hidden_state[:, 0]
