"""How a block lets tokens go, as a value: which tokens matter, which merge into which, and how they are averaged.

A new importance, pairing or mean is a class here, with the attributes of the others beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffrate.blocks.merge import merge_tokens
from diffrate.blocks.prune import keep_tokens, most_important
from diffrate.blocks.tokens import TokenState
from diffrate.budgets.schedule import Kept


@dataclass(frozen=True)
class FirstTokensAttention:
    """Importance is the attention of the first `queries` tokens, the mean over them and over heads (paper, section 3.2:
    the class token's)."""

    queries: int
    masked_queries: ClassVar[bool] = False

    def of(self, attention: Tensor) -> Tensor:
        """Importance `[B, N]` of the attention `[B, N]` that tokens receive from those that are queries."""
        return attention


@dataclass(frozen=True)
class ReceivedAttention:
    """Importance is the attention received from all tokens, for models without a class token.

    masked_queries: in search, tokens that were removed go on being queries, as in the published search of CAFormer.
    """

    masked_queries: bool = False
    queries: ClassVar[int] = 0  # all

    def of(self, attention: Tensor) -> Tensor:
        """As of `FirstTokensAttention`."""
        return attention


@dataclass(frozen=True)
class RandomImportance:
    """Any tokens go: a baseline. Drawn from torch's generator."""

    queries: int
    masked_queries: ClassVar[bool] = False

    def of(self, attention: Tensor) -> Tensor:
        """As of `FirstTokensAttention`."""
        return torch.rand_like(attention)


@dataclass(frozen=True)
class PlainMean:
    """The features of merged tokens are their plain mean, whatever their sizes.

    cosine_sizes: a merged token's size counts times its cosine with its destination; else sizes add up.
    """

    cosine_sizes: bool


@dataclass(frozen=True)
class IntoMostSimilarKept:
    """The least important tokens merge, each into the most similar of those that are kept (paper, section 3.2).

    spared: the first tokens by importance, the prefix at least, that none is merged into.
    """

    spared: int

    def reduce(self, state: TokenState, importance: Tensor, kept: Kept, prefix: int, mean: PlainMean) -> TokenState:
        """The most important tokens, after the less important ones joined them.

        `importance` `[B, N - prefix]` is that of all tokens but the first `prefix`.
        """
        index = most_important(importance, kept.pruned, prefix)
        if kept.merged < kept.pruned:
            return merge_tokens(state, index, kept.merged, self.spared, mean.cosine_sizes)
        return keep_tokens(state, index)


Importance = FirstTokensAttention | ReceivedAttention | RandomImportance


@dataclass(frozen=True)
class ReductionRule:
    """How a block lets tokens go. prefix: the first tokens, which always stay: class, distillation, registers."""

    prefix: int
    importance: Importance
    pairing: IntoMostSimilarKept
    mean: PlainMean

    def reduced(self, state: TokenState, attention: Tensor, kept: Kept) -> TokenState:
        """What is left of `state` of `kept.entering` tokens, given the attention `[B, N - prefix]` that all but the
        prefix receive."""
        return self.pairing.reduce(state, self.importance.of(attention), kept, self.prefix, self.mean)


def published_rule(prefix: int, class_tokens: int) -> ReductionRule:
    """The paper's rule for models with so many tokens in front, of which the first stand for the whole image."""
    importance = FirstTokensAttention(class_tokens) if class_tokens else ReceivedAttention()
    return ReductionRule(prefix, importance, IntoMostSimilarKept(spared=prefix), PlainMean(cosine_sizes=True))
