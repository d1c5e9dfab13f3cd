"""The batches of a search's epochs, from whatever gives images and labels, and again from the middle on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffrate.device import least, rank, seed_everything, step_seed
from diffrate.searching.settings import SearchSettingError

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class Restartable(Protocol):
    """A loader that begins in the middle of an epoch without reading what comes before."""

    def batches_from(self, epoch: int, batch: int) -> Iterator[Batch]:
        """The batches of `epoch` from number `batch` on."""
        ...


def batches_from(loader: Any, epoch: int, batch: int, seed: int) -> Iterator[Batch]:
    """The batches of `epoch` from number `batch` on.

    Any other loader than a `Restartable` begins anew, from a seed of its own for the epoch, as do the
    generators that it or its sampler holds, and what comes before is read and left out. A sampler that
    knows epochs is told (`set_epoch`). Loader processes that persist have generators out of reach.
    """
    if isinstance(loader, Restartable):
        return loader.batches_from(epoch, batch)
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    drawn = step_seed(seed, epoch, rank())
    seed_everything(drawn)
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(drawn)
    batches = iter(loader)
    # Now, not at the first step, which draws from a seed of its own: a shuffling sampler draws its order here.
    first = list(islice(batches, 1))
    for _ in islice(batches, max(0, batch - 1)):
        pass
    return chain(first, batches) if batch == 0 else batches


def with_length(loader: Any, steps: int | None) -> tuple[Any, int | None]:
    """What to go through in every epoch, and its batches; None where only `steps` tell how far to go.

    Where nobody tells, what can be gone through only once is kept in memory, and the rest is counted.
    """
    try:
        return loader, len(loader)
    except TypeError:  # a generator, or a data set that streams
        if steps is not None:
            return loader, None
    kept = list(loader) if isinstance(loader, Iterator) else loader
    return kept, sum(1 for _ in kept)


def updates_of(batches: int | None, steps: int | None, accumulate: int, device: torch.device) -> int:
    """Updates an epoch: `steps`, or as many as there are batches for; of several processes, the fewest.

    Raises:
        SearchSettingError: there is no batch, or none for an update.
    """
    if batches == 0:
        raise SearchSettingError("loader: found no batch; accepted: batches of images and labels")
    if batches is not None and batches < accumulate:
        raise SearchSettingError(f"accumulate: found {accumulate}; accepted: up to {batches}, the batches of an epoch")
    most = None if batches is None else batches // accumulate
    if steps is not None and not (steps >= 1 and (most is None or steps <= most)):
        accepted = "from 1" if most is None else f"1 to {most}, the updates of an epoch"
        raise SearchSettingError(f"steps: found {steps}; accepted: {accepted}")
    chosen = most if steps is None else steps
    assert chosen is not None, "one of the two is known"
    return least(chosen, device)
