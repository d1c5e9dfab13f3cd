"""The kept counts of a model as part of its state: they travel with copies, pickles and files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffrate.schedule import Schedule, make_schedule

FORMAT = "kept counts: an integer tensor [1 or 2, blocks]"


class KeptCounts(nn.Module):
    """Holds a schedule as Python integers and writes it into the state dict as a tensor.

    Integers keep shapes static, need no device sync, and are constants to `torch.export`. Official
    checkpoints know nothing of them, and load strictly all the same.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def get_extra_state(self) -> Tensor:
        """The counts, `[2, blocks]`: prune and merge; `[1, blocks]` for models that only merge."""
        rows = [self.schedule.merge] if self.schedule.prune is None else [self.schedule.prune, self.schedule.merge]
        return torch.tensor(rows, dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over counts of the same shape.

        Raises:
            ValueError: another number of blocks, or counts of another kind of model.
        """
        expected = self.get_extra_state().shape
        if state.shape != expected:
            raise ValueError(f"{FORMAT}: found {list(state.shape)}; accepted: {list(expected)}")
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
