"""Logging, progress, devices, signals, and files that are written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from termcolor import colored

from diffrate.files import whole_file
from processes import Processes

PROGRESS = "progress"  # the logger of lines that tell how far a run is
AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class UsageError(ValueError):
    """A flag or an environment that cannot be used as given."""


class StopRequestedError(Exception):
    """A signal asked a run to stop, and it saved its state."""


# --- where a run computes ---------------------------------------------------------------------


def resolve_device(name: str, processes: Processes) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; each local process has a GPU of its own.

    Raises:
        UsageError: CUDA asked for where there is none, or another device.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name.startswith("cuda") and not available:
        raise UsageError(f"--device {name}: this machine or this build of torch has no CUDA; accepted: auto, cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown; accepted: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda":
        index = processes.local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: no GPU number {index}; accepted: 0 to {torch.cuda.device_count() - 1}")
        return torch.device("cuda", index)
    return device


def amp_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """What to autocast to: by default float16 on CUDA, as published, and nothing elsewhere."""
    if name is None:
        name = "fp16" if device.type == "cuda" else "off"
    return AMP_DTYPES[name]


def seed_everything(seed: int) -> None:
    """Seed every generator that augmentation, mixup and dropout draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what timm's mixup draws from)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes, and where it leaves its records."""

    processes: Processes
    device: torch.device
    amp: torch.dtype | None
    print_freq: int
    output_dir: Path | None
    board: Any = None
    dtype: torch.dtype = torch.float32  # of images, and of weights at rest
    bar: bool = False  # whether progress is a bar on the terminal

    def inside(self, name: str) -> Runtime:
        """The same with a folder `name` in the output folder for its own."""
        return self if self.output_dir is None else replace(self, output_dir=make_output_dir(self.output_dir / name))

    def autocast(self) -> torch.autocast:
        """Mixed precision as chosen, or none."""
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def append(self, content: dict[str, Any], name: str) -> None:
        """Add a JSON line to the file `name` in the output folder, if there is one; main process only."""
        if self.output_dir is not None and self.processes.is_main:
            with (self.output_dir / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")

    def record(self, content: dict[str, Any]) -> None:
        """`append` to `log.txt`, and figures of an epoch to TensorBoard."""
        self.append(content, "log.txt")
        if self.board is not None and "epoch" in content:
            for name, value in content.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, content["epoch"])
            self.board.flush()

    def save(self, content: dict[str, Any], name: str) -> None:
        """`torch.save` as a whole file in the output folder, if there is one; main process only."""
        if self.output_dir is not None and self.processes.is_main:
            with whole_file(self.output_dir / name) as file:
                torch.save(content, file)


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


# --- log -------------------------------------------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------


def open_board(output_dir: Path | None, is_main: bool) -> Any:
    """A TensorBoard writer into `output_dir`; None on other processes than the main one.

    Raises:
        UsageError: TensorBoard is not installed, or there is no folder.
    """
    if output_dir is None:
        raise UsageError("--tensorboard needs --output_dir")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard: not installed; accepted after pip install tensorboard") from error
    return SummaryWriter(str(output_dir)) if is_main else None


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
