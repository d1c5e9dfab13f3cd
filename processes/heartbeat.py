"""A sign of life from every process, so that the others stop when one is gone instead of waiting for it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

import torch.distributed as dist

BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as gone
DONE, FAILED = b"done", b"failed"


class LostProcessError(RuntimeError):
    """Another process of the run is gone."""


class Heartbeat:
    """Writes this process's signs of life to `store`, and ends the process when another's stop.

    A thread does it: a process that waits for a lost one sits in a call that nothing else gets it
    out of. `store` must be a clone that no other thread uses.
    """

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(world) if other != rank]
        self._stopping, self._watching = threading.Event(), True
        self._loss: str | None = None
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin; every process must, or the others take it for lost."""
        self._write(b"0")
        self._thread.start()

    def wait_for_loss(self) -> str | None:
        """What is known of a lost process, waiting for as long as its silence may take; None when all live.

        From here on a loss is only told, and no longer ends this process.
        """
        self._watching = False
        self._found.wait(SILENCE + 2 * BEAT)
        return self._loss

    def stop(self, failed: bool) -> None:
        """End the signs of life and say how this process ended."""
        self._stopping.set()
        self._thread.join()
        if self._loss is None:
            with contextlib.suppress(dist.DistError):  # process 0 left first: nobody reads it any more
                self._write(FAILED if failed else DONE)

    def _run(self) -> None:
        beats, heard = 0, {other: (b"", time.monotonic()) for other in self._others}
        while not self._stopping.wait(BEAT):
            beats += 1
            try:
                self._write(str(beats).encode())
                self._loss = self._find_loss(heard)
            except dist.DistError:
                self._loss = "process 0 is gone"
            if self._loss is not None:
                self._found.set()
                if self._watching:
                    self._end()
                return

    def _find_loss(self, heard: dict[int, tuple[bytes, float]]) -> str | None:
        """The first of the others that failed or fell silent; updates what was `heard` of each, and when."""
        now = time.monotonic()
        there = [other for other in self._others if self._store.check([_key(other)])]
        for other, sign in zip(there, self._store.multi_get([_key(other) for other in there]), strict=True):
            if sign != heard[other][0]:
                heard[other] = (sign, now)
        for other, (sign, since) in heard.items():
            if sign == FAILED:
                return f"process {other} failed"
            if sign != DONE and now - since > SILENCE:
                return f"process {other} gave no sign of life for {SILENCE:.0f} s"
        return None

    def _write(self, sign: bytes) -> None:
        self._store.set(_key(self._rank), sign)

    def _end(self) -> None:
        # One write: nothing of another process's message gets in between.
        sys.stderr.write(f"main.py: error: process {self._rank} stops: {self._loss}\n")
        sys.stderr.flush()
        os._exit(1)


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
