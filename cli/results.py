"""What a run leaves behind: scores in the log, schedules in files, the next command to type."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Any

import diffrate
from cli.runtime import FOUND, RATES, Runtime
from cli.schedules import PROJECT_RATES
from cli.settings import OFFICIAL, Settings, size_words
from diffrate.budget import Budget, uniform_schedules
from diffrate.schedule import Schedule, fields_of, save_schedule
from engine import log_counts
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL

log = logging.getLogger(__name__)


def report(
    mode: str, entry: ModelEntry, compressed: diffrate.CompressedModel, scores: diffrate.Scores, runtime: Runtime
) -> None:
    """Record the scores of a model at its kept counts, and log the published closing line."""
    runtime.record(_record(mode, entry, compressed, compressed.compression.current(), scores))
    log.info(scores.line(compressed.flops()))


def save_model(
    settings: Settings,
    entry: ModelEntry,
    compressed: diffrate.CompressedModel,
    classes: Sequence[str] | None,
    runtime: Runtime,
) -> None:
    """Leave the model where `--save` says, if it says so; main process only.

    Raises:
        SavedModelError: it cannot be written.
    """
    path = settings.run.save
    if path is not None and runtime.processes.is_main:
        diffrate.save(compressed, path, name=entry.name, classes=classes)
        log.info("saved %s: %.3f GFLOPs", path, compressed.flops() / 1e9)


def save_schedules(
    settings: Settings, entry: ModelEntry, target: float, schedule: Schedule, runtime: Runtime
) -> Path | None:
    """Add a schedule to `compression_rate.json` in the output folder, and to the project's when asked.

    Gives the file to load it from, None where it was not saved. Main process only.

    Raises:
        ScheduleError: a file is malformed or cannot be written.
    """
    files = [] if runtime.output_dir is None else [runtime.output_dir / RATES]
    if settings.run.save_rates:
        files.append(PROJECT_RATES)
    for file in files if runtime.processes.is_main else []:
        save_schedule(file, entry.schedule_key, target, schedule)
    return files[-1] if files else None


def log_found(
    settings: Settings,
    entry: ModelEntry,
    target: float,
    budget: Budget,
    compressed: diffrate.CompressedModel,
    found: diffrate.Found,
    scores: tuple[diffrate.Scores, diffrate.Scores] | None,
    file: Path | None,
    runtime: Runtime,
    apart: float | None = None,
) -> None:
    """The end of a search: schedule, accuracy against dense or the loss against its outputs, the speed if that was
    asked for, the next command to type.

    target: the GFLOPs under which its schedule is kept. scores: of the schedule and of the dense model; None where
    there was nothing to score on. apart: how far the outputs are from the dense ones; None where the search did not
    look at them.
    """
    schedule = found.schedule
    log_counts(fields_of(schedule), "found ")
    flops, whole = compressed.flops_at(schedule), compressed.flops_at(compressed.dense_schedule())
    if apart is not None:
        log.info(
            "found: loss against dense %#.3g flops %.3f (%.0f %% of dense)", apart, flops / 1e9, 100 * flops / whole
        )
    if scores is not None:
        reached, dense = scores
        runtime.append(_record("eval", entry, compressed, compressed.dense_schedule(), dense), FOUND)
        # To draw beside it: the uniform schedules of the same budget that the model can run.
        beside = uniform_schedules(compressed.compression.space, budget)
        uniform = {kind: fields_of(beside[kind]) for kind in ("prune", "merge", "both") if kind in beside}
        more = {"target_gflops": target, "uniform": uniform}
        runtime.append(_record("found", entry, compressed, schedule, reached) | more, FOUND)
        (name, now), (_, before) = reached.ranked, dense.ranked
        log.info("dense: %s", dense.line(whole))
        log.info("found: %s (%.0f %% of dense, %s %+.3f)", reached.line(flops), 100 * flops / whole, name, now - before)
    if found.speed is not None:
        runtime.record({"mode": "speed", "model": entry.name, **asdict(found.speed)})
        log.info(found.speed.line())
    if file is not None:
        log.info("next: %s", next_command(settings, entry, target, file))


def _record(
    mode: str, entry: ModelEntry, compressed: diffrate.CompressedModel, schedule: Schedule, scores: diffrate.Scores
) -> dict[str, Any]:
    """A JSON line of the scores at a schedule, with what plots need to know of the model."""
    dense = compressed.flops_at(compressed.dense_schedule())
    shape = {"tokens": compressed.compression.space.limits[0], "blocks": len(compressed.compressible_blocks())}
    named = {"mode": mode, "model": entry.name, "dense_gflops": dense / 1e9, **shape}
    return named | scores.record(compressed.flops_at(schedule)) | fields_of(schedule)


def next_command(settings: Settings, entry: ModelEntry, target: float, file: Path) -> str:
    """How to evaluate what was found, in as few words as there are."""
    own_data = entry.name != SAMPLE_MODEL or settings.data.path is not None
    data = [f"--data-path {quote(str(settings.data.path))}"] if own_data else []
    if settings.data.data_set not in ("IMNET", "SAMPLE"):
        data.append(f"--data-set {settings.data.data_set}")
    if settings.run.save is not None:
        return " ".join(["python main.py --eval", f"--checkpoint {quote(str(settings.run.save))}", *data])
    words = ["python main.py --eval --load_compression_rate", f"--target_flops {target:g}"]
    if file != PROJECT_RATES:
        words.append(f"--compression_rate_file {quote(str(file))}")
    if own_data or settings.model.checkpoint != OFFICIAL:
        # As it was given where the weights are others than its tag says: the tag says what images are like, too.
        name = entry.name if settings.model.checkpoint == OFFICIAL else settings.model.name
        words += [f"--model {name}", *data, f"--checkpoint {quote(settings.model.checkpoint)}"]
    if settings.model.input_size is not None:
        words.append(f"--input-size {size_words(settings.model.input_size)}")
    return " ".join(words)
