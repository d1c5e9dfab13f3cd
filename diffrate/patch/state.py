"""What compression adds to a model's state: rate logits to search with, kept counts to run at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffrate.blocks.rates import Choice, candidate_count, draw, expectation, flattest_logits
from diffrate.schedule import Schedule, SearchSpace, make_schedule


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
        """Choose among counts these steps apart: fresh rate logits, where the old ones were if there are any.

        Raises:
            RateError: a step below 1.
        """
        self.granularity = {"prune": prune, "merge": merge}
        device = next((rate.device for rate in self.parameters()), None)
        for block, kind in self.choices():
            candidates = candidate_count(self.patches(block), self.granularity[kind])
            self.register_parameter(f"{kind}{block}", nn.Parameter(torch.zeros(candidates, device=device)))

    @torch.no_grad()
    def reset(self) -> None:
        """Rate logits of zero that learn, as a search starts: all candidates alike. In float32, which small updates
        show in."""
        for rate in self.logits():
            rate.data = torch.zeros_like(rate, dtype=torch.float32)
            rate.requires_grad_(True)

    def patches(self, block: int) -> int:
        """Tokens of `block` that can go."""
        return self.space.limits[block] - self.space.prefix

    def choices(self) -> list[tuple[int, str]]:
        """Block and kind of each choice: block order, prune before merge."""
        return [(block, kind) for block in self.space.searchable for kind in self.space.kinds]

    def logits(self) -> list[nn.Parameter]:
        """The rate logits in the order of `choices`."""
        return [self.get_parameter(f"{kind}{block}") for block, kind in self.choices()]

    def draw(self) -> dict[int, dict[str, Choice]]:
        """The choices of every searchable block at the present logits."""
        drawn: dict[int, dict[str, Choice]] = {block: {} for block in self.space.searchable}
        patches = self.patches(self.space.searchable[0])
        for kind in self.space.kinds:
            logits = torch.stack([self.get_parameter(f"{kind}{block}") for block in self.space.searchable])
            choices = draw(logits, patches, self.granularity[kind], self.space.prefix)
            for block, choice in zip(self.space.searchable, choices, strict=True):
                drawn[block][kind] = choice
        return drawn

    @torch.no_grad()
    def expected_schedule(self) -> Schedule:
        """The kept counts that the rate logits stand for; blocks without a choice keep all."""
        drawn = self.draw()
        return self.space.schedule([choice.count for block in drawn.values() for choice in block.values()])

    @torch.no_grad()
    def start_at(self, schedule: Schedule, spread: float | None = None) -> None:
        """Set the logits so that the expected counts, rounded up, are those of `schedule`.

        Of all distributions over the candidates with that mean, the flattest: it leaves the search
        the most freedom; or bells of deviation `spread`, a share of the patches. Counts beyond the
        candidates' range go to its ends.
        """
        rows = {"prune": schedule.prune, "merge": schedule.merge}
        for (block, kind), rate in zip(self.choices(), self.logits(), strict=True):
            counts = rows[kind]
            assert counts is not None, "a schedule that the model's check has passed"
            mean = counts[block] - self.space.prefix - 0.5  # rounded up, this is the count
            rate.copy_(flattest_logits(mean, self.patches(block), self.granularity[kind], spread))

    @torch.no_grad()
    def expected_counts(self) -> list[float]:
        """The expected counts before rounding, one per choice in the order of `logits`."""
        prefix = self.space.prefix
        return [
            float(expectation(rate, self.patches(block), self.granularity[kind])) + prefix
            for (block, kind), rate in zip(self.choices(), self.logits(), strict=True)
        ]

    @torch.no_grad()
    def expectations(self) -> list[float]:
        """`expected_counts`, read from the device at once: for records, as the last bit may differ."""
        rows: dict[str, Tensor] = {}
        for kind in self.space.kinds:
            logits = torch.stack([self.get_parameter(f"{kind}{block}") for block in self.space.searchable])
            patches = self.patches(self.space.searchable[0])
            rows[kind] = expectation(logits, patches, self.granularity[kind]) + self.space.prefix
        return torch.stack([rows[kind] for kind in self.space.kinds], dim=1).flatten().tolist()

    @torch.no_grad()
    def current(self) -> Schedule:
        """The fixed schedule; before there is one, that of the rate logits, or dense while all of them are zero."""
        if self.schedule is not None:
            return self.schedule
        return self.expected_schedule() if any(bool(rate.any()) for rate in self.logits()) else self.space.dense()

    def get_extra_state(self) -> Tensor:
        """The fixed counts `[2, blocks]`, prune and merge (`[1, blocks]` without prune); `[0]` for none."""
        if self.schedule is None:
            return torch.empty(0, dtype=torch.int64)
        rows = [self.schedule.merge] if self.schedule.prune is None else [self.schedule.prune, self.schedule.merge]
        return torch.tensor(rows, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the counts of another model of the same shape.

        Raises:
            ValueError: another number of blocks, or counts of another kind of model.
        """
        if state.numel() == 0:
            self.schedule = None
            return
        expected = [len(self.space.kinds), len(self.space.limits)]
        if list(state.shape) != expected:
            raise ValueError(f"kept counts in the state dict: found {list(state.shape)}; accepted: {expected}")
        *prune, merge = state.tolist()
        self.schedule = make_schedule(prune[0] if prune else None, merge)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = any(key.startswith(prefix) for key in state_dict)
        missing = missing_keys if known else []  # an official file: its weights are all there is to load
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
