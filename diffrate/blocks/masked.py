"""One block in search: tokens stay in place, and a mask says which are still there (paper, section 3.3).

Nothing is dropped or moved. Instead of sorting tokens, each keeps its place and has a rank by
importance; the mask of a token is the survival of its rank. The gradient reaches the rates through
the mask, in the attention of every later block, and through the expected counts, in the cost. The attention is

    E = exp(scores - max)                  A = E * visible
    weights = (A + eps / N) / (Z + eps)    Z = sum of A, visible_ij = mask_j, and 1 for i = j

Automatic differentiation would keep seven maps of `[B, H, N, N]` and go over each in memory. Here
the ordinary softmax P is the only map, and the rest is folded into the small factors on its sides:
P = E / S with S = sum of E = 1 / max P, so that with P's diagonal d, mask m, T = (Z + eps) / S and
c = eps / (N S)

    output = (P (m v) + d (1 - m) v + c sum v) / T        T = P m + d (1 - m) + eps / S

Backward, with the output's gradient g over T and G = ((g v') - g output) P, masked and whole sums of
G's rows and columns give the rest, but for the row's maximum: eps makes the weights depend on it, by
`r = eps / S (g output - g mean v)`, which its position gets back.
A few images are treated at a time, so that on a CPU their maps stay in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from diffrate.blocks.attention import Heads, parts_of, size_bias
from diffrate.blocks.block import UnsupportedModelError, attention_branch, has_hooks, mlp_branch, with_hooks
from diffrate.blocks.heads import Positions
from diffrate.blocks.rates import Choice, ste_leaving
from diffrate.blocks.reduction import IntoMostSimilarKept, Mean, ReductionRule, after_prefix, length_of, most_similar
from diffrate.blocks.tokens import TokenState, follow, followed, replaced, size_dtype, take
from diffrate.schedule import Kept

LEAST_SEARCH_SIZE = 1.0  # the published search clamps sizes here, which inference does not
EPSILON = 1e-6


def masked_attention(
    heads: Heads,
    bias: Tensor | None,
    mask: Tensor,
    queries: int,
    pairs: Tensor | None = None,
    masked_queries: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention `[B, H, Q, V]` where masked tokens are seen by themselves alone, and importance `[B, N]`.

    The rows may be those of the first Q tokens alone, `queries` at least. `mask` is
    `[B, N]`, `bias` `[B, 1, 1, N]` or None, and `pairs` a bias of pairs `[B or 1, H, Q, N]` or None, which
    takes no gradient. Importance is the attention of the first `queries` tokens, the mean over them, or with
    0 the attention received from all that are there, with `masked_queries` from the others
    too, heads averaged; it takes no gradient. Computed in float32 at least, also under autocast.
    """
    query, key, value, scale = heads
    dtype = size_dtype(value)
    with torch.autocast(value.device.type, enabled=False):
        rows = None if bias is None else bias[:, 0, 0].to(dtype)
        items = (query.to(dtype), key.to(dtype), value.to(dtype))
        table = None if pairs is None else pairs.detach().to(dtype)
        querying = torch.ones_like(mask) if masked_queries else (mask > 0).to(mask.dtype)
        masks = (mask.to(dtype), querying.to(dtype))
        mixed, importance = _MaskedAttention.apply(*items, rows, *masks, table, scale, queries)
    return mixed.to(value.dtype), importance


