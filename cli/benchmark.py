"""`--benchmark`: run the one that was asked for, log its figures, and leave them in files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils.data import Subset

import diffrate
import models
from benchmarks import speed
from benchmarks.speed import Row, Setting, Subject, line, table, write_rows
from cli.data import eval_dataset, eval_loader, eval_transform, input_size_of, view_of
from cli.model import Weights, chosen_entry, compressed, for_inference, planned
from cli.runtime import AMP_DTYPES, Runtime
from cli.schedules import latency_table, schedules_that_fit
from cli.settings import DEFAULT_BATCH, FILES, FROM_SCRATCH, PROJECT, Settings
from datasets import DataError, ImageFiles, LabelledDataset
from diffrate.files.header import about, is_saved_model
from diffrate.latency.measure import random_schedule
from models.zoo import ModelEntry
from utils import UsageError

log = logging.getLogger(__name__)
RANDOM = 20  # schedules that predictions are compared at, beside those of the file


def run(settings: Settings, runtime: Runtime) -> None:
    """Measure what `--benchmark` names, and report it."""
    kind, data, device = settings.run.benchmark, settings.data, runtime.device
    precisions = (settings.run.amp,) if settings.run.amp else ("off", "bf16")
    dtypes = [AMP_DTYPES[name] or torch.float32 for name in precisions]
    modes = (False, True) if settings.run.compile else (False,)
    setting = Setting(data.batch_sizes or (DEFAULT_BATCH,), dtypes, modes, settings.run.rounds, device)
    if kind == FILES:
        _report("benchmark files", _file_rows(settings, setting), runtime)
        return
    subject = _subject(settings)
    free = replace(subject, schedule=None)  # of benchmarks that have schedules of their own
    if kind == "search":
        _report("benchmark search", [speed.step_row(free, data.batch_size, settings.run.rounds, device)], runtime)
    elif kind == "scaling":
        (rows, columns), chosen = subject.entry.input_size, settings.model.input_size
        sizes = [(round(rows * share), round(columns * share)) for share in speed.SIZES] if chosen is None else [chosen]
        measured = _report("benchmark scaling", speed.scaling_rows(free, sizes, setting), runtime)
        for exponent in speed.exponents(measured):
            log.info(speed.EXPONENT.format_map(exponent))
    elif kind == "loading":
        model, name = subject.compressed(), subject.entry.name
        flops = model.flops()
        running, inside = for_inference(model, settings.run.compile, data.batch_size, runtime)
        loader = eval_loader(_images(settings, subject.entry), settings, inside)
        _report("benchmark loading", [speed.loading_row(running, loader, name, flops, inside)], runtime)
    elif kind == "latency":
        _latency(settings, subject.entry, free.compressed().to(device), runtime)
    else:
        _report("benchmark", speed.speed_rows(subject, setting), runtime)


def _latency(settings: Settings, entry: ModelEntry, model: diffrate.CompressedModel, runtime: Runtime) -> None:
    """Report the table of seconds, and what it predicts of schedules beside what they take."""
    sizes = settings.data.batch_sizes or (settings.latency.batch_size,)
    times = latency_table(replace(settings.latency, batch_size=sizes[0]), model, runtime)
    _report("benchmark latency", speed.latency_rows(entry.name, times), runtime)

    def report(schedule: diffrate.Schedule, predicted: float, measured: float) -> None:
        gflops = model.flops_at(schedule) / 1e9
        runtime.record({"mode": "latency check", "predicted": predicted, "measured": measured, "gflops": gflops})
        log.info("%.3f GFLOPs: speed-up predicted %.3f, measured %.3f", gflops, predicted, measured)

    rng, known = Random(settings.run.seed), schedules_that_fit(settings.model, entry, model)
    schedules = [*known, *(random_schedule(model.compression.space.every_block(), rng) for _ in range(RANDOM))]
    log.info(diffrate.check_predictions(model, times, schedules, callback=report).line())


def _file_rows(settings: Settings, setting: Setting) -> Iterator[Row]:
    """Time the files that `--benchmark` names beside the model that they were exported from."""
    files = [speed.open_file(path) for path in map(Path, settings.run.timed)]
    first = files[0].loaded.metadata
    size = settings.model.input_size or first.input_size[1:]
    for file in files:
        said, shape = file.loaded.metadata, (first.input_size[0], *size)
        if said.input_size != shape:
            found, accepted = (" x ".join(map(str, sides)) for sides in (said.input_size, shape))
            raise UsageError(f"--benchmark {file.path}: found images of {found}; accepted: {accepted}, as the others")
        if models.bare_name(said.model) != models.bare_name(first.model):
            wrong = f"--benchmark {file.path}: found one of {said.model}"
            raise UsageError(f"{wrong}; accepted: of {first.model}, as the first")
    chosen = replace(settings.model, name=settings.model.name or first.model, input_size=size)
    if chosen.load:
        schedule = _subject(replace(settings, model=chosen)).schedule
    else:
        schedule = min((file.loaded.metadata for file in files), key=lambda said: said.gflops).schedule
    subject = Subject(chosen_entry(chosen), size, schedule, chosen.granularity, settings.run.seed)
    return speed.file_rows(subject, files, setting)


def _subject(settings: Settings) -> Subject:
    """The model at the schedule of the flags or of the file that `--checkpoint` names; its weights do not matter."""
    chosen = settings.model
    saved = is_saved_model(chosen.checkpoint)
    entry = chosen_entry(chosen if saved else replace(chosen, checkpoint=FROM_SCRATCH))
    plan, held = planned(settings, entry, reads_data=False), about(chosen.checkpoint).schedule if saved else None
    model = compressed(plan.shapes, chosen, plan, Weights(None, chosen.checkpoint, held))
    schedule = model.compression.current()
    return Subject(entry, input_size_of(chosen, entry), schedule, chosen.granularity, settings.run.seed)


def _images(settings: Settings, entry: ModelEntry) -> Subset[Any]:
    """The validation images of `--data-path`, or the photographs that ship, over and over; whole batches."""
    data, size, rounds = settings.data, settings.data.batch_size, settings.run.rounds
    dataset: LabelledDataset
    if data.path is None:
        files = [(str(path), 0) for path in sorted((PROJECT / "figures").glob("*.jpg"))]
        dataset = ImageFiles(files, (), eval_transform(view_of(settings, entry)), data.exif)
        images = size * rounds
    else:
        dataset = eval_dataset(settings, entry)
        images = len(dataset)
    batches = min(images // size, rounds)
    if batches < 2:
        raise DataError(f"--batch-size {size}: found {images} images; accepted: two batches at least")
    return Subset(dataset, [index % len(dataset) for index in range(batches * size)])


def _report(mode: str, measured: Iterable[Row], runtime: Runtime) -> list[Row]:
    """Log the rows as they come and as a table, and write them to the output folder, if there is one."""
    rows = []
    for row in measured:
        rows.append(row)
        runtime.record({"mode": mode, **row})
        log.info(line(row))
    for text in table(rows):
        log.info(text)
    if runtime.writes:
        assert runtime.output_dir is not None
        write_rows(rows, runtime.output_dir, mode.replace(" ", "_"))
    return rows
