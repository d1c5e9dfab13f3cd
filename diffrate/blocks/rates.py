"""The differentiable choice of a kept count (paper, section 3.3), and what it adds to a model's state.

A choice has one logit per candidate. Its count is the expectation over the candidates, rounded up;
its mask says which of the tokens, sorted by importance, survive. Both have exact values forward and
the gradient of the probabilities backward (straight-through)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor, nn

from diffrate.blocks.tokens import size_dtype
from diffrate.schedule import RULE_NAMES, Schedule, SearchSpace, check_schedule, make_schedule


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
    """How many kept patch counts `patches, patches - g, ...` there are down to 1; a RateError for steps below 1."""
    if not isinstance(granularity, SupportsIndex) or isinstance(granularity, bool) or granularity < 1:
        raise RateError(f"granularity: found {granularity}; accepted: from 1 to {patches}")
    return (patches + granularity - 1) // granularity


def expectation(logits: Tensor, patches: int, granularity: int) -> Tensor:
    """Expected kept patch counts `[...]` of logits `[..., K]`, not rounded.

    In float32 at least, outside autocast: half precision would round another way.
    """
    with torch.autocast(logits.device.type, enabled=False):
        candidates = patches - granularity * torch.arange(logits.shape[-1], device=logits.device)
        return (logits.to(size_dtype(logits)).softmax(-1) * candidates).sum(-1)


def survival_probabilities(logits: Tensor, patches: int, granularity: int, prefix: int) -> Tensor:
    """Probability `[R, N0]` that each token survives, for logits `[R, K]`; a prefix token's is 1.

    Candidate k keeps `patches - g k` tokens: token i survives under those with `k < (patches - i) / g`,
    so that its probability is a cumulative sum, and no loop over candidates is needed.
    """
    with torch.autocast(logits.device.type, enabled=False):
        cumulative = logits.to(size_dtype(logits)).softmax(-1).cumsum(-1)
        token = torch.arange(patches, device=logits.device)
        keeping = (patches - token + granularity - 1) // granularity  # how many candidates keep it
        survival = cumulative[:, keeping - 1]
        return torch.cat([survival.new_ones(len(logits), prefix), survival], dim=1) if prefix else survival


def draw(logits: Tensor, patches: int, granularity: int, prefix: int) -> list[Choice]:
    """The choices `[R]` of logits `[R, K]`; a RateError where those are no numbers. Reads all counts from the device at
    once."""
    expected = ste_ceil(expectation(logits, patches, granularity)) + prefix
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


def schedule_of(state: Tensor, space: SearchSpace) -> Schedule:
    """The schedule in the state of a model with the choices of `space`, as `CompressionState.get_extra_state` gives it.

    Raises:
        ValueError: another number of blocks or tokens, or counts of another kind of model, or no rules.
    """
    rows, kinds, blocks = state.tolist(), len(space.kinds), len(space.limits)
    if state.ndim != 2 or state.shape[1] != blocks or not kinds <= len(rows) <= kinds + 1:
        raise ValueError(f"kept counts in the state dict: found {list(state.shape)}; accepted: {[kinds, blocks]}")
    numbers = rows[kinds] if len(rows) > kinds else [0] * blocks
    if not all(0 <= number < len(RULE_NAMES) for number in numbers):
        raise ValueError(f"rules in the state dict: found {numbers}; accepted: 0 to {len(RULE_NAMES) - 1}")
    made = make_schedule(rows[0] if kinds > 1 else None, rows[kinds - 1], [RULE_NAMES[number] for number in numbers])
    check_schedule(made, space.limits, space.prunes, "kept counts in the state dict: ", space.least)
    return made


class CompressionState(nn.Module):
    """The rate logits as parameters, and the fixed schedule once there is one.

    The schedule is held as Python integers (static shapes, no device sync, constants to
    `torch.export`) and travels in the state dict as a tensor. Official checkpoints know nothing of
    either, and load strictly all the same.
    """

    def __init__(self, space: SearchSpace, prune_granularity: int, merge_granularity: int) -> None:
        super().__init__()
        self.space = space
        self._schedule: Schedule | None = None
        self.set_granularity(prune_granularity, merge_granularity)

    @property
    def schedule(self) -> Schedule | None:
        """The fixed kept counts; None while the rate logits say how many tokens are kept.

        The logits take gradients only then: parameters that nothing reads would hold up `DistributedDataParallel`.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        self._schedule = schedule
        for rate in self.parameters():
            rate.requires_grad_(schedule is None)

    def set_granularity(self, prune: int, merge: int) -> None:
        """Choose among counts these steps apart, by fresh rate logits on the same device; refuses one below 1."""
        granularity = {"prune": prune, "merge": merge}
        for step in granularity.values():
            candidate_count(self.patches, step)
        self.granularity = granularity
        device = next((rate.device for rate in self.parameters()), None)
        for block, kind in self.space.choices:
            candidates = candidate_count(self.patches, self.granularity[kind])
            self.register_parameter(f"{kind}{block}", nn.Parameter(torch.zeros(candidates, device=device)))

    @torch.no_grad()
    def reset(self) -> None:
        """Rate logits of zero that learn, as a search starts: all candidates alike. In float32, which small updates
        show in."""
        for rate in self.logits():
            rate.data = torch.zeros_like(rate, dtype=torch.float32)
            rate.requires_grad_(True)

    @property
    def patches(self) -> int:
        """Tokens of a searchable block that can go."""
        return self.space.tokens - self.space.prefix

    def logits(self) -> list[nn.Parameter]:
        """The rate logits in the order of the space's choices."""
        return [self.get_parameter(f"{kind}{block}") for block, kind in self.space.choices]

    def _of_kind(self, kind: str) -> Tensor:
        """The rate logits of one kind, `[blocks, K]`."""
        return torch.stack([self.get_parameter(f"{kind}{block}") for block in self.space.searchable])

    def draw(self) -> dict[int, dict[str, Choice]]:
        """The choices of every searchable block at the present logits."""
        rows = [
            draw(self._of_kind(kind), self.patches, self.granularity[kind], self.space.prefix)
            for kind in self.space.kinds
        ]
        chosen = (dict(zip(self.space.kinds, choices, strict=True)) for choices in zip(*rows, strict=True))
        return dict(zip(self.space.searchable, chosen, strict=True))

    @torch.no_grad()
    def expected_schedule(self) -> Schedule:
        """The kept counts that the rate logits stand for; blocks without a choice keep all."""
        drawn = self.draw()
        return self.space.schedule([choice.count for block in drawn.values() for choice in block.values()])

    @torch.no_grad()
    def start_at(self, schedule: Schedule, spread: float | None = None) -> None:
        """Set the logits so that the expected counts, rounded up, are those of `schedule`, by `flattest_logits`: the
        flattest distribution leaves the search the most freedom. Counts out of the candidates' range go to its ends."""
        rows = {"prune": schedule.prune, "merge": schedule.merge}
        for (block, kind), rate in zip(self.space.choices, self.logits(), strict=True):
            counts = rows[kind]
            assert counts is not None, "a schedule that the model's check has passed"
            mean = counts[block] - self.space.prefix - 0.5  # rounded up, this is the count
            rate.copy_(flattest_logits(mean, self.patches, self.granularity[kind], spread))

    @torch.no_grad()
    def expected_counts(self) -> list[float]:
        """The expected counts before rounding, one per choice in the order of `logits`."""
        return [
            float(expectation(rate, self.patches, self.granularity[kind])) + self.space.prefix
            for (_, kind), rate in zip(self.space.choices, self.logits(), strict=True)
        ]

    @torch.no_grad()
    def expectations(self) -> list[float]:
        """`expected_counts`, read from the device at once: for records, as the last bit may differ."""
        rows = [expectation(self._of_kind(kind), self.patches, self.granularity[kind]) for kind in self.space.kinds]
        return (torch.stack(rows, dim=1) + self.space.prefix).flatten().tolist()

    @torch.no_grad()
    def current(self) -> Schedule:
        """The fixed schedule; before there is one, that of the rate logits, or dense while all of them are zero."""
        if self.schedule is not None:
            return self.schedule
        return self.expected_schedule() if any(bool(rate.any()) for rate in self.logits()) else self.space.dense()

    def get_extra_state(self) -> Tensor:
        """The fixed counts `[2, blocks]`, prune and merge (`[1, blocks]` without prune), and a row of the numbers of
        rules where they are not the paper's; `[0]` for none."""
        schedule = self.schedule
        rows = [] if schedule is None else [row for row in (schedule.prune, schedule.merge) if row is not None]
        if schedule is not None and schedule.rules is not None:
            rows.append(tuple(map(RULE_NAMES.index, schedule.rules)))
        return torch.tensor(rows, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the counts of another model of the same shape; raises as `schedule_of`."""
        self.schedule = schedule_of(state, self.space) if state.numel() else None

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing_keys: list[str], *given: Any
    ) -> None:
        known = any(key.startswith(prefix) for key in state_dict)
        missing = missing_keys if known else []  # an official file: its weights are all there is to load
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *given)
