"""Errors that a user's input can cause, signals that ask a run to stop, the output folder. No torch here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

STOPPED = 130  # the shell's code for a process that was interrupted


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
