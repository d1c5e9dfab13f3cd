"""What a search is set to: the defaults are the paper's. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffrate.budgets.space import GRANULARITY

METHODS = ("gradient", "calibrated", "both")
FLOPS_LOSSES = ("absolute", "relative")
LOSSES = ("labels", "distill", "tokens")
BUDGETS = ("penalty", "held")
SMOOTHING = 0.1  # of labels, as in DeiT's recipe


def least_rate(learning_rate: float) -> float:
    """The learning rate of the last step, where nobody says: a tenth of the first."""
    return learning_rate / 10


class SearchSettingError(ValueError):
    """A setting of a search that makes no sense."""


@dataclass(frozen=True)
class SearchSettings:
    """What the user chooses of a search (paper, section 4.1).

    flops_loss: the cost's distance from its target in GFLOPs (`absolute`, the paper's), or as a share of
        the target (`relative`), for models whose GFLOPs are far from 1.
    flops_weight: of that distance, squared, in the loss.
    warmup: whether the first epoch's loss leaves the cost out.
    learning_rate, least_learning_rate: of the rate logits, in the first step and in the last.
    granularity: tokens between the candidates of a count.
    accumulate: batches an update.
    loss: what the compressed model is held against: `labels` (the paper), the dense model's outputs
        (`distill`), or its features of every patch (`tokens`).
    multi_label: whether outputs are labels of their own, by a sigmoid each, and not classes.
    budget: how the cost is: a `penalty` in the loss (the paper), or `held` on its target by a multiplier that
        the search learns.
    """

    epochs: int = 3
    flops_loss: str = "absolute"
    flops_weight: float = 5.0
    warmup: bool = False
    learning_rate: float = 0.01
    least_learning_rate: float = least_rate(0.01)
    granularity: int = GRANULARITY
    accumulate: int = 1
    seed: int = 0
    loss: str = "labels"
    budget: str = "penalty"
    multi_label: bool = False

    @property
    def held(self) -> bool:
        """Whether a multiplier holds the cost on its target."""
        return self.budget == "held"

    def __post_init__(self) -> None:
        accepted = {
            "epochs": (self.epochs >= 1, "from 1"),
            "flops_loss": (self.flops_loss in FLOPS_LOSSES, " or ".join(FLOPS_LOSSES)),
            "loss": (self.loss in LOSSES, ", ".join(LOSSES)),
            "budget": (self.budget in BUDGETS, " or ".join(BUDGETS)),
            "warmup": (not (self.warmup and self.held), "False where the budget is held"),
            "flops_weight": (0 <= self.flops_weight < math.inf, "from 0"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "least_learning_rate": (0 <= self.least_learning_rate <= self.learning_rate, "0 to learning_rate"),
            "accumulate": (self.accumulate >= 1, "from 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 4294967295"),
        }
        for name, (fine, what) in accepted.items():
            if not fine:
                raise SearchSettingError(f"{name}: found {getattr(self, name)!r}; accepted: {what}")


@dataclass(frozen=True)
class Course:
    """A search as it will run: its settings, its target in multiply-accumulates, its updates an epoch."""

    settings: SearchSettings
    target: float
    steps: int

    def learning_rate(self, epoch: int, step: int) -> float:
        """Cosine over all steps, from the first rate to the last step's."""
        chosen = self.settings
        total = chosen.epochs * self.steps
        share = (epoch * self.steps + step) / max(1, total - 1)
        first, last = chosen.learning_rate, chosen.least_learning_rate
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    def weight(self, epoch: int) -> float:
        """The cost's weight in the loss."""
        return 0.0 if self.settings.warmup and epoch == 0 else self.settings.flops_weight

    def distance(self, flops: Any) -> Any:
        """How far a cost is from the target, squared (paper, equation 9)."""
        unit = 1e9 if self.settings.flops_loss == "absolute" and not self.settings.held else self.target
        return ((flops - self.target) / unit) ** 2
