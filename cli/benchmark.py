"""`--benchmark`: run the one that was asked for, log its figures, and leave them in files."""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

import diffrate
import models
from benchmarks import speed
from benchmarks.speed import Row, Setting, Subject, line, memory_mib, table, write_rows
from cli.data import eval_dataset, eval_loader, input_size_of
from cli.model import Weights, chosen_entry, compressed, for_inference, planned
from cli.runtime import AMP_DTYPES, Runtime
from cli.schedules import latency_table, schedules_that_fit
from cli.settings import DEFAULT_BATCH, FILES, FROM_SCRATCH, PROJECT, Settings
from datasets import DataError, ImageLoader
from diffrate.files.header import about, is_saved_model
from diffrate.latency.measure import OTHER_RULES, random_schedule
from diffrate.latency.table import BlockTimes
from diffrate.schedule import PUBLISHED, RULES, Kept
from diffrate.timing import PairedTimes, time_in_turn
from models.zoo import ModelEntry
from utils import UsageError

log = logging.getLogger(__name__)
RANDOM = 20  # schedules that predictions are compared at, beside those of the file
ROWS = 13  # token counts of a kind of block
GONE = 0.1  # of the tokens, in the prices of reductions
PASSES = 3


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
    row = step_row(subject, settings.data.batch_size, settings.run.rounds, runtime.device)
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
        _report("benchmark loading", [loading_row(running, loader, name, flops, inside)], runtime)


