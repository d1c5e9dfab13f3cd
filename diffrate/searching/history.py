"""How a search went: a record per step and per epoch, and those of steps as one table for a file."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrate.budgets.schedule import Schedule
from diffrate.running.evaluation import Scores

FIXED = 6  # figures of a step, beside a count for each choice


@dataclass(frozen=True)
class StepRecord:
    """One update of the rates, as it was before the update; means over batches and processes.

    loss: of classification. flops_loss: distance of the cost from its target, without its weight.
    flops: expected, in multiply-accumulates. counts: what the rates expected to keep, one per choice,
    block order, prune before merge, not rounded.
    """

    epoch: int
    step: int
    loss: float
    flops_loss: float
    flops: float
    learning_rate: float
    counts: tuple[float, ...]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: means of its steps, and the schedule that its rates round to.

    scores: at that schedule, None where there was nothing to score on. best: whether it is the one to
    report so far.
    """

    epoch: int
    loss: float
    flops_loss: float
    expected_flops: float
    learning_rate: float
    schedule: Schedule
    flops: int
    scores: Scores | None
    best: bool


class History:
    """The records of a search's steps, kept as rows of numbers: a checkpoint takes them as they lie."""

    def __init__(self, choices: int) -> None:
        self.columns = FIXED + choices
        self.numbers = array("d")

    def append(self, record: StepRecord) -> None:
        """One more step."""
        figures = record.loss, record.flops_loss, record.flops, record.learning_rate
        self.numbers.extend((record.epoch, record.step, *figures, *record.counts))

    def table(self) -> Tensor:
        """A float64 tensor, `[steps, 6 + choices]`."""
        if not self.numbers:
            return torch.empty(0, self.columns, dtype=torch.float64)
        return torch.frombuffer(bytearray(self.numbers), dtype=torch.float64).reshape(-1, self.columns)

    def load(self, table: Tensor | None) -> None:
        """Take over the rows of `table`; None, from files that have no history, leaves it empty.

        Raises:
            ValueError: the table is another search's.
        """
        self.numbers = array("d")
        if table is None:
            return
        if table.ndim != 2 or table.shape[1] != self.columns:
            raise ValueError(f"history: found {list(table.shape)}; accepted: {self.columns} columns")
        self.numbers.extend(table.double().flatten().tolist())

    def records(self) -> tuple[StepRecord, ...]:
        """A record per step, in order."""
        return tuple(
            StepRecord(int(epoch), int(step), loss, flops_loss, flops, rate, tuple(counts))
            for epoch, step, loss, flops_loss, flops, rate, *counts in self.table().tolist()
        )
