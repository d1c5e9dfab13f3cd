"""From images to the schedule that a search at hard counts reports: calibrate on most of them, choose on the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrate.atomic import UNREADABLE, first_line, whole_file
from diffrate.budget import Cost
from diffrate.device import Place, all_sum, least, rank, world
from diffrate.evaluation import modes_kept
from diffrate.patch.base import CompressedModel
from diffrate.schedule import Schedule, make_schedule
from diffrate.searching.calibration import CHUNK, FIRST_PART, Calibration, Clock, gather_images
from diffrate.searching.checkpoint import KIND, SearchCheckpointError, check_record, plain_row, read_checkpoint
from diffrate.searching.moves import Moves
from diffrate.searching.settings import CALIBRATED, SearchSettings
from diffrate.searching.teacher import Teacher
from diffrate.searching.trials import FINALISTS, CalibratedSearch, TrialRecord, Trials

WORK = 22_000.0  # forward passes of the dense model on one image, all in all
LOOKS_AN_IMAGE = 60.0  # at most: of few images there is no more to learn
CHOSEN_ON = 4  # one in so many images is held back to choose on
MOST_CHOSEN_ON = 512  # images
CHOICE = 0.25  # of the time at most: where all images and candidates would take longer, there are fewer of them
UNIFORM = "uniform"  # and the kind
KNOWN = 0.1  # of the least loss: where a difference is measured no closer, too few images say that two are alike
# Of schedules that measurement does not tell apart, the first by this order is chosen: simple ones before others.
SIMPLEST = (f"{UNIFORM} merge", f"{UNIFORM} prune", f"{UNIFORM} both")  # then what was given, then what was calibrated


@dataclass(frozen=True)
class Stage:
    """What a part of a search took: forward passes of the dense model on one image, and seconds."""

    name: str
    work: float
    seconds: float


@dataclass(frozen=True)
class Calibrated:
    """What calibration came to. chosen: whose schedule it is. losses: on the images held back, of all candidates.

    alike: the candidates whose loss is within a standard error of the least, image by image, where that error is small
    beside the loss; the simplest of them is chosen. noise: that error of the chosen one; 0 where it has the least
    loss itself.
    """

    schedule: Schedule
    chosen: str
    losses: tuple[tuple[str, float], ...]
    stages: tuple[Stage, ...]
    trials: tuple[TrialRecord, ...]
    alike: tuple[str, ...] = ()
    noise: float = 0.0


@dataclass(frozen=True)
class Plan:
    """How far a calibration goes. work: None for the usual, or a `share` of it; minutes: to end within, loading
    included, None for any."""

    seed: int
    images: int = SearchSettings.images
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

    def stop(self) -> bool:
        """Asked after each trial, and within long computations: whether all processes are to stop."""
        return False


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
        StoppedError: the observer asked to stop.
        ValueError: fewer than two images, or no schedule to start from.
    """
    observer, told = observer or CalibrationObserver(), []
    before = {} if resume is None else _content(resume)
    clock = Clock(place.device, None if plan.minutes is None else 60 * plan.minutes, observer.stop)
    clock.saved = bool(before)
    clock.begun -= before.get("seconds", 0.0)
    # What is gone on from had its images: they are the same again, however long that takes.
    loading, begun = clock.untimed() if before else clock, clock.now()
    with modes_kept(model):
        model.eval()
        timed = before["setting"].get("timed", False) if before else clock.limited
        searched_on, chosen_on = _images(loader, plan, before, timed, loading)
        setting = {"seed": plan.seed, "images": len(searched_on) + len(chosen_on), "target": target, "work": plan.work}
        setting |= {"loss": loss, "multi_label": multi_label}
        saved = None if resume is None else _trials(resume, before, setting)
        setting |= {"timed": timed}
        if saved is not None and saved.felt is not None:
            searched_on = searched_on[: len(saved.felt)]
        ready = clock.now()
        calibration = Calibration(Teacher(model, loss, multi_label), searched_on, place, precision, clock=loading)
        calibration.clock = clock
        speed = calibration.work / max(1e-9, clock.now() - ready)
        moves = Moves(model.compression.space, cost, target, _is_last_idle(model))
        starts = {f"{UNIFORM} {kind}": schedule for kind, schedule in moves.uniform().items()} | dict(given or {})
        starts |= {name: make_schedule(*row) for name, row in before.get("starts", {}).items()}
        share = target / cost(model.dense_schedule())
        choosing = len(chosen_on) * (1 + (len(starts) + FINALISTS) * share)
        work = _work(plan, calibration, choosing, place)
        reserve = min(choosing / speed, CHOICE * clock.seconds)
        search = CalibratedSearch(moves, calibration, work - choosing, plan.seed, saved, speed, reserve)
        observer.on_plan(len(calibration.images) + len(chosen_on), search.limit + choosing, speed)

        def after(record: TrialRecord) -> None:
            told.append(record)
            observer.on_trials(record)

        def keep(trials: Trials, best: Schedule) -> None:
            if checkpoint is not None and rank() == 0:
                _write(checkpoint, trials, setting, best, starts, notes or {})
            clock.saved = clock.saved or checkpoint is not None

        def save(trials: Trials) -> None:
            keep(trials, told[-1].schedule)
            observer.after_trials()

        found = search.run(list(starts.values()), after, save)
        searched, state = clock.now(), search.state()
        passes = clock.left() * search.pace / world()
        candidates = _candidates(found, starts, (passes / min(FIRST_PART, len(chosen_on)) - 1) / share)
        losses, chosen_work = _losses(calibration, chosen_on, [schedule for _, schedule in candidates])
    chosen, alike, noise = _chosen([name for name, _ in candidates], losses, place)
    name, schedule = candidates[chosen]
    keep(state, schedule)
    stages = (
        Stage("images", 0.0, ready - begun),
        Stage("calibrated search", state.work, searched - ready),
        Stage("choice", chosen_work, clock.now() - searched),
    )
    means = [(name, _mean(row, place)[0]) for (name, _), row in zip(candidates, losses, strict=True)]
    return Calibrated(schedule, name, tuple(means), stages, tuple(told), alike, noise)


