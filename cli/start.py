"""The start of a run: its processes, device, log, and the mode that the flags ask for."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from importlib import import_module

import torch

import diffrate
import models
from cli.runtime import (
    AMP_DTYPES,
    RUN_LOG,
    LostProcessError,
    Runtime,
    open_board,
    process_group,
    processes_from_environment,
    resolve_device,
    setup_logging,
)
from cli.settings import Settings
from datasets import DataError, listed
from diffrate.budget import BudgetError
from diffrate.device import default_precision, made_by_first, seed_everything
from diffrate.searching.settings import SearchSettingError
from utils import STOPPED, StopRequestedError, UsageError, alone_in, keep_freed_memory, make_output_dir

log = logging.getLogger(__name__)
# The file in this folder and its function, of modes that are not `run` in a file of their name.
FUNCTIONS = {
    "eval": ("evaluate", "run"),
    "finetune": ("evaluate", "run_finetune"),
    "baseline": ("evaluate", "run_baseline"),
    "export": ("evaluate", "run_export"),
    "list_models": ("evaluate", "run_list_models"),
    "sensitivity": ("search", "run_sensitivity"),
}
WITHOUT_PLOTS = ("visualize", "export", "plot", "list_models")
BESIDE_OTHERS = (*WITHOUT_PLOTS, "eval")  # these may go on in the output folder of another run
# The library names its arguments, which the flags of these are called like.
INPUT_ERRORS = (
    UsageError,
    DataError,
    models.CheckpointError,
    models.InputSizeError,
    models.UnknownModelError,
    diffrate.ScheduleError,
    diffrate.UnsupportedModelError,
    diffrate.RateError,
    diffrate.SavedModelError,
    diffrate.ExportError,
    diffrate.SearchCheckpointError,
    diffrate.NonFiniteLossError,
    diffrate.ScoresError,
    SearchSettingError,
    diffrate.LatencyFileError,
)


def run(settings: Settings) -> None:
    """The one mode that the settings ask for."""
    keep_freed_memory()
    asked, processes = settings.run, processes_from_environment()
    device = resolve_device(asked.device, processes)
    output_dir = None if asked.output_dir is None else make_output_dir(asked.output_dir)
    bar = processes.is_main and not asked.quiet and sys.stdout.isatty() and sys.stderr.isatty()
    setup_logging(output_dir, processes.is_main, lines=not bar and not asked.quiet)
    seed_everything(asked.seed)  # fresh weights are the same in every process
    amp = default_precision(device) if asked.amp is None else AMP_DTYPES[asked.amp]
    with process_group(processes, device), ExitStack() as held:
        if output_dir is not None and asked.mode not in BESIDE_OTHERS:
            made_by_first(lambda: held.enter_context(alone_in(output_dir, RUN_LOG)), None)
        board = open_board(output_dir, processes.is_main) if asked.tensorboard else None
        runtime = Runtime(processes, device, amp, asked.print_freq, output_dir, board, bar=bar)
        try:
            file, function = FUNCTIONS.get(asked.mode, (asked.mode, "run"))
            getattr(import_module(f"cli.{file}"), function)(settings, runtime)
        finally:
            if runtime.unreadable:
                files = list(runtime.unreadable)
                log.warning("left out %d images that cannot be read: %s", len(files), listed(files))
        if asked.mode not in WITHOUT_PLOTS and output_dir is not None and runtime.writes:
            from cli.plot import plot_run  # half a second of matplotlib

            plot_run(output_dir)


def explain(error: Exception) -> tuple[str, int] | None:
    """One line for an error and the exit code that goes with it; None for one that no user's input causes."""
    said = str(error).strip() or type(error).__name__
    # Ours are of one line, but for what they cite; those of others end in what is wrong.
    line = said if isinstance(error, INPUT_ERRORS) else said.splitlines()[-1]
    if isinstance(error, BudgetError):
        return f"error: --{line}", 2
    # "loader: found" fewer batches than the library needs: the rest cannot be read.
    if isinstance(error, INPUT_ERRORS) or line.startswith("loader: found"):
        return f"error: {line}", 2
    if str(error).startswith("DataLoader worker"):  # torch raises it wherever the run is when one dies
        return f"error: loading: {line}", 2
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "error: out of memory; accepted: a smaller --batch-size or --input-size", 2
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"error: {where}{error.strerror}", 2
    from torch._dynamo.exc import BackendCompilerFailed  # takes a second, which only an error has to spare

    if isinstance(error, BackendCompilerFailed):
        said = " ".join(str(error).split("\n")[:2])  # what it comes from, and what went wrong; advice follows
        return f"error: --compile: {said}; accepted: with a compiler that works", 2
    if isinstance(error, LostProcessError):
        return f"error: process {processes_from_environment().rank} stops: {line}", 1
    if isinstance(error, StopRequestedError):
        return line, STOPPED
    if isinstance(error, diffrate.StoppedError):
        return f"{line}: go on with --resume" if error.saved else f"{line}, before anything was saved", STOPPED
    return None
