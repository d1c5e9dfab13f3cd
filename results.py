"""What a run leaves behind: scores in the log, schedules in files, the next command to type."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import diffrate
import models
from build import PROJECT_RATES
from diffrate.schedule import Schedule, save_schedule
from engine import Scores
from models.zoo import SAMPLE_MODEL
from utils import Runtime

log = logging.getLogger(__name__)
RATES = "compression_rate.json"


def report(
    mode: str, entry: models.ModelEntry, compressed: diffrate.CompressedModel, scores: Scores, runtime: Runtime
) -> None:
    """Record the scores of a model at its kept counts, and log the published closing line."""
    flops = compressed.flops()
    prune, merge = compressed.get_kept_num()
    counts = {"prune_kept_num": prune, "merge_kept_num": merge}
    runtime.record({"mode": mode, "model": entry.name, **scores.record(flops), **counts})
    log.info(scores.line(flops))


def save_result(
    args: Namespace, entry: models.ModelEntry, target: float, schedule: Schedule, runtime: Runtime
) -> Path | None:
    """Add a schedule to `compression_rate.json` in the output folder, and to the project's when asked.

    Gives the file to load it from, None where it was not saved. Main process only.

    Raises:
        ScheduleError: a file is malformed or cannot be written.
    """
    files = [] if runtime.output_dir is None else [runtime.output_dir / RATES]
    if args.save_compression_rate:
        files.append(PROJECT_RATES)
    for file in files if runtime.processes.is_main else []:
        save_schedule(file, entry.schedule_key, target, schedule)
    return files[-1] if files else None


def log_found(
    args: Namespace,
    entry: models.ModelEntry,
    target: float,
    compressed: diffrate.CompressedModel,
    schedule: Schedule,
    scores: tuple[Scores, Scores],
    file: Path | None,
) -> None:
    """The end of a search: schedule, accuracy against dense, and the next command to type."""
    found, dense = scores
    for name, counts in (("prune_kept_num", schedule.prune), ("merge_kept_num", schedule.merge)):
        if counts is not None:
            log.info("found %s %s", name, list(counts))
    flops, whole = compressed.flops_at(schedule), compressed.flops_at(compressed.dense_schedule())
    log.info("dense: %s", dense.line(whole))
    log.info(
        "found: %s (%.0f %% of dense, top-1 %+.3f)", found.line(flops), 100 * flops / whole, found.acc1 - dense.acc1
    )
    if file is not None:
        log.info("next: %s", next_command(args, entry, target, file))


def next_command(args: Namespace, entry: models.ModelEntry, target: float, file: Path) -> str:
    """How to evaluate what was found."""
    words = ["python main.py --eval --load_compression_rate", f"--target_flops {target:g}"]
    if file != PROJECT_RATES:
        words.append(f"--compression_rate_file {file}")
    if entry.name != SAMPLE_MODEL or args.data_path is not None:
        words.append(f"--model {entry.name} --data-path {args.data_path} --checkpoint {args.checkpoint}")
    return " ".join(words)
