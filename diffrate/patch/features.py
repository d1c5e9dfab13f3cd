"""What is made of the tokens that are left: one vector an image by timm's poolings, each token weighed by its size, or
features at the full grid, as timm's own model returns them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from diffrate.blocks.block import called
from diffrate.blocks.tokens import TokenState, replaced, size_dtype, standing
from diffrate.patch.parts import ClassAndMean

POOLS = ("token", "avg", "avgmax", "max", "map")


def pooled(model: Any, state: TokenState, left_out: int) -> Tensor:
    """`[B, C]` of the normalised tokens in `state`, as `model.global_pool` says, the first `left_out` unseen."""
    if model.global_pool == "map" and isinstance(model.attn_pool, ClassAndMean):
        mean = partial(weighted_mean, left_out=model.attn_pool.prefix)
        return called(model.attn_pool, state.x, lambda x: torch.cat([x[:, 0], mean(replaced(state, x=x))], dim=-1))
    if model.global_pool == "map":
        seen = state.x[:, left_out:]
        return called(model.attn_pool, seen, lambda x: attention_pool(model.attn_pool, x, state, left_out))
    if model.global_pool == "token" or state.x.shape[1] == left_out:  # all others are gone: the class token saw them
        return state.x[:, 0]
    if model.global_pool == "max":
        return highest_of(state, left_out)
    mean = weighted_mean(state, left_out)
    return mean if model.global_pool == "avg" else 0.5 * (highest_of(state, left_out) + mean)


def weighted_mean(state: TokenState, left_out: int) -> Tensor:
    """The mean `[B, C]` of the tokens `[B, N, C]` but the first `left_out`, weighed by their sizes.

    In search the mask weighs as well, and the sum of the weights takes no gradient, as in the published code.
    """
    x, size, mask = state.x, state.sizes(), state.mask
    weight = (size if mask is None else size * mask)[:, left_out:, None]
    total = weight.sum(1)
    return ((x[:, left_out:] * weight).sum(1) / (total if mask is None else total.detach())).to(x.dtype)


def highest_of(state: TokenState, left_out: int) -> Tensor:
    """The highest value `[B, C]` of each channel among the tokens but the first `left_out` that are there."""
    x = state.x
    if state.mask is not None:
        x = torch.where(state.mask[:, :, None] > 0, x, -torch.inf)
    return x[:, left_out:].amax(1)


def attention_pool(pool: AttentionPoolLatent, x: Tensor, state: TokenState, left_out: int) -> Tensor:
    """timm's attention pooling with latent queries of the tokens `x`, all in `state` but the first `left_out`,
    proportional: a token counts `size` times.

    In search masked tokens count by their mask, which takes the gradient.
    """
    key, value = pool.kv(x).unflatten(-1, (2, pool.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    latent = pool.q(pool.latent.expand(x.shape[0], -1, -1)).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
    scores = (pool.q_norm(latent) * pool.scale) @ pool.k_norm(key).transpose(-2, -1)
    shares = scores.to(size_dtype(scores)).softmax(-1)
    weights = [weight[:, None, None, left_out:] for weight in (state.size, state.mask) if weight is not None]
    if weights:
        shares = shares * (weights[0] if len(weights) == 1 else weights[0] * weights[1])
        shares = shares / shares.sum(-1, keepdim=True)
    mixed = pool.proj_drop(pool.proj((shares.to(value.dtype) @ value).transpose(1, 2).flatten(2)))
    if pool.mlp is not None:
        mixed = mixed + pool.mlp(pool.norm(mixed))
    return mixed[:, 0] if pool.pool == "token" else mixed.mean(1)


def pool_parts(model: Any) -> list[str]:
    """What `pooled` does not handle of the model's pooling, for a message; nothing where it handles all."""
    pool: nn.Module | None = getattr(model, "attn_pool", None)
    if model.global_pool and model.global_pool not in POOLS:
        return [f"global_pool={model.global_pool!r}"]
    if (model.global_pool == "map") != (pool is not None):
        return ["attn_pool"]
    if isinstance(pool, ClassAndMean):  # timm gives it a head for half of what it pools
        width = getattr(getattr(model.head, "features", model.head), "in_features", 2 * model.embed_dim)
        return [] if width == 2 * model.embed_dim else [f"head of {width} inputs after ClassAndMean"]
    if not isinstance(pool, AttentionPoolLatent):
        return [] if pool is None else [f"attn_pool={type(pool).__name__}"]
    found = [] if pool.pos_embed is None else ["attn_pool.pos_embed"]
    return found if pool.pool in ("token", "avg") else [*found, f"attn_pool.pool={pool.pool!r}"]


def restore(state: TokenState) -> Tensor:
    """Features for every input position `[B, N0, C]`: those of the token that stands for it.

    Where none does, the position was pruned: it gets what it last was, or zeros where nobody asked to
    remember. In search tokens are still in place: a masked one gives way to the one that stands for it
    by the share that its mask says, and so passes on how much its own features were worth.
    """
    if state.origin is None:
        return state.x
    found = standing(state.x, state.origin)
    if state.last is not None:
        found = torch.where(state.origin[:, :, None] >= 0, found, state.last)
    if state.mask is None:
        return found
    return torch.lerp(found, state.x, state.mask.to(state.x.dtype).unsqueeze(-1))


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, N, C]` as `[B, C, rows, columns]`."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
