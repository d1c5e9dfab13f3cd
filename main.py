"""DiffRate's command line: `python main.py --help`. Flags, checked once, then one of the modes."""

from __future__ import annotations

import copy
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.data import DataLoader

import diffrate
import models
from benchmarks import run_benchmark
from build import (
    check_inputs,
    check_same_classes,
    check_targets,
    compress,
    dense_model,
    eval_dataset,
    eval_loader,
    input_size_of,
    patch,
    read_weights,
    start_rates,
    targets_of,
    train_dataset,
    train_loader,
    trained_model,
)
from datasets import DataError
from diffrate.baselines import BaselineError, baseline_schedule
from diffrate.budget import BudgetError
from engine import NonFiniteLossError, evaluate, finetune
from flags import get_args_parser, parse_flags
from heartbeat import LostProcessError
from inference import for_inference
from plotting import draw_plots, plot_run
from processes import EnvironmentVariableError, Processes, process_group, processes_from_environment
from progress import bar_fits
from results import log_found, report, save_result
from resume import restore, resume_path, saver, search_identity, use_searched
from searching import Search, settings_from
from utils import (
    Runtime,
    StopRequestedError,
    UsageError,
    amp_dtype,
    make_output_dir,
    open_board,
    resolve_device,
    seed_everything,
    setup_logging,
)
from visualizing import visualize

__all__ = ["get_args_parser", "main"]

