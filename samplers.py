"""The order in which images are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

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


def train_sampler(
    dataset: Dataset[Any], rank: int, world: int, repeated: bool, seed: int
) -> ShuffleSampler | RepeatAugSampler:
    """The order of a training epoch; call `set_epoch` before each.

    With `repeated`, three views of an image follow each other, on different processes where there
    are several (repeated augmentation, Hoffer et al. 2020, as in DeiT's recipe).
    """
    if repeated:
        return SeededRepeatAugSampler(dataset, rank=rank, world=world, seed=seed)
    return ShuffleSampler(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed)


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's sampler draws its order from the epoch alone: here the run's seed counts as well."""

    def __init__(self, dataset: Dataset[Any], rank: int, world: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, num_repeats=REPEATS)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        mixed = torch.Generator().manual_seed(self.seed)
        super().set_epoch(int(torch.randint(2**31, (1,), generator=mixed)) + epoch)
