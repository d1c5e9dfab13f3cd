"""The search at hard counts as a whole: calibrate on most of the images, choose on the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from diffrate.atomic import UNREADABLE, first_line
from diffrate.budget import Budget, BudgetError, baseline_schedule, meets_budget, uniform_schedules
from diffrate.device import Placement, rank, world
from diffrate.latency.measure import Again
from diffrate.schedule import PUBLISHED, Schedule, make_schedule
from diffrate.searching.calibration import CHUNK, LOADED, Calibration, Clock, gather_images, mean_of
from diffrate.searching.checkpoint import SearchCheckpointError, Task, check_record, plain_row, read_checkpoint
from diffrate.searching.moves import Moves
from diffrate.searching.settings import CALIBRATED
from diffrate.searching.teacher import Teacher
from diffrate.searching.trials import FINALISTS, CalibratedSearch, TrialRecord, Trials

AGAIN = 0.3  # of the trials, where what was found is measured to be too slow
WORK = 22_000.0  # forward passes of the dense model on one image, all in all
LOOKS_AN_IMAGE = 60.0  # at most: of few images there is no more to learn
CHOSEN_ON = 4  # one in so many images is held back to choose on
MOST_CHOSEN_ON = 512  # images
CHOICE = 0.25  # of the time at most: where all images and candidates would take longer, there are fewer of them
UNIFORM = "uniform"  # and the kind
KNOWN = 0.1  # of the least loss: where a difference is measured no closer, too few images say that two are alike
# Where no rule is given, these are compared at uniform counts, and the best of them are tried in each block: the
# paper's, and those that measured best in some case.
TRIED_RULES = (
    *(PUBLISHED, "valued", "received"),
    *("similar", "similar_less_important", "minor_into_major", "received_halves"),
)
RULES_IN_PLAY = 4
RULED_ON, RULES_SHARE = 3, 0.05  # chunks of images, as far as that share of the time and the work suffices
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


class CalibrationObserver:
    """Called while a calibration runs; override the methods of interest."""

    def on_plan(self, images: int, work: float, speed: float) -> None:
        """It begins: with so many images and forward passes of the dense model, which makes `speed` a second."""

    def on_trials(self, record: TrialRecord) -> None:
        """A round of trials is done."""

    def after_trials(self) -> None:
        """The round is saved, too; may raise to end the search."""

    def stop(self) -> bool:
        """Asked after each trial, and within long computations: whether all processes are to stop."""
        return False


def search_at_hard_counts(task: Task) -> tuple[Calibrated, Again | None]:
    """The outcome of trials at fixed counts, and how to search on for a corrected budget; None where the images come
    only once. Raises as `diffrate.search`."""
    settings, budget, space = task.settings, task.budget, task.space
    task = replace(task, loader=task.loader if settings.calibration is None else settings.calibration)
    given = {}
    if budget.timed:  # a speed may be out of reach of every uniform schedule
        ruled = space.ruled(settings.rule or PUBLISHED)
        given["at once"] = budget.rounded([space.least] * len(space.choices), ruled)
    if settings.start is not None:
        given["start"] = task.model.check(settings.start, "start: ")

    minutes = settings.minutes or math.inf
    first = Calibrating(task, minutes * (1 - AGAIN) if budget.timed else minutes)  # the rest is for a corrected budget

    def again(corrected: Budget, before: Schedule, rounded: Schedule) -> Schedule:
        """From the schedule before, where that costs no more, and the same rounded to the corrected budget, which is
        all where the time is over."""
        left = minutes - first.clock.now() / 60
        if left <= 0:
            return rounded
        starts = {"rounded": rounded} | ({"before": before} if corrected.cost(before) <= corrected.target else {})
        unsaved = replace(task, budget=corrected, file=None, resume=None)
        return Calibrating(unsaved, left, again=True).run(starts).schedule

    return first.run(given), None if isinstance(task.loader, Iterator) else again


class Calibrating:
    """A search for the schedule that meets the budget of `task` at which the model loses least against its dense self,
    within `minutes`; `again` with a share of the work, and not reported to the observer.

    The model's own schedule is neither read nor set.
    """

    def __init__(self, task: Task, minutes: float, again: bool = False) -> None:
        self.task, self.model, self.again = task, task.model, again
        self.observer: CalibrationObserver = task.settings.trials or CalibrationObserver()
        self.records: list[TrialRecord] = []
        self.before: dict[str, Any] = {}
        if task.resume is not None:
            content = read_checkpoint(task.resume).get("calibrated")
            if content is None:
                raise SearchCheckpointError(
                    f"{task.resume}: found a gradient search's; accepted: the checkpoint of a calibrated one"
                )
            try:
                starts = {name: make_schedule(*row) for name, row in content["starts"].items()}
                rules, trials = tuple(content["rules"]), Trials(**content["trials"])
                self.before = {"setting": content["setting"], "rules": rules, "starts": starts, "trials": trials}
            except UNREADABLE as error:
                raise SearchCheckpointError(f"{task.resume}: does not fit this search ({first_line(error)})") from error
        self.saved: Trials | None = self.before.get("trials")
        self.clock = Clock(task.place, 60 * minutes, self.observer.stop, self.saved is not None)
        self.clock.begun -= 0.0 if self.saved is None else self.saved.seconds
        self.share = task.budget.target / task.budget.cost(self.model.dense_schedule())

    def run(self, given: Mapping[str, Schedule]) -> Calibrated:
        """Search from the uniform schedules and those that are `given` by name; the best of all is reported."""
        task, clock = self.task, self.clock
        begun = clock.now()
        searched_on, chosen_on = self._images()
        ready = clock.now()
        teacher = Teacher(self.model, self.setting["loss"], task.settings.multi_label)
        whole = self.saved is not None
        calibration = Calibration(teacher, searched_on, task.settings.precision, clock, whole)
        speed = calibration.work / max(1e-9, clock.now() - ready)
        search = self._search(calibration, given, len(chosen_on), speed)
        found = search.run(list(self.starts.values()), self._after)
        searched, state = clock.now(), search.state()
        cost, target = task.budget.cost, task.budget.target  # a start may cost something else
        met = [(name, start) for name, start in self.starts.items() if meets_budget(cost(start), target)]
        candidates = [*((CALIBRATED, schedule) for schedule in found), *met]
        parts = []
        for part in clock.parts(len(chosen_on), clock.seconds):
            images, taught = chosen_on[part], calibration.taught_on(chosen_on[part])
            parts.append([calibration.losses_on(images, taught, schedule)[0] for _, schedule in candidates])
        lost = [torch.cat(losses) for losses in zip(*parts, strict=True)]
        chosen, alike, noise = _chosen([name for name, _ in candidates], lost, task.place)
        name, schedule = candidates[chosen]
        self._save(state, schedule)
        stages = (
            Stage("images", 0.0, ready - begun),
            Stage("calibrated search", state.work, searched - ready),
            Stage("choice", calibration.work - state.work, clock.now() - searched),
        )
        means = [(name, mean_of(row, task.place)[0]) for (name, _), row in zip(candidates, lost, strict=True)]
        return Calibrated(schedule, name, tuple(means), stages, tuple(self.records), alike, noise)

    def _images(self) -> tuple[Tensor, Tensor]:
        """The images to search on, and those held back to choose on.

        Those of a search that goes on are read again, however long it takes. Held back are some from all over, as
        files lie in classes.
        """
        settings, before = self.task.settings, self.before.get("setting")
        timed = self.clock.limited if before is None else before["timed"]
        count = before["images"] if before is not None and timed else settings.images
        until = LOADED * self.clock.seconds if before is None else math.inf
        images = gather_images(self.task.epoch_of(0), count, self.clock, until)
        count = len(images)
        if timed:  # the first of them may be all that there is time for
            images = images[torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))]
        loss, target = "tokens" if settings.loss == "tokens" else "distill", self.task.budget.target
        self.setting = {"seed": settings.seed, "images": count, "target": target, "work": settings.work}
        self.setting |= {"rule": settings.rule, "loss": loss, "multi_label": settings.multi_label, "timed": timed}
        some = max(1, min(MOST_CHOSEN_ON, count // CHOSEN_ON))
        held = torch.zeros(count, dtype=torch.bool)
        held[torch.arange(1, some + 1) * count // some - 1] = True
        if self.saved is None or self.task.resume is None:
            return images[~held], images[held]
        check_record(self.task.resume, self.before["setting"], self.setting)
        return images[~held][: len(self.saved.felt)], images[held]

    def _search(
        self, calibration: Calibration, given: Mapping[str, Schedule], chosen_on: int, speed: float
    ) -> CalibratedSearch:
        """The search on the images of `calibration`, with work and time left to choose on so many others."""
        space, budget, settings = self.task.space, self.task.budget, self.task.settings
        # Of the last block nothing may be read but the prefix: then a search may drop the patches there.
        idle = self.model.read is not None and space.searchable[-1] == len(self.model.compressible_blocks()) - 1
        images = len(calibration.images)
        work = settings.work or min(WORK, LOOKS_AN_IMAGE * images)
        uniform, self.rules = self._uniform(calibration, work, speed)
        moves = Moves(space, budget.cost, budget.target, idle, self.rules)
        self.starts: dict[str, Schedule] = uniform | dict(given) | self.before.get("starts", {})
        choosing = chosen_on * (1 + (len(self.starts) + FINALISTS) * self.share)
        reserve = min(choosing / speed, CHOICE * self.clock.seconds)
        if self.clock.limited and settings.work is None:
            work = math.inf
        else:
            work = float(int(max(AGAIN * work if self.again else work, choosing + 2 * images)))
        if not self.again:
            self.observer.on_plan(images + chosen_on, min(work, speed * self.clock.seconds), speed)
        end = self.clock.seconds - reserve
        return CalibratedSearch(moves, calibration, work - choosing, settings.seed, self.saved, end)

    def _uniform(
        self, calibration: Calibration, work: float, speed: float
    ) -> tuple[dict[str, Schedule], tuple[str, ...]]:
        """The uniform schedules to begin with, and the rules to try in each block, the best one first.

        Rules are compared by uniform schedules that merge, on some of the images: all that are tried, or the first
        ones that there is time for.
        """
        space, settings, budget = self.model.compression.space, self.task.settings, self.task.budget
        given = settings.rule or PUBLISHED
        uniform = uniform_schedules(space.ruled(given), budget)
        if not uniform:  # the published choices do not reach the budget
            space = self.task.space
            uniform = uniform_schedules(space.ruled(given), budget)
        starts = {f"{UNIFORM} {kind}": schedule for kind, schedule in uniform.items()}
        if self.before:
            return starts, self.before["rules"]
        if settings.rule is not None:
            return starts, (settings.rule,)
        left = self.clock.seconds - self.clock.now()
        passes = RULES_SHARE * min(work, left * speed)
        images = min(passes / (len(TRIED_RULES) * self.share), RULED_ON * CHUNK) // world(self.task.place.group)
        index = torch.cat(calibration.drawn(RULED_ON, Random(settings.seed))[0])[: max(1, int(images))]
        merging: dict[str, Schedule] = {}
        losses: dict[str, float] = {}
        begun = self.clock.now()
        for rule in TRIED_RULES:
            if losses and self.clock.now() > begun + RULES_SHARE * left:
                break
            with suppress(BudgetError):
                merging[rule] = baseline_schedule("merge", space.ruled(rule), budget)
                losses[rule] = calibration.mean(merging[rule], index)
        rules = sorted(losses, key=losses.__getitem__)[:RULES_IN_PLAY] or [PUBLISHED]
        if rules[0] != PUBLISHED:
            starts[f"{UNIFORM} merge by {rules[0]}"] = merging[rules[0]]
        return starts, tuple(rules)

    def _after(self, record: TrialRecord, trials: Trials) -> None:
        """A round of trials is done."""
        self.records.append(record)
        if not self.again:
            self.observer.on_trials(record)
        self._save(trials, record.schedule)
        self.observer.after_trials()

    def _save(self, trials: Trials, best: Schedule) -> None:
        if self.task.file is None:
            return
        if rank(self.task.place.group) == 0:
            rows = {name: plain_row(schedule) for name, schedule in self.starts.items()}
            content = {"setting": self.setting, "rules": self.rules, "starts": rows, "trials": vars(trials)}
            self.task.save(best, best, epoch=0, step=trials.round, calibrated=content)
        self.clock.saved = True


def _chosen(names: list[str], losses: list[Tensor], place: Placement) -> tuple[int, tuple[str, ...], float]:
    """Which candidate it is, the names of those that are as good by measurement, and the standard error of the
    difference between its loss and the least."""
    means = [mean_of(row, place)[0] for row in losses]
    least_lost = losses[means.index(min(means))].double()
    apart, known = [mean_of(row.double() - least_lost, place) for row in losses], KNOWN * max(0.0, min(means))
    errors = [math.sqrt(variance) for _, variance in apart]
    alike = [
        index
        for index, ((mean, _), error) in enumerate(zip(apart, errors, strict=True))
        if mean <= error <= known or mean == error == 0
    ]
    simple = {kind: order for order, kind in enumerate(SIMPLEST)} | {CALIBRATED: len(SIMPLEST) + 1}
    chosen = min(alike, key=lambda index: (simple.get(names[index], len(SIMPLEST)), means[index]))
    return chosen, tuple(dict.fromkeys(names[index] for index in alike)), errors[chosen]
