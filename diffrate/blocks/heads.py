"""Into heads and out of them, for each of timm's attentions, and what attention knows of positions.

`projection_of` finds how by the type of the module. Submodules are read by name, a timm attention's `forward` is
never called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.attention import Heads
from diffrate.blocks.tokens import replaced


class Projection:
    """One linear layer for queries, keys and values; or three, of which those of keys and values may make fewer heads
    than there are queries. `parts` are the submodules and parameters that it reads."""

    parts: frozenset[str] = frozenset(
        {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
        | {"q_bias", "v_bias", "rel_pos", "relative_position_bias_table"}  # relative biases are read as positions
    )
    one_softmax = True  # whether values are mixed by the heads' weights as they are

    def split(self, attention: Any, x: Tensor) -> Heads:
        """Queries, keys and values of `x` `[B, N, C]`."""
        if attention.qkv is not None:
            if getattr(attention, "q_bias", None) is None:
                fused = attention.qkv(x)
            else:  # biases of queries and values are parameters beside
                bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
                # The weight of an adapter, for one, does not show all that it does.
                plain = type(attention.qkv) is nn.Linear
                fused = F.linear(x, attention.qkv.weight, bias) if plain else attention.qkv(x) + bias
            heads = (_in_heads(item, attention.num_heads) for item in fused.chunk(3, dim=-1))
            return _normalised(attention, *heads)
        width = attention.q_proj.out_features // attention.num_heads
        projected = (getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        heads = _normalised(attention, *(_in_heads(item, item.shape[-1] // width) for item in projected))
        groups = attention.num_heads // heads.key.shape[1]
        if groups == 1:
            return heads
        key, value = (item.repeat_interleave(groups, dim=1) for item in (heads.key, heads.value))
        return replaced(heads, key=key, value=value)

    def mixing(self, attention: Any) -> int:
        """Width of queries and of values, all heads together: multiply-accumulates that a pair of tokens costs."""
        return 2 * attention.proj.in_features

    def join(self, attention: Any, mixed: Tensor, x: Tensor) -> Tensor:
        """`[B, Q, C]` of the heads' output `[B, H, Q, V]`, for the first Q tokens of the input `x` `[B, N, C]`."""
        joined = _optional(attention, "norm", mixed.transpose(1, 2).flatten(2))
        if getattr(attention, "gate", None) is not None:
            joined = joined * attention.gate(x[:, : mixed.shape[2]]).sigmoid()
        return attention.proj_drop(attention.proj(joined))


class Differential(Projection):
    """Two maps for each head, the second taken off the first (arXiv 2410.05258).

    To the rest of the block they are twice as many heads; neighbours have the same values.
    """

    parts = Projection.parts | {"sub_norm", "lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}
    one_softmax = False

    def split(self, attention: Any, x: Tensor) -> Heads:
        query, key, value = attention.qkv(x).chunk(3, dim=-1)
        query, key = (_in_heads(item, 2 * attention.num_heads) for item in (query, key))
        return _normalised(attention, query, key, _in_heads(value, attention.num_heads).repeat_interleave(2, dim=1))

    def mixing(self, attention: Any) -> int:
        return 3 * attention.proj.in_features

    def join(self, attention: Any, mixed: Tensor, x: Tensor) -> Tensor:
        plus, minus = attention.lambda_a, attention.lambda_b
        if plus is None:
            plus = (attention.lambda_q1 * attention.lambda_k1).sum(-1).float()
            minus = (attention.lambda_q2 * attention.lambda_k2).sum(-1).float()
        share = plus.exp() - minus.exp() + attention.lambda_init  # lambda in the paper, its equation 2
        first, second = mixed.unflatten(1, (-1, 2)).unbind(2)
        difference = first - share.type_as(mixed) * second
        return super().join(attention, attention.sub_norm(difference) * (1 - attention.lambda_init), x)


PROJECTIONS: dict[type[nn.Module], Projection] = dict.fromkeys(
    (Attention, MetaFormerAttention, RelPosAttention, BeitAttention, EvaAttention, AttentionRope), Projection()
)
try:
    from timm.layers.diff_attention import DiffAttention
except ImportError:  # before timm 1.0.24, which has no models with it either
    pass
else:
    PROJECTIONS[DiffAttention] = Differential()


def projection_of(attention: nn.Module) -> Projection:
    """How an attention of a known type projects."""
    return PROJECTIONS[type(attention)]


def _in_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, N, H D]` as `[B, H, N, D]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _normalised(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Heads:
    query, key = _optional(attention, "q_norm", query), _optional(attention, "k_norm", key)
    return Heads(query, key, value, attention.scale)


def _optional(module: Any, name: str, value: Tensor) -> Tensor:
    """`value` through the submodule `name` where there is one (not every attention has norms)."""
    return getattr(module, name)(value) if hasattr(module, name) else value


class Positions:
    """Nothing is known of positions: of models whose embeddings are in the features."""

    def turn(self, heads: Heads, place: Tensor | None) -> Heads:
        """Queries and keys turned by the angles of their places `[B or 1, N]` (RoPE)."""
        return heads

    def pairs(self, place: Tensor | None) -> Tensor | None:
        """What is added to the scores of each pair of tokens, `[B or 1, H, N, N]`; None for nothing."""
        return None


@dataclass(frozen=True, eq=False)
class Rotary(Positions):
    """Angles of every input position: `table` has their sines, then their cosines, `[N0, 2 D]`, or `[H, N0, 2 D]`
    where heads differ; `half` is timm's name for the layout in which the first half of the channels turns
    with the second, not each with its neighbour."""

    table: Tensor
    half: bool

    def turn(self, heads: Heads, place: Tensor | None) -> Heads:
        assert place is not None
        table = self.table[place] if self.table.ndim == 2 else self.table[:, place].transpose(0, 1)
        angles = table if table.ndim == 4 else table[:, None]  # [B, 1 or H, N, 2 D]
        query, key = (apply_rot_embed_cat(item, angles, half=self.half) for item in (heads.query, heads.key))
        return replaced(heads, query=query.type_as(heads.value), key=key.type_as(heads.value))


@dataclass(frozen=True, eq=False)
class PairBias(Positions):
    """A bias of every pair of input positions: `table()` makes it when it is needed, `[H, N0, N0]`, since those
    of all blocks together are large. Rows ask and columns are seen."""

    table: Callable[[], Tensor]

    def pairs(self, place: Tensor | None) -> Tensor | None:
        assert place is not None
        table = self.table()
        pair = place[:, :, None] * table.shape[-1] + place[:, None, :]
        found = table.flatten(1).index_select(1, pair.flatten())
        return found.unflatten(1, pair.shape).transpose(0, 1)


NO_POSITIONS = Positions()
