"""How a block lets tokens go, as a value: which tokens matter, which merge into which, and how they are averaged
(paper, section 3.2).

A new importance, pairing or mean is a class here, with the attributes of the others beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrate.blocks.attention import Heads
from diffrate.blocks.tokens import TokenState, alone, in_graph, moved, precise, rows_of, take, uncast
from diffrate.schedule import Kept


def most_important(importance: Tensor, kept: int, prefix: int) -> Tensor:
    """Positions `[B, kept]` of the tokens to keep: the first `prefix`, then the most important of the others, in
    falling order of `importance` `[B, N]`."""
    if in_graph():  # where what is added, far more than any importance, is a constant
        ahead = torch.arange(prefix, prefix - importance.shape[1], -1, device=importance.device).clamp(min=0) * 1e30
        return (importance + ahead).topk(kept, dim=1).indices
    return after_prefix(importance[:, prefix:].topk(kept - prefix, dim=1).indices, prefix)


def after_prefix(others: Tensor, prefix: int) -> Tensor:
    """The positions of the first `prefix` tokens, then `others` `[B, K]`, counted from behind the prefix."""
    if not prefix:
        return others
    if in_graph():
        first = torch.arange(prefix, device=others.device).expand(others.shape[0], prefix)
        return F.pad(others + 1, (1, 0)) if prefix == 1 else torch.cat([first, others + prefix], dim=1)
    index = others.new_zeros(others.shape[0], prefix + others.shape[1])
    torch.add(others, prefix, out=index[:, prefix:])  # in less time than `F.pad`
    for position in range(1, prefix):
        index[:, position] = position
    return index


def keep_tokens(state: TokenState, index: Tensor) -> TokenState:
    """The tokens at `index` `[B, K]`, in that order; the others are pruned."""
    size = None if state.size is None else state.size.gather(1, index)
    place = None if state.place is None else take(state.place, index)
    kept = TokenState(take(state.x, index), size, place=place)
    if state.origin is None:
        return kept
    return moved(state, kept, index, torch.arange(index.shape[1], device=index.device).expand_as(index))


# Negative cosines can bring a similarity-weighted size to 0 or below, and its logarithm to NaN. The
# bound lies far below what cancellation of float32 sizes leaves, so that no finite result changes.
LEAST_SIZE = 1e-30


def length_of(x: Tensor, keepdim: bool = False) -> Tensor:
    """The length of each token of `x` `[..., N, C]`, `[..., N]` or `[..., N, 1]`, in float32 at least."""
    return torch.linalg.vector_norm(precise(x), dim=-1, keepdim=keepdim).clamp(min=1e-12)


def directions(x: Tensor) -> Tensor:
    """`x` `[..., N, C]` at a length of 1, in float32 at least."""
    return precise(x) / length_of(x, keepdim=True)


def matched(sources: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine of each source and the candidate that it is most similar to, and which that is: both `[B, S]`, of
    `directions` `[B, S, C]` and `[B, K, C]`."""
    return full_product(sources, candidates.transpose(1, 2)).max(dim=-1)


