"""What a model's modules show: the images it is meant for, and what it costs."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffrate.blocks.block import UnsupportedModelError, form_of
from diffrate.blocks.heads import projection_of
from diffrate.flops import BlockShape

DEFAULT_INPUT = (3, 224, 224)
Size = tuple[int, int]
# timm's names of layers that cost what they weigh: in the stem, in attentions and poolings, in MLPs.
COUNTED = frozenset({"proj", "qkv", "q_proj", "k_proj", "v_proj", "q", "kv", "fc1", "fc1_g", "fc1_x", "fc2"})


def configured_size(model: nn.Module) -> Size:
    """Height and width in the model's `pretrained_cfg`; 224 pixels where it has none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size") or DEFAULT_INPUT
    return height, width


def channels_of(model: Any) -> int:
    """Channels of the images that a model takes: timm says it on the model from 1.0.26 on, else its stem shows it."""
    for part in (model, getattr(model, "embeds", None)):
        channels = getattr(part, "in_chans", None)
        if channels is not None:
            return channels
    return next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), DEFAULT_INPUT[0])


def input_size(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a patched `model` takes."""
    height, width = model.image_size
    return channels_of(model), height, width


def as_size(size: Any, name: str = "input_size") -> Size:
    """Height and width in pixels, of both or of one side; an UnsupportedModelError, for `name`, for anything else."""
    try:
        sides = [operator.index(side) for side in (size if isinstance(size, list | tuple) else (size, size))]
    except TypeError:
        sides = []
    if len(sides) != 2 or min(sides) < 1:
        raise UnsupportedModelError(f"{name}: found {size!r}; accepted: height and width in pixels, or a side")
    return sides[0], sides[1]


def check_layers(model: nn.Module) -> None:
    """Refuse layers of unknown cost, as quantised ones and those in wrappers, with an UnsupportedModelError."""
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in COUNTED and not isinstance(layer, nn.Linear | nn.Conv2d | nn.Identity):
            found = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise UnsupportedModelError(f"{name}: found {found}; accepted: torch.nn.Linear until it is patched")


def block_shape(block: nn.Module) -> BlockShape:
    """The shape of one attention block."""
    attention = getattr(block, form_of(block).attention)
    assert isinstance(block.mlp, nn.Module)
    return BlockShape(
        projections=sum(weights(layer) for layer in attention.children() if isinstance(layer, nn.Linear)),
        mixing=projection_of(attention).mixing(attention),
        mlp=weights(block.mlp),
    )


def pooling_flops(model: Any) -> tuple[int, int]:
    """Multiply-accumulates of attention pooling, in which each latent query sees all tokens: for each token, and for an
    image. None of other poolings."""
    pool = getattr(model, "attn_pool", None)
    if not isinstance(pool, AttentionPoolLatent):
        return 0, 0
    width = pool.num_heads * pool.head_dim
    queries = sum(weights(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
    return weights(pool.kv) + 2 * width * pool.latent_len, queries * pool.latent_len


def stem_flops(stem: nn.Module, channels: int, size: tuple[int, int]) -> int:
    """Multiply-accumulates of a convolutional stem for one image of `size`, rows and columns, by torch's counter."""
    shapes = copy.deepcopy(stem).to("meta").eval().requires_grad_(False)
    images = torch.empty(1, channels, *size, device="meta", dtype=next(shapes.parameters()).dtype)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        shapes(images)
    return counter.get_total_flops() // 2


def weights(module: nn.Module) -> int:
    """Weights of all linear layers in `module`: each is used once for what goes through it."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
