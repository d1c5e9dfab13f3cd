"""Small models of each family, plain timm, and their names and shapes in the official layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from torch import nn

import diffrate
import models
from tests import recipe_weights

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("deit", "mae", "caformer")
VIT_NAMES = {"deit": "vit_deit_small_patch16_224", "mae": "vit_base_patch16_mae"}
VIT_SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 10}
IMAGE_SIZE = {"deit": 32, "mae": 32, "caformer": 224}
TOKENS = {"deit": 65, "mae": 65, "caformer": 196}


def plain(family: str, **options: Any) -> nn.Module:
    """A small timm model with fresh weights."""
    if family in VIT_NAMES:
        return timm.create_model(VIT_NAMES[family], **{**VIT_SIZE, **options})
    return MetaFormer(
        depths=options.get("depths", (1, 1, 5, 2)),
        dims=(16, 32, 64, 96),
        num_classes=options.get("num_classes", 10),
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
    )


def official_state(family: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What `torch.load` gives for the golden model's checkpoint in its official layout."""
    if family == "caformer":
        shapes = json.loads((GOLDEN / "caformer_tiny_layout.json").read_text())
        return recipe_weights.state_dict(shapes, dtype)
    shapes = {name: tuple(value.shape) for name, value in plain(family).state_dict().items()}
    return {"model": recipe_weights.state_dict(shapes, dtype)}


def golden_model(family: str, tmp_path: Path) -> diffrate.CompressedModel:
    """The golden model in float64, loaded from an official-layout file and patched."""
    model = plain(family).double().eval()
    file = tmp_path / f"{family}.pth"
    torch.save(official_state(family), file)
    models.load_weights(model, file)
    return dense(getattr(diffrate.patch, family)(model))


def dense(model: diffrate.CompressedModel) -> diffrate.CompressedModel:
    """`model`, told to keep every token."""
    model.schedule = model.dense_schedule()
    return model


def saved_file(path: Path) -> Path:
    """A file of `diffrate.save` with two blocks and three classes, the second at half its tokens: quick to compile."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
    model = diffrate.patch.vit(timm.create_model("vit_tiny_patch16_224", **sizes), 1, 1)
    model.set_kept_num([17, 12], [17, 9])
    diffrate.save(model, path)
    return path


def schedule_for(family: str, kept: list[int]) -> tuple[list[int] | None, list[int]]:
    """A schedule that merges down to `kept` tokens, block by block, for the tiny model."""
    if family == "caformer":
        return None, [*kept[:5], 49, 49]
    return list(kept), list(kept)


def original_caformer_name(name: str) -> str:
    """timm's name of a CAFormer tensor in the original layout."""
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    name = name.replace("downsample_layers.0.norm", "downsample_layers.0.post_norm")
    name = re.sub(r"^(downsample_layers\.[123])\.norm", r"\1.pre_norm", name)
    name = re.sub(r"^(stages\.\d)\.blocks\.", r"\1.", name)
    name = re.sub(r"^head\.norm\.", "norm.", name)
    return re.sub(r"^head\.fc\.", "head.", name)


def original_caformer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CAFormer's tensors in the original layout: linear, not 1x1, projections."""
    return {
        original_caformer_name(name): tuple(value.shape[:2] if value.shape[2:] == (1, 1) else value.shape)
        for name, value in model.state_dict().items()
        if not (value.ndim == 4 and value.shape[1] == 1 and value.shape[2:] == (1, 1))
    }
