"""What a run leaves behind: scores in the log, schedules in files, the next command to type."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import diffrate
from cli.runtime import RATES, Runtime
from cli.schedules import PROJECT_RATES
from cli.settings import OFFICIAL, Settings, size_words
from diffrate import CompressedModel, Scores
from diffrate.schedule import Schedule, fields_of, save_schedule
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL

log = logging.getLogger(__name__)


def report(mode: str, entry: ModelEntry, compressed: CompressedModel, scores: Scores, runtime: Runtime) -> None:
    """Record the scores of a model at its kept counts, and log the published closing line."""
    runtime.record(record_of(mode, entry, compressed, compressed.compression.current(), scores))
    log.info(scores.line(compressed.flops()))


def save_model(
    settings: Settings,
    entry: ModelEntry,
    compressed: CompressedModel,
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


def record_of(
    mode: str, entry: ModelEntry, compressed: CompressedModel, schedule: Schedule, scores: Scores
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
