"""Two processes as a launcher starts them, copies of a server that has torch already: they need seconds less.

Copies of this process would not do: torch refuses a backward pass where the parent had made one.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

import main
from tests.conftest import free_port

LONGEST = 200  # seconds


class Ended(NamedTuple):
    """How a process ended: exit code, standard output, standard error."""

    code: int | None
    out: str
    err: str


def with_torch() -> ForkServerContext:
    """To start processes that are such copies."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["cli.search", "tests.forked"])
    return context


def two(run: Callable[[], object], folder: Path) -> list[Ended]:
    """`run` in processes 0 and 1; what it returns is their exit code. Their output goes to files in `folder`."""
    port, folder = free_port(), folder / "two_processes"
    folder.mkdir()
    context = with_torch()
    processes = [context.Process(target=_as_rank, args=(rank, port, folder, run)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONGEST)
        process.kill()
        process.join()
    return [
        Ended(process.exitcode, _output(folder, rank, "out").read_text(), _output(folder, rank, "err").read_text())
        for rank, process in enumerate(processes)
    ]


def two_mains(folder: Path, *words: object) -> list[Ended]:
    """`main.py` with these words in both processes."""
    return two(partial(main.main, [*map(str, words), "--num_workers", "0"]), folder)


def _output(folder: Path, rank: int, name: str) -> Path:
    return folder / f"{name}_{rank}.txt"


def _as_rank(rank: int, port: int, folder: Path, run: Callable[[], object]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with _output(folder, rank, "out").open("w") as sys.stdout, _output(folder, rank, "err").open("w") as sys.stderr:
        try:
            code = run()
        except Exception:
            traceback.print_exc()
            code = 1
        sys.exit(code)  # type: ignore[arg-type]
