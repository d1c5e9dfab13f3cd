"""What a run says of itself: the log, and how far it is."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from termcolor import colored
from tqdm import tqdm

from cli.runtime import Runtime

log = logging.getLogger("progress")  # of lines that tell how far a run is


class _Formatter(logging.Formatter):
    """`[date] message`, the date green and warnings yellow on a terminal."""

    def __init__(self, color: bool) -> None:
        super().__init__("%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        paint, text = partial(colored, no_color=not self.color, force_color=self.color), super().format(record)
        if record.levelno >= logging.WARNING:
            text = paint(f"{record.levelname.lower()}: {text}", "yellow")
        return f"{paint(f'[{self.formatTime(record, self.datefmt)}]', 'green')} {text}"


def setup_logging(output_dir: Path | None, is_main: bool, lines: bool = True) -> None:
    """Log to the terminal and to `log_rank0.txt` in `output_dir`; other ranks keep to warnings.

    Without `lines`, those of progress are kept from the terminal.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler.formatter, _Formatter)]:
        root.removeHandler(handler)  # an earlier run's in this process
        handler.close()
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(_Formatter(color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if not lines:
        terminal.addFilter(lambda record: record.name != log.name)
    root.addHandler(terminal)
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    if output_dir is not None and is_main:
        file = logging.FileHandler(output_dir / "log_rank0.txt", encoding="utf-8")
        file.setFormatter(_Formatter(color=False))
        root.addHandler(file)
    for chatty in ("timm", "torch", "PIL", "httpx", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


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
        self.close = self.bar.close  # leaves the bar as it is

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


@contextmanager
def share(header: str, seconds: float, runtime: Runtime) -> Iterator[Callable[[int, float], None]]:
    """How much of something that takes about `seconds` is over, while it lasts: a bar on a terminal, a line at its
    end elsewhere. The block says how many runs are done, and which share of all there is to do."""
    start, done = time.perf_counter(), 0

    def advance(runs: int, part: float) -> None:
        nonlocal done
        done, bar.n = runs, round(part * bar.total)
        bar.refresh()

    try:
        with tqdm(total=round(seconds), desc=header, unit="s", disable=not runtime.bar, dynamic_ncols=True) as bar:
            yield advance
    finally:
        if done:
            log.info("%s: %d runs in %.0f s", header, done, time.perf_counter() - start)
