"""Ways to let tokens go beside the paper's, and all of them by name: those that a block of a schedule may have.

Another one is a pairing here or a new mix of parts, a row of `NAMED`, and one of `diffrate.schedule.RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffrate.blocks.attention import Heads
from diffrate.blocks.reduction import (
    AttentionTimesValue,
    Mean,
    RandomImportance,
    ReductionRule,
    add_up,
    after_prefix,
    full_product,
    gathered,
    joined,
    keep_tokens,
    length_of,
    most_important,
)
from diffrate.blocks.tokens import TokenState, size_dtype, take
from diffrate.schedule import Kept


@dataclass(frozen=True)
class HalvesIntoHalves:
    """One half of the patches are sources, the other half destinations; the sources that are most similar to some
    destination merge into it (Bolya et al., "Token Merging: Your ViT but faster", ICLR 2023, section 3).

    Where more than half are to go, the same is done in rounds. What is pruned is what matters least, as in the paper.

    keys: compare keys, the mean over heads; else features. by_rank: the less important half are the sources; else
    every other patch. aversion: sources are ranked by their similarity less so many times their importance, relative
    to the mean.
    """

    keys: bool = False
    by_rank: bool = False
    aversion: float = 0.0

    @property
    def by_importance(self) -> bool:
        return self.by_rank or self.aversion > 0

    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """The tokens that did not merge, after those that others merged into; first of all the prefix."""
        compared = _keys(heads) if self.keys else None
        if kept.pruned < kept.entering:
            assert importance is not None
            index = most_important(importance, kept.pruned, prefix)
            state, importance = keep_tokens(state, index), take(importance, index[:, prefix:] - prefix)
            compared = None if compared is None else take(compared, index)
        if kept.merged <= prefix:
            return keep_tokens(state, _first(state, prefix))
        left = kept.pruned
        while left > kept.merged:
            going = min(left - kept.merged, (left - prefix) // 2)
            state, importance, compared = self._round(state, importance, compared, going, prefix, mean)
            left -= going
        return state

    def _round(
        self, state: TokenState, importance: Tensor | None, compared: Tensor | None, going: int, prefix: int, mean: Mean
    ) -> tuple[TokenState, Tensor | None, Tensor | None]:
        """`going` sources, half of the patches at most, merge."""
        metric = state.x if compared is None else compared
        patches = metric.shape[1] - prefix
        if self.by_rank:
            assert importance is not None
            order = importance.argsort(dim=1, descending=True) + prefix
            targets, sources = order[:, : patches - patches // 2], order[:, patches - patches // 2 :]
            nearest, cosine = _nearest(take(metric, sources), take(metric, targets))
        else:
            positions = torch.arange(prefix, metric.shape[1], device=metric.device).expand(metric.shape[0], -1)
            targets, sources = positions[:, ::2], positions[:, 1::2]
            nearest, cosine = _nearest(metric[:, prefix + 1 :: 2], metric[:, prefix::2])
        likely = cosine
        if self.aversion:
            assert importance is not None
            relative = importance / importance.mean(dim=1, keepdim=True)
            likely = cosine - self.aversion * relative.gather(1, sources - prefix)
        order = likely.argsort(dim=1, descending=True)
        gone, stays = order[:, :going], order[:, going:]
        others = torch.cat([targets, sources.gather(1, stays), sources.gather(1, gone)], dim=1) - prefix
        destination = nearest.gather(1, gone) + prefix
        similar = cosine.gather(1, gone) if mean.cosine_sizes else None
        left = _merged(state, after_prefix(others, prefix), destination, similar, mean)
        if importance is not None:  # what merged is as important as its parts together
            shares, kept = importance.gather(1, others), patches - going
            importance = add_up(shares[:, :kept], destination - prefix, shares[:, kept:])
        if compared is not None:
            compared = take(compared, after_prefix(others[:, : patches - going], prefix))
        return left, importance, compared


@dataclass(frozen=True)
class HighestEnergy:
    """Tokens that many others are similar to merge among each other: the twice as many of the highest energy, every
    other of them into the most similar of the rest (Tran et al., "Accelerating transformers with spectrum-preserving
    token merging", NeurIPS 2024, equations 3 and 4). Half of the patches can go at most; the rest is pruned.

    margin: the cosine from which on two tokens count as similar.
    """

    margin: float

    @property
    def by_importance(self) -> bool:
        return False

    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """The tokens of the lowest energy, after those that others merged into; first of all the prefix."""
        keys = _keys(heads)[:, prefix:]
        patches, going = keys.shape[1], kept.entering - kept.merged
        unit = keys / length_of(keys).unsqueeze(-1)
        cosine = full_product(unit, unit.transpose(1, 2))
        near = torch.where(cosine >= self.margin, cosine, (cosine - self.margin).exp() - 1)
        order = near.mean(dim=-1).argsort(dim=1, descending=True)
        if going > patches // 2:
            return keep_tokens(state, after_prefix(order[:, patches - (kept.merged - prefix) :], prefix))
        sources, targets = order[:, : 2 * going : 2], order[:, 1 : 2 * going : 2]
        nearest, similarity = _nearest(take(keys, sources), take(keys, targets))
        index = after_prefix(torch.cat([targets, order[:, 2 * going :], sources], dim=1), prefix)
        return _merged(state, index, nearest + prefix, similarity if mean.cosine_sizes else None, mean)


def _merged(state: TokenState, index: Tensor, destination: Tensor, cosine: Tensor | None, mean: Mean) -> TokenState:
    """All tokens at `index` `[B, N]`, the last ones merged into those at `destination` `[B, S]` of them."""
    x = gathered(state.x, index)
    if x.ndim == 2:
        destination, cosine = destination[0], None if cosine is None else cosine[0]
    return joined(state, index, x.shape[-2] - destination.shape[-1], x, destination, cosine, mean)


def _nearest(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `targets` `[B, T, C]` each of `sources` `[B, S, C]` is most similar to, and their cosine: `[B, S]`."""
    precise = size_dtype(sources)
    sources, targets = sources.to(precise), targets.to(precise)
    products = full_product(sources, targets.transpose(1, 2))
    along, nearest = (products / length_of(targets).unsqueeze(1)).max(dim=-1)
    return nearest, along / length_of(sources)


def _keys(heads: Heads) -> Tensor:
    """What keys say of a token, the mean over heads: `[B, N, D]`."""
    return heads.key.mean(dim=1, dtype=size_dtype(heads.key))


def _first(state: TokenState, count: int) -> Tensor:
    return torch.arange(count, device=state.x.device).expand(state.x.shape[0], count)


Named = Callable[[ReductionRule, float], ReductionRule]  # of the published rule, and the block's depth from 0 to 1


def _with(pairing: HalvesIntoHalves) -> Named:
    return lambda rule, depth: replace(rule, pairing=pairing, mean=Mean(by_size=True))


def _energetic(rule: ReductionRule, depth: float) -> ReductionRule:
    return replace(rule, pairing=HighestEnergy(0.9 - 0.9 * depth), mean=Mean(by_size=True))


def _valued(rule: ReductionRule, depth: float) -> ReductionRule:
    return replace(rule, importance=AttentionTimesValue(rule.importance.queries))


def _received(rule: ReductionRule, depth: float) -> ReductionRule:
    return replace(rule, importance=AttentionTimesValue(0), mean=Mean(cosine_sizes=True))


def _received_halves(rule: ReductionRule, depth: float) -> ReductionRule:
    pairing = HalvesIntoHalves(by_rank=True, aversion=SMALL_AVERSION)
    return replace(rule, importance=AttentionTimesValue(0), pairing=pairing, mean=Mean(cosine_sizes=True))


def _random(rule: ReductionRule, depth: float) -> ReductionRule:
    return replace(rule, importance=RandomImportance(rule.importance.queries))


AVERSION, SMALL_AVERSION = 0.2, 0.1  # how much importance counts against leaving, beside a cosine; measured
NAMED: Mapping[str, Named] = {
    "published": lambda rule, depth: rule,
    "weighted": lambda rule, depth: replace(rule, mean=Mean(by_size=True)),
    "valued": _valued,
    "received": _received,
    "similar": _with(HalvesIntoHalves()),
    "similar_less_important": _with(HalvesIntoHalves(aversion=AVERSION)),
    "minor_into_major": _with(HalvesIntoHalves(by_rank=True)),
    "received_halves": _received_halves,
    "tome": _with(HalvesIntoHalves(keys=True)),
    "pitome": _energetic,
    "random": _random,
}


def named_rule(name: str, published: ReductionRule, block: int, blocks: int) -> ReductionRule:
    """The rule called `name` in a block of a model of so many, whose rule by the paper is `published`."""
    return NAMED[name](published, block / blocks)
