"""The time that a search at hard counts has, and whether it was asked to stop: the same in all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch

from diffrate.group import all_sum, rank, world
from diffrate.searching.loop import StoppedError

FIRST_PART = 8  # things that tell how long one takes


class Clock:
    """Runs from now on, for so many `seconds` where there is a limit.

    stop: whether this process was asked to; all stop where one was. saved: whether there is something to go on from.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float | None = None,
        stop: Callable[[], bool] | None = None,
        saved: bool = False,
    ) -> None:
        self.device, self.stop, self.saved = device, stop, saved
        self.begun = time.monotonic()
        self.limited, self.seconds = seconds is not None, math.inf if seconds is None else seconds

    def now(self) -> float:
        """Seconds by the first process's clock. All processes ask together.

        Raises:
            StoppedError: one of them was asked to stop.
        """
        passed, asked = time.monotonic() - self.begun, self.asked()
        if world() > 1:
            own = torch.tensor([passed if rank() == 0 else 0.0, float(asked)], dtype=torch.float64, device=self.device)
            passed, asked = all_sum(own).tolist()
        if asked:
            raise StoppedError("stopped while schedules were tried", self.saved)
        return passed

    def untimed(self) -> Clock:
        """One without a limit that stops when this one does."""
        return Clock(self.device, None, self.stop, self.saved)

    def left(self) -> float:
        """Seconds until the end, as `now`; infinite without a limit."""
        return self.seconds - self.now()

    def asked(self) -> bool:
        """Whether this process alone was asked to stop."""
        return self.stop is not None and self.stop()

    def late(self, share: float) -> bool:
        """Whether more than a `share` of the time is over; to be asked in one process alone."""
        return time.monotonic() - self.begun > share * self.seconds

    def parts(self, count: int, most: int, until: float) -> Iterator[slice]:
        """Parts of `count` things, up to `most` at a time: all of them without a limit, else as many as are done
        `until` then, by what those before took. There is one at least."""
        begun, done, size = self.now(), 0, min(most, FIRST_PART) if self.limited else most
        while done < count and size > 0:
            yield slice(done, min(count, done + size))
            done, now = done + size, self.now()
            if self.limited:
                size = min(most, int(done * (until - now) / max(1e-9, now - begun)))
