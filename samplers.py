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


def train_sampler(dataset: Dataset[Any], rank: int, world: int, repeated: bool, seed: int) -> SeededOrder:
    """The order of a training epoch; call `set_epoch` before each.

    With `repeated`, three views of an image follow each other, on different processes where there
    are several (repeated augmentation, Hoffer et al. 2020, as in DeiT's recipe).
    """
    order: DistributedSampler[Any] | RepeatAugSampler
    if repeated:
        order, epochs = RepeatAugSampler(dataset, world, rank, num_repeats=REPEATS), _epochs_from(seed)
    else:
        order, epochs = DistributedSampler(dataset, world, rank, shuffle=True, seed=seed), 0
    return SeededOrder(order, epochs, seed, rank, world)


def _epochs_from(seed: int) -> int:
    """Where to count epochs from for an order that timm's sampler draws from the epoch alone: the seed counts, too."""
    return int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(seed)))


class SeededOrder(Sampler[tuple[int, int]]):
    """The indices of a training order, each with a seed for its augmentation, from `start` on.

    The seed depends on the run's seed, epoch and position among all processes alone: a run repeats
    whatever the number of processes, and goes on in the middle of an epoch as if it had not stopped.
    """

    def __init__(
        self, order: DistributedSampler[Any] | RepeatAugSampler, epochs: int, seed: int, rank: int, world: int
    ) -> None:
        self.order, self.epochs, self.seed, self.rank, self.world = order, epochs, seed, rank, world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw the order of `epoch`, and leave out its first `start` images."""
        self.order.set_epoch(self.epochs + epoch)
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.order):
            if position >= self.start:
                yield index, step_seed(self.seed, self.epoch, position * self.world + self.rank)

    def __len__(self) -> int:
        """Of a whole epoch, wherever this one begins: it is what the epochs to come are counted with."""
        return len(self.order)