def most_similar(sources: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Which candidate each source is most similar to by their cosine, and the cosine times the source's own length,
    which makes no difference to that: both `[B, S]`, of features `[B, S, C]` and `[B, K, C]` in float32 at least."""
    # Of the candidates, which are many, the products are divided by their length, not the features.
    products = full_product(sources, candidates.transpose(1, 2))
    along, nearest = (products / length_of(candidates).unsqueeze(1)).max(dim=-1)
    return nearest, along


def full_product(left: Tensor, right: Tensor) -> Tensor:
    """`left` `[B, S, C]` times `right` `[B, C, K]` in their own precision: half of it has not the range, and costs
    more on many a CPU."""
    return uncast(torch.bmm, left, right)  # not `@`, which exporters copy both sides for


def add_by_index(x: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """The first tokens of `x` `[B, K + S, C]`, `[B, K, C]`, plus each of `values` `[B, S, C]` at its `destination`.

    In place, row by row: faster on a CPU; on a GPU the sums would come in another order each time. `values` may be
    the last tokens of `x`.
    """
    (batch, tokens, _), sources = x.shape, destination.shape[1]
    stays = x.narrow(1, 0, tokens - sources)
    if alone(x):
        return stays.index_add_(1, destination[0], values)
    # Without the last image's sources, so that no row is both read and written.
    rows = x.flatten(0, 1)[: batch * tokens - sources]
    rows.index_add_(0, rows_of(destination, tokens).flatten(), values.flatten(0, 1))
    return stays


def add_by_product(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`start` `[B, K, C]` plus each of `values` `[B, S, C]` at its `destination`, as a product with a matrix of ones
    and zeros: the same sums each time."""
    return product_added(start, matrix_of(destination, start), values)


def matrix_of(destination: Tensor, start: Tensor) -> Tensor:
    """Ones where a value goes to, `[B, K, S]`, zeros elsewhere, for `start` `[B, K, C]` and `destination` `[B, S]`."""
    return (destination[:, None] == torch.arange(start.shape[1], device=start.device)[:, None]).to(start.dtype)


def product_added(start: Tensor, goes_to: Tensor, values: Tensor) -> Tensor:
    """`start` plus the product of the others; tokens keep the residual stream's precision."""
    return uncast(torch.baddbmm, start, goes_to, values)


def add_up(start: Tensor, destination: Tensor, values: Tensor) -> Tensor:
    """`start` `[B, K]` plus each of `values` `[B, S]` at its `destination` `[B, S]`."""
    if on_cpu(start):
        return start.scatter_add(1, destination, values)
    return add_by_product(start[:, :, None], destination, values[:, :, None]).squeeze(-1)


def averaged(x: Tensor, destination: Tensor, total: Tensor | None) -> Tensor:
    """The first tokens of `x` `[B, K + S, C]` plus each of the others at its `destination` `[B, S]`, over their `total`
    `[B, K]`, by default how many these are: `[B, K, C]`.

    `x` may be overwritten, unless a backward pass asks for it.
    """
    kept, leaving = x.shape[1] - destination.shape[1], destination.shape[1]
    if in_graph() or x.requires_grad or not on_cpu(x):  # a graph has nothing to do in place
        stays, leaves = x.split_with_sizes((kept, leaving), 1)
        goes_to = matrix_of(destination, stays)
        total = goes_to.sum(-1, keepdim=True) + 1 if total is None else total.unsqueeze(-1)
        return product_added(stays, goes_to, leaves) / total
    if total is None:
        total = add_up(x.new_ones(x.shape[0], kept), destination, x.new_ones(destination.shape))
    sums, total = add_by_index(x, destination, x.narrow(1, kept, leaving)), total.unsqueeze(-1)
    return sums.div_(total) if sums.is_contiguous() else sums / total


def merge_tokens(state: TokenState, index: Tensor, kept: int, spared: int, mean: Mean) -> TokenState:
    """The tokens at the first `kept` of `index` `[B, K]`, each but the first `spared` (nothing is merged into class
    tokens and registers) averaged with those at the later ones that are most similar to it; all others are pruned.

    Where none but spared tokens are kept there is no destination, and the later ones are pruned.
    """
    if kept <= spared:
        return keep_tokens(state, index[:, :kept])
    x = precise(take(state.x, index))
    _, candidates, sources = directions(x).split_with_sizes((spared, kept - spared, x.shape[1] - kept), 1)
    cosine, nearest = matched(sources, candidates)
    return joined(state, index, x, nearest + spared, cosine, mean)


def joined(
    state: TokenState, index: Tensor, x: Tensor | None, destination: Tensor, cosine: Tensor | None, mean: Mean
) -> TokenState:
    """The tokens at `index` `[B, K + S]`, the last `S` averaged with the earlier ones that they go to.

    `x` are the features at `index`, in float32 at least, None where they are not at hand; they may be overwritten,
    unless a backward pass asks for them. `destination` and `cosine` `[B, S]` are the position in `index` that each of
    the last goes to, and how similar the two are.
    """
    x = precise(take(state.x, index)) if x is None else x
    leaving, weighed = destination.shape[1], state.size is not None
    kept = index.shape[1] - leaving
    whole = x.new_ones(x.shape[:2]) if state.size is None else state.size.gather(1, index)
    start, leaves = whole.split_with_sizes((kept, leaving), 1)
    sizes = add_up(start, destination, leaves * cosine if mean.cosine_sizes and cosine is not None else leaves)
    if mean.cosine_sizes:
        sizes = sizes.clamp(min=LEAST_SIZE)
    total = None if weighed or mean.cosine_sizes else sizes
    if mean.by_size:
        x = x * whole.unsqueeze(-1) if weighed else x
        total = add_up(start, destination, leaves) if mean.cosine_sizes else sizes
    place = None if state.place is None else take(state.place, index[:, :kept])
    features = averaged(x, destination, total)
    merged = TokenState(features if x.dtype == state.x.dtype else features.to(state.x.dtype), sizes, place=place)
    if state.origin is None:
        return merged
    staying = index[:, :kept]
    stay = torch.arange(kept, device=index.device).expand_as(staying)
    return moved(state, merged, index, torch.cat([stay, destination], dim=1))


def on_cpu(x: Tensor) -> bool:
    """Whether sums come in the same order each time however they are made."""
    return x.device.type in ("cpu", "meta")


# What a rule may go by: the attention `[B, N]` that tokens receive before a reduction, None where the rule does not ask
# for it, and keys and values of all heads.
Seen = tuple[Tensor | None, Heads]


@dataclass(frozen=True)
class ReceivedAttention:
    """Importance is the attention that a token receives from the first `queries` tokens, or from all with 0; the mean
    over them and over heads (paper, section 3.2: from the class token).

    masked_queries: in search, tokens that were removed go on being queries, as in the published search of CAFormer.
    """

    queries: int
    masked_queries: bool = False

    def of(self, attention: Tensor, heads: Heads) -> Tensor:
        """Importance `[B, N]` of the attention `[B, N]` that tokens receive from those that are queries."""
        return attention


@dataclass(frozen=True)
class RandomImportance(ReceivedAttention):
    """Any tokens go: a baseline. Drawn from torch's generator."""

    def of(self, attention: Tensor, heads: Heads) -> Tensor:
        return torch.rand_like(attention)


@dataclass(frozen=True)
class AttentionTimesValue(ReceivedAttention):
    """Importance is the received attention times the length of the token's value, heads together (Guo et al.,
    "Attention score is not all you need for token importance indicator in KV cache reduction: value also matters",
    EMNLP 2024)."""

    def of(self, attention: Tensor, heads: Heads) -> Tensor:
        return attention * torch.linalg.vector_norm(heads.value, dim=(1, 3), dtype=attention.dtype)


@dataclass(frozen=True)
class Mean:
    """How the features and sizes of merged tokens come about.

    by_size: features are the mean weighted by sizes (Bolya et al., ICLR 2023, section 3); else the plain mean (paper).
    cosine_sizes: a merged token's size counts times its cosine with its destination (paper); else sizes add up.
    """

    by_size: bool = False
    cosine_sizes: bool = False


class Pairing(ABC):
    """Which tokens merge into which."""

    def ranks(self, kept: Kept) -> bool:
        """Whether importance is asked for."""
        return True

    @abstractmethod
    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """What is left of `state` at the counts `kept`: the first `prefix` tokens, and others; `importance` `[B, N]` is
        None where neither pruning nor pairing asks for it."""


@dataclass(frozen=True)
class IntoMostSimilarKept(Pairing):
    """The least important tokens merge, each into the most similar of those that are kept (paper, section 3.2).

    spared: the first tokens by importance, the prefix at least, that none is merged into.
    """

    spared: int

    def reduce(
        self, state: TokenState, importance: Tensor | None, heads: Heads, kept: Kept, prefix: int, mean: Mean
    ) -> TokenState:
        """The most important tokens, after the less important ones joined them."""
        assert importance is not None
        index = most_important(importance, kept.pruned, prefix)
        if kept.merged < kept.pruned:
            return merge_tokens(state, index, kept.merged, self.spared, mean)
        return keep_tokens(state, index)


@dataclass(frozen=True)
class ReductionRule:
    """How a block lets tokens go. prefix: the first tokens, which always stay: class, distillation, registers."""

    prefix: int
    importance: ReceivedAttention
    pairing: Pairing
    mean: Mean

    def reduced(self, state: TokenState, seen: Seen, kept: Kept) -> TokenState:
        """What is left of `state` of `kept.entering` tokens, given what was `seen` of their attention."""
        attention, heads = seen
        importance = None if attention is None else self.importance.of(attention, heads)
        return self.pairing.reduce(state, importance, heads, kept, self.prefix, self.mean)
