"""The log on the terminal and in the output folder."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from termcolor import colored

PROGRESS = "progress"  # the logger of lines that tell how far a run is


class _Formatter(logging.Formatter):
    """`[date] message`, the date green and warnings yellow on a terminal."""

    def __init__(self, color: bool) -> None:
        super().__init__("%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        stamp, text = f"[{self.formatTime(record, self.datefmt)}]", super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if not self.color:
            return f"{stamp} {text}"
        if record.levelno >= logging.WARNING:
            text = colored(text, "yellow", force_color=True)
        return f"{colored(stamp, 'green', force_color=True)} {text}"


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
        terminal.addFilter(lambda record: record.name != PROGRESS)
    root.addHandler(terminal)
    root.setLevel(logging.INFO if is_main else logging.WARNING)
    if output_dir is not None and is_main:
        file = logging.FileHandler(output_dir / "log_rank0.txt", encoding="utf-8")
        file.setFormatter(_Formatter(color=False))
        root.addHandler(file)
    for chatty in ("timm", "torch", "PIL", "httpx", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
