"""One pre-norm block at fixed rates: attention, then compression, then MLP (paper, figure 2).

The submodules of timm's blocks are read by name, their `forward` is never called: its signature
moves between timm versions, and compression sits in the middle of it. Blocks are typed `Any`, since
their parts are attributes that only timm's classes, not `nn.Module`, declare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.blocks.attention import (
    attend,
    attend_with_map,
    class_importance,
    join_heads,
    mean_importance,
    size_bias,
    split_heads,
)
from diffrate.blocks.merge import merge_tokens
from diffrate.blocks.prune import keep_tokens, most_important
from diffrate.blocks.tokens import TokenState
from diffrate.budgets.schedule import Kept


class UnsupportedModelError(TypeError):
    """A model with parts that compression does not handle; the message names them."""


@dataclass(frozen=True)
class BlockNames:
    """What timm calls the parts of a block: the attention, and what lies on each path around.

    The block computes `skip1(x) + branch1(attention(norm1(x)))`, then the same with `skip2`,
    `branch2` and `mlp(norm2(x))`; each path is a chain of submodules.
    """

    attention: str
    branch1: tuple[str, ...]
    branch2: tuple[str, ...]
    skip1: tuple[str, ...] = ()
    skip2: tuple[str, ...] = ()

    def all(self) -> set[str]:
        paths = (*self.branch1, *self.branch2, *self.skip1, *self.skip2)
        return {"norm1", "norm2", "mlp", self.attention, *paths}


@dataclass(frozen=True)
class ReductionRules:
    """How a family reduces tokens.

    class_token: importance is the class token's attention, and it is never removed; else the
        attention that a token receives from all.
    weigh_by_similarity: a merged token counts for its size times its cosine, else for its size.
    random: any tokens go, whatever their importance (a baseline, drawn from torch's generator).
    """

    class_token: bool
    weigh_by_similarity: bool
    random: bool = False


ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}


def check_block(block: nn.Module, names: BlockNames, where: str) -> None:
    """Refuse a block with parts that `fixed_block` would pass over.

    Raises:
        UnsupportedModelError: names the parts.
    """
    _check_parts(block, names.all(), where)
    _check_parts(getattr(block, names.attention), ATTENTION_PARTS, f"{where}.{names.attention}")


def fixed_block(
    block: Any, names: BlockNames, rules: ReductionRules, state: TokenState, kept: Kept, class_only: bool = False
) -> TokenState:
    """Run one block that leaves `kept.merged` of the `kept.entering` tokens in `state`.

    With `class_only` nothing but the class token is read of what it leaves, and it is all that is
    left: the others serve as keys and values, and need neither reduction nor MLP.
    """
    removes = kept.merged < kept.entering and not class_only
    x, importance = _attention(block, names, rules, state, removes, class_only)
    if class_only:
        state = TokenState(x)
    state = state._replace(x=x)
    if importance is not None:
        if rules.random:
            importance = torch.rand_like(importance)
        state = keep_tokens(state, most_important(importance, kept.pruned, rules.class_token))
        if kept.merged < kept.pruned:
            state = merge_tokens(state, kept.merged, rules.weigh_by_similarity)
    x = state.x
    y = through(block, ("norm2", "mlp", *names.branch2), x)
    return state._replace(x=through(block, names.skip2, x) + y)


def through(block: Any, names: Iterable[str], x: Tensor) -> Tensor:
    """`x` through a chain of submodules."""
    for name in names:
        x = getattr(block, name)(x)
    return x


def _attention(
    block: Any, names: BlockNames, rules: ReductionRules, state: TokenState, removes: bool, class_only: bool
) -> tuple[Tensor, Tensor | None]:
    """The residual stream after attention, and the tokens' importance if some are to go."""
    attention = getattr(block, names.attention)
    heads = split_heads(attention, block.norm1(state.x))
    before = state.x
    if class_only:
        heads, before = heads._replace(query=heads.query[:, :, :1]), before[:, :1]
    bias = size_bias(state.size)
    dropout = attention.attn_drop.p if attention.training else 0.0
    importance = None
    if removes and not rules.class_token:
        mixed, weights = attend_with_map(heads, bias, dropout)
        importance = mean_importance(weights)
    else:
        mixed = attend(heads, bias, dropout)
        if removes:
            importance = class_importance(heads, bias)
    y = through(block, names.branch1, join_heads(attention, mixed))
    return through(block, names.skip1, before) + y, importance


def _check_parts(module: nn.Module, known: set[str], where: str) -> None:
    unknown = [name for name, _ in module.named_children() if name not in known]
    if unknown:
        raise UnsupportedModelError(f"{where}: found {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
