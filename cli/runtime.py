"""Where and how a run computes, and where it leaves its records."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cli.distributed import Processes
from diffrate.atomic import whole_file
from diffrate.device import Place, autocast, default_precision
from utils import UsageError, make_output_dir

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The files that a run leaves in its output folder.
LOG = "log.txt"  # a JSON line for each epoch, score and timing
STEPS = "search_steps.txt"  # how the expected counts of a search moved, a JSON line every few steps
FOUND = "found.txt"  # what searches ended with, JSON lines
WORK = "search_work.txt"  # what searches had spent and come to, stage by stage, JSON lines
SENSITIVITY = "sensitivity.txt"  # what each block loses alone, JSON lines
SPEED, SCALING, LATENCY = "benchmark.json", "benchmark_scaling.json", "benchmark_latency.json"
RATES = "compression_rate.json"


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
    unreadable: dict[str, None] = field(default_factory=dict)  # files left out so far, in order: a set has none

    def inside(self, name: str) -> Runtime:
        """The same with a folder `name` in the output folder for its own."""
        return self if self.output_dir is None else replace(self, output_dir=make_output_dir(self.output_dir / name))

    def autocast(self) -> torch.autocast:
        """Mixed precision as chosen, or none."""
        return autocast(self.device, self.amp)

    @property
    def place(self) -> Place:
        """Where batches go."""
        return Place(self.device, self.dtype)

    @property
    def writes(self) -> bool:
        """Whether this process leaves files in an output folder."""
        return self.output_dir is not None and self.processes.is_main

    def append(self, content: dict[str, Any], name: str) -> None:
        """Add a JSON line to the file `name` in the output folder, if there is one; main process only."""
        if self.output_dir is not None and self.writes:
            with (self.output_dir / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")

    def record(self, content: dict[str, Any]) -> None:
        """`append` to `log.txt`, and figures of an epoch to TensorBoard."""
        self.append(content, LOG)
        if self.board is not None and "epoch" in content:
            for name, value in content.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, content["epoch"])
            self.board.flush()

    def save(self, content: dict[str, Any], name: str) -> None:
        """`torch.save` as a whole file in the output folder, if there is one; main process only."""
        if self.output_dir is not None and self.writes:
            with whole_file(self.output_dir / name) as file:
                torch.save(content, file)


def resolve_device(name: str, processes: Processes) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; each local process has a GPU of its own.

    Raises:
        UsageError: CUDA asked for where there is none, or another device.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if available else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, re.ASCII) is None:  # torch knows more, and warns of some
        raise UsageError(f"--device {name}: unknown or not supported; accepted: auto, cpu, cuda, cuda:N")
    if name.startswith("cuda") and not available:
        raise UsageError(f"--device {name}: this machine or this build of torch has no CUDA; accepted: auto, cpu")
    device = torch.device(name)
    if device.type == "cuda":
        index = processes.local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: no GPU number {index}; accepted: 0 to {torch.cuda.device_count() - 1}")
        return torch.device("cuda", index)
    return device


def amp_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """What to autocast to: by default float16 on CUDA, as published, and nothing elsewhere."""
    return default_precision(device) if name is None else AMP_DTYPES[name]


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
