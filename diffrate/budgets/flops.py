"""The cost model: multiply-accumulates as the paper counts them (section 4.1, "FLOPs").

One formula for each kind of block. Token counts may be integers or tensors, so that the same lines
cost a fixed schedule and, differentiably, an expected one. Left out, as in the paper: softmax,
normalisation, activations, biases, and what pruning and merging themselves cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class VitShape:
    """What the cost of a plain ViT depends on. `tokens` includes the class token."""

    tokens: int
    width: int
    hidden: int
    patch_inputs: int
    classes: int


@dataclass(frozen=True)
class StageShape:
    """One stage of a MetaFormer: the convolution into it, then `depth` blocks over `tokens`."""

    tokens: int
    width: int
    inputs: int
    kernel: int
    depth: int


def attention_flops(tokens: Count, width: int) -> Count:
    """Query, key, value and output projections, scores, and weighted sum: `4 N C^2 + 2 N^2 C`."""
    return 4 * tokens * width**2 + 2 * tokens * tokens * width


def mlp_flops(tokens: Count, width: int, hidden: int) -> Count:
    """Two linear layers: `2 N C hidden`, with the usual ratio of 4 `8 N C^2`."""
    return 2 * tokens * width * hidden


def separable_flops(tokens: int, width: int, kernel: int) -> int:
    """Two pointwise and one depthwise convolution at twice the width: `4 N C^2 + 2 k^2 N C`."""
    return 4 * tokens * width**2 + 2 * kernel**2 * tokens * width


def blocks_flops(counts: Iterable[tuple[Count, Count]], width: int, hidden: int) -> Count | int:
    """Attention blocks; `counts` has for each the tokens that enter it and those its MLP sees."""
    return sum(attention_flops(entering, width) + mlp_flops(leaving, width, hidden) for entering, leaving in counts)


def vit_flops(shape: VitShape, counts: Iterable[tuple[Count, Count]]) -> Count | int:
    """A whole ViT. The patch embedding counts the class token too, as the published code does."""
    embedding = shape.tokens * shape.width * shape.patch_inputs
    return embedding + blocks_flops(counts, shape.width, shape.hidden) + shape.width * shape.classes


def caformer_flops(
    stages: tuple[StageShape, StageShape, StageShape, StageShape],
    classes: int,
    kernel: int,
    counts: Iterable[tuple[Count, Count]],
) -> Count | int:
    """A whole CAFormer; `counts` are those of stage 3. The head counts `8 C K`, as published.

    `kernel` is the side of the depthwise convolutions of stages 1 and 2.
    """
    *_, third, fourth = stages
    total = sum(stage.tokens * stage.width * stage.kernel**2 * stage.inputs for stage in stages)
    for stage in stages[:2]:
        block = separable_flops(stage.tokens, stage.width, kernel) + _mlp4(stage.tokens, stage.width)
        total += stage.depth * block
    whole = [(fourth.tokens, fourth.tokens)] * fourth.depth
    total += blocks_flops(whole, fourth.width, 4 * fourth.width) + 8 * fourth.width * classes
    return total + blocks_flops(counts, third.width, 4 * third.width)


def _mlp4(tokens: int, width: int) -> int:
    return mlp_flops(tokens, width, 4 * width)
