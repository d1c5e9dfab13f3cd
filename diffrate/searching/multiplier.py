"""A cost that is held on its target: the multiplier of its excess is learnt beside the rates.

The loss is the classification loss plus `unit (value excess + STIFFNESS / 2 excess^2)`: the augmented
Lagrangian of a constraint, whose multiplier rises while the cost is above its target and falls while it is
below. The unit is a running mean of the classification loss, so that one setting suits all losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

GAIN = 0.2  # of the value, a step, for each whole excess
STIFFNESS = 4.0
MEMORY = 0.9  # of the running mean


@dataclass
class Multiplier:
    """What an excess costs: `value` in units of the classification loss, None before the first step."""

    value: float = 0.0
    unit: float | None = None

    def cost(self, flops: Tensor, target: float, loss: Tensor) -> Tensor:
        """What to add to the classification `loss`, for a cost in multiply-accumulates that carries gradients."""
        excess = flops / target - 1
        unit = loss.detach() if self.unit is None else self.unit
        return unit * (self.value * excess + STIFFNESS / 2 * excess**2)

    def update(self, flops: float, target: float, loss: float) -> None:
        """After a step at this cost and classification loss, means over all processes."""
        self.value += GAIN * (flops / target - 1)
        self.unit = loss if self.unit is None else MEMORY * self.unit + (1 - MEMORY) * loss

    def plain(self) -> list[float]:
        """Both numbers for a checkpoint."""
        return [self.value, math.nan if self.unit is None else self.unit]

    @classmethod
    def from_plain(cls, numbers: Sequence[float] | None) -> Multiplier:
        """Back; None, from files of searches that had none, is a fresh one."""
        if numbers is None:
            return cls()
        value, unit = numbers
        return cls(value, None if math.isnan(unit) else unit)
