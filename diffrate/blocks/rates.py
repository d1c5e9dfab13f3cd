"""The differentiable choice of a kept count (paper, section 3.3).

A choice has one logit per candidate. Its count is the expectation over the candidates, rounded up;
its mask says which of the tokens, sorted by importance, survive. Both have exact values forward and
the gradient of the probabilities backward (straight-through)."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor


def with_gradient_of(value: Tensor, *carriers: Tensor) -> Tensor:
    """`value` forward; backward its gradient goes unchanged to each of `carriers`."""
    result = value.detach()
    for carrier in carriers:
        result = result + (carrier - carrier.detach())
    return result


def ste_ceil(x: Tensor) -> Tensor:
    """Round up; the gradient is that of `x` (paper, section 3.3)."""
    return with_gradient_of(x.ceil(), x)


def ste_leaving(entering: Tensor, pruned: Tensor, merged: Tensor) -> Tensor:
    """Tokens that leave a block: the minimum of all three.

    The gradient goes in full to the block's own two counts and not to the tokens that enter,
    whichever is the smallest, as in the published code.
    """
    return with_gradient_of(entering.minimum(pruned).minimum(merged), pruned, merged)


STEEPEST = 3.0  # a slope at which one candidate has all but a twentieth of the probability


class RateError(ValueError):
    """A granularity that leaves no choice, or logits that are no numbers."""


class Choice(NamedTuple):
    """One choice as drawn for a step.

    expected: kept tokens, prefix tokens included, a scalar that carries gradients.
    count: the same as an integer.
    survival: probability that each token survives, most important first, `[N0]`.
    """

    expected: Tensor
    count: int
    survival: Tensor

    def mask(self) -> Tensor:
        """1 for the first `count` tokens and 0 for the others, `[N0]`; gradient of `survival`."""
        kept = torch.arange(len(self.survival), device=self.survival.device) < self.count
        return with_gradient_of(kept.to(self.survival.dtype), self.survival)


def candidate_count(patches: int, granularity: int) -> int:
    """How many kept patch counts `patches, patches - g, ...` there are down to 1.

    Raises:
        RateError: a granularity below 1.
    """
    if granularity < 1:
        raise RateError(f"granularity: found {granularity}; accepted: from 1 to {patches}")
    return (patches + granularity - 1) // granularity


def expected_counts(logits: Tensor, patches: int, granularity: int, prefix: int) -> Tensor:
    """Kept tokens `[R]` of logits `[R, K]`, prefix tokens included, rounded up, with gradients.

    In float32 at least, outside autocast: half precision would round another way.
    """
    return ste_ceil(expectation(logits, patches, granularity)) + prefix


def expectation(logits: Tensor, patches: int, granularity: int) -> Tensor:
    """Expected kept patch counts `[...]` of logits `[..., K]`, not rounded."""
    with torch.autocast(logits.device.type, enabled=False):
        candidates = patches - granularity * torch.arange(logits.shape[-1], device=logits.device)
        return (_probabilities(logits) * candidates).sum(-1)


def survival_probabilities(logits: Tensor, patches: int, granularity: int, prefix: int) -> Tensor:
    """Probability `[R, N0]` that each token survives, for logits `[R, K]`; a prefix token's is 1.

    Candidate k keeps `patches - g k` tokens: token i survives under those with `k < (patches - i) / g`,
    so that its probability is a cumulative sum, and no loop over candidates is needed.
    """
    with torch.autocast(logits.device.type, enabled=False):
        cumulative = _probabilities(logits).cumsum(-1)
        token = torch.arange(patches, device=logits.device)
        keeping = (patches - token + granularity - 1) // granularity  # how many candidates keep it
        survival = cumulative[:, keeping - 1]
        return torch.cat([survival.new_ones(len(logits), prefix), survival], dim=1) if prefix else survival


def draw(logits: Tensor, patches: int, granularity: int, prefix: int) -> list[Choice]:
    """The choices `[R]` of logits `[R, K]`. Reads the counts from the device, once for all.

    Raises:
        RateError: the logits are no numbers.
    """
    expected = expected_counts(logits, patches, granularity, prefix)
    survival = survival_probabilities(logits, patches, granularity, prefix)
    counts = expected.tolist()
    if not all(map(math.isfinite, counts)):
        raise RateError("rate logits: found no numbers; accepted: finite ones, as lower learning rates leave them")
    return [Choice(*item) for item in zip(expected, map(int, counts), survival, strict=True)]


def flattest_logits(mean: float, patches: int, granularity: int, spread: float | None = None) -> Tensor:
    """Logits `[K]` with the given expectation whose distribution has the greatest entropy.

    These are linear in the candidates; the slope is found by bracketing. A mean at or beyond the
    ends of the candidates gets the steepest slope allowed. With a `spread`, a share of the patches, the
    distribution is a bell of that deviation around the mean, which the slope then balances.
    """
    from scipy.optimize import brentq  # a quarter of a second, which only a chosen start has to spare

    candidates = patches - granularity * torch.arange(candidate_count(patches, granularity), dtype=torch.float64)
    centred = candidates - candidates.mean()
    bell = 0 * centred if spread is None else -(((candidates - mean) / (spread * patches)) ** 2) / 2

    def excess(slope: float) -> float:
        return float((candidates * (bell + slope * centred).softmax(0)).sum()) - mean

    if excess(-STEEPEST) >= 0:
        slope = -STEEPEST
    elif excess(STEEPEST) <= 0:
        slope = STEEPEST
    else:
        slope = cast(float, brentq(excess, -STEEPEST, STEEPEST))
    return (bell + slope * centred).float()


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