def _images(
    loader: Iterable[Any], plan: Plan, before: Mapping[str, Any], timed: bool, clock: Clock
) -> tuple[Tensor, Tensor]:
    """Those to search on, and those held back to choose on, as many in all processes."""
    images = gather_images(loader, before["setting"]["images"] if before and timed else plan.images, clock)
    images = images[: least(len(images), clock.device)]
    if timed:  # the first of them may be all that there is time for
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(plan.seed))]
    held = _held_back(len(images))
    return images[~held], images[held]


def _candidates(found: list[Schedule], starts: Mapping[str, Schedule], most: float) -> list[tuple[str, Schedule]]:
    """What to choose among: up to `most`, of which the best that was found and the starts come first."""
    tried = [(CALIBRATED, schedule) for schedule in found]
    candidates = [*tried, *starts.items()]
    if most >= len(candidates):
        return candidates
    return [*tried[:1], *starts.items(), *tried[1:]][: max(2, int(most))]


def _losses(calibration: Calibration, images: Tensor, schedules: list[Schedule]) -> tuple[list[Tensor], float]:
    """What is lost at each of `schedules` on each of `images`, or on the first ones that there is time for, and the
    work of that."""
    clock, work = calibration.clock, 0.0
    rows: list[list[Tensor]] = [[] for _ in schedules]
    untimed = clock.untimed()
    for part in clock.parts(len(images), CHUNK, clock.seconds):
        held = Calibration(
            calibration.teacher, images[part], calibration.place, calibration.precision, calibration.spread, untimed
        )
        for row, schedule in zip(rows, schedules, strict=True):
            row.append(held.losses(schedule, held.whole()))
        work += held.work
    return [torch.cat(row) for row in rows], work


def _chosen(names: list[str], losses: list[Tensor], place: Place) -> tuple[int, tuple[str, ...], float]:
    """Which candidate it is, the names of those that are as good by measurement, and the standard error of the
    difference between its loss and the least."""
    means = [_mean(row, place)[0] for row in losses]
    least_lost = losses[means.index(min(means))]
    apart, known = [_mean(row.double() - least_lost.double(), place) for row in losses], KNOWN * max(0.0, min(means))
    alike = [index for index, (mean, error) in enumerate(apart) if mean <= error <= known or mean == error == 0]
    chosen = min(alike, key=lambda index: (_rank_of(names[index]), means[index]))
    return chosen, tuple(dict.fromkeys(names[index] for index in alike)), apart[chosen][1]


def _rank_of(name: str) -> int:
    """The place of a candidate among the `SIMPLEST`."""
    others = len(SIMPLEST) + (name == CALIBRATED)
    return SIMPLEST.index(name) if name in SIMPLEST else others


def _mean(values: Tensor, place: Place) -> tuple[float, float]:
    """The mean over the values of all processes, and its standard error; 0 of a single one."""
    values = values.double()
    sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(values))])
    total, squares, count = all_sum(sums.to(place.device)).tolist()
    mean = total / count
    return mean, sqrt(max(squares / count - mean**2, 0.0) / max(1.0, count - 1))


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


def _work(plan: Plan, calibration: Calibration, choosing: float, place: Place) -> float:
    """How many forward passes there are to be, the choice included, as far as the clock does not say."""
    if plan.minutes is not None and plan.work is None:
        return float("inf")
    usual = min(WORK, LOOKS_AN_IMAGE * len(calibration.images)) if plan.work is None else plan.work
    work = usual if plan.minutes is not None else plan.share * usual
    return float(least(int(max(work, choosing + 2 * len(calibration.images))), place.device))


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


def _content(path: Path) -> dict[str, Any]:
    """What a calibration saved."""
    content = read_checkpoint(path).get("calibrated")
    if content is None:
        raise SearchCheckpointError(f"{path}: found a gradient search's; accepted: the checkpoint of a calibrated one")
    return content


def _trials(path: Path, content: Mapping[str, Any], setting: Mapping[str, Any]) -> Trials:
    """The state that a calibration of this `setting` saved at `path`."""
    check_record(path, content["setting"], setting)
    try:
        return Trials(**{item.name: content[item.name] for item in fields(Trials)})
    except UNREADABLE as error:
        raise SearchCheckpointError(f"{path}: does not fit this search ({first_line(error)})") from error