class _MaskedAttention(torch.autograd.Function):
    """Inputs: queries `[B, H, Q, D]`, keys `[B, H, N, D]`, values `[B, H, N, V]`, bias, mask and which
    tokens are queries for importance, `[B, N]`, pairs."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        querying: Tensor,
        pairs: Tensor | None,
        scale: float,
        queries: int,
    ) -> tuple[Tensor, Tensor]:
        heads, rows = query.shape[1:3]
        tokens = key.shape[2]
        seen = mask[:, None, :, None]  # [B, 1, N, 1]
        hides = 1 - seen[:, :, :rows]
        visible = torch.cat([value * seen, seen.expand(-1, heads, -1, -1)], dim=-1)  # the last column gives P m
        mixed, importance = value.new_empty(*query.shape[:3], value.shape[3]), torch.empty_like(mask)
        totals, inverses = torch.empty_like(query[..., :1]), torch.empty_like(query[..., :1])
        positions, maps = torch.empty_like(totals, dtype=torch.int64), []
        for part in parts_of(key, heads * rows * tokens):
            scores = (query[part] @ key[part].transpose(-2, -1)).mul_(scale)
            if bias is not None:
                scores += bias[part, None, None]
            if pairs is not None:
                scores += pairs if len(pairs) == 1 else pairs[part]
            softmax = scores.softmax(-1)
            inverse, highest = softmax.max(-1, keepdim=True)  # 1 / S, and where E is 1
            hidden = softmax.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * hides[part]  # d (1 - m)
            product = softmax @ visible[part]
            total = product[..., -1:] + hidden + EPSILON * inverse
            spread = EPSILON / tokens * inverse  # c
            everywhere = value[part].sum(-2, keepdim=True)
            mixed[part] = (product[..., :-1] + hidden * value[part, :, :rows] + spread * everywhere) / total
            totals[part] = total
            importance[part] = _importance(softmax, mask[part], querying[part], hidden, spread, total, queries)
            inverses[part], positions[part] = inverse, highest
            maps.append(softmax)
        ctx.save_for_backward(query, key, value, mask, mixed, totals, inverses, positions, *maps)
        ctx.has_bias, ctx.scale = bias is not None, scale
        ctx.mark_non_differentiable(importance)
        return mixed, importance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, mixed, totals, inverses, positions, *maps = ctx.saved_tensors
        heads, rows = query.shape[1:3]
        tokens = key.shape[2]
        seen = mask[:, None, :, None]
        masked_key, ones = key * seen, value.new_ones(1, 1, 1, 1)
        grads = [torch.empty_like(item) for item in (query, key, value)]
        columns, to_highest = torch.empty_like(mask), torch.empty_like(mask)
        diagonals = torch.zeros_like(mask)
        parts = parts_of(key, heads * rows * tokens)
        for part, softmax in zip(parts, maps, strict=True):
            k, v, hides = key[part], value[part], 1 - seen[part, :, :rows]
            itself = softmax.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            spread = EPSILON / tokens * inverses[part]
            grad = grad_mixed[part] / totals[part]
            centre = (grad * mixed[part]).sum(-1, keepdim=True)
            sides = torch.cat([grad, -centre], -1), torch.cat([v, ones.expand(*v.shape[:-1], 1)], -1)
            flow = (sides[0] @ sides[1].transpose(-2, -1)).mul_(softmax)  # G, of `visible`
            own = flow.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            columns[part], diagonals[part, :rows] = flow.sum((1, 2)), own.squeeze(-1).sum(1)
            grads[0][part] = flow @ masked_key[part] + own * hides * k[:, :, :rows]
            grads[1][part] = flow.transpose(-2, -1) @ query[part] * seen[part]
            grads[1][part, :, :rows] += own * hides * query[part]
            everywhere = (spread * grad).sum(-2, keepdim=True)
            back = EPSILON * inverses[part] * (centre - grad @ v.mean(-2, keepdim=True).transpose(-2, -1))  # r
            highest = positions[part]
            grads[0][part] -= back * k.gather(2, highest.expand_as(query[part]))
            grads[1][part].scatter_add_(2, highest.expand_as(query[part]), -back * query[part])
            to_highest[part] = torch.zeros_like(k[..., :1]).scatter_add_(2, highest, back).sum((1, 3))
            grads[2][part] = softmax.transpose(-2, -1) @ grad * seen[part] + everywhere
            grads[2][part, :, :rows] += itself * hides * grad
            grads[0][part] *= ctx.scale
            grads[1][part] *= ctx.scale
        to_bias = mask * columns + (1 - mask) * diagonals - to_highest if ctx.has_bias else None
        return *grads, to_bias, columns - diagonals, None, None, None, None


def _importance(
    softmax: Tensor, mask: Tensor, querying: Tensor, hidden: Tensor, spread: Tensor, total: Tensor, queries: int
) -> Tensor:
    """The mean over heads of the weights' first rows, or of all that are queries: `[b, N]`."""
    if queries == 1:  # itself always seen
        return ((softmax[:, :, 0] * mask[:, None] + spread[:, :, 0]) / total[:, :, 0]).mean(1)
    if queries:
        first = slice(queries)
        rows = (softmax[:, :, first] * mask[:, None, None] + spread[:, :, first]) / total[:, :, first]
        return rows.mean((1, 2))
    share = querying[:, None, :, None] / total
    received = (softmax.transpose(-2, -1) @ share).squeeze(-1) * mask[:, None]
    received = (received + (hidden * share).squeeze(-1) + (spread * share).sum(-2)).mean(1)
    return received / querying.sum(-1, keepdim=True)


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
    some = next(iter(drawn.values()))["merge"]
    entering, entering_cost = tokens, some.expected.new_tensor(tokens)
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
    """Run one block of the search on `state`, whose mask is `[B, N]`. With `read` nothing but that many first tokens is
    read of what it leaves: the others need no reduction, which would come too late to be seen, and no MLP."""

    def step(state: TokenState, read: int | None) -> TokenState:
        def mix(attention: Any, heads: Heads, pairs: Tensor | None) -> tuple[Tensor, tuple[Tensor, Heads]]:
            if has_hooks(attention.attn_drop):
                raise UnsupportedModelError("attn_drop: found hooks; accepted: none in a search, whose map is another")
            assert state.mask is not None
            ranking = rule.importance
            queries = ranking.queries if read is None else read  # there nothing goes by it
            bias = size_bias(state.size)
            mixed, received = masked_attention(heads, bias, state.mask, queries, pairs, ranking.masked_queries)
            return mixed, (ranking.of(received, heads), heads)

        after, (importance, heads) = attention_branch(block, positions, state, read, mix)
        if read is None and plan.merged < plan.entering:
            if isinstance(rule.pairing, IntoMostSimilarKept):
                after = _reduce(after, importance, rule, rule.pairing.spared, plan)
            else:
                after = _reduce_in_order(after, importance, heads, rule, plan)
        return replaced(after, x=mlp_branch(block, after.x))

    return with_hooks(block, state, read, step)


