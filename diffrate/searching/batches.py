"""The batches of a search's epochs, from whatever gives images and labels, and again from the middle on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from diffrate.group import rank
from diffrate.searching.settings import SearchSettingError
from diffrate.seeds import seed_everything, step_seed

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class Restartable(Protocol):
    """A loader that begins in the middle of an epoch without reading what comes before."""

    def batches_from(self, epoch: int, batch: int) -> Iterator[Batch]:
        """The batches of `epoch` from number `batch` on."""
        ...


def batches_from(loader: Any, epoch: int, batch: int, seed: int) -> Iterator[Batch]:
    """The batches of `epoch` from number `batch` on.

    Any other loader than a `Restartable` begins anew, from a seed of its own for the epoch, and what
    comes before is read and left out. A sampler that knows epochs is told (`set_epoch`).
    """
    if isinstance(loader, Restartable):
        return loader.batches_from(epoch, batch)
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    seed_everything(step_seed(seed, epoch, rank()))
    batches = iter(loader)
    # Now, not at the first step, which draws from a seed of its own: a shuffling sampler draws its order here.
    first = list(islice(batches, 1))
    for _ in islice(batches, max(0, batch - 1)):
        pass
    return chain(first, batches) if batch == 0 else batches


def updates_of(loader: Any, steps: int | None, accumulate: int) -> int:
    """Updates an epoch: `steps`, or as many as the loader has batches for.

    Raises:
        SearchSettingError: there is no batch, none for an update, or the loader does not tell and nobody else does.
    """
    try:
        batches = len(loader)
    except TypeError:  # a generator, or a data set that streams
        batches = None
    if steps is None and batches is None:
        raise SearchSettingError("steps: found none, and the loader has no length; accepted: updates an epoch")
    if batches is not None and batches < accumulate:
        raise SearchSettingError(f"accumulate: found {accumulate}; accepted: up to {batches}, the batches of an epoch")
    most = steps if batches is None else batches // accumulate
    if steps is None:
        assert most is not None
        return most
    if not 1 <= steps <= (most or 0):
        raise SearchSettingError(f"steps: found {steps}; accepted: 1 to {most}, the updates of an epoch")
    return steps


def batch_size_of(loader: Iterable[Any]) -> int | None:
    """Images of a batch, None where the loader does not tell."""
    size = getattr(loader, "batch_size", None)
    return size if isinstance(size, int) else None
