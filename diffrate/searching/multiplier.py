"""A cost that is held on its target: the multiplier of its excess is learnt beside the rates.

The step goes along the gradient of the classification loss, plus `unit (value + STIFFNESS excess)` times that of
the excess: the augmented Lagrangian of a constraint, whose value rises while the cost is above its target and
falls while it is below. The unit is a running mean of how much longer the first gradient is than the second, so
that one setting suits all losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GAIN = 0.2  # of the value, a step, for each whole excess
STIFFNESS = 60.0  # an excess of 2 % weighs about as much as the classification loss
MOST = 0.1  # of an excess that the value takes in: far from the target, it would rise without end
MEMORY = 0.9  # of the running mean


@dataclass
class Multiplier:
    """What an excess costs: `value` in its `unit`, which is 0 before the first step."""

    value: float = 0.0
    unit: float = 0.0

    def add(self, rates: Sequence[nn.Parameter], slopes: Sequence[Tensor], excess: float, scale: float) -> None:
        """Add the cost's part to the gradients of `rates`, which are `scale` times those of the classification loss.

        `slopes` are the gradients of the excess, as a share of the target. Gradients that are no numbers are left
        to the scaler, which passes the step over.
        """
        lengths = [torch.cat([part.flatten() for part in parts]).norm() for parts in (_gradients(rates), slopes)]
        own, other = torch.stack(lengths).tolist()
        unit = own / scale / other if other else math.nan
        if not math.isfinite(unit):
            return
        self.unit = MEMORY * self.unit + (1 - MEMORY) * unit if self.unit else unit
        weight = self.unit * (self.value + STIFFNESS * excess)
        self.value += GAIN * max(-MOST, min(MOST, excess))
        for gradient, slope in zip(_gradients(rates), slopes, strict=True):
            gradient.add_(slope, alpha=weight * scale)

    def plain(self) -> list[float]:
        """Both numbers for a checkpoint."""
        return [self.value, self.unit]

    @classmethod
    def from_plain(cls, numbers: Sequence[float] | None) -> Multiplier:
        """Back; None, from files of searches that had none, is a fresh one."""
        return cls() if numbers is None else cls(*numbers)


def _gradients(rates: Sequence[nn.Parameter]) -> list[Tensor]:
    return [rate.grad for rate in rates if rate.grad is not None]
