"""How a search went: a record per step and per epoch, and those of steps as one table for a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrate.budgets.schedule import Schedule
from diffrate.running.evaluation import Scores


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


def history_table(history: Sequence[StepRecord]) -> Tensor:
    """The records as rows of a float64 tensor, `[steps, 6 + choices]`."""
    rows = [
        [record.epoch, record.step, record.loss, record.flops_loss, record.flops, record.learning_rate, *record.counts]
        for record in history
    ]
    return torch.tensor(rows, dtype=torch.float64) if rows else torch.empty(0, 6, dtype=torch.float64)


def history_from_table(table: Tensor | None, choices: int) -> list[StepRecord]:
    """The records of a table; none from files that have no table.

    Raises:
        ValueError: the table is another search's.
    """
    if table is None or len(table) == 0:
        return []
    if table.shape[1] != 6 + choices:
        raise ValueError(f"history: found {table.shape[1]} columns; accepted: {6 + choices}")
    return [
        StepRecord(int(epoch), int(step), loss, flops_loss, flops, rate, tuple(counts))
        for epoch, step, loss, flops_loss, flops, rate, *counts in table.tolist()
    ]
