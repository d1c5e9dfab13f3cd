"""How far a run is: a bar on a terminal, lines elsewhere, and always lines in the log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from tqdm import tqdm

from processes.runtime import Runtime
from reporting.log import PROGRESS

log = logging.getLogger(PROGRESS)


def bar_fits(quiet: bool) -> bool:
    """Whether progress is to be a bar: on a terminal, unless `--quiet`."""
    return not quiet and sys.stdout.isatty() and sys.stderr.isatty()


class Progress:
    """Position, images per second, time to go, and what the caller says of it, while `total` items pass.

    The items are `images` images; lines come every `runtime.print_freq` items.
    """

    def __init__(self, total: int, header: str, images: int, runtime: Runtime) -> None:
        self.total, self.header, self.images, self.every = total, header, images, runtime.print_freq
        self.start, self.position = time.perf_counter(), 0
        self.bar = tqdm(total=total, desc=header, unit="step", disable=not runtime.bar, dynamic_ncols=True)

    def advance(self, describe: Callable[[], str]) -> None:
        """One more item is done; `describe` is asked where there is something to say. The last closes the bar."""
        self.position += 1
        self.bar.update()
        if self.position % self.every == 0 or self.position == self.total:
            spent = time.perf_counter() - self.start
            speed = f"{self.images * self.position / self.total / spent:.1f} images/s"
            left = timedelta(seconds=round(spent / self.position * (self.total - self.position)))
            figures = describe()
            self.bar.set_postfix_str(f"{speed}  {figures}", refresh=self.position == self.total)
            place = f"[{self.position:{len(str(self.total))}d}/{self.total}]"
            log.info("%s: %s  eta %s  %s  %s", self.header, place, left, speed, figures)
        if self.position == self.total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


class Share:
    """How much of something that takes about `seconds` is over, while it lasts: a bar on a terminal, a line at its
    end elsewhere."""

    def __init__(self, header: str, seconds: float, runtime: Runtime) -> None:
        self.header, self.start = header, time.perf_counter()
        self.bar = tqdm(total=round(seconds), desc=header, unit="s", disable=not runtime.bar, dynamic_ncols=True)
        self.runs = 0

    def advance(self, runs: int, share: float) -> None:
        """So many runs are done, and this share of all there is to do."""
        self.runs = runs
        self.bar.n = round(share * self.bar.total)
        self.bar.refresh()

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.runs:
            log.info("%s: %d runs in %.0f s", self.header, self.runs, time.perf_counter() - self.start)
