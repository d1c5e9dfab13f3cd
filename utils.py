"""Errors of users, signals that ask a run to stop, the output folder, the allocator. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NoReturn

from diffrate.atomic import SCRATCH, WRITING

STOPPED = 130  # the shell's code for a process that was interrupted
STOPS = (signal.SIGTERM, signal.SIGINT)
GRACE = 0.5  # seconds from a signal until what goes on is cut off
AFTER_MAIN = 0.5  # seconds more in other processes: the main one, which saves, must not miss them before
# glibc's numbers of two settings, and what they are set to: the largest piece that it keeps, and the most bytes.
MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


class UsageError(ValueError):
    """A flag or an environment that cannot be used as given."""


class StopRequestedError(Exception):
    """A signal asked a run to stop, and it saved its state."""


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a request that a loop can ask for between steps.

    late: called in another thread where no loop does in time; it saves what there is, and says where that stopped.
    """

    present: ClassVar[StopSignals | None] = None

    def __init__(self, late: Callable[[], str] = lambda: "stopped") -> None:
        self.requested, self.late = False, late

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self._request) for number in STOPS}
        StopSignals.present = self
        return self

    def __exit__(self, *exception: object) -> None:
        StopSignals.present = None
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True


def stop_in_time() -> None:
    """Let SIGTERM and Ctrl-C end this process, where no loop asks for them, and at the latest soon after.

    Python handles a signal between two operations, of which a backward pass is one; a thread hears of it at once.
    An exception would not do: raised while torch is imported, it aborts the process.
    """
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of a shell's background jobs
            signal.signal(number, lambda *_: leave(STOPPED, "stopped"))
    listening, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)

    def end_late(told: socket.socket = told) -> None:  # keeps `told`, which closes once nothing refers to it
        while listening.recv(1)[0] not in STOPS:
            pass
        time.sleep(GRACE + (AFTER_MAIN if os.environ.get("RANK", "0") != "0" else 0.0))
        with WRITING:
            stopping = StopSignals.present
            try:
                line = "stopped" if stopping is None else stopping.late()
            except Exception as error:  # as of a full disk
                line = f"stopped, and nothing could be saved ({error})"
            leave(STOPPED, line)

    threading.Thread(target=end_late, daemon=True).start()


def leave(code: int, line: str = "") -> NoReturn:
    """End the process and its loader processes here and now: an orderly end takes torch seconds."""
    with WRITING:
        for path in SCRATCH:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # nobody reads on, or it is being written to
            sys.stdout.flush()
            print(*([f"main.py: {line}\n"] if line else []), end="", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()  # they leave other signals to this process
        os._exit(code)


def make_output_dir(path: Path) -> Path:
    """`path` as a folder that exists.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path}: {error.strerror}; accepted: a folder that can be made") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path}: cannot be written")
    if pipe := next((inside for inside in path.iterdir() if inside.is_fifo()), None):  # which a run would wait for
        raise UsageError(f"--output_dir {path}: holds a pipe, {pipe.name}; accepted: a folder of files")
    return path


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """Keep other runs from writing to a folder while the block runs, by a lock on its file `name`.

    The system lets go of it when the process ends, however it does; loader processes do not hold it. File systems
    without locks go without.

    Raises:
        UsageError: another run writes there.
    """
    with (folder / name).open("a") as file:
        try:
            import fcntl  # not on Windows

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UsageError(f"--output_dir {folder}: another run writes to it; accepted: another folder") from error
        except (ImportError, OSError):
            pass
        yield


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees.

    glibc hands large pieces back to the system, which makes each page anew for the next batch: up to a third of a
    forward pass on a CPU, and more in some processes than in others. False where there is another allocator, or users
    set one of `MALLOC_VARIABLES`.
    """
    if any(os.environ.get(name) for name in MALLOC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return all(mallopt(option, value) for option, value in MALLOC_OPTIONS.items())