INPUT_ERRORS = (
    UsageError,
    EnvironmentVariableError,
    DataError,
    models.CheckpointError,
    models.UnknownModelError,
    diffrate.ScheduleError,
    diffrate.UnsupportedModelError,
    diffrate.RateError,
    BaselineError,
    BudgetError,
    NonFiniteLossError,
)
STOPPED = 130  # the shell's code for a process that was interrupted
log = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Bad input is one line on standard error and 2."""
    processes = Processes()
    try:
        args = parse_flags(words)
        processes = processes_from_environment()
        runtime = _runtime(args, processes)
        with process_group(processes, runtime.device):
            run(args, runtime)
    except INPUT_ERRORS as error:
        print(f"main.py: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except BackendCompilerFailed as error:
        print(f"main.py: error: --compile: {_one_line(error)}; accepted: with a compiler that works", file=sys.stderr)
        return 2
    except LostProcessError as lost:
        print(f"main.py: error: process {processes.rank} stops: {lost}", file=sys.stderr)
        return 1
    except StopRequestedError as stopped:
        print(f"main.py: {stopped}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        return STOPPED
    return 0


def run(args: Namespace, runtime: Runtime) -> None:
    """The one mode that the flags ask for."""
    if args.eval:
        evaluate_mode(args, runtime)
    elif args.finetune:
        finetune_mode(args, runtime)
    elif args.visualize:
        visualize(args, runtime)
    elif args.plot:
        draw_plots(args.plot)
    elif args.benchmark:
        run_benchmark(args, runtime)
    elif args.baseline:
        baseline_mode(args, runtime)
    else:
        search_mode(args, runtime)
    if not (args.visualize or args.plot):
        plot_run(runtime)


def evaluate_mode(args: Namespace, runtime: Runtime) -> None:
    """`--eval`: score the model on the validation split, compressed or dense."""
    entry = models.lookup(args.model)
    model, dataset = trained_model(args, entry, runtime)
    compressed = compress(model, entry, args)
    use_searched(compressed, args, runtime)
    model, inference = for_inference(compressed, args, runtime)
    scores = evaluate(model, eval_loader(dataset, args, runtime), inference)
    report("eval", entry, compressed, scores, runtime)


def baseline_mode(args: Namespace, runtime: Runtime) -> None:
    """`--baseline`: score uniform schedules that meet `--target_flops`."""
    entry = models.lookup(args.model)
    model, dataset = trained_model(args, entry, runtime)
    compressed = patch(model, entry, args).to(runtime.device)
    loader = eval_loader(dataset, args, runtime)
    if args.baseline == "random":
        compressed.rules = replace(compressed.rules, random=True)
    for target in targets_of(args):
        space, cost = compressed.compression.space, compressed.flops_at
        schedule = baseline_schedule(args.baseline, space, cost, target * 1e9)
        compressed.set_kept_num(schedule.prune, schedule.merge)
        scores = evaluate(compressed, loader, runtime)
        report(f"baseline {args.baseline}", entry, compressed, scores, runtime)
        save_result(args, entry, target, schedule, runtime)


def search_mode(args: Namespace, runtime: Runtime) -> None:
    """No mode flag: search the kept counts for each of `--target_flops` in turn."""
    entry = models.lookup(args.model)
    targets = targets_of(args)
    plain, dataset = trained_model(args, entry, runtime, drop_path_rate=args.drop_path)
    check_targets(args, entry, len(dataset.classes))
    train = train_dataset(args, entry)
    check_same_classes(train, dataset)
    loaders = train_loader(train, args, runtime), eval_loader(dataset, args, runtime)
    for left, target in zip(reversed(range(len(targets))), targets, strict=True):
        model = copy.deepcopy(plain) if left else plain  # a huge model needs no second copy for the last
        compressed = patch(model, entry, args).to(runtime.device)
        start_rates(compressed, entry, args)
        search_one(target, args, entry, compressed, loaders, runtime)


def search_one(
    target: float,
    args: Namespace,
    entry: models.ModelEntry,
    compressed: diffrate.CompressedModel,
    loaders: tuple[DataLoader[Any], DataLoader[Any]],
    runtime: Runtime,
) -> None:
    """The search for one target, from its checkpoint if there is one, and what it leaves behind."""
    train, val = loaders
    # Several targets have a folder each for their checkpoints, and one file for their schedules.
    inner = runtime.inside(f"target_{target:g}") if len(targets_of(args)) > 1 else runtime
    identity = search_identity(args, target)
    search = Search(compressed, args, settings_from(args, target, len(train)), compressed.num_classes, inner)
    path = resume_path(args, inner)
    if path is not None:
        restore(search, path, identity)
    schedule, scores = search.run(train, val, saver(args, identity, inner))
    file = save_result(args, entry, target, schedule, runtime)
    dense = search.score(val, compressed.dense_schedule())
    log_found(args, entry, target, compressed, schedule, (scores, dense), file, runtime)


def finetune_mode(args: Namespace, runtime: Runtime) -> None:
    """`--finetune`: train the weights at fixed rates, or dense, and score them after each epoch."""
    entry = models.lookup(args.model)
    check_inputs(args, entry)
    state, name = read_weights(args, entry, runtime)
    train, val = train_dataset(args, entry), eval_dataset(args, entry, head=None)
    check_same_classes(train, val)
    classes = len(train.classes)
    model = dense_model(entry, input_size_of(args, entry), num_classes=classes, drop_path_rate=args.drop_path)
    notes = ("training from scratch",) if state is None else models.fit_state(model, state, name).notes
    for note in notes:
        log.info(note)
    compressed = compress(model, entry, args).to(runtime.device)
    finetune(compressed, args, train_loader(train, args, runtime), eval_loader(val, args, runtime), classes, runtime)


def _runtime(args: Namespace, processes: Processes) -> Runtime:
    device = resolve_device(args.device, processes)
    output_dir = make_output_dir(args.output_dir)
    bar = processes.is_main and bar_fits(args.quiet)
    setup_logging(output_dir, processes.is_main, lines=not bar and not args.quiet)
    seed_everything(args.seed)  # fresh weights are the same in every process
    board = open_board(output_dir, processes.is_main) if args.tensorboard else None
    return Runtime(processes, device, amp_dtype(args.amp, device), args.print_freq, output_dir, board, bar=bar)


def _one_line(error: Exception) -> str:
    """The message alone: a loader process wraps it in its traceback, message last."""
    last = str(error).strip().splitlines()[-1]
    return last.split("Error: ", 1)[1] if "Traceback" in str(error) else last


if __name__ == "__main__":
    sys.exit(main())
