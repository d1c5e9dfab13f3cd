"""DiffRate's command line: `python main.py --help`. Flags, checked once, then one of the modes."""

from __future__ import annotations

import logging
import random
import sys
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch

import diffrate
import models
from build import (
    check_inputs,
    check_same_classes,
    compress,
    dense_model,
    eval_dataset,
    eval_loader,
    input_size_of,
    read_weights,
    train_dataset,
    train_loader,
)
from datasets import DataError
from diffrate.benchmark import compare_speed
from engine import NonFiniteLossError, evaluate, finetune
from flags import get_args_parser, parse_flags
from utils import (
    Processes,
    Runtime,
    UsageError,
    amp_dtype,
    make_output_dir,
    process_group,
    processes_from_environment,
    resolve_device,
    setup_logging,
)

__all__ = ["get_args_parser", "main"]

INPUT_ERRORS = (
    UsageError,
    DataError,
    models.CheckpointError,
    models.UnknownModelError,
    diffrate.ScheduleError,
    diffrate.UnsupportedModelError,
    NonFiniteLossError,
)
log = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Bad input is one line on standard error and 2."""
    try:
        args = parse_flags(words)
        processes = processes_from_environment()
        runtime = _runtime(args, processes)
        with process_group(processes, runtime.device):
            run(args, runtime)
    except INPUT_ERRORS as error:
        print(f"main.py: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(args: Namespace, runtime: Runtime) -> None:
    """The one mode that the flags ask for."""
    if args.eval:
        evaluate_mode(args, runtime)
    if args.finetune:
        finetune_mode(args, runtime)
    if args.benchmark:
        benchmark_mode(args, runtime)


def evaluate_mode(args: Namespace, runtime: Runtime) -> None:
    """`--eval`: score the model on the validation split, compressed or dense."""
    entry = models.lookup(args.model)
    check_inputs(args, entry)
    state, name = read_weights(args, entry, runtime)
    head = None if state is None else models.head_classes(state)
    dataset = eval_dataset(args, entry, head)
    model = dense_model(entry, input_size_of(args, entry), num_classes=head or len(dataset.classes))
    if state is not None:
        models.fit_state(model, state, name)
    compressed = compress(model, entry, args).to(runtime.device)
    scores = evaluate(compressed, eval_loader(dataset, args, runtime), runtime)
    flops = compressed.flops()
    runtime.record({"mode": "eval", "model": entry.name, **scores.record(flops), "kept": compressed.get_kept_num()})
    log.info(scores.line(flops))


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


def benchmark_mode(args: Namespace, runtime: Runtime) -> None:
    """`--benchmark`: time the plain timm model against the compressed one, in turn."""
    entry = models.lookup(args.model)
    size = input_size_of(args, entry)
    plain = dense_model(entry, size).to(runtime.device)
    compressed = compress(dense_model(entry, size), entry, args).to(runtime.device)
    images = torch.randn(args.batch_size, 3, size, size, device=runtime.device)
    comparison = compare_speed(plain, compressed, images, args.rounds, runtime.amp)
    runtime.record({"mode": "benchmark", "model": entry.name, **comparison.record()})
    log.info(comparison.line())


def _runtime(args: Namespace, processes: Processes) -> Runtime:
    device = resolve_device(args.device, processes)
    output_dir = make_output_dir(args.output_dir)
    setup_logging(output_dir, processes.is_main)
    random.seed(args.seed + processes.rank)
    np.random.seed(args.seed + processes.rank)  # noqa: NPY002  (what timm's mixup draws from)
    torch.manual_seed(args.seed + processes.rank)
    return Runtime(processes, device, amp_dtype(args.amp, device), args.print_freq, output_dir)


def _one_line(error: Exception) -> str:
    """The message alone: a loader process wraps it in its traceback, message last."""
    last = str(error).strip().splitlines()[-1]
    return last.split("Error: ", 1)[1] if "Traceback" in str(error) else last


if __name__ == "__main__":
    sys.exit(main())
