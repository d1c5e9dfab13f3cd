"""What a model costs, read off the shapes of its modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffrate.blocks.forms import form_of
from diffrate.blocks.projection import projection_of
from diffrate.budgets.flops import BlockShape, PoolShape


def block_shape(block: nn.Module) -> BlockShape:
    """The shape of one attention block."""
    attention = getattr(block, form_of(block).attention)
    assert isinstance(block.mlp, nn.Module)
    return BlockShape(
        projections=sum(weights(layer) for layer in attention.children() if isinstance(layer, nn.Linear)),
        mixing=projection_of(attention).mixing(attention),
        mlp=weights(block.mlp),
    )


def pool_shape(model: Any) -> PoolShape:
    """What the pooling of a ViT costs: that of attention pooling, in which each latent query sees all tokens."""
    pool = getattr(model, "attn_pool", None)
    if not isinstance(pool, AttentionPoolLatent):
        return PoolShape()
    width = pool.num_heads * pool.head_dim
    queries = sum(weights(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
    return PoolShape(token=weights(pool.kv) + 2 * width * pool.latent_len, fixed=queries * pool.latent_len)


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
