"""The cost model: multiply-accumulates as the paper counts them (section 4.1, "FLOPs").

One formula for all attention blocks, from the shapes of their layers. Token counts may be integers or
tensors, so that the same lines cost a fixed schedule and, differentiably, an expected one. Left out, as
in the paper: softmax, normalisation, activations, biases, and what pruning and merging themselves cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Count = TypeVar("Count", int, Tensor)


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