def _reduce(state: TokenState, importance: Tensor, rule: ReductionRule, spared: int, plan: BlockPlan) -> TokenState:
    """As the published search does it: tokens stay in place, and sources merge into all that are kept."""
    assert state.mask is not None
    ranked = importance.masked_fill(state.mask == 0, -1)[:, rule.prefix :].argsort(dim=1, descending=True)
    order = after_prefix(ranked, rule.prefix)  # removed tokens last
    if plan.prune is not None and plan.pruned < plan.entering:
        state = _pruned(state, order, plan.prune, plan.entering)
    if plan.merge is None or plan.merged == plan.pruned:
        return state
    if plan.merged > spared:
        state = _merge(state, order, plan, spared, rule.mean)
    elif state.origin is not None:  # no destination is left: merging into the spared tokens prunes
        stays = (state.origin[:, :, None] == order[:, None, : plan.merged]).any(-1)
        state = replaced(state, origin=torch.where(stays, state.origin, -1))
    return _masked(state, order, plan.merge, plan.pruned)


def _reduce_in_order(
    state: TokenState, importance: Tensor, heads: Heads, rule: ReductionRule, plan: BlockPlan
) -> TokenState:
    """As `_reduce` for other pairings, which go by the order of tokens: those that are there come first, as they would
    be left at fixed counts, and then those that were removed."""
    everywhere = torch.arange(state.x.shape[1], device=state.x.device).expand(state.x.shape[:2])
    if plan.prune is not None and plan.pruned < plan.entering:
        ranked = after_prefix(importance[:, rule.prefix : plan.entering].argsort(dim=1, descending=True), rule.prefix)
        order = torch.cat([ranked, everywhere[:, plan.entering :]], dim=1)
        x, sizes, importance = take(state.x, order), take(state.sizes(), order), take(importance, order)
        heads = replaced(heads, key=heads.key.gather(2, order[:, None, :, None].expand_as(heads.key)))
        state = _moved_to(state, order, x, sizes, order.argsort(dim=1))
        state = _pruned(state, everywhere, plan.prune, plan.entering)
    if plan.merge is None or plan.merged == plan.pruned:
        return state
    there, sizes = slice(plan.pruned), state.sizes()
    part = TokenState(state.x[:, there], sizes[:, there]).traced().placed()
    few, kept = replaced(heads, key=heads.key[:, :, there]), Kept(plan.pruned, plan.pruned, plan.merged)
    left = rule.pairing.reduce(part, importance[:, : plan.pruned], few, kept, rule.prefix, rule.mean)
    assert left.place is not None
    assert left.origin is not None
    stays = left.place.expand(len(state.x), -1)
    leaving = torch.ones_like(everywhere[:, there]).scatter(1, stays, 0)
    goes = leaving.argsort(dim=1, descending=True, stable=True)[:, : plan.pruned - plan.merged]
    order = torch.cat([stays, goes, everywhere[:, plan.pruned :]], dim=1)
    x = torch.cat([left.x, take(state.x, order[:, plan.merged :])], dim=1)
    sizes = torch.cat([left.sizes(), take(sizes, order[:, plan.merged :])], dim=1)
    to = torch.cat([left.origin, everywhere[:, plan.pruned :]], dim=1)
    return _masked(_moved_to(state, order, x, sizes, to), everywhere, plan.merge, plan.pruned)


