"""The reduction rules that a schedule may name for a block, and the pairings of those beside the paper's.

To add one: a row in `NAMED`, one in `diffrate.schedule.RULES`, and a pairing here where none of these serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffrate.blocks.attention import Heads
from diffrate.blocks.reduction import (
    AttentionTimesValue,
    Mean,
    Pairing,
    RandomImportance,
    ReductionRule,
    add_up,
    after_prefix,
    directions,
    full_product,
    joined,
    keep_tokens,
    matched,
    most_important,
)
from diffrate.blocks.tokens import TokenState, moved, size_dtype, take
from diffrate.schedule import Kept


@dataclass(frozen=True)
class HalvesIntoHalves(Pairing):
    """One half of the patches are sources, the other half destinations. The sources whose most similar destination is
    most similar merge into it (Bolya et al., "Token Merging: Your ViT but faster", ICLR 2023, section 3).

    Where more than half of the patches are to go, this is done in rounds. Pruning goes by importance, as in the paper.

    keys: compare keys, the mean over heads; else features. by_rank: the less important half are the sources; else
    every other patch. aversion: sources are ranked by their similarity less this factor times their importance, which
    is relative to its mean.
    """

    keys: bool = False
    by_rank: bool = False
    aversion: float = 0.0

    def ranks(self, kept: Kept) -> bool:
        return kept.pruned < kept.entering or self.by_rank or self.aversion > 0

    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """The prefix, the destinations, and the sources that did not merge."""
        keys = heads.key.mean(dim=1, dtype=size_dtype(heads.key)) if self.keys else None
        if kept.pruned < kept.entering:
            assert importance is not None
            index = most_important(importance, kept.pruned, prefix)
            state, importance = keep_tokens(state, index), take(importance, index)
            keys = None if keys is None else take(keys, index)
        if kept.merged <= prefix:
            return keep_tokens(state, torch.arange(prefix, device=state.x.device).expand(state.x.shape[0], prefix))
        left = kept.pruned
        while left > kept.merged:
            sources = min(left - kept.merged, (left - prefix) // 2)
            index, destination, cosine = self._match(state.x if keys is None else keys, importance, sources, prefix)
            state = joined(state, index, None, destination, cosine, mean)
            left -= sources
            if left > kept.merged:  # for another round
                if importance is not None:  # of a merged token, the sum
                    parts = importance.gather(1, index)
                    importance = add_up(parts[:, :left], destination, parts[:, left:])
                keys = None if keys is None else take(keys, index[:, :left])
        return state

    def _match(
        self, compared: Tensor, importance: Tensor | None, count: int, prefix: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens in an order `[B, N]` in which the `count` sources that merge come last, the position in it that
        each of them goes to, and their cosine, both `[B, count]`."""
        patches = compared.shape[1] - prefix
        importance = None if importance is None else importance[:, prefix:]
        if self.by_rank:
            assert importance is not None
            order = importance.argsort(dim=1, descending=True)
            x, to, of = take(compared, order + prefix), slice(patches - patches // 2), slice(-(patches // 2), None)
        else:
            order = torch.arange(patches, device=compared.device).expand(compared.shape[0], -1)
            x, to, of = compared[:, prefix:], slice(0, None, 2), slice(1, None, 2)
        x = directions(x)
        cosine, nearest = matched(x[:, of], x[:, to])
        targets, sources, rank = order[:, to], order[:, of], cosine
        if self.aversion:
            assert importance is not None
            relative = importance / importance.mean(dim=1, keepdim=True)
            rank = cosine - self.aversion * relative.gather(1, sources)
        ranked = rank.argsort(dim=1, descending=True)
        merging, sources = ranked[:, :count], sources.gather(1, ranked)
        index = after_prefix(torch.cat([targets, sources[:, count:], sources[:, :count]], dim=1), prefix)
        return index, nearest.gather(1, merging) + prefix, cosine.gather(1, merging)


@dataclass(frozen=True)
class HighestEnergy(Pairing):
    """The tokens of the highest energy, which many others are similar to, are sources and destinations in turn; each
    source merges into its most similar destination (Tran et al., "Accelerating transformers with spectrum-preserving
    token merging", NeurIPS 2024, equations 3 and 4).

    Half of the patches can merge at most: where more are to go, those of the highest energy are pruned.

    margin: the cosine from which on two tokens count as similar.
    """

    margin: float

    def ranks(self, kept: Kept) -> bool:
        return False

    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """The prefix, the destinations, and the tokens of lower energy."""
        keys = heads.key.mean(dim=1, dtype=size_dtype(heads.key))[:, prefix:]
        patches, count = keys.shape[1], kept.entering - kept.merged
        unit = directions(keys)
        cosine = full_product(unit, unit.transpose(1, 2))
        near = torch.where(cosine >= self.margin, cosine, (cosine - self.margin).exp() - 1)
        order = near.mean(dim=-1).argsort(dim=1, descending=True)
        if count > patches // 2:
            return keep_tokens(state, after_prefix(order[:, count:], prefix))
        sources, targets = order[:, : 2 * count : 2], order[:, 1 : 2 * count : 2]
        unit = take(unit, order[:, : 2 * count])
        similarity, nearest = matched(unit[:, ::2], unit[:, 1::2])
        index = after_prefix(torch.cat([targets, order[:, 2 * count :], sources], dim=1), prefix)
        return joined(state, index, None, nearest + prefix, similarity, mean)


@dataclass(frozen=True)
class FirstTokens(Pairing):
    """The first tokens stay, the others are pruned. It costs nothing: how fast any rule can be at the same counts."""

    def ranks(self, kept: Kept) -> bool:
        return False

    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """The first `kept.merged` tokens, as views."""
        size, place = (None if part is None else part[:, : kept.merged] for part in (state.size, state.place))
        first = TokenState(state.x[:, : kept.merged], size, place=place)
        if state.origin is None:
            return first
        index = torch.arange(kept.merged, device=state.x.device).expand(state.x.shape[0], -1)
        return moved(state, first, index, index)


# From the published rule, and the depth of the block: its number as a share of the model's blocks.
Named = Callable[[ReductionRule, float], ReductionRule]
BY_SIZE, COSINE_SIZES = Mean(by_size=True), Mean(cosine_sizes=True)
AVERSION, SMALL_AVERSION = 0.2, 0.1  # as measured best


def _with(**parts: Any) -> Named:
    """The published rule with other parts."""
    return lambda rule, depth: replace(rule, **parts)


NAMED: Mapping[str, Named] = {
    "published": lambda rule, depth: rule,
    "weighted": _with(mean=BY_SIZE),
    "valued": lambda rule, depth: replace(rule, importance=AttentionTimesValue(rule.importance.queries)),
    "received": _with(importance=AttentionTimesValue(0), mean=COSINE_SIZES),
    "similar": _with(pairing=HalvesIntoHalves(), mean=BY_SIZE),
    "similar_less_important": _with(pairing=HalvesIntoHalves(aversion=AVERSION), mean=BY_SIZE),
    "minor_into_major": _with(pairing=HalvesIntoHalves(by_rank=True), mean=BY_SIZE),
    "received_halves": _with(
        importance=AttentionTimesValue(0),
        pairing=HalvesIntoHalves(by_rank=True, aversion=SMALL_AVERSION),
        mean=COSINE_SIZES,
    ),
    "tome": _with(pairing=HalvesIntoHalves(keys=True), mean=BY_SIZE),
    # The margin falls with depth, from 0.9 to 0 (PiToMe, section 3.2).
    "pitome": lambda rule, depth: replace(rule, pairing=HighestEnergy(0.9 - 0.9 * depth), mean=BY_SIZE),
    "random": lambda rule, depth: replace(rule, importance=RandomImportance(rule.importance.queries)),
    "sliced": _with(pairing=FirstTokens()),
}
