"""One block at fixed rates: attention, then compression, then MLP (paper, figure 2).

The submodules of timm's blocks are read by name, their `forward` is never called: its signature
moves between timm versions, and compression sits in the middle of it. Blocks are typed `Any`, since
their parts are attributes that only timm's classes, not `nn.Module`, declare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffrate.blocks.attention import add_bias, attend, attend_and_rank, attend_with_map, size_bias
from diffrate.blocks.forms import called, form_of, has_hooks, through
from diffrate.blocks.heads import Positions, projection_of
from diffrate.blocks.reduction import ReductionRule
from diffrate.blocks.tokens import TokenState, replaced
from diffrate.schedule import Kept


def fixed_block(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, kept: Kept, read: int | None = None
) -> TokenState:
    """Run one block that leaves `kept.merged` of the `kept.entering` tokens in `state`.

    With `read` nothing but that many first tokens is read of what it leaves, and they are all that is
    left: the others serve as keys and values, and need neither reduction nor MLP.
    """

    def step(state: TokenState, read: int | None) -> TokenState:
        state, attention = attended(block, positions, rule, state, kept, read)
        state = reduced(rule, state, attention, kept)
        return replaced(state, x=mlp_branch(block, state.x))

    return with_hooks(block, state, read, step)


def with_hooks(
    block: Any, state: TokenState, read: int | None, step: Callable[[TokenState, int | None], TokenState]
) -> TokenState:
    """`step(state, read)`, with the hooks of `block` around it, where it has any: they see all tokens before and after,
    whatever is read of them."""
    if not has_hooks(block):
        return step(state, read)
    left = state

    def run(x: Tensor) -> Tensor:
        nonlocal left
        left = step(replaced(state, x=x), None)
        return left.x

    x = called(block, state.x, run)
    return replaced(left, x=x) if read is None else TokenState(x[:, :read])


def removes(kept: Kept, read: int | None) -> bool:
    """Whether a block lets tokens go: not where nothing is read of them anyway."""
    return kept.merged < kept.entering and read is None


def attended(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, kept: Kept, read: int | None
) -> tuple[TokenState, Tensor | None]:
    """The first part of a block: the tokens after attention, the first `read` alone if that says so, and where some
    are to go the attention `[B, N - prefix]` that all but the prefix receive from the rule's queries."""
    x, attention = _attention(block, positions, rule, state, removes(kept, read), read)
    return (replaced(state, x=x) if read is None else TokenState(x)), attention


def reduced(rule: ReductionRule, state: TokenState, attention: Tensor | None, kept: Kept) -> TokenState:
    """The second part: the tokens that are left by `rule`, all where no `attention` was asked for."""
    return state if attention is None else rule.reduced(state, attention, kept)


def mlp_branch(block: Any, x: Tensor) -> Tensor:
    """The last part of a block, `[B, N, C]`."""
    form = form_of(block)
    y = through(block, (*form.before2, "mlp", *form.after2), x)
    return through(block, form.skip2, x) + y


def attention_branch(block: Any, x: Tensor, mix: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """The residual stream after attention, `[B, Q, C]`, of tokens `x` `[B, N, C]`.

    `mix(attention, entering)` gives the heads' output `[B, H, Q, V]` for what enters the attention, `[B, N, C]`.
    """
    form = form_of(block)
    attention = getattr(block, form.attention)

    def run(entering: Tensor) -> Tensor:
        return projection_of(attention).join(attention, mix(attention, entering), entering)

    y = through(block, form.after1, called(attention, through(block, form.before1, x), run))
    return through(block, form.skip1, x[:, : y.shape[1]]) + y


def _attention(
    block: Any, positions: Positions, rule: ReductionRule, state: TokenState, removes: bool, read: int | None
) -> tuple[Tensor, Tensor | None]:
    """The residual stream after attention, and what tokens receive of it, as `attended`."""
    received: Tensor | None = None

    def mix(attention: Any, entering: Tensor) -> Tensor:
        nonlocal received
        heads = positions.turn(projection_of(attention).split(attention, entering), state.place).asking(read)
        pairs = positions.pairs(state.place)
        bias = add_bias(size_bias(state.size), pairs if read is None or pairs is None else pairs[:, :, :read])
        drop = attention.attn_drop
        dropout = getattr(drop, "p", 0.0) if attention.training else 0.0
        if has_hooks(drop):  # which are there to see the maps, each head's
            images = heads.query.shape[:2]
            mixed, received = attend_with_map(
                heads, bias, lambda maps: drop(maps.unflatten(0, images)).flatten(0, 1), rule.importance.queries
            )
        elif removes:
            mixed, received = attend_and_rank(heads, bias, dropout, rule.importance.queries)
        else:
            mixed = attend(heads, bias, dropout)
        return mixed

    x = attention_branch(block, state.x, mix)
    return x, received[:, rule.prefix :] if removes and received is not None else None
