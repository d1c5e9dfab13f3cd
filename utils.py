"""Errors of users, signals that ask a run to stop, the output folder, the allocator. No torch here."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

STOPPED = 130  # the shell's code for a process that was interrupted
# glibc's numbers of two settings, and what they are set to: the largest piece that it keeps, and the most bytes.
MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


class UsageError(ValueError):
    """A flag or an environment that cannot be used as given."""


class StopRequestedError(Exception):
    """A signal asked a run to stop, and it saved its state."""


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a request that a loop can ask for between steps."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True


def make_output_dir(path: Path | None) -> Path | None:
    """`path` as a folder that exists.

    Raises:
        UsageError: it cannot be made or written.
    """
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path}: {error.strerror}; accepted: a folder that can be made") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path}: cannot be written")
    return path


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
