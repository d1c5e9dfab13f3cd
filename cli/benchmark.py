"""`--benchmark`: run the one that was asked for, log its figures, and leave them in files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Subset

import diffrate
import models
from benchmarks import parts, speed
from benchmarks import speed as exported
from benchmarks.speed import Row, Setting, Subject, line, table, write_rows
from cli.data import eval_dataset, eval_loader, input_size_of
from cli.model import Weights, chosen_entry, compressed, for_inference, planned
from cli.runtime import AMP_DTYPES, Runtime
from cli.schedules import latency_table, schedules_that_fit
from cli.settings import DEFAULT_BATCH, FILES, FROM_SCRATCH, PROJECT, Settings
from datasets import DataError
from diffrate.files.header import about, is_saved_model
from diffrate.latency.measure import random_schedule
from models.zoo import ModelEntry
from utils import UsageError

log = logging.getLogger(__name__)
RANDOM = 20  # schedules that predictions are held against, beside those of the file


def run(settings: Settings, runtime: Runtime) -> None:
    """Measure what `--benchmark` names.

    Raises:
        ScheduleError, InputSizeError, DataError: the schedule, a size or the data do not fit.
        ExportError, UsageError: a file to time is none, or takes other images than the others.
    """
    kind = settings.run.benchmark
    assert kind is not None, "the mode that is asked for"
    if kind == FILES:
        _exported(settings, runtime)
    else:
        MEASURES[kind](settings, _subject(settings), runtime)


def _search(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    subject = replace(subject, schedule=None)
    row = parts.step_row(subject, settings.data.batch_size, settings.run.rounds, runtime.device)
    _report("benchmark search", [row], runtime)


def _scaling(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    (rows, columns), chosen = subject.entry.input_size, settings.model.input_size
    sizes = [(round(rows * share), round(columns * share)) for share in speed.SIZES] if chosen is None else [chosen]
    measured = speed.scaling_rows(replace(subject, schedule=None), sizes, _setting(settings, runtime))
    for exponent in speed.exponents(_report("benchmark scaling", measured, runtime)):
        log.info(speed.EXPONENT.format_map(exponent))


def _loading(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    model = subject.compressed()
    flops, name = model.flops(), subject.entry.name
    running, inside = for_inference(model, settings.run.compile, settings.data.batch_size, runtime)
    with _images(settings, subject.entry) as dataset:
        loader = eval_loader(dataset, settings, inside)
        _report("benchmark loading", [parts.loading_row(running, loader, name, flops, inside)], runtime)


def _speed(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    _report("benchmark", speed.speed_rows(subject, _setting(settings, runtime)), runtime)


def _latency(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    model = replace(subject, schedule=None).compressed().to(runtime.device)
    sizes = settings.data.batch_sizes or (settings.latency.batch_size,)
    times = latency_table(replace(settings.latency, batch_size=sizes[0]), model, runtime)
    _report("benchmark latency", parts.latency_rows(subject.entry.name, times), runtime)

    def tell(schedule: diffrate.Schedule, predicted: float, measured: float) -> None:
        gflops = model.flops_at(schedule) / 1e9
        runtime.record({"mode": "latency check", "predicted": predicted, "measured": measured, "gflops": gflops})
        log.info("%.3f GFLOPs: speed-up predicted %.3f, measured %.3f", gflops, predicted, measured)

    rng, known = Random(settings.run.seed), schedules_that_fit(settings.model, subject.entry, model)
    schedules = [*known, *(random_schedule(model.compression.space, rng) for _ in range(RANDOM))]
    log.info(diffrate.check_predictions(model, times, schedules, callback=tell).line())


def _exported(settings: Settings, runtime: Runtime) -> None:
    """Rows of the files that `--benchmark` names, beside those of the model that they are of."""
    loaded = [exported.open_file(path) for path in settings.run.exported]
    first = loaded[0].loaded.metadata
    chosen = replace(settings.model, name=settings.model.name or first.model)
    entry = chosen_entry(chosen)
    if chosen.input_size is None and input_size_of(chosen, entry) != first.input_size[1:]:
        chosen = replace(chosen, input_size=first.input_size[1:])
    size = input_size_of(chosen, entry)
    _check_alike(loaded, (first.input_size[0], *size))
    if chosen.load:
        schedule = _subject(replace(settings, model=chosen)).schedule
    else:
        schedule = min((file.loaded.metadata for file in loaded), key=lambda said: said.gflops).schedule
    subject = Subject(entry, size, schedule, chosen.granularity, settings.run.seed)
    _report("benchmark files", exported.file_rows(subject, loaded, _setting(settings, runtime)), runtime)


def _check_alike(files: Sequence[exported.File], size: tuple[int, ...]) -> None:
    first = files[0].loaded.metadata.model
    for file in files:
        said = file.loaded.metadata
        if said.input_size != size:
            found, accepted = (" x ".join(map(str, sides)) for sides in (said.input_size, size))
            raise UsageError(f"--benchmark {file.path}: found images of {found}; accepted: {accepted}, as the others")
        if models.bare_name(said.model) != models.bare_name(first):
            raise UsageError(f"--benchmark {file.path}: found one of {said.model}; accepted: of {first}, as the first")


MEASURES = {"eval": _speed, "search": _search, "scaling": _scaling, "loading": _loading, "latency": _latency}


def _subject(settings: Settings) -> Subject:
    """The model at the schedule of the flags or of the file that `--checkpoint` names; its weights do not matter.

    Raises:
        ScheduleError: no such schedule, or one that does not fit; before anything is timed.
    """
    chosen = settings.model
    saved = is_saved_model(chosen.checkpoint)
    entry = chosen_entry(chosen if saved else replace(chosen, checkpoint=FROM_SCRATCH))
    size = input_size_of(chosen, entry)
    schedule = about(chosen.checkpoint).schedule if saved else None
    plan = planned(chosen, entry)
    compressed(plan.shapes, chosen, plan, Weights(None, chosen.checkpoint, schedule))
    schedule = plan.shapes.compression.current()
    return Subject(entry, size, schedule, chosen.granularity, settings.run.seed)


def _setting(settings: Settings, runtime: Runtime) -> Setting:
    dtypes = [
        AMP_DTYPES[name] or torch.float32 for name in ([settings.run.amp] if settings.run.amp else ["off", "bf16"])
    ]
    modes = (False, True) if settings.run.compile else (False,)
    return Setting(settings.data.batch_sizes or (DEFAULT_BATCH,), dtypes, modes, settings.run.rounds, runtime.device)


@contextmanager
def _images(settings: Settings, entry: ModelEntry) -> Iterator[Subset[Any]]:
    """The validation images of `--data-path`, or the photographs that ship, over and over; whole batches.

    Raises:
        DataError: fewer images than two batches.
    """
    data, size = settings.data, settings.data.batch_size
    with TemporaryDirectory() as folder:
        if data.path is None:
            for path in (PROJECT / "figures").glob("*.jpg"):
                place = Path(folder, "val", path.stem)
                place.mkdir(parents=True)
                shutil.copy(path, place)
            settings = replace(settings, data=replace(data, data_set="IMNET", path=folder))
        dataset = eval_dataset(settings, entry, None, None)
        images = size * settings.run.rounds if data.path is None else len(dataset)
        batches = min(images // size, settings.run.rounds)
        if batches < 2:
            raise DataError(f"--batch-size {size}: found {images} images; accepted: two batches at least")
        yield Subset(dataset, [index % len(dataset) for index in range(batches * size)])


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
