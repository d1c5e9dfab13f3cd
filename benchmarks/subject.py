"""The model that a benchmark is about: built afresh for each measurement, with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import diffrate
import models
from models.zoo import ModelEntry


@dataclass(frozen=True)
class Subject:
    """A model at an input size, rows and columns; `schedule` is None where a benchmark has schedules of its own."""

    entry: ModelEntry
    input_size: models.Size
    schedule: diffrate.Schedule | None
    granularity: int
    seed: int

    def dense(self) -> nn.Module:
        """The plain timm model.

        Raises:
            InputSizeError: its patches do not tile the input.
        """
        torch.manual_seed(self.seed)
        return models.create(self.entry, self.input_size)

    def compressed(self) -> diffrate.CompressedModel:
        """The patched model, at the schedule if there is one, else searching."""
        model = diffrate.patch.vit(self.dense(), self.granularity, self.granularity)
        if self.schedule is not None:
            model.check(self.schedule)
            model.set_kept_num(self.schedule.prune, self.schedule.merge)
        return model
