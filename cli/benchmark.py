"""`--benchmark`: run the one that was asked for, log its figures, and leave them in files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch.utils.data import Subset

import diffrate
import models
from benchmarks import exported, latency, loading, scaling, speed
from benchmarks.search_step import search_cost
from benchmarks.subject import Subject
from benchmarks.tables import table, write_rows
from cli.data import eval_dataset, eval_loader, input_size_of
from cli.latency import latency_table
from cli.model import Weights, at_schedule, chosen_entry, for_inference, planned
from cli.schedules import schedules_that_fit
from cli.settings import DEFAULT_BATCH, FILES, FROM_SCRATCH, Settings
from datasets import DataError
from diffrate.saving.about import about, is_saved_model
from models.zoo import ModelEntry
from processes.runtime import AMP_DTYPES, Runtime
from utils import UsageError

log = logging.getLogger(__name__)


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
    cost = search_cost(subject, settings.data.batch_size, settings.run.rounds, runtime.device)
    runtime.record({"mode": "benchmark search", "model": subject.entry.name, **cost.record()})
    for line in cost.lines():
        log.info(line)


def _scaling(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    (rows, columns), chosen = subject.entry.input_size, settings.model.input_size
    sizes = [(round(rows * share), round(columns * share)) for share in scaling.SIZES] if chosen is None else [chosen]
    setting = scaling.Setting(
        settings.data.batch_sizes or (DEFAULT_BATCH,), _dtypes(settings)[0], settings.run.rounds, runtime.device
    )
    measured = scaling.scaling_rows(replace(subject, schedule=None), sizes, setting)
    for exponent in scaling.exponents(_report("benchmark scaling", measured, scaling.HEADINGS, runtime)):
        log.info(exponent.line())


def _loading(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    model = subject.compressed()
    flops, name = model.flops(), subject.entry.name
    running, inside = for_inference(model, settings.run.compile, settings.data.batch_size, runtime)
    with _images(settings, subject.entry) as dataset:
        loader = eval_loader(dataset, settings, inside)
        row = loading.loading_row(running, loader, name, flops, inside)
    _report("benchmark loading", [row], loading.HEADINGS, runtime)


def _speed(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    modes = (False, True) if settings.run.compile else (False,)
    sizes, rounds = settings.data.batch_sizes or (DEFAULT_BATCH,), settings.run.rounds
    rows = speed.speed_rows(subject, sizes, _dtypes(settings), modes, rounds, runtime.device)
    _report("benchmark", rows, speed.HEADINGS, runtime)


def _latency(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    model = replace(subject, schedule=None).compressed().to(runtime.device)
    use = replace(
        settings.latency,
        batch_size=settings.data.batch_sizes[0] if settings.data.batch_sizes else settings.latency.batch_size,
    )
    table = latency_table(use, model, runtime)
    name = subject.entry.name
    _report("benchmark latency", latency.latency_rows(name, table), latency.HEADINGS, runtime)
    known = schedules_that_fit(settings.model, subject.entry, model)

    def tell(schedule: diffrate.Schedule, predicted: float, measured: float) -> None:
        gflops = model.flops_at(schedule) / 1e9
        runtime.record({"mode": "latency check", "predicted": predicted, "measured": measured, "gflops": gflops})
        log.info("%.3f GFLOPs: speed-up predicted %.3f, measured %.3f", gflops, predicted, measured)

    checked = diffrate.check_predictions(
        model, table, latency.schedules_to_check(model, known, settings.run.seed), callback=tell
    )
    log.info(checked.line())


def _exported(settings: Settings, runtime: Runtime) -> None:
    """Rows of the files that `--benchmark` names, beside those of the model that they are of."""
    data, paths = settings.data, settings.run.exported
    loaded = [exported.open_file(path) for path in paths]
    first = loaded[0].metadata
    chosen = replace(settings.model, name=settings.model.name or first.model)
    entry = chosen_entry(chosen)
    if chosen.input_size is None and input_size_of(chosen, entry) != first.input_size[1:]:
        chosen = replace(chosen, input_size=first.input_size[1:])
    size = input_size_of(chosen, entry)
    _check_alike(loaded, (first.input_size[0], *size))
    if chosen.load:
        schedule = _subject(replace(settings, model=chosen)).schedule
    else:
        schedule = min((file.metadata for file in loaded), key=lambda said: said.gflops).schedule
    subject = Subject(entry, size, schedule, chosen.granularity, settings.run.seed, chosen.compile_merging)
    setting = exported.Setting(
        (False, True) if settings.run.compile else (False,),
        data.batch_sizes or (DEFAULT_BATCH,),
        settings.run.rounds,
        runtime.device,
    )
    _report("benchmark files", exported.file_rows(subject, loaded, setting), exported.HEADINGS, runtime)


def _check_alike(loaded: Sequence[exported.File], size: tuple[int, ...]) -> None:
    first = loaded[0].metadata.model
    for file in loaded:
        said = file.metadata
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
    at_schedule(plan.shapes, chosen, plan, Weights(None, chosen.checkpoint, schedule))
    schedule = plan.shapes.compression.current()
    return Subject(entry, size, schedule, chosen.granularity, settings.run.seed, chosen.compile_merging)


def _dtypes(settings: Settings) -> list[torch.dtype]:
    """The precisions to measure; the first is what a single one is measured in."""
    names = [settings.run.amp] if settings.run.amp else ["off", "bf16"]
    return [AMP_DTYPES[name] or torch.float32 for name in names]


@contextmanager
def _images(settings: Settings, entry: ModelEntry) -> Iterator[Any]:
    """The validation images of `--data-path`, or JPEGs made for the purpose; whole batches.

    Raises:
        DataError: fewer images than two batches.
    """
    data = settings.data
    wanted = data.batch_size * settings.run.rounds
    if data.path is not None:
        yield _whole_batches(eval_dataset(settings, entry, None, None), data.batch_size, wanted)
        return
    with loading.photographs(wanted) as folder:
        made = replace(settings, data=replace(data, data_set="IMNET", path=str(folder)))
        yield _whole_batches(eval_dataset(made, entry, None, None), data.batch_size, wanted)


def _whole_batches(dataset: Any, batch_size: int, wanted: int) -> Subset[Any]:
    batches = min(wanted, len(dataset)) // batch_size
    if batches < 2:
        raise DataError(f"--batch-size {batch_size}: found {len(dataset)} images; accepted: two batches at least")
    return Subset(dataset, range(batches * batch_size))


def _report(mode: str, measured: Iterable[Any], headings: Mapping[str, str], runtime: Runtime) -> list[Any]:
    """Log the rows as they come and as a table, and write them to the output folder, if there is one."""
    rows = []
    for row in measured:
        rows.append(row)
        runtime.record({"mode": mode, **asdict(row)})
        log.info(row.line())
    for line in table(rows, headings):
        log.info(line)
    if runtime.writes:
        assert runtime.output_dir is not None
        write_rows(rows, runtime.output_dir, mode.replace(" ", "_"))
    return rows
