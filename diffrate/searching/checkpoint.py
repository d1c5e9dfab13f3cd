"""How a search went: a record per step and per epoch, and those of steps as one table for a file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.atomic import UNREADABLE, first_line, whole_file
from diffrate.evaluation import Scores
from diffrate.schedule import Schedule, ScheduleError, make_schedule
from diffrate.searching.settings import OPTIONS, Course
from diffrate.searching.target import Multiplier

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


KIND = "search"


class SearchCheckpointError(ValueError):
    """A file that is no search's checkpoint, or that of another search."""


@dataclass
class SearchState:
    """All that changes while a search runs, besides rates and optimizer.

    step: updates done in this epoch. sums: losses and GFLOPs of this epoch, added up.
    best: schedule and scores of the best epoch, None for scores where none were taken.
    multiplier: of the cost's excess, where the budget is held.
    """

    epoch: int
    step: int
    sums: list[float]
    best: tuple[Schedule, Scores | None] | None
    history: History
    multiplier: Multiplier = field(default_factory=Multiplier)

    @classmethod
    def fresh(cls, choices: int) -> SearchState:
        """At the start."""
        return cls(0, 0, [0.0, 0.0, 0.0], None, History(choices))


@dataclass
class Parts:
    """The parts of a search that a checkpoint holds, or tells apart from another's."""

    course: Course
    rates: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: SearchState


def write_checkpoint(search: Parts, schedule: Schedule, path: Path, notes: Mapping[str, Any]) -> None:
    """All of a search in one file, with the `schedule` of its rates, and `notes` beside its own fields."""
    state, course = search.state, search.course
    best, scores = state.best or (None, None)
    content = {
        **notes,
        "mode": KIND,
        "settings": course.record(),
        "rates": [rate.detach().cpu() for rate in search.rates],
        "tokens": schedule.tokens,
        "schedule": plain_row(schedule),
        "best_schedule": None if best is None else plain_row(best),
        "best_scores": None if scores is None else asdict(scores),
        "optimizer": search.optimizer.state_dict(),
        "scheduler": {
            "rate": course.settings.learning_rate,
            "least_rate": course.settings.last_rate,
            "steps": course.steps,
        },
        "scaler": search.scaler.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "sums": state.sums,
        # Every step draws from a seed made of this one and its position: no generator state is left over.
        "random": {"seed": course.settings.seed},
        "history": state.history.table(),
        "multiplier": state.multiplier.plain() if course.settings.held else None,
    }
    with whole_file(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a search's checkpoint.

    Raises:
        SearchCheckpointError: the file is missing, damaged, or none of a search.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise SearchCheckpointError(
            f"{path}: cannot be read ({first_line(error)}); accepted: the checkpoint of a search"
        ) from error
    found = content.get("mode", "weights alone") if isinstance(content, dict) else type(content).__name__
    if found != KIND:
        raise SearchCheckpointError(f"{path}: found the checkpoint of another kind ({found}); accepted: of a search")
    return content


def restore(search: Parts, path: Path) -> None:
    """Put a search back where a checkpoint left it.

    Raises:
        SearchCheckpointError: as `read_checkpoint`, or it is another search's; names what differs.
    """
    content = read_checkpoint(path)
    if content.get("calibrated") is not None:
        raise SearchCheckpointError(
            f"{path}: found a calibrated search's; accepted: the checkpoint of a gradient search"
        )
    saved = content.get("settings")
    if saved is not None:  # older files have none of their own
        check_record(path, saved, search.course.record())
    try:
        with torch.no_grad():
            for rate, saved in zip(search.rates, content["rates"], strict=True):
                rate.copy_(saved)
        search.optimizer.load_state_dict(content["optimizer"])
        search.scaler.load_state_dict(content["scaler"])
        search.state = _state(content)
    except UNREADABLE as error:
        raise SearchCheckpointError(f"{path}: does not fit this search ({first_line(error)})") from error


def check_record(path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse what was `saved` of another search. Files from before there was an option were made with its default.

    Raises:
        SearchCheckpointError: names the first value that differs.
    """
    for name, value in expected.items():
        found = saved.get(name, OPTIONS[name].default if name in OPTIONS else value)
        if found != value:
            raise SearchCheckpointError(f"{path}: was made with {name} {found}; accepted: {value}, as in this search")


def searched_schedule(path: Path) -> Schedule:
    """The best schedule of a search's checkpoint, or before its first epoch ended that of its rates.

    Raises:
        SearchCheckpointError: as `read_checkpoint`.
    """
    content = read_checkpoint(path)
    try:
        found = make_schedule(*(content["best_schedule"] or content["schedule"]))
        return replace(found, tokens=content.get("tokens"))
    except (*UNREADABLE, ScheduleError) as error:
        raise SearchCheckpointError(f"{path}: no schedule in it ({error!r})") from error


def _state(content: dict[str, Any]) -> SearchState:
    best, scores = content["best_schedule"], content["best_scores"]
    history = History(len(content["rates"]))
    history.load(content.get("history"))
    return SearchState(
        epoch=content["epoch"],
        step=content["step"],
        sums=content["sums"],
        best=None if best is None else (make_schedule(*best), None if scores is None else Scores(**scores)),
        history=history,
        multiplier=Multiplier.from_plain(content.get("multiplier")),
    )


def plain_row(schedule: Schedule) -> tuple[list[int] | None, list[int]]:
    """A schedule as plain values: prune, None where there is none, and merge."""
    return None if schedule.prune is None else list(schedule.prune), list(schedule.merge)
