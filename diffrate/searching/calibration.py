"""The images that a search at hard counts tries schedules on, what is lost on them, and the time that it has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from diffrate.blocks.tokens import TokenState
from diffrate.device import Placement, all_parts, all_sum, autocast, rank, world
from diffrate.evaluation import split_batch
from diffrate.schedule import Schedule
from diffrate.searching.checkpoint import StoppedError
from diffrate.searching.teacher import Teacher, finite, spread_of

CHUNK = 64  # images that are compared at a time, over all processes
IMAGE_BYTES = 2**31  # of images
LEAST_ODDS = 1.0  # of the mean loss, which is added to that of each image: none is left out
LOADED, TAUGHT = 0.2, 0.35  # of the time, after which no more images are loaded, or shown to the dense model


class Clock:
    """Runs from now on, for `seconds`, the same in all processes of `place`.

    stop: whether this process was asked to stop; all stop where one was. saved: whether a checkpoint was written.
    """

    def __init__(self, place: Placement, seconds: float, stop: Callable[[], bool], saved: bool) -> None:
        self.place, self.seconds, self.stop, self.saved = place, seconds, stop, saved
        self.begun, self.limited = time.monotonic(), seconds < math.inf

    def now(self) -> float:
        """Seconds by the first process's clock. All processes ask together; StoppedError where one is to stop."""
        passed = self.here() if rank(self.place.group) == 0 else 0.0
        told = torch.tensor([passed, float(self.stop())], dtype=torch.float64, device=self.place.device)
        passed, asked = all_sum(told, self.place.group).tolist()
        if asked:
            raise StoppedError("stopped while schedules were tried", self.saved)
        return passed

    def here(self) -> float:
        """Seconds by the clock of this process alone."""
        return time.monotonic() - self.begun

    def parts(self, count: int, until: float) -> Iterator[slice]:
        """Yield parts of `count` images: all of them where `until` is infinite, else one image, and then as many as are
        done by then, judged by the time that those before took."""
        begun, done, size = self.now(), 0, CHUNK if until == math.inf else 1
        while done < count and size > 0:
            yield slice(done, min(count, done + size))
            done, now = done + size, self.now()
            if until < math.inf:
                size = min(CHUNK, int(done * (until - now) / max(1e-9, now - begun)))


def images_that_fit(numbers: int, count: int) -> int:
    """Up to `count` images of so many numbers each, fewer where they are large."""
    return min(count, max(CHUNK, IMAGE_BYTES // max(1, numbers * torch.float32.itemsize)))


def gather_images(loader: Iterable[Any], count: int, clock: Clock, until: float) -> Tensor:
    """The first `count` images of `loader` at most, `[M, 3, H, W]` on the CPU, as many in all processes; fewer where
    they are large or not read in time; ValueError where there are fewer than two."""
    found, there = [], 0
    for batch in loader:
        images = split_batch(batch)[0].to("cpu", torch.float32)
        most = images_that_fit(images.shape[1:].numel(), count)
        found.append(images[: max(0, most - there)])
        there += len(found[-1])
        if there >= most or clock.stop() or (there >= 2 and clock.here() > until):
            break
    clock.now()
    there = min(all_parts(there, clock.place.group))
    if there < 2:
        raise ValueError(f"loader: found {there} images; accepted: from 2, to search and to choose on")
    return torch.cat(found)[:there]


def mean_of(values: Tensor, place: Placement) -> tuple[float, float]:
    """The mean over the losses of all processes, as `finite`, and the variance of that; 0 of a single one."""
    values = values.double()
    sums = torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(values))])
    total, squares, count = all_sum(sums.to(place.device), place.group).tolist()
    mean = finite(total / count)
    return mean, max(squares / count - mean**2, 0.0) / max(1.0, count - 1)


Draw = tuple[list[Tensor], list[Tensor]]  # images in chunks: their numbers and their weights, `[n]` both


