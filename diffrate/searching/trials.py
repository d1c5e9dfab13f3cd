"""The trials of the search at hard counts: schedules on the budget, on calibration images, tokens really dropped.

A surrogate learns from all that was measured, and says which schedules near the best ones to try next, on a few images
each. In phases the best one so far becomes the reference that others are compared with, on images drawn afresh. No
gradient is computed, and a cost may be of FLOPs or of seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import numpy as np
import torch
from scipy.linalg import cho_solve, cholesky, solve_triangular
from torch import Tensor

from diffrate.blocks.tokens import TokenState
from diffrate.device import made_by_first, step_seed
from diffrate.schedule import Kept, Schedule
from diffrate.searching.calibration import Calibration, Draw, mean_of
from diffrate.searching.moves import Counts, Moves
from diffrate.searching.settings import TELLING, SearchSettingError

CHUNKS = 24  # of images in a phase
PHASES = 5
LOOKS = 6  # chunks that starts, and the best of a phase, are compared on
FIRST, SECOND = 72, 20  # schedules drawn at random before the surrogate is asked; those that are measured again
GLANCE = 0.5  # of a chunk, for a first look
TOGETHER = 8  # schedules that are chosen at a time
NEW, FAR, KEPT, GENERATIONS = 16, 6, 16, 3  # schedules that the surrogate predicts, for each that it chooses
SCALED_EVERY = 10  # rounds
DARING = 1.0  # how many deviations better than the mean a schedule is hoped to be, as they are drawn
PATIENCE = 0.4  # of the work, without a better schedule
BETTER = 0.005  # of the first reference's loss, at least
FINALISTS = 6  # schedules among which images held back decide
BEGUN = 0.5  # of the time, after which nothing is measured before the surrogate is asked
LINEAR = 0.5  # of the start's loss: how much worse than the reference counts in full
FITTED = 1000  # schedules that the surrogate is fitted to, the best ones: memory grows with their square
STATE_BYTES = 2**30  # of the tokens that are kept between blocks
NUGGET = 1e-5  # of the surrogate's amplitude, on the diagonal
SCALES = 24  # that are tried
SCALED_ON = 300  # measurements that scales are chosen on
LIMITS = (-3.0, 2.5)  # of the scales' logarithms


@dataclass(frozen=True)
class TrialRecord:
    """The best schedule after a round of trials: loss estimated over all images, forward passes of the dense model
    on one image so far, seconds, schedules measured."""

    schedule: Schedule
    loss: float
    work: float
    seconds: float
    trials: int


@dataclass
class Trials:
    """All that changes while the search runs: plain values and tensors, from which it goes on.

    felt, seen: of the calibration. measured: counts, how much worse than the first reference as a share of its loss,
    the variance of that. looks: the chunks of this phase that each of the counts was measured on.
    offset: the reference's own value on that scale. scale: the first reference's loss. known: the chunks that the
    reference was measured on. improved: the work at the last better schedule. exhausted: nothing is left to measure.
    """

    work: float
    felt: Tensor
    seen: Tensor
    round: int = 0
    phase: int = 0
    seconds: float = 0.0
    measured: list[tuple[Counts, float, float]] = field(default_factory=list)
    reference: Counts = ()
    offset: float = 0.0
    scale: float = 0.0
    order: list[int] = field(default_factory=list)
    looks: dict[Counts, list[int]] = field(default_factory=dict)
    draw: Draw = ([], [])
    known: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    best: float = 0.0
    improved: float = 0.0
    exhausted: bool = False


class Reference:
    """A schedule that others are compared with, on a draw of images.

    losses, states: of the schedule itself, by chunk: `[n]`, and where there is room the tokens after each block.
    """

    def __init__(self, calibration: Calibration, schedule: Schedule, draw: Draw) -> None:
        self.calibration, self.schedule, (self.images, self.weights) = calibration, schedule, draw
        self.model = calibration.model
        self.steps = self._steps(schedule)
        self.losses: dict[int, Tensor] = {}
        self.states: dict[int, list[TokenState]] = {}
        tokens = sum(kept.merged for kept, _ in self.steps)
        size = sum(map(len, self.images)) * tokens * getattr(self.model, "num_features", 1024) * 4
        several = len(self.model.compression.space.searchable) > 1
        self.keeps_states = calibration.resumable and size <= STATE_BYTES and several

    def __len__(self) -> int:
        return len(self.images)

    def difference(self, schedule: Schedule, chunk: int, part: float = 1.0) -> tuple[float, float]:
        """How much more is lost at `schedule`, a mean over the images that a chunk stands for; and its variance.

        Only `part` of the chunk is used. Blocks run from the first one on in which the schedules differ.
        """
        ours, held = self.at(chunk), self.calibration
        count = max(1, round(part * len(ours)))
        start, state = 0, None
        if chunk in self.states:
            pairs = zip(self.steps, self._steps(schedule), strict=True)
            start = next((block for block, (one, other) in enumerate(pairs) if one != other), 0)
        if start:
            whole = len(ours)  # what all images share stays
            parts = (one if one is None or len(one) != whole else one[:count] for one in self.states[chunk][start - 1])
            state = TokenState(*parts)  # type: ignore[arg-type]
        theirs, _ = held.losses(schedule, self.images[chunk][:count], start, state)
        return mean_of(self.weights[chunk][:count] * (theirs - ours[:count]), held.place)

    def at(self, chunk: int) -> Tensor:
        """What the reference itself loses on each image of a chunk, `[n]`."""
        if chunk not in self.losses:
            self.losses[chunk], states = self.calibration.losses(self.schedule, self.images[chunk])
            if self.keeps_states:
                self.states[chunk] = states
        return self.losses[chunk]

    def _steps(self, schedule: Schedule) -> list[tuple[Kept, str | None]]:
        """What happens in each compressible block, and by which rule where it lets tokens go."""
        pairs = zip(self.model.counts_at(schedule), schedule.rule_names, strict=False)
        return [(kept, rule if kept.merged < kept.entering else None) for kept, rule in pairs]


class Surrogate:
    """What measured losses say about schedules that were not measured: a Gaussian process over their features.

    Measurements are of few images and noisy, each with a variance that is known. Together they tell the effects of
    single choices far better than any two of them would (Matérn kernel of 5/2; Rasmussen and Williams 2006).

    It is fitted to features `[M, F]`, values `[M]` and their variances `[M]`; `groups` of features share a scale.
    """

    def __init__(self, groups: np.ndarray) -> None:
        self.groups = groups
        self.scales = np.zeros(int(groups.max()) + 2)  # logarithms: of each group, and of the amplitude

    def choose_scales(self, features: np.ndarray, values: np.ndarray, variances: np.ndarray, seed: int) -> None:
        """Scales at which the measurements are likelier than at others drawn near them; `fit` comes next."""
        rng = np.random.default_rng(seed)
        few = rng.permutation(len(values))[:SCALED_ON]
        before, best, most = self.scales, self.scales, -math.inf
        for trial in range(SCALES):
            drawn = rng.normal(0, 0.7, len(before)) if trial else np.zeros(len(before))
            self.scales = np.clip(before + drawn, *LIMITS)
            try:
                self.fit(features[few], values[few], variances[few])
            except np.linalg.LinAlgError:
                continue
            apart = solve_triangular(self.factor, values[few] - self.centre, lower=True)
            likelihood = float(-0.5 * apart @ apart - np.log(np.diag(self.factor)).sum() - 0.1 * (self.scales**2).sum())
            if likelihood > most:
                best, most = self.scales, likelihood
        self.scales = best

    def fit(self, features: np.ndarray, values: np.ndarray, variances: np.ndarray) -> None:
        """Condition on measurements, at the present scales."""
        self.features, self.centre = features, float(np.median(values))
        spread, scale = float(max(values.var(), 1e-8)), math.exp(self.scales[-1])
        self.amplitude = spread * scale
        self.factor = cholesky(self._kernel(features) + np.diag(variances + NUGGET * spread * scale), lower=True)
        self.weights = cho_solve((self.factor, True), values - self.centre)

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the values at `features` `[P, F]`, both `[P]`."""
        cross = self._kernel(features)
        explained = solve_triangular(self.factor, cross.T, lower=True)
        variance = np.maximum(self.amplitude - (explained**2).sum(0), 1e-12)
        return cross @ self.weights + self.centre, np.sqrt(variance)

    def _kernel(self, features: np.ndarray) -> np.ndarray:
        """Of these with the features that were fitted to."""
        weights = np.exp(self.scales[:-1])[self.groups]
        one, other = features * weights, self.features * weights
        squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
        apart = math.sqrt(5) * np.sqrt(np.maximum(squares, 1e-12))
        return self.amplitude * (1 + apart + apart**2 / 3) * np.exp(-apart)