def _moved_to(state: TokenState, order: Tensor, x: Tensor, sizes: Tensor, to: Tensor) -> TokenState:
    """`state` with its tokens in the `order` `[B, N]`, in which `x` and `sizes` come; token i went to `to[:, i]`."""
    assert state.mask is not None
    place = None if state.place is None else take(state.place, order)
    after = TokenState(x, sizes, take(state.mask, order), place=place, last=state.last, origin=state.origin)
    return after if state.origin is None else followed(state, after, to)


def _masked(state: TokenState, order: Tensor, choice: Choice, current: int) -> TokenState:
    """`state` masked by a choice among the `current` tokens that are still there, the first of `order` `[B, N]`."""
    assert state.mask is not None
    mask, first = state.mask, order[:, :current]
    surviving = choice.mask()[:current].to(mask.dtype).expand(len(mask), current)
    return replaced(state, mask=mask.scatter(1, first, mask.gather(1, first) * surviving))


def _pruned(state: TokenState, order: Tensor, choice: Choice, current: int) -> TokenState:
    """As `_masked`; input tokens whose token is gone were pruned."""
    masked = _masked(state, order, choice, current)
    if state.mask is None or masked.mask is None or state.last is None:
        return masked
    stay = torch.arange(masked.mask.shape[1], device=masked.mask.device)
    return followed(state, masked, torch.where((state.mask > 0) & (masked.mask == 0), -1, stay))


def _merge(state: TokenState, order: Tensor, plan: BlockPlan, spared: int, mean: Mean) -> TokenState:
    """Average sources into their destinations; the sources stay beside them, to be masked.

    A source's weighted size is clamped before it is added, and is what the source keeps (quirks).
    """
    x, tokens, precise = state.x, state.x.shape[1], size_dtype(state.x)
    sources, kept = order[:, plan.merged : plan.pruned], order[:, spared : plan.merged]
    moving, candidates = take(x, sources), take(x, kept)
    nearest, along = most_similar(moving.to(precise), candidates.to(precise))
    destination = kept.gather(1, nearest)
    goes_to = F.one_hot(destination, tokens).transpose(1, 2)  # [B, N, S]
    features, sizes = goes_to.to(x.dtype), state.sizes()
    source_size = take(sizes, sources)
    if mean.by_size:
        weights, weighed = sizes.to(x.dtype).unsqueeze(-1), source_size.to(x.dtype).unsqueeze(-1)
        merged = (weights * x + features @ (weighed * moving)) / (weights + features @ weighed)
    else:
        merged = (x + features @ moving) / (1 + features.sum(-1, keepdim=True))
    if mean.cosine_sizes:
        similarity = along / length_of(moving)
        source_size = (source_size * similarity.to(source_size.dtype)).clamp(min=LEAST_SEARCH_SIZE)
    size = sizes + (goes_to.to(sizes.dtype) @ source_size.unsqueeze(-1)).squeeze(-1)
    size = size.scatter(1, sources, source_size)
    origin = state.origin
    if origin is not None:
        stay = torch.arange(tokens, device=x.device).expand(len(x), tokens)
        origin = follow(origin, stay.scatter(1, sources, destination))
    return replaced(state, x=merged.to(x.dtype), size=size, origin=origin)
