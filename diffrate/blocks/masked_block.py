"""One block in search: tokens stay in place, and a mask says which are still there (section 3.3).

Nothing is dropped or moved. Instead of sorting tokens, each keeps its place and has a rank by
importance; the mask of a token is the survival of its rank. The gradient reaches the rates through
the mask, in the attention of every later block, and through the expected counts, in the cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.attention import size_bias
from diffrate.blocks.block import attention_branch, mlp_branch, with_hooks
from diffrate.blocks.forms import UnsupportedModelError, has_hooks
from diffrate.blocks.heads import Positions, projection_of
from diffrate.blocks.masked_attention import masked_attention
from diffrate.blocks.rates import Choice, ste_leaving
from diffrate.blocks.reduction import ReductionRule, length_of, most_similar
from diffrate.blocks.tokens import TokenState, follow, followed, replaced, size_dtype, take

SEARCH_SIZE_FLOOR = 1.0  # the published search clamps sizes here, which inference does not


@dataclass(frozen=True)
class BlockPlan:
    """What one block does in this step, known before any image is seen.

    entering, pruned, merged: running counts as integers.
    prune, merge: the choices, None where the block has none.
    cost: tokens that enter and leave the block for the cost formula, carrying gradients.
    """

    entering: int
    pruned: int
    merged: int
    prune: Choice | None
    merge: Choice | None
    cost: tuple[Tensor, Tensor]


def plan_search(drawn: dict[int, dict[str, Choice]], blocks: int, tokens: int) -> list[BlockPlan]:
    """The plan of `blocks` blocks over `tokens` tokens for the choices that were drawn.

    A reduction happens only where its count is below the running one.
    """
    plans = []
    any_choice = next(iter(next(iter(drawn.values())).values()))
    entering, entering_cost = tokens, any_choice.expected.new_tensor(tokens)
    for block in range(blocks):
        choices = drawn.get(block, {})
        prune, merge = choices.get("prune"), choices.get("merge")
        pruned = entering if prune is None else min(entering, prune.count)
        merged = pruned if merge is None else min(pruned, merge.count)
        leaving_cost = entering_cost.detach()  # an uncompressed block passes the count on as a constant
        if merge is not None:
            pruning = entering_cost.detach() if prune is None else prune.expected
            leaving_cost = ste_leaving(entering_cost, pruning, merge.expected)
        plans.append(BlockPlan(entering, pruned, merged, prune, merge, (entering_cost, leaving_cost)))
        entering, entering_cost = merged, leaving_cost
    return plans


def search_block(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, plan: BlockPlan, read: int | None
) -> TokenState:
    """Run one block of the search on `state`, whose mask is `[B, N]`.

    With `read` nothing but that many first tokens is read of what it leaves: the others need no
    reduction, which would come too late to be seen, and no MLP.
    """

    def step(state: TokenState, read: int | None) -> TokenState:
        return _search_step(block, positions, rule, state, plan, read)

    return with_hooks(block, state, read, step)


def _search_step(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, plan: BlockPlan, read: int | None
) -> TokenState:
    mask = state.mask
    assert mask is not None
    importance = mask

    def mix(attention: Any, entering: Tensor) -> Tensor:
        nonlocal importance
        if has_hooks(attention.attn_drop):
            raise UnsupportedModelError("attn_drop: found hooks; accepted: none in a search, whose map is another")
        heads = positions.turn(projection_of(attention).split(attention, entering), state.place).asking(read)
        pairs = positions.pairs(state.place)
        if pairs is not None:
            pairs = pairs[:, :, : heads.query.shape[2]]
        mixed, importance = masked_attention(
            heads, size_bias(state.size), mask, rule.importance.queries, pairs, rule.importance.masked_queries
        )
        return mixed

    x = attention_branch(block, state.x, mix)
    if read is not None:
        return TokenState(mlp_branch(block, x))
    state = replaced(state, x=x)
    if plan.merged < plan.entering:
        state = _reduce(state, importance, rule, plan)
    return replaced(state, x=mlp_branch(block, state.x))


def _reduce(state: TokenState, importance: Tensor, rule: ReductionRule, plan: BlockPlan) -> TokenState:
    assert state.mask is not None
    order = _order(importance, state.mask, rule.prefix)
    if plan.prune is not None and plan.pruned < plan.entering:
        state = _prune(state, _remove(state.mask, order, plan.prune, plan.entering))
    if plan.merge is not None and plan.merged < plan.pruned:
        if plan.merged > rule.pairing.spared:
            state = _merge(state, order, plan, rule)
        elif state.origin is not None:  # no destination is left: merging into the spared tokens prunes
            kept = order[:, : plan.merged]
            stays = (state.origin[:, :, None] == kept[:, None]).any(-1)
            state = replaced(state, origin=torch.where(stays, state.origin, -1))
        assert state.mask is not None
        state = replaced(state, mask=_remove(state.mask, order, plan.merge, plan.pruned))
    return state


def _order(importance: Tensor, mask: Tensor, prefix: int) -> Tensor:
    """Tokens `[B, N]` by falling importance `[B, N]`: the prefix first and as it is, removed ones last."""
    importance = importance.masked_fill(mask == 0, -1)[:, prefix:]
    others = importance.argsort(dim=1, descending=True) + prefix
    if not prefix:
        return others
    first = torch.arange(prefix, device=others.device).expand(len(others), prefix)
    return torch.cat([first, others], dim=1)


def _remove(mask: Tensor, order: Tensor, choice: Choice, current: int) -> Tensor:
    """The mask `[B, N]` after a choice among the `current` tokens that are still there."""
    surviving = choice.mask()[:current].to(mask.dtype).expand(len(mask), current)
    places = order[:, :current]
    return mask.scatter(1, places, mask.gather(1, places) * surviving)


def _prune(state: TokenState, mask: Tensor) -> TokenState:
    """`state` with a new mask; input tokens whose token is gone were pruned."""
    assert state.mask is not None
    masked = replaced(state, mask=mask)
    if state.last is None:
        return masked
    stay = torch.arange(mask.shape[1], device=mask.device)
    return followed(state, masked, torch.where((state.mask > 0) & (mask == 0), -1, stay))


def _merge(state: TokenState, order: Tensor, plan: BlockPlan, rule: ReductionRule) -> TokenState:
    """Average sources into their destinations; the sources stay beside them, to be masked.

    A source's weighted size is clamped before it is added, and is what the source keeps (quirks).
    """
    x, tokens = state.x, state.x.shape[1]
    sources = order[:, plan.merged : plan.pruned]
    kept = order[:, rule.pairing.spared : plan.merged]
    moving, candidates = take(x, sources), take(x, kept)
    precise = size_dtype(x)
    nearest, along = most_similar(moving.to(precise), candidates.to(precise), length_of(candidates))
    destination = kept.gather(1, nearest)
    goes_to = F.one_hot(destination, tokens).transpose(1, 2)  # [B, N, S]
    features = goes_to.to(x.dtype)
    merged = (x + features @ moving) / (1 + features.sum(-1, keepdim=True))

    sizes = state.sizes()
    source_size = take(sizes, sources)
    if rule.mean.cosine_sizes:
        similarity = along / length_of(moving)
        source_size = (source_size * similarity.to(source_size.dtype)).clamp(min=SEARCH_SIZE_FLOOR)
    size = sizes + (goes_to.to(sizes.dtype) @ source_size.unsqueeze(-1)).squeeze(-1)
    size = size.scatter(1, sources, source_size)
    origin = state.origin
    if origin is not None:
        stay = torch.arange(tokens, device=x.device).expand(len(x), tokens)
        origin = follow(origin, stay.scatter(1, sources, destination))
    return replaced(state, x=merged.to(x.dtype), size=size, origin=origin)
