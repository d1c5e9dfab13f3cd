"""The order in which images are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from diffrate.seeds import step_seed

REPEATS = 3  # views of an image in a row with repeated augmentation, as in DeiT's recipe


class ShardSampler(Sampler[int]):
    """Every `world`-th image from `rank` on: each image once over all processes, no padding."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ShuffleSampler(DistributedSampler[Any]):
    """A fresh order every epoch from `seed` and epoch alone, on one process or many."""


def eval_sampler(length: int, rank: int, world: int) -> Sampler[int]:
    """The order of an evaluation: `ShardSampler`, plain order on one process."""
    return ShardSampler(length, rank, world) if world > 1 else SequentialSampler(range(length))


def train_sampler(dataset: Dataset[Any], rank: int, world: int, repeated: bool, seed: int) -> SeededOrder:
    """The order of a training epoch; call `set_epoch` before each.

    With `repeated`, three views of an image follow each other, on different processes where there
    are several (repeated augmentation, Hoffer et al. 2020, as in DeiT's recipe).
    """
    order: ShuffleSampler | RepeatAugSampler
    if repeated:
        order = SeededRepeatAugSampler(dataset, rank=rank, world=world, seed=seed)
    else:
        order = ShuffleSampler(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed)
    return SeededOrder(order, seed, rank, world)


class SeededOrder(Sampler[tuple[int, int]]):
    """The indices of a training order, each with a seed for its augmentation, from `start` on.

    The seed depends on the run's seed, epoch and position among all processes alone: a run repeats
    whatever the number of processes, and goes on in the middle of an epoch as if it had not stopped.
    """

    def __init__(self, order: ShuffleSampler | RepeatAugSampler, seed: int, rank: int, world: int) -> None:
        self.order, self.seed, self.rank, self.world = order, seed, rank, world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw the order of `epoch`, and leave out its first `start` images."""
        self.order.set_epoch(epoch)
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.order):
            if position >= self.start:
                yield index, step_seed(self.seed, self.epoch, position * self.world + self.rank)

    def __len__(self) -> int:
        """Of a whole epoch, wherever this one begins: it is what the epochs to come are counted with."""
        return len(self.order)


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's sampler draws its order from the epoch alone: here the run's seed counts as well."""

    def __init__(self, dataset: Dataset[Any], rank: int, world: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, num_repeats=REPEATS)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        mixed = torch.Generator().manual_seed(self.seed)
        super().set_epoch(int(torch.randint(2**31, (1,), generator=mixed)) + epoch)