def _speed(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    _report("benchmark", speed.speed_rows(subject, _setting(settings, runtime)), runtime)


def _latency(settings: Settings, subject: Subject, runtime: Runtime) -> None:
    model = replace(subject, schedule=None).compressed().to(runtime.device)
    sizes = settings.data.batch_sizes or (settings.latency.batch_size,)
    times = latency_table(replace(settings.latency, batch_size=sizes[0]), model, runtime)
    _report("benchmark latency", latency_rows(subject.entry.name, times), runtime)

    def report(schedule: diffrate.Schedule, predicted: float, measured: float) -> None:
        gflops = model.flops_at(schedule) / 1e9
        runtime.record({"mode": "latency check", "predicted": predicted, "measured": measured, "gflops": gflops})
        log.info("%.3f GFLOPs: speed-up predicted %.3f, measured %.3f", gflops, predicted, measured)

    rng, known = Random(settings.run.seed), schedules_that_fit(settings.model, subject.entry, model)
    schedules = [*known, *(random_schedule(model.compression.space.every_block(), rng) for _ in range(RANDOM))]
    log.info(diffrate.check_predictions(model, times, schedules, callback=report).line())


def _exported(settings: Settings, runtime: Runtime) -> None:
    """Time the files that `--benchmark` names beside the model that they were exported from."""
    loaded = [speed.open_file(path) for path in settings.run.exported]
    first = loaded[0].loaded.metadata
    size = settings.model.input_size or first.input_size[1:]
    chosen = replace(settings.model, name=settings.model.name or first.model, input_size=size)
    _check_alike(loaded, (first.input_size[0], *size))
    if chosen.load:
        schedule = _subject(replace(settings, model=chosen)).schedule
    else:
        schedule = min((file.loaded.metadata for file in loaded), key=lambda said: said.gflops).schedule
    subject = Subject(chosen_entry(chosen), size, schedule, chosen.granularity, settings.run.seed)
    _report("benchmark files", speed.file_rows(subject, loaded, _setting(settings, runtime)), runtime)


def _check_alike(files: Sequence[speed.File], size: tuple[int, ...]) -> None:
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
    plan, held = planned(chosen, entry), about(chosen.checkpoint).schedule if saved else None
    model = compressed(plan.shapes, chosen, plan, Weights(None, chosen.checkpoint, held))
    schedule = model.compression.current()
    return Subject(entry, input_size_of(chosen, entry), schedule, chosen.granularity, settings.run.seed)


def _setting(settings: Settings, runtime: Runtime) -> Setting:
    names = (settings.run.amp,) if settings.run.amp else ("off", "bf16")
    dtypes = [AMP_DTYPES[name] or torch.float32 for name in names]
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
                of_class = Path(folder, "val", path.stem)
                of_class.mkdir(parents=True)
                shutil.copy(path, of_class)
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


def step_row(subject: Subject, batch_size: int, rounds: int, device: torch.device) -> Row:
    """What a step of the search costs: its time against a plain step, timed in turn, and its memory against that of a
    step which also computes weight gradients."""
    use = (subject, batch_size, device)
    memory = [memory_mib(build_step, kind, *use, device=device) for kind in ("search", "weights")]
    search, plain = (build_step(kind, *use) for kind in ("search", "plain"))
    times = PairedTimes(*time_in_turn((search, plain), rounds, device))
    return {
        "model": subject.entry.name,
        "batch_size": batch_size,
        "search_seconds": median(times.baseline),
        "plain_seconds": median(times.rival),
        "time_ratio": times.ratio,
        "time_ratio_low": min(times.ratios),
        "time_ratio_high": max(times.ratios),
        "search_memory_mib": memory[0],
        "weights_memory_mib": memory[1],
        "memory_ratio": memory[0] / memory[1] if memory[0] and memory[1] else None,
    }


def build_step(kind: str, subject: Subject, batch_size: int, device: torch.device) -> Callable[[], None]:
    """One step on random images: `plain`, `search`, or a search that trains `weights` as well."""
    model = subject.dense() if kind == "plain" else subject.compressed()
    model = model.requires_grad_(kind == "weights").train().to(device)
    images = torch.randn(batch_size, 3, *subject.input_size, device=device)
    # Without a head, the features stand for classes: what a step costs is the same.
    outputs = subject.entry.num_classes or model.num_features
    labels = torch.randint(0, outputs, (batch_size,), device=device)
    if not isinstance(model, diffrate.CompressedModel):
        return lambda: F.cross_entropy(model(images.clone().requires_grad_(True)), labels).backward()
    for rate in model.arch_parameters():
        rate.requires_grad_(True)
    target = 0.6 * model.flops_at(model.dense_schedule())

    def step() -> None:
        logits, flops = model(images)
        (F.cross_entropy(logits, labels) + ((flops - target) / target) ** 2).backward()

    return step


def latency_rows(name: str, table: diffrate.LatencyTable) -> Iterator[Row]:
    """Milliseconds of a batch in the first block of each kind, by the tokens that enter and, of the MLP, leave it.

    sized: what attention takes more where tokens stand for several. prune, merge, and by name what merging by other
    rules takes: removing a tenth of the tokens, without the MLP; None where the kind reduces nothing. rest: outside the
    blocks.
    """
    for kind, times in enumerate(table.kinds):
        counts = {max(1, round(table.tokens * part / ROWS)) for part in range(1, ROWS + 1)}
        for tokens in sorted(counts, reverse=True):
            yield {
                "model": name,
                "batch_size": table.batch_size,
                "precision": table.setting["precision"],
                "mode": table.setting["mode"],
                "block": table.order.index(kind),
                "tokens": tokens,
                "attention_ms": 1000 * times.plain[tokens],
                "sized_ms": 1000 * times.sized[tokens],
                "mlp_ms": 1000 * times.after[tokens if times.read is None else times.read],
                "prune_ms": _price(times, tokens, merging=False),
                "merge_ms": _price(times, tokens, merging=True),
                **{f"{rule}_ms": _price(times, tokens, merging=True, rule=rule) for rule in OTHER_RULES},
                "rest_ms": 1000 * (table.embedding + table.head[0] + table.head[1] * table.tokens),
            }


def _price(times: BlockTimes, tokens: int, merging: bool, rule: str = PUBLISHED) -> float | None:
    """Milliseconds of removing a tenth of the tokens."""
    if not times.reduction or tokens < 2:
        return None
    left = tokens - max(1, round(GONE * tokens))
    return 1000 * times.price(Kept(tokens, tokens if merging else left, left), False, RULES[rule])


def loading_row(model: nn.Module, loader: ImageLoader, name: str, flops: int, runtime: Runtime) -> Row:
    """Throughputs of whole batches of `loader` alone, of `model` alone (`flops` an image), and of evaluation: medians
    over passes in turn."""
    model.eval()
    batch = next(iter(loader))[0].to(runtime.device, runtime.dtype)

    def compute(batches: Iterable[torch.Tensor]) -> None:
        with torch.inference_mode(), runtime.autocast():
            for images in batches:
                model(images, return_flop=False)

    runs = (
        lambda: deque(loader, maxlen=0),
        lambda: compute([batch] * len(loader)),
        lambda: compute(images.to(runtime.device, runtime.dtype, non_blocking=True) for images, _ in loader),
    )
    images = len(loader) * (loader.batch_size or 1)
    times = time_in_turn(runs, PASSES, runtime.device, shortest=1e-9)  # a pass is long enough
    loading, computing, both = (images / median(seconds) for seconds in times)
    return {
        "model": name,
        "batch_size": loader.batch_size,
        "gflops": flops / 1e9,
        "images": images,
        "loader_images_per_second": loading,
        "model_images_per_second": computing,
        "both_images_per_second": both,
        "bound_by": "model" if loading > computing else "loader",
    }
