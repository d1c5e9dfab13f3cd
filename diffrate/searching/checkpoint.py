"""What a search works on, its records, and its checkpoints."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffrate.atomic import UNREADABLE, first_line, load_tensors, whole_file
from diffrate.budget import SHARE, SPEEDUP, Budget, Target
from diffrate.device import Placement, rank, seed_everything, step_seed
from diffrate.evaluation import Batches, Scores, evaluate
from diffrate.latency.table import LatencyTable, check_table
from diffrate.patch.base import CompressedModel
from diffrate.schedule import Schedule, ScheduleError, SearchSpace, fields_of, make_schedule
from diffrate.searching.settings import GRADIENT, SearchSettingError, SearchSettings

KIND = "search"


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


class NonFiniteLossError(RuntimeError):
    """A loss that is no number."""


class StoppedError(Exception):
    """An observer asked a search to stop. saved: False where there was nothing for its checkpoint to save yet."""

    def __init__(self, message: str, saved: bool = True) -> None:
        super().__init__(message)
        self.saved = saved


class SearchCheckpointError(ValueError):
    """A file that is no search's checkpoint, or that of another search."""


@dataclass(frozen=True)
class Task:
    """A search to do. file: its checkpoint."""

    model: CompressedModel
    loader: Any
    settings: SearchSettings
    budget: Budget
    place: Placement
    val: Batches | None
    file: Path | None
    resume: Path | None

    @property
    def space(self) -> SearchSpace:
        """The choices: by gradient the published ones, at hard counts those of every block."""
        space = self.model.compression.space
        return space if self.settings.method == GRADIENT else space.every_block()

    def generators(self) -> list[torch.Generator]:
        """Those that the loader or its sampler holds."""
        owners = (self.loader, getattr(self.loader, "sampler", None))
        held = (getattr(owner, "generator", None) for owner in owners)
        return [generator for generator in held if isinstance(generator, torch.Generator)]

    def epoch_of(self, epoch: int) -> Iterator[Any]:
        """The batches of `epoch`, from a seed of its own, as are the generators that the loader or its sampler holds. A
        sampler with `set_epoch` gets the epoch. Loader processes that persist have generators out of reach."""
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        drawn = step_seed(self.settings.seed, epoch, rank(self.place.group))
        seed_everything(drawn)
        for generator in self.generators():
            generator.manual_seed(drawn)
        return iter(self.loader)

    def scores_at(self, schedule: Schedule, callback: Any = None) -> Scores | None:
        """The scores of the model at `schedule`, which it is left at; None without images for it."""
        if self.val is None:
            return None
        self.model.schedule = schedule
        multi_label, precision = self.settings.multi_label, self.settings.precision
        options = {"multi_label": multi_label, "precision": precision, "group": self.place.group}
        return evaluate(self.model, self.val, callback=callback, **options)

    def check_file(self) -> None:
        """SearchSettingError where the checkpoint cannot be written: no such folder, or notes that cannot be saved."""
        if self.file is None:
            return
        if self.file.is_dir() or not self.file.parent.is_dir():
            raise SearchSettingError(f"checkpoint: found {self.file}; accepted: a file in a folder that is there")
        trial = io.BytesIO()
        try:
            torch.save(dict(self.settings.notes or {}), trial)
            trial.seek(0)
            torch.load(trial, weights_only=True)
        except (*UNREADABLE, pickle.PicklingError) as error:
            raise SearchSettingError(f"notes: {first_line(error)}; accepted: plain values and tensors") from error

    def save(self, schedule: Schedule, best: Schedule | None, **content: Any) -> None:
        """Write the checkpoint: the present schedule, the best one so far, and what the search goes on from."""
        assert self.file is not None
        notes = self.settings.notes or {}
        schedules = {"schedule": plain_row(schedule), "best_schedule": None if best is None else plain_row(best)}
        with whole_file(self.file) as file:
            torch.save({**notes, "mode": KIND, "tokens": schedule.tokens, **schedules, **content}, file)


def budget_of(model: CompressedModel, target: Target, table: LatencyTable | None) -> Budget:
    """What a target is for `model`; one in seconds goes by `table`. SearchSettingError for another model's."""
    dense = model.dense_schedule()
    if not target.timed:
        return Budget(model.flops_at, target.value * (model.flops_at(dense) if target.kind == SHARE else 1))
    assert table is not None
    try:
        check_table(table, model)
    except ValueError as error:
        raise SearchSettingError(str(error)) from None
    whole = table.seconds(dense)
    seconds = whole / target.value if target.kind == SPEEDUP else target.value
    return Budget(table.seconds, seconds, target.kind, whole)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a search's checkpoint; SearchCheckpointError where it is missing, damaged, or of another kind."""
    try:
        content = load_tensors(path)
    except UNREADABLE as error:
        raise SearchCheckpointError(
            f"{path}: cannot be read ({first_line(error)}); accepted: the checkpoint of a search"
        ) from error
    found = content.get("mode", "weights alone") if isinstance(content, dict) else type(content).__name__
    if found != KIND:
        raise SearchCheckpointError(f"{path}: found the checkpoint of another kind ({found}); accepted: of a search")
    return content


def check_record(path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """SearchCheckpointError where a value `saved` is not as `expected`; names the first one."""
    for name, value in expected.items():
        found = saved.get(name)
        if found != value:
            raise SearchCheckpointError(f"{path}: was made with {name} {found}; accepted: {value}, as in this search")


def searched_schedule(path: Path) -> Schedule:
    """The best schedule of a search's checkpoint, or before its first epoch ended that of its rates; raises as
    `read_checkpoint`."""
    content = read_checkpoint(path)
    try:
        found = make_schedule(*(content["best_schedule"] or content["schedule"]))
        return replace(found, tokens=content.get("tokens"))
    except (*UNREADABLE, ScheduleError) as error:
        raise SearchCheckpointError(f"{path}: no schedule in it ({error!r})") from error


def plain_row(schedule: Schedule) -> list[Any]:
    """A schedule as plain values, as `make_schedule` takes them."""
    return list(fields_of(schedule).values())
