"""What a model's modules show: the images it is meant for, and what it costs.

The cost is in multiply-accumulates as the paper counts them (section 4.1, "FLOPs"): one formula for all attention
blocks, from the shapes of their layers. Token counts may be integers or tensors, so that the same lines cost a fixed
schedule and, differentiably, an expected one. Left out, as in the paper: softmax, normalisation, activations, biases,
and what pruning and merging themselves cost."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffrate.blocks.block import UnsupportedModelError, form_of
from diffrate.blocks.heads import projection_of

DEFAULT_INPUT = (3, 224, 224)
Count = TypeVar("Count", int, Tensor)
Size = tuple[int, int]


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


@dataclass(frozen=True)
class BlockShape:
    """What the cost of an attention block depends on.

    projections: weights of the linear layers into and out of the attention, each used once a token.
    mixing: width of queries and of values, all heads together: two tokens cost that many.
    mlp: weights of the linear layers of the MLP, whatever its form.
    """

    projections: int
    mixing: int
    mlp: int


@dataclass(frozen=True)
class VitShape:
    """What the cost of a ViT depends on.

    embedding: multiply-accumulates of making the tokens of one image, and what else it costs once.
    blocks: all that there are, in order.
    pooling: multiply-accumulates for each token that is left but the first `left_out`, and for an image. Means are not
        counted.
    """

    embedding: int
    blocks: tuple[BlockShape, ...]
    pooling: tuple[int, int] = (0, 0)
    left_out: int = 0


@dataclass(frozen=True)
class StageShape:
    """One stage of a MetaFormer: the convolution into it, then `depth` blocks over `tokens`."""

    tokens: int
    width: int
    inputs: int
    kernel: int
    depth: int


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


def blocks_flops(shapes: Iterable[BlockShape], counts: Iterable[tuple[Count, Count]]) -> Count | int:
    """Attention blocks; `counts` has for each the tokens that enter it and those its MLP sees.

    A block of the usual form takes `N (4 C^2) + 2 N^2 C` of attention for the N tokens that enter, and `2 N C hidden`
    of MLP for those that leave.
    """
    return sum(
        entering * shape.projections + entering * entering * shape.mixing + leaving * shape.mlp
        for shape, (entering, leaving) in zip(shapes, counts, strict=True)
    )


def vit_flops(shape: VitShape, head: int, counts: Iterable[tuple[Count, Count]]) -> Count | int:
    """A whole ViT whose head costs `head`."""
    counts, (each, once) = list(counts), shape.pooling
    pooling = (counts[-1][1] - shape.left_out) * each if each else 0
    return shape.embedding + blocks_flops(shape.blocks, counts) + pooling + once + head


def caformer_flops(
    stages: Sequence[StageShape], classes: int, kernel: int, counts: Iterable[tuple[Count, Count]]
) -> Count | int:
    """A whole CAFormer; `counts` are those of stage 3. The head counts `8 C K`, as published.

    `kernel` is the side of the depthwise convolutions of stages 1 and 2.
    """
    *_, third, fourth = stages
    total = sum(stage.tokens * stage.width * stage.kernel**2 * stage.inputs for stage in stages)
    for stage in stages[:2]:
        # Two pointwise convolutions and a depthwise one at twice the width; an MLP of ratio 4.
        separable = 4 * stage.tokens * stage.width**2 + 2 * kernel**2 * stage.tokens * stage.width
        total += stage.depth * (separable + 8 * stage.tokens * stage.width**2)
    third_block, fourth_block = (BlockShape(4 * s.width**2, 2 * s.width, 8 * s.width**2) for s in (third, fourth))
    whole = [(fourth.tokens, fourth.tokens)] * fourth.depth
    total += blocks_flops([fourth_block] * fourth.depth, whole) + 8 * fourth.width * classes
    return total + blocks_flops([third_block] * third.depth, counts)
