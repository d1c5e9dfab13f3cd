"""The processes that work together, if there are several: torch's initialised process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")


def rank() -> int:
    """This process's number, 0 for a single one."""
    return dist.get_rank() if _joined() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; unchanged for a single one."""
    if _joined():
        dist.all_reduce(values)
    return values


def made_by_first(make: Callable[[], Made]) -> Made:
    """What the first process makes, in all of them, which wait for it; an error there is raised in all."""
    if not _joined():
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = [make(), None]
        except Exception as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, src=0)
    made, error = outcome
    if error is not None:
        raise error
    return made


def all_parts(part: Any) -> list[Any]:
    """The `part` of every process, in their order; for a single one its own alone."""
    if not _joined():
        return [part]
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, part)
    return parts


def least(value: int, device: torch.device) -> int:
    """The smallest `value` of all processes, which meet on `device`."""
    if not _joined():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
