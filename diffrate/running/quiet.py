"""Packages that log or warn of what users cannot act on: quiet, for a while."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_alone(*names: str) -> Iterator[None]:
    """Let the loggers of these names say errors alone, inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def no_warnings_of(modules: str) -> Iterator[None]:
    """Without warnings at code of the modules that this pattern names, inside the block."""
    with warnings.catch_warnings():
        for category in (UserWarning, DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=modules)
        yield
