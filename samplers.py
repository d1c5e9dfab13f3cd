"""The order in which images are read in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from diffrate.device import step_seed

REPEATS = 3  # views of an image in a row with repeated augmentation, as in DeiT's recipe
ROUND = 256  # images that an epoch of it is a multiple of, as there


class SeededOrder(Sampler[tuple[int, int]]):
    """The indices of a training order, each with a seed for its augmentation; call `set_epoch` before each epoch.

    With `repeated`, three views of an image follow each other, on different processes where there are several
    (repeated augmentation, Hoffer et al. 2020). The seed depends on the run's seed, epoch and position among all
    processes alone: a run repeats whatever the number of processes, and goes on within an epoch as if it had not
    stopped.
    """

    def __init__(self, dataset: Dataset[Any], rank: int, world: int, repeated: bool, seed: int) -> None:
        self.seed, self.rank, self.world, self.first = seed, rank, world, 0
        self.order: DistributedSampler[Any] | RepeatAugSampler
        if repeated:
            # timm's sampler draws from the epoch alone: count epochs from a number that the seed gives.
            self.first = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed)))
            # Of fewer images than it rounds to, timm before 1.0.31 would keep none.
            whole = ROUND if len(dataset) >= ROUND else 0
            self.order = RepeatAugSampler(dataset, world, rank, num_repeats=REPEATS, selected_round=whole)
        else:
            self.order = DistributedSampler(dataset, world, rank, shuffle=True, seed=seed)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw the order of `epoch`, and leave out its first `start` images."""
        self.order.set_epoch(self.first + epoch)
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.order):
            if position >= self.start:
                yield index, step_seed(self.seed, self.epoch, position * self.world + self.rank)

    def __len__(self) -> int:
        """Of a whole epoch, wherever this one starts: the epochs to come are counted with it."""
        return len(self.order)
