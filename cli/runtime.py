"""The processes of a run, where it computes, its log and progress, and the records that it leaves."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from termcolor import colored
from tqdm import tqdm

from diffrate.atomic import first_line, one_line, whole_file
from diffrate.device import autocast
from utils import UsageError

PATIENCE = timedelta(hours=1)  # for a slow download or disk elsewhere; a broken connection shows at once


class LostProcessError(RuntimeError):
    """Another process of the run is gone."""


class Processes(NamedTuple):
    """This process among those of the run, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def processes_from_environment(environment: Mapping[str, str] = os.environ) -> Processes:
    """What torchrun or `torch.distributed.launch --use_env` says of this process.

    Raises:
        UsageError: one of the variables is not a number or too large, or nothing joins the tasks of a SLURM step.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}
    found = {name: environment.get(name, default) for name, default in defaults.items()}
    for name, value in found.items():
        if not value.isdecimal():
            raise UsageError(f"environment: {name}={value}; accepted: a whole number")
    *of_process, tasks = map(int, found.values())
    if "WORLD_SIZE" not in environment and tasks > 1:  # they would write the same files
        raise UsageError(f"environment: SLURM_STEP_NUM_TASKS={tasks}; accepted: 1, or tasks that run torchrun")
    processes = Processes(*of_process)
    if processes.rank >= processes.world:  # it would wait for others that never come
        raise UsageError(f"environment: RANK={processes.rank}; accepted: below WORLD_SIZE={processes.world}")
    return processes


@contextmanager
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Join the other processes while the block runs; nothing to do for a single one.

    Raises:
        LostProcessError: another process was gone while this one waited for it, or never came.
        UsageError: the environment does not say where they meet.
    """
    if processes.world == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except ValueError as error:  # of MASTER_ADDR and MASTER_PORT
            raise UsageError(f"environment: {first_line(error)}; accepted: as torchrun sets it") from error
        yield
        leave_group()
    except RuntimeError as error:
        gloo = type(error) is RuntimeError and "gloo/" in str(error)  # which has no class of its own
        if isinstance(error, dist.DistError) or gloo:
            raise LostProcessError(f"another process is gone ({str(error).splitlines()[0]})") from error
        raise


def leave_group(group: dist.ProcessGroup | None = None) -> None:
    """Destroy a process group, torch's default one unless another is given, once all of its processes are here."""
    dist.barrier(group)  # nobody leaves while another still waits for it
    # Before torch 2.8, destruction holds the GIL while it joins gloo's threads. One that has yet to free a tensor waits
    # for the GIL, and one run in seven hung. The sleep lets go of it.
    time.sleep(0.1)
    dist.destroy_process_group(group)


@contextmanager
def local_main_first(processes: Processes) -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others: they find its files."""
    first = processes.local_rank == 0
    if not first and dist.is_initialized():
        dist.barrier()
    yield
    if first and dist.is_initialized():
        dist.barrier()


AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The files that a run leaves in its output folder.
RUN_LOG = "log_rank0.txt"  # what the terminal shows; locked while a run writes to the folder
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

    def autocast(self) -> torch.autocast:
        """Mixed precision as chosen, or none."""
        return autocast(self.device, self.amp)

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
    if name == "cpu":
        return torch.device(name)
    if not available:
        raise UsageError(f"--device {name}: this machine or this build of torch has no CUDA; accepted: auto, cpu")
    index, last = int(name[5:] or processes.local_rank), torch.cuda.device_count() - 1
    if index > last:
        raise UsageError(f"--device {name}: no GPU number {index}; accepted: 0 to {last}")
    return torch.device("cuda", index)


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


log = logging.getLogger("progress")  # of lines that tell how far a run is


class _Formatter(logging.Formatter):
    """`[date] message`, the date green and warnings yellow on a terminal."""

    def __init__(self, color: bool) -> None:
        super().__init__("%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self.color = color

    def format(self, record: logging.LogRecord) -> str:
        paint = partial(colored, no_color=not self.color, force_color=self.color)
        # Names of classes and files may hold what steers a terminal, and line breaks.
        if isinstance(record.args, tuple):
            record.args = tuple(one_line(str(item)) if isinstance(item, str | Path) else item for item in record.args)
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = paint(f"{record.levelname.lower()}: {text}", "yellow")
        return f"{paint(f'[{self.formatTime(record, self.datefmt)}]', 'green')} {text}"


def setup_logging(output_dir: Path | None, is_main: bool, lines: bool = True) -> None:
    """Log to the terminal and to `RUN_LOG` in `output_dir`; other ranks keep to warnings.

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
        file = logging.FileHandler(output_dir / RUN_LOG, encoding="utf-8")
        file.setFormatter(_Formatter(color=False))
        root.addHandler(file)
    for chatty in ("timm", "torch", "PIL", "httpx", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class Progress:
    """Position, images per second, time to go, and what the caller says of it, while `total` items pass.

    The items are `images` images; lines come every `runtime.print_freq` items.
    """

    def __init__(self, total: int, header: str, images: int, runtime: Runtime) -> None:
        self.total, self.header, self.images, self.every = total, header, images, runtime.print_freq
        self.start, self.position = time.perf_counter(), 0
        self.bar = tqdm(total=total, desc=header, unit="step", disable=not runtime.bar, dynamic_ncols=True)
        self.bar._time = time.monotonic  # its own clock may be set back, and the bar would stand still until then
        self.bar.unpause()
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
