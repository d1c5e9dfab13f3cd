"""The processes of a run: who they are, and how they meet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils import UsageError

PATIENCE = timedelta(hours=1)  # for a slow download or disk elsewhere; a broken connection shows at once


class LostProcessError(RuntimeError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def processes_from_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """What torchrun or `torch.distributed.launch --use_env` says of this process.

    Raises:
        UsageError: one of the variables is not a number, or nothing joins the tasks of a SLURM step.
    """

    def number(name: str, default: str) -> int:
        value = environment.get(name, default)
        if not value.isdecimal():
            raise UsageError(f"environment: {name}={value}; accepted: a whole number")
        return int(value)

    if "WORLD_SIZE" not in environment and number("SLURM_STEP_NUM_TASKS", "1") > 1:  # they would write the same files
        tasks = environment["SLURM_STEP_NUM_TASKS"]
        raise UsageError(f"environment: SLURM_STEP_NUM_TASKS={tasks}; accepted: 1, or tasks that run torchrun")
    return Processes(
        number("RANK", "0"), number("WORLD_SIZE", "1"), number("LOCAL_RANK", "0"), number("LOCAL_WORLD_SIZE", "1")
    )


@contextmanager
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Join the other processes while the block runs; nothing to do for a single one.

    Raises:
        LostProcessError: another process was gone while this one waited for it.
    """
    if processes.world == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        gloo = type(error) is RuntimeError and "gloo/" in str(error)  # which has no class of its own
        if isinstance(error, dist.DistError) or gloo:
            raise LostProcessError(f"another process is gone ({str(error).splitlines()[0]})") from error
        raise
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


@contextmanager
def local_main_first(processes: Processes) -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others: they find its files."""
    first = processes.local_rank == 0
    if not first and dist.is_initialized():
        dist.barrier()
    yield
    if first and dist.is_initialized():
        dist.barrier()


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
