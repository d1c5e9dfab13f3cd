"""From images to the schedule that a search at hard counts reports: calibrate on most of them, choose on the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrate.budgets.rounding import Cost
from diffrate.budgets.schedule import Schedule, make_schedule
from diffrate.files import UNREADABLE, first_line, whole_file
from diffrate.group import least, rank
from diffrate.patch.base import CompressedModel
from diffrate.running.evaluation import modes_kept
from diffrate.running.precision import Place
from diffrate.searching.calibrated import FINALISTS, CalibratedSearch, TrialRecord, Trials
from diffrate.searching.calibration import Calibration, gather_images
from diffrate.searching.checkpoint import EARLIER, KIND, SearchCheckpointError, plain_row, read_checkpoint
from diffrate.searching.moves import Moves
from diffrate.searching.teacher import Teacher

IMAGES = 4096  # of calibration, over all processes
WORK = 22_000.0  # forward passes of the dense model on one image, all in all
LOOKS_AN_IMAGE = 60.0  # at most: of few images there is no more to learn
CHOSEN_ON = 4  # one in so many images is held back to choose on
MOST_CHOSEN_ON = 512  # images
CALIBRATED = "calibrated"
UNIFORM = "uniform"  # and the kind


@dataclass(frozen=True)
class Stage:
    """What a part of a search took: forward passes of the dense model on one image, and seconds."""

    name: str
    work: float
    seconds: float


@dataclass(frozen=True)
class Calibrated:
    """What calibration came to. chosen: whose schedule it is. losses: on the images held back, of all candidates."""

    schedule: Schedule
    chosen: str
    losses: tuple[tuple[str, float], ...]
    stages: tuple[Stage, ...]
    trials: tuple[TrialRecord, ...]


@dataclass(frozen=True)
class Plan:
    """How far a calibration goes. work: None for the usual, or a `share` of it; minutes: to end within, None for
    any."""

    seed: int
    images: int = IMAGES
    work: float | None = None
    minutes: float | None = None
    share: float = 1.0


class CalibrationObserver:
    """Told how a calibration goes; override what you want to know."""

    def on_plan(self, images: int, work: float, speed: float) -> None:
        """It begins: with so many images and forward passes of the dense model, which makes `speed` a second."""

    def on_trials(self, record: TrialRecord) -> None:
        """A round of trials is done."""

    def after_trials(self) -> None:
        """The round is saved, too; may raise to end the search."""


def calibrate(
    model: CompressedModel,
    loader: Iterable[Any],
    cost: Cost,
    target: float,
    plan: Plan,
    place: Place,
    *,
    loss: str = "distill",
    multi_label: bool = False,
    precision: torch.dtype | None = None,
    given: Mapping[str, Schedule] | None = None,
    observer: CalibrationObserver | None = None,
    checkpoint: Path | None = None,
    notes: Mapping[str, Any] | None = None,
    resume: Path | None = None,
) -> Calibrated:
    """The schedule of `cost` `target` at which `model` loses least against its dense self.

    `given` are schedules of that cost from elsewhere, by name: the search starts from them, too, and the best of
    all, the uniform ones included, is reported. The model's own schedule is neither read nor set.

    Raises:
        SearchCheckpointError: `resume` is another search's.
        SearchSettingError: as `CalibratedSearch.run`.
        ValueError: fewer than two images, or no schedule to start from.
    """
    observer, told = observer or CalibrationObserver(), []
    begun = time.monotonic()
    with modes_kept(model):
        model.eval()
        images = gather_images(loader, plan.images)
        images = images[: least(len(images), place.device)]  # as many in all processes
        count, held = len(images), _held_back(len(images))
        searched_on, chosen_on = images[~held], images[held]
        del images  # they are large
        teacher = Teacher(model, loss, multi_label)
        ready = time.monotonic()
        calibration = Calibration(teacher, searched_on, place, precision)
        speed = calibration.work / max(1e-9, time.monotonic() - ready)
        moves = Moves(model.compression.space, cost, target, _is_last_idle(model))
        starts = {f"{UNIFORM} {kind}": schedule for kind, schedule in moves.uniform().items()} | dict(given or {})
        if resume is not None:
            starts |= _given(resume)
        choosing = len(chosen_on) * (1 + (len(starts) + FINALISTS) * target / cost(model.dense_schedule()))
        work = _work(plan, calibration, choosing, speed, place)
        setting = {"seed": plan.seed, "images": count, "target": target, "work": plan.work}
        setting |= {"loss": loss, "multi_label": multi_label}
        saved = None if resume is None else _read(resume, setting)
        observer.on_plan(count, work, speed)
        search = CalibratedSearch(moves, calibration, work - choosing, plan.seed, saved)

        def after(record: TrialRecord) -> None:
            told.append(record)
            observer.on_trials(record)

        def save(trials: Trials) -> None:
            if checkpoint is not None and rank() == 0:
                _write(checkpoint, trials, setting, told[-1].schedule, starts, notes or {})
            observer.after_trials()

        found = search.run(list(starts.values()), after, save)
        searched = time.monotonic()
        chooser = Calibration(teacher, chosen_on, place, precision, calibration.spread)
        candidates = [(CALIBRATED, schedule) for schedule in found] + list(starts.items())
        losses = [(name, chooser.mean(schedule)) for name, schedule in candidates]
    best = min(range(len(losses)), key=lambda place: losses[place][1])
    if checkpoint is not None and rank() == 0:
        _write(checkpoint, search.state(), setting, candidates[best][1], starts, notes or {})
    ended = time.monotonic()
    stages = (
        Stage("images", 0.0, ready - begun),
        Stage("calibrated search", calibration.work, searched - ready),
        Stage("choice", chooser.work, ended - searched),
    )
    return Calibrated(candidates[best][1], candidates[best][0], tuple(losses), stages, tuple(told))


def _held_back(images: int) -> Tensor:
    """Which of so many images are to choose on, `[images]`: some from all over, as files lie in classes."""
    count = max(1, min(MOST_CHOSEN_ON, images // CHOSEN_ON))
    held = torch.zeros(images, dtype=torch.bool)
    held[torch.arange(1, count + 1) * images // count - 1] = True
    return held


def _is_last_idle(model: CompressedModel) -> bool:
    """Whether nothing is read of the patches that the last block leaves, and a search may drop them there."""
    last = len(model.compressible_blocks()) - 1
    return model.read is not None and model.compression.space.searchable[-1] == last


def _work(plan: Plan, calibration: Calibration, choosing: float, speed: float, place: Place) -> float:
    """How many forward passes there are to be, the choice included."""
    usual = min(WORK, LOOKS_AN_IMAGE * len(calibration.images)) if plan.work is None else plan.work
    work = plan.share * usual
    if plan.minutes is not None:
        work = min(plan.work or float("inf"), 60 * plan.minutes * speed)
    return float(least(int(max(work, choosing + 2 * len(calibration.images))), place.device))


def is_calibrated(path: Path) -> bool:
    """Whether a search's checkpoint is of the part at hard counts.

    Raises:
        SearchCheckpointError: it cannot be read, or is none.
    """
    return read_checkpoint(path).get("calibrated") is not None


def _write(
    path: Path,
    trials: Trials,
    setting: Mapping[str, Any],
    best: Schedule,
    starts: Mapping[str, Schedule],
    notes: Mapping[str, Any],
) -> None:
    state = {item.name: getattr(trials, item.name) for item in fields(trials)}
    rows = {name: plain_row(schedule) for name, schedule in starts.items()}
    content = {
        **notes,
        "mode": KIND,
        "tokens": best.tokens,
        "schedule": plain_row(best),
        "best_schedule": plain_row(best),
        "epoch": 0,
        "step": trials.round,
        "calibrated": {"setting": dict(setting), "starts": rows, **state},
    }
    with whole_file(path) as file:
        torch.save(content, file)


def _given(path: Path) -> dict[str, Schedule]:
    """The schedules that a calibration started from."""
    content = read_checkpoint(path).get("calibrated") or {}
    return {name: make_schedule(*row) for name, row in content.get("starts", {}).items()}


def _read(path: Path, setting: Mapping[str, Any]) -> Trials:
    content = read_checkpoint(path).get("calibrated")
    if content is None:
        raise SearchCheckpointError(f"{path}: found a gradient search's; accepted: the checkpoint of a calibrated one")
    for name, expected in setting.items():
        found = content["setting"].get(name, EARLIER.get(name))
        if found != expected:
            raise SearchCheckpointError(
                f"{path}: was made with {name} {found}; accepted: {expected}, as in this search"
            )
    try:
        return Trials(**{item.name: content[item.name] for item in fields(Trials)})
    except UNREADABLE as error:
        raise SearchCheckpointError(f"{path}: does not fit this search ({first_line(error)})") from error