class CalibratedSearch:
    """A search with `work` forward passes of the dense model, which is over by `end` of the calibration's clock."""

    def __init__(
        self, moves: Moves, calibration: Calibration, work: float, seed: int, trials: Trials | None, end: float
    ) -> None:
        self.moves, self.calibration, self.limit, self.seed = moves, calibration, work, seed
        self.clock, self.end = calibration.clock, end
        self.surrogate, self.fitted = Surrogate(moves.groups()), list[Counts]()
        self.trials = trials or Trials(calibration.work, calibration.felt, calibration.seen)
        self.begun = self.clock.here() - self.trials.seconds
        if trials is not None:
            self.surrogate.scales = np.array(trials.scales)
            self._refer(trials.reference)
            for chunk in trials.known:  # the tokens between its blocks are not saved
                self.reference.at(chunk)
            calibration.work, calibration.felt, calibration.seen = trials.work, trials.felt, trials.seen
            self._fit()

    def run(self, starts: list[Schedule], after: Callable[[TrialRecord, Trials], None]) -> list[Schedule]:
        """The best schedules that were found, the best first.

        `after` is called after each round, with a record and all that is needed to go on; it may raise to end the
        search. SearchSettingError where the first schedules all come to the same loss, ValueError where none of
        `starts` can be brought onto the budget.
        """
        trials, held = self.trials, self.calibration
        if not trials.measured:
            self._begin(starts)
        while self._done() < 1 and not trials.exhausted and held.work - trials.improved <= PATIENCE * self.limit:
            self._round()
            counts, value = self._best(1)[0]
            loss, schedule, state = max(0.0, trials.scale * (1 + value)), self.moves.schedule(counts), self.state()
            after(TrialRecord(schedule, loss, state.work, state.seconds, len(state.measured)), state)
        return [self.moves.schedule(counts) for counts, _ in self._best(FINALISTS)]

    def state(self) -> Trials:
        """What there is to go on from."""
        trials = self.trials
        trials.work, trials.seconds = self.calibration.work, self.clock.here() - self.begun
        trials.known, trials.scales = list(self.reference.losses), self.surrogate.scales.tolist()
        return trials

    def _begin(self, starts: list[Schedule]) -> None:
        """The best start becomes the reference; schedules drawn around it are the first to be measured."""
        rng, trials, moves = Random(step_seed(self.seed, 0)), self.trials, self.moves
        fitted = [counts for start in starts if (counts := moves.fitted(start, rng)) is not None]
        if not fitted:
            raise ValueError("starts: none of them can be brought onto the budget")
        first, _ = self.calibration.drawn(LOOKS, rng)
        index = torch.cat(first[:1] if self.clock.limited else first)
        losses: list[float] = []
        for counts in fitted:
            if not losses or not self._over():
                losses.append(self.calibration.mean(moves.schedule(counts), index))
        trials.scale = max(min(losses), 1e-12)
        best = fitted[int(np.argmin(losses))]
        self._redraw(best, rng)
        trials.measured.append((best, 0.0, 1e-4))
        for counts in fitted:  # of the reference nothing is left to measure
            for _ in range(2):
                self._measure(counts, rng)
        near = []
        for trial in range(FIRST):  # one near a start in three, else of a few steps
            self.clock.now()
            drawn = moves.stepped(rng) if trial % 3 else moves.changed(rng.choice([best, *fitted]), rng)
            if trial % 3 == 0 and drawn:
                drawn = moves.changed(drawn, rng) or drawn
            near.append(drawn)
        for counts in dict.fromkeys(counts for counts in near if counts is not None):
            self._measure(counts, rng, part=GLANCE)
        for counts, _, _ in sorted(trials.measured, key=lambda trial: trial[1])[:SECOND]:
            self._measure(counts, rng)
        tried = {counts for counts, _, _ in trials.measured}
        if len(tried) > 1 and all(value == 0 for _, value, _ in trials.measured):
            found = f"{min(losses):.6g} for each of {len(tried)} schedules"
            raise SearchSettingError(f"loss: found {found}; accepted: {TELLING}")
        trials.improved = self.calibration.work
        self._fit()

    def _round(self) -> None:
        """Measure what the surrogate hopes for; at the end of a phase, change the reference."""
        trials = self.trials
        trials.round += 1
        seed = step_seed(self.seed, trials.round)  # of its own: a search goes on as if it had not stopped
        rng = Random(seed)
        if trials.round % SCALED_EVERY == 1 or trials.round in (2, 4, 7):
            self._fit(seed)
        hoped = self._hoped([counts for counts, _ in self._best(TOGETHER)], rng)
        trials.exhausted = not hoped and not self._over()
        for counts in hoped:
            self._measure(counts, rng)
        self._fit()
        if (trials.phase + 1) / PHASES < self._done() < 1:
            trials.phase += 1
            self._change(rng)
        leader = self._best(1)[0][1]
        if leader < trials.best - BETTER:
            trials.best, trials.improved = leader, self.calibration.work

    def _change(self, rng: Random) -> None:
        """Compare the leaders on fresh images; the best of them is the next reference."""
        before = self.trials.reference
        leaders = [counts for counts, _ in self._best(4) if counts != before]
        self._redraw(before, rng, self.trials.offset)
        for chunk in range(min(LOOKS, len(self.reference))):
            for counts in leaders:
                self._measure(counts, rng, chunk)
        self._fit()
        leader = self._best(1)[0][0]
        if leader == before:
            return
        for chunk in range(LOOKS, min(2 * LOOKS + 4, len(self.reference))):
            self._measure(leader, rng, chunk)
        self._fit()
        leader, self.trials.offset = self._best(1)[0]
        self._refer(leader)

    def _hoped(self, leaders: list[Counts], rng: Random) -> list[Counts]:
        """Schedules that the surrogate expects to be good, or knows little of: near the `leaders`, and every other one
        from scratch, since near the leaders alone a search ends in the first local optimum."""
        chosen: list[Counts] = []
        for turn in range(TOGETHER):
            daring, pool = abs(rng.gauss(0, DARING)), list(leaders) if turn % 2 else []
            if self._over():
                break
            for _ in range(GENERATIONS):
                near = [self.moves.changed(rng.choice(pool[:TOGETHER]), rng) for _ in range(NEW if pool else 0)]
                far = [self.moves.stepped(rng) for _ in range(FAR)]
                pool = list(dict.fromkeys([*pool, *(counts for counts in near + far if counts is not None)]))
                if pool:
                    mean, deviation = self.surrogate.predict(self.moves.features(pool))
                    pool = [pool[index] for index in np.argsort(mean - daring * deviation, kind="stable")[:KEPT]]
            # The same images have no more to tell of the same counts.
            unseen = (counts for counts in pool if counts not in chosen and self._unseen(counts))
            chosen += islice(unseen, 1)
        return made_by_first(lambda: chosen, self.clock.place.group)  # others may round otherwise

    def _measure(self, counts: Counts, rng: Random, chunk: int | None = None, part: float = 1.0) -> None:
        """How much worse than the reference `counts` are, on `chunk`, or the next one that is left, while there is time
        and work left."""
        trials, unseen = self.trials, self._unseen(counts)
        if self._over() or not unseen:
            return
        if chunk is None:
            if not set(unseen) & set(trials.order):
                trials.order += rng.sample(unseen, len(unseen))
            chunk = next(one for one in reversed(trials.order) if one in unseen)
            trials.order.remove(chunk)
        trials.looks.setdefault(counts, []).append(chunk)
        mean, variance = self.reference.difference(self.moves.schedule(counts), chunk, part)
        value, variance = mean / trials.scale, variance / trials.scale**2
        if value > LINEAR:  # how bad the bad ones are is of no interest
            value, variance = LINEAR * (1 + np.log(value / LINEAR)), variance * (LINEAR / value) ** 2
        trials.measured.append((counts, float(value) + trials.offset, float(variance) + 1e-6))

    def _unseen(self, counts: Counts) -> list[int]:
        """The chunks of this phase on which `counts` were not measured; none for the reference."""
        if counts == self.trials.reference:
            return []
        seen = self.trials.looks.get(counts, [])
        return [chunk for chunk in range(len(self.reference)) if chunk not in seen]

    def _redraw(self, counts: Counts, rng: Random, offset: float = 0.0) -> None:
        trials = self.trials
        trials.draw, trials.order, trials.looks, trials.offset = self.calibration.drawn(CHUNKS, rng), [], {}, offset
        self._refer(counts)

    def _refer(self, counts: Counts) -> None:
        self.trials.reference = counts
        self.reference = Reference(self.calibration, self.moves.schedule(counts), self.trials.draw)

    def _fit(self, seed: int | None = None) -> None:
        """Fit the surrogate to the best schedules' means over all looks and the variances of these; with a seed, its
        scales, too."""
        measured = self.trials.measured
        # Few images are lost badly: a look that happens to miss them must not seem surer than the others.
        usual = float(np.median([variance for _, value, variance in measured if value < LINEAR]))
        sums: dict[Counts, np.ndarray] = {}
        for counts, value, variance in measured:
            weight = 1 / max(variance, usual)
            sums[counts] = sums.get(counts, np.zeros(2)) + np.array([weight, weight * value])
        tried, (weights, weighed) = list(sums), np.array(list(sums.values())).T
        best = np.sort(np.argsort(weighed / weights, kind="stable")[:FITTED])
        self.fitted = [tried[index] for index in best]
        known = self.moves.features(self.fitted), (weighed / weights)[best], (1 / weights)[best]
        if seed is not None:
            self.surrogate.choose_scales(*known, seed=seed)
        self.surrogate.fit(*known)

    def _best(self, count: int) -> list[tuple[Counts, float]]:
        """The schedules that are surely good, with what the surrogate makes of them."""
        mean, deviation = self.surrogate.predict(self.surrogate.features)
        best = np.argsort(mean + deviation, kind="stable")[:count]
        return [(self.fitted[index], float(mean[index])) for index in best]

    def _over(self) -> bool:
        """Whether nothing more is to be measured: work or time are spent, or a part of the time before the surrogate is
        asked."""
        return self._done(1.0 if self.trials.round else BEGUN) >= 1

    def _done(self, part: float = 1.0) -> float:
        """How much is over of the work after the dense model's own, or of a part of the time."""
        looked_at = len(self.calibration.images)
        work = (self.calibration.work - looked_at) / max(1.0, self.limit - looked_at)
        return max(work, self.clock.now() / (part * self.end))