class Calibration:
    """`images` `[M, 3, H, W]`, as many as the dense model has time for, its outputs for them, and losses.

    whole: use all images, however long they take. work: forward passes so far, in those of the dense model on one
    image, over all processes. felt, seen: the sum of the losses on each image, and their number. spread: what squared
    errors of a head with one output are relative to, the variance of the dense outputs; 1 for all other heads.
    """

    def __init__(
        self, teacher: Teacher, images: Tensor, precision: torch.dtype | None, clock: Clock, whole: bool
    ) -> None:
        self.teacher, self.model, self.precision, self.clock = teacher, teacher.model, precision, clock
        self.place = clock.place
        self.dense = self.model.flops_at(self.model.dense_schedule())
        # Losses of what `classify` gives: then blocks may be run from any one on.
        self.resumable = teacher.at == self.model.outputs_at
        self.work = 0.0
        parts = self.clock.parts(len(images), math.inf if whole else TAUGHT * self.clock.seconds)
        self.taught = torch.cat([self.taught_on(images[part]) for part in parts])
        self.images = images[: len(self.taught)]
        self.felt, self.seen = torch.zeros(len(self.images)), torch.zeros(len(self.images))
        self.spread = spread_of(teacher.moments(self.taught).to(self.place.device), self.place.group)

    def taught_on(self, images: Tensor) -> Tensor:
        """The dense model's outputs for images, on the CPU."""
        with torch.inference_mode(), autocast(self.place.device, self.precision):
            taught = self.teacher.taught(self.place.take(images)).cpu()
        self._worked(len(images), 1.0)
        return taught

    def drawn(self, most: int, rng: Random) -> Draw:
        """Up to `most` chunks of images, each as likely as what was lost on it so far.

        One after the other at equal steps through all odds, so that none is drawn more often than it should be.
        """
        size = max(1, min(CHUNK // world(self.place.group), (len(self.images) + 1) // 2))
        count = size * max(2, min(most, len(self.images) // size))
        mean = (self.felt.sum() / self.seen.sum()).item() if self.seen.any() else 1.0
        likely = (self.felt + mean) / (self.seen + 1)
        odds = likely + LEAST_ODDS * likely.mean()
        odds = odds / odds.sum() if odds.sum() > 0 else torch.full_like(odds, 1 / len(odds))
        order = torch.tensor(rng.sample(range(len(odds)), len(odds)))
        steps = (torch.arange(count) + rng.random()) / count
        reached = torch.searchsorted(odds[order].cumsum(0), steps).clamp(max=len(odds) - 1)
        picked = order[reached][torch.tensor(rng.sample(range(count), count))]
        return list(picked.split(size)), list((1 / (len(odds) * odds[picked])).split(size))

    def mean(self, schedule: Schedule, index: Tensor) -> float:
        """The mean of the losses at `schedule` on the images `index` of all processes."""
        parts = [self.losses(schedule, part)[0] for part in index.split(CHUNK)]
        return mean_of(torch.cat(parts), self.place)[0]

    def losses(
        self, schedule: Schedule, index: Tensor, start: int = 0, state: TokenState | None = None
    ) -> tuple[Tensor, list[TokenState]]:
        """As `losses_on`, for the images `index` `[n]`: what is lost on each says how often they are drawn."""
        losses, states = self.losses_on(self.images[index], self.taught[index], schedule, start, state)
        self.felt.index_add_(0, index, losses)
        self.seen.index_add_(0, index, torch.ones(len(index)))
        return losses, states

    def losses_on(
        self, images: Tensor, taught: Tensor, schedule: Schedule, start: int = 0, state: TokenState | None = None
    ) -> tuple[Tensor, list[TokenState]]:
        """What is lost at `schedule` on each of the images, `[n]` on the CPU, and where blocks may be resumed the
        tokens after each; from block `start` on, which `state` enters."""
        model, there, states = self.model, self.place.take(images), []
        with torch.inference_mode(), autocast(self.place.device, self.precision):
            if self.resumable:
                entry = model.enter(there)
                state = model.prepared(entry.state, schedule) if state is None else state
                states = model.run_each(model.steps(entry, schedule)[start:], state)
                outputs = model.classify(states[-1])
            else:
                outputs = self.teacher.at(there, schedule)
            apart = self.teacher.apart(outputs, taught.to(outputs.device))
        # The work of the blocks from `start` on goes by the tokens that enter them.
        entering = [kept.entering for kept in model.counts_at(schedule)]
        self._worked(len(images), model.flops_at(schedule) / self.dense * sum(entering[start:]) / sum(entering))
        self.clock.now()
        return apart.float().cpu() / self.spread, states

    def _worked(self, images: int, share: float) -> None:
        self.work += images * world(self.place.group) * share
