"""`--benchmark`: run the one that was asked for, log its figures, and leave them in files."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import loading_benchmark
import scaling_benchmark
import speed_benchmark
from search_benchmark import search_cost
from tables import table, write_rows
from utils import Runtime

log = logging.getLogger(__name__)


def run_benchmark(args: Namespace, runtime: Runtime) -> None:
    """Measure what `--benchmark` names.

    Raises:
        ScheduleError, UsageError, DataError: the schedule, a size or the data do not fit.
    """
    if args.benchmark == "search":
        cost = search_cost(args, runtime.device)
        runtime.record({"mode": "benchmark search", "model": args.model, **cost.record()})
        for line in cost.lines():
            log.info(line)
    elif args.benchmark == "scaling":
        rows = _report(scaling_benchmark.scaling_rows(args, runtime.device), scaling_benchmark.HEADINGS, args, runtime)
        for exponent in scaling_benchmark.exponents(rows):
            log.info(exponent.line())
    elif args.benchmark == "loading":
        _report([loading_benchmark.loading_row(args, runtime)], loading_benchmark.HEADINGS, args, runtime)
    else:
        _report(speed_benchmark.speed_rows(args, runtime.device), speed_benchmark.HEADINGS, args, runtime)


def _report(measured: Iterable[Any], headings: Mapping[str, str], args: Namespace, runtime: Runtime) -> list[Any]:
    """Log the rows as they come and as a table, and write them to the output folder, if there is one."""
    mode = "benchmark" if args.benchmark == "eval" else f"benchmark {args.benchmark}"
    rows = []
    for row in measured:
        rows.append(row)
        runtime.record({"mode": mode, **asdict(row)})
        log.info(row.line())
    for line in table(rows, headings):
        log.info(line)
    if runtime.output_dir is not None and runtime.processes.is_main:
        write_rows(rows, runtime.output_dir, mode.replace(" ", "_"))
    return rows
