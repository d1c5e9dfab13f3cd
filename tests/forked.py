"""Processes alone, or two as a launcher starts them: copies of a server that has torch already need seconds less.

Copies of this process would not do: torch refuses a backward pass where the parent had made one.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import main
import utils
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


def started(run: Callable[[], object], folder: Path, processes: int = 2) -> list[BaseProcess]:
    """Processes of one group that run `run`; what it returns is their exit code. Their output goes to `folder`."""
    port = free_port()
    context = with_torch()
    found = [context.Process(target=_as_rank, args=(rank, processes, port, folder, run)) for rank in range(processes)]
    for process in found:
        process.start()
    return found


def ended(processes: Sequence[BaseProcess], folder: Path) -> list[Ended]:
    """How those that `started` end, at the latest when they take too long."""
    for process in processes:
        process.join(LONGEST)
        process.kill()
        process.join()
    return [
        Ended(process.exitcode, *(_output(folder, rank, name).read_text() for name in ("out", "err")))
        for rank, process in enumerate(processes)
    ]


def two(run: Callable[[], object], folder: Path) -> list[Ended]:
    """`run` in processes 0 and 1."""
    (folder / "two_processes").mkdir()
    return ended(started(run, folder / "two_processes"), folder / "two_processes")


def two_mains(folder: Path, *words: object) -> list[Ended]:
    """`main.py` with these words in both processes."""
    return two(partial(main.main, [*map(str, words), "--num_workers", "0"]), folder)


def as_command(words: Sequence[object]) -> NoReturn:
    """`main.py` with these words, which a signal ends."""
    utils.stop_in_time()
    utils.leave(main.main([*map(str, words)]))


def _held_up(place: str, number: int, words: Sequence[object]) -> NoReturn:
    module, owner, name = place.split(":")
    whole: Any = importlib.import_module(module)
    holder = whole if owner == "-" else getattr(whole, owner)
    original, calls = getattr(holder, name), []

    def held_up(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return original(*args, **options)

    setattr(holder, name, held_up)
    as_command(words)


def end_while_held_up(folder: Path, place: str, number: int, *words: object) -> tuple[int | None, str]:
    """Run `main.py` until the call of this number of `place` (module:owner:name, or module:-:name), which never ends;
    exit code and standard error after SIGTERM then."""
    (done,) = ended(started(partial(_held_up, place, number, words), folder, 1), folder)
    return done.code, done.err


def _output(folder: Path, rank: int, name: str) -> Path:
    return folder / f"{name}_{rank}.txt"


def _as_rank(rank: int, processes: int, port: int, folder: Path, run: Callable[[], object]) -> None:
    if processes > 1:
        world = str(processes)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": world, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with _output(folder, rank, "out").open("w") as sys.stdout, _output(folder, rank, "err").open("w") as sys.stderr:
        try:
            code = run()
        except Exception:
            traceback.print_exc()
            code = 1
        sys.exit(code)  # type: ignore[arg-type]
