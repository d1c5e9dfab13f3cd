"""The time that a search at hard counts has, and whether it was asked to stop: the same in all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffrate.blocks.tokens import TokenState
from diffrate.device import Placement, all_sum, autocast, rank, world
from diffrate.evaluation import images_of
from diffrate.schedule import Kept, Schedule
from diffrate.searching.gradient import NonFiniteLossError, StoppedError
from diffrate.searching.teacher import Teacher, spread_of

FIRST_PART = 8  # things that tell how long one takes


class Clock:
    """Runs from now on, for `seconds`.

    stop: whether this process was asked to; all stop where one was. saved: whether there is something to go on from.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float = math.inf,
        stop: Callable[[], bool] | None = None,
        saved: bool = False,
    ) -> None:
        self.device, self.seconds, self.stop, self.saved = device, seconds, stop, saved
        self.begun, self.limited = time.monotonic(), seconds < math.inf

    def now(self) -> float:
        """Seconds by the first process's clock. All processes ask together.

        Raises:
            StoppedError: one of them was asked to stop.
        """
        passed, asked = self.here(), self.asked()
        if world() > 1:
            own = torch.tensor([passed if rank() == 0 else 0.0, float(asked)], dtype=torch.float64, device=self.device)
            passed, asked = all_sum(own).tolist()
        if asked:
            raise StoppedError("stopped while schedules were tried", self.saved)
        return passed

    def left(self) -> float:
        """Seconds until the end, as `now`; infinite without a limit."""
        return self.seconds - self.now()

    def here(self) -> float:
        """Seconds by the clock of this process alone."""
        return time.monotonic() - self.begun

    def asked(self) -> bool:
        """Whether this process alone was asked to stop."""
        return self.stop is not None and self.stop()

    def parts(self, count: int, most: int, until: float) -> Iterator[slice]:
        """Parts of `count` things, up to `most` at a time: all of them where `until` is infinite, else as many as are
        done by then, judged by the time that those before took. There is one at least."""
        limited = until < math.inf
        begun, done, size = self.now(), 0, min(most, FIRST_PART) if limited else most
        while done < count and size > 0:
            yield slice(done, min(count, done + size))
            done, now = done + size, self.now()
            if limited:
                size = min(most, int(done * (until - now) / max(1e-9, now - begun)))


CHUNK = 64  # images that are compared at a time, over all processes
IMAGE_BYTES = 2**31  # of images
STATE_BYTES = 2**30  # of the tokens that are kept between blocks
FLOOR = 1.0  # of the mean loss, which the odds of an image never fall below
LOADED, TAUGHT = 0.2, 0.35  # of the time, after which no more images are loaded, or shown to the dense model


def images_that_fit(numbers: int, count: int) -> int:
    """Up to `count` images of so many numbers each, fewer where they are large."""
    return min(count, max(CHUNK, IMAGE_BYTES // max(1, numbers * torch.float32.itemsize)))


def gather_images(loader: Iterable[Any], count: int, clock: Clock, until: float = math.inf) -> Tensor:
    """The first `count` images of `loader` at most, `[M, 3, H, W]` on the CPU, fewer where they are large, or are not
    read `until` then.

    Raises:
        ValueError: there are fewer than two.
        StoppedError: as `Clock.now`.
    """
    cpu, found, there = Placement(torch.device("cpu"), torch.float32), [], 0
    for batch in loader:
        images = images_of(batch, cpu)
        most = images_that_fit(images.shape[1:].numel(), count)
        found.append(images[: max(0, most - there)])
        there += len(found[-1])
        if there >= most or clock.asked() or (there >= 2 and clock.here() > until):
            break
    clock.now()
    if there < 2:
        raise ValueError(f"loader: found {there} images; accepted: from 2, to search and to choose on")
    return torch.cat(found)


def finite(loss: float) -> float:
    """`loss` as it is.

    Raises:
        NonFiniteLossError: it is no number.
    """
    if not math.isfinite(loss):
        raise NonFiniteLossError(
            f"the loss is {loss} on the calibration images; accepted: images, weights and a precision that give numbers"
        )
    return loss


def mean_of(values: Tensor, device: torch.device) -> tuple[float, float]:
    """The mean over the losses of all processes, and the variance of that; 0 of a single one.

    Raises:
        NonFiniteLossError: one of them is no number.
    """
    values = values.double()
    sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(values))])
    total, squares, count = all_sum(sums.to(device)).tolist()
    mean = finite(total / count)
    return mean, max(squares / count - mean**2, 0.0) / max(1.0, count - 1)


