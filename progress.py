"""How far a run is: a bar on a terminal, lines elsewhere, and always lines in the log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from tqdm import tqdm

from utils import PROGRESS, Runtime

Item = TypeVar("Item")
log = logging.getLogger(PROGRESS)


def bar_fits(quiet: bool) -> bool:
    """Whether progress is to be a bar: on a terminal, unless `--quiet`."""
    return not quiet and sys.stdout.isatty() and sys.stderr.isatty()


def with_progress(
    items: Iterable[Item], total: int, header: str, images: int, describe: Callable[[], str], runtime: Runtime
) -> Iterator[Item]:
    """Pass `items` on, and tell position, images per second, time to go, and what `describe` says.

    The `total` items are `images` images; lines come every `runtime.print_freq` items.
    """
    start = time.perf_counter()
    width = len(str(total))
    with tqdm(total=total, desc=header, unit="step", disable=not runtime.bar, dynamic_ncols=True) as bar:
        for position, item in enumerate(items, start=1):
            yield item
            spent = time.perf_counter() - start
            bar.update()
            if position % runtime.print_freq == 0 or position == total:
                speed = f"{images * position / total / spent:.1f} images/s"
                left = timedelta(seconds=round(spent / position * (total - position)))
                figures = describe()
                bar.set_postfix_str(f"{speed}  {figures}", refresh=False)
                log.info("%s: [%*d/%d]  eta %s  %s  %s", header, width, position, total, left, speed, figures)
