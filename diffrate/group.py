"""The processes that work together, if there are several: torch's initialised process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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


def from_first(values: Tensor, device: torch.device) -> Tensor:
    """The first process's `values`, of the same shape in all, which meet on `device`."""
    if not _joined():
        return values
    shared = values.to(device)
    dist.broadcast(shared, src=0)
    return shared.cpu()


def least(value: int, device: torch.device) -> int:
    """The smallest `value` of all processes, which meet on `device`."""
    if not _joined():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MIN)
    return int(shared)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
