"""The processes of a run: who they are, how they meet, and how the others notice that one is gone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from processes.heartbeat import Heartbeat, LostProcessError

PATIENCE = timedelta(hours=2)  # for a slow download or disk elsewhere; a lost process is noticed by its heartbeat
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")


class EnvironmentVariableError(ValueError):
    """A launcher's variable that makes no sense."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run, and among those of its machine; `address` is where they meet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = "env://"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def processes_from_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """What torchrun, `torch.distributed.launch --use_env` or `srun` says of this process.

    SLURM's variables count in a step of several tasks that torchrun does not lead: in the shell of
    an allocation, which has them as well, there is one process.

    Raises:
        EnvironmentVariableError: one of the variables is not a number.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return _slurm_processes(environment)
    rank, world, local_rank, local_world = (
        _number(environment, name, "1" if "WORLD" in name else "0") for name in TORCHRUN
    )
    return Processes(rank, world, local_rank, local_world)


def _slurm_processes(environment: Mapping[str, str]) -> Processes:
    """The first host of the step is where the processes meet, unless MASTER_ADDR names another."""
    rank, world, local_rank = (_number(environment, name, "0") for name in SLURM[:3])
    node = _number(environment, "SLURM_NODEID", "0")
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    # One port per job: two jobs on a machine do not meet each other.
    port = _number(environment, "MASTER_PORT", str(20000 + _number(environment, "SLURM_JOB_ID", "0") % 10000))
    local_world = tasks_per_node(environment.get(SLURM[3], str(world)))[node]
    return Processes(rank, world, local_rank, local_world, f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """The first host of a list in SLURM's notation: `gpu[03-05,9],x1` gives `gpu03`."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    assert found is not None, "each part may be empty"
    prefix, number, suffix = found.groups()
    return prefix + (number or "") + suffix


def tasks_per_node(text: str) -> list[int]:
    """How many tasks each node has, from SLURM's notation: `2(x3),1` gives `[2, 2, 2, 1]`.

    Raises:
        EnvironmentVariableError: it is not in this notation.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise EnvironmentVariableError(f"environment: {SLURM[3]}={text}; accepted: such as 4 or 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    value = environment.get(name, default)
    if not value.isdecimal():
        raise EnvironmentVariableError(f"environment: {name}={value}; accepted: a whole number")
    return int(value)


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
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous(processes.address, processes.rank, processes.world))
    store.set_timeout(PATIENCE)
    heart = Heartbeat(store.clone(), rank, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    heart.start()
    try:
        yield
    except Exception as error:
        # A peer that is gone shows as a broken connection: say which one it was.
        broken = isinstance(error, dist.DistError) or type(error) is RuntimeError
        lost = heart.wait_for_loss() if broken else None
        heart.stop(failed=True)
        if lost is not None:
            raise LostProcessError(lost) from error
        raise
    heart.stop(failed=False)
    dist.barrier()  # process 0 holds what the others' hearts beat in: nobody leaves before all have stopped
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