class Draw(NamedTuple):
    """Images in chunks: which they are, and what each counts, `[n]` both."""

    images: list[Tensor]
    weights: list[Tensor]


class Calibration:
    """`images` `[M, 3, H, W]`, as many as the dense model has time for by `clock`, and what it makes of them.

    spread: what squared errors of a head with one output are relative to, by default the variance of the dense
    outputs over the images of all processes; 1 for all other heads. whole: whether all images are looked at,
    however long that takes.
    work: forward passes so far, in those of the dense model on one image, over all processes.
    """

    def __init__(
        self,
        teacher: Teacher,
        images: Tensor,
        place: Placement,
        precision: torch.dtype | None,
        spread: float | None = None,
        clock: Clock | None = None,
        whole: bool = False,
    ) -> None:
        self.clock = clock or Clock(place.device)
        self.teacher, self.model, self.place, self.precision = teacher, teacher.model, place, precision
        self.dense = self.model.flops_at(self.model.dense_schedule())
        self.work = 0.0
        parts: list[Tensor] = []
        until = math.inf if whole else TAUGHT * self.clock.seconds
        for part in self.clock.parts(len(images), CHUNK, until):
            with torch.inference_mode(), autocast(place.device, precision):
                parts.append(teacher.taught(self._to(images[part])).cpu())
            self._worked(len(parts[-1]), 1.0)
        self.taught = torch.cat(parts)
        self.images = images[: len(self.taught)]
        self.felt, self.seen = torch.zeros(len(self.images)), torch.zeros(len(self.images))
        self.spread = spread_of(teacher.moments(self.taught).to(place.device)) if spread is None else spread

    def whole(self) -> Tensor:
        """All images."""
        return torch.arange(len(self.images))

    def drawn(self, most: int, rng: Random) -> Draw:
        """Up to `most` chunks of images, each as likely as what was lost on it so far.

        One after the other at equal steps through all odds, so that none is drawn more often than it should be.
        """
        size = max(1, min(CHUNK // world(), (len(self.images) + 1) // 2))
        count = size * max(2, min(most, len(self.images) // size))
        mean = (self.felt.sum() / self.seen.sum()).item() if self.seen.any() else 1.0
        likely = (self.felt + mean) / (self.seen + 1)
        odds = likely + FLOOR * likely.mean()
        odds = odds / odds.sum() if odds.sum() > 0 else torch.full_like(odds, 1 / len(odds))
        order = torch.tensor(rng.sample(range(len(odds)), len(odds)))
        steps = (torch.arange(count) + rng.random()) / count
        places = torch.searchsorted(odds[order].cumsum(0), steps).clamp(max=len(odds) - 1)
        picked = order[places][torch.tensor(rng.sample(range(count), count))]
        return Draw(list(picked.split(size)), list((1 / (len(odds) * odds[picked])).split(size)))

    def losses(self, schedule: Schedule, index: Tensor) -> Tensor:
        """What is lost at `schedule` on the images `index` `[n]`, each, `[n]` on the CPU."""
        return self.outputs(schedule, index, None)[0]

    def mean(self, schedule: Schedule, index: Tensor) -> float:
        """The mean over the images `index` of all processes."""
        parts = [self.losses(schedule, part) for part in index.split(CHUNK)]
        return mean_of(torch.cat(parts), self.place.device)[0]

    def outputs(
        self, schedule: Schedule, index: Tensor, known: tuple[int, TokenState] | None
    ) -> tuple[Tensor, list[TokenState]]:
        """Losses, and where blocks may be resumed the tokens after each; `known` is the block to go on at and what
        enters it.

        Raises:
            StoppedError: as `Clock.now`.
        """
        model, images = self.model, self._to(self.images[index])
        with torch.inference_mode(), autocast(self.place.device, self.precision):
            if self.resumable:
                entry = model.enter(images)
                start, state = known or (0, model.prepared(entry.state, schedule))
                states = model.run_each(model.steps(entry, schedule)[start:], state)
                outputs = model.classify(states[-1])
            else:
                start, states = 0, []
                outputs = self.teacher.at(images, schedule)
            apart = self.teacher.apart(outputs, self.taught[index].to(outputs.device))
        losses = apart.float().cpu() / self.spread
        self.felt.index_add_(0, index, losses)
        self.seen.index_add_(0, index, torch.ones(len(index)))
        self._worked(len(index), self._share(schedule, start))
        self.clock.now()
        return losses, states

    @property
    def resumable(self) -> bool:
        """Whether the loss is of what `classify` gives, which blocks may be resumed for."""
        return self.teacher.at == self.model.outputs_at

    def steps(self, schedule: Schedule) -> list[tuple[Kept, str | None]]:
        """What happens in each compressible block, and by which rule where it lets tokens go."""
        pairs = zip(self.model.counts_at(schedule), schedule.rule_names, strict=False)
        return [(kept, rule if kept.merged < kept.entering else None) for kept, rule in pairs]

    def _share(self, schedule: Schedule, start: int) -> float:
        """Of a dense pass's work: that of the blocks from `start` on goes by the tokens that enter them."""
        entering = [kept.entering for kept, _ in self.steps(schedule)]
        return self.model.flops_at(schedule) / self.dense * sum(entering[start:]) / sum(entering)

    def _worked(self, images: int, share: float) -> None:
        self.work += images * world() * share

    def _to(self, images: Tensor) -> Tensor:
        return images.to(self.place.device, self.place.dtype, non_blocking=True)


class Reference:
    """A schedule that others are held against, on a draw of images."""

    def __init__(self, calibration: Calibration, schedule: Schedule, draw: Draw) -> None:
        self.calibration, self.schedule, self.draw = calibration, schedule, draw
        self.steps = calibration.steps(schedule)
        self.losses: dict[int, Tensor] = {}
        self.states: dict[int, list[TokenState]] = {}
        space = calibration.model.compression.space
        images = sum(len(part) for part in draw.images)
        width = getattr(calibration.model, "num_features", 1024)
        size = images * width * 4 * sum(kept.merged for kept, _ in self.steps)
        self.keeps_states = calibration.resumable and size <= STATE_BYTES and len(space.searchable) > 1

    def __len__(self) -> int:
        return len(self.draw.images)

    def difference(self, schedule: Schedule, chunk: int, part: float = 1.0) -> tuple[float, float]:
        """How much more is lost at `schedule`, a mean over the images that a chunk stands for; and its variance.

        `part` of the chunk is looked at.
        """
        count = max(1, round(part * len(self.draw.images[chunk])))
        ours, theirs = self.at(chunk)[:count], self._losses(schedule, chunk, count)
        return mean_of(self.draw.weights[chunk][:count] * (theirs - ours), self.calibration.place.device)

    def at(self, chunk: int) -> Tensor:
        """What the reference itself loses on a chunk, each image, `[n]`."""
        if chunk not in self.losses:
            self.losses[chunk], states = self.calibration.outputs(self.schedule, self.draw.images[chunk], None)
            if self.keeps_states:
                self.states[chunk] = states
        return self.losses[chunk]

    def _losses(self, schedule: Schedule, chunk: int, count: int) -> Tensor:
        """What is lost at another schedule on the first `count` images of a chunk, each."""
        index, states, known = self.draw.images[chunk][:count], self.states.get(chunk), None
        if states:
            pairs = zip(self.steps, self.calibration.steps(schedule), strict=True)
            differing = (block for block, (ours, theirs) in enumerate(pairs) if ours != theirs)
            start = min(next(differing, 0), len(states) - 1)
            known = (start, _first_of(states[start - 1], count)) if start else None
        return self.calibration.outputs(schedule, index, known)[0]


def _first_of(state: TokenState, count: int) -> TokenState:
    """The tokens of the first `count` images; what all images share stays."""

    def first(part: Tensor | None) -> Tensor | None:
        return part if part is None or len(part) != len(state.x) else part[:count]

    return TokenState(*map(first, state))  # type: ignore[arg-type]
