"""`--benchmark`: run the one that was asked for, log its figures, and leave them in files."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

import diffrate
import models
from benchmarks import speed
from benchmarks.speed import Row, Setting, Subject, line, memory_mib, table, write_rows
from cli.data import eval_dataset, eval_loader, eval_transform, input_size_of, view_of
from cli.model import Weights, chosen_entry, compressed, for_inference, planned
from cli.runtime import AMP_DTYPES, Runtime
from cli.schedules import latency_table, schedules_that_fit
from cli.settings import DEFAULT_BATCH, FILES, FROM_SCRATCH, PROJECT, Settings
from datasets import DataError, ImageFiles, ImageLoader, LabelledDataset
from diffrate.files.header import about, is_saved_model
from diffrate.latency.measure import OTHER_RULES, random_schedule
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
        _report("benchmark search", [step_row(free, data.batch_size, settings.run.rounds, device)], runtime)
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
        _report("benchmark loading", [loading_row(running, loader, name, flops, inside)], runtime)
    elif kind == "latency":
        _latency(settings, subject.entry, free.compressed().to(device), runtime)
    else:
        _report("benchmark", speed.speed_rows(subject, setting), runtime)


def _latency(settings: Settings, entry: ModelEntry, model: diffrate.CompressedModel, runtime: Runtime) -> None:
    """Report the table of seconds, and what it predicts of schedules beside what they take."""
    sizes = settings.data.batch_sizes or (settings.latency.batch_size,)
    times = latency_table(replace(settings.latency, batch_size=sizes[0]), model, runtime)
    _report("benchmark latency", latency_rows(entry.name, times), runtime)

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
    priced = {"prune": PUBLISHED, "merge": PUBLISHED, **{rule: rule for rule in OTHER_RULES}}
    for kind, times in enumerate(table.kinds):
        counts = {max(1, round(table.tokens * part / ROWS)) for part in range(1, ROWS + 1)}
        for tokens in sorted(counts, reverse=True):
            left, prices = tokens - max(1, round(GONE * tokens)), dict.fromkeys(priced)
            if times.reduction and tokens > 1:
                for column, rule in priced.items():
                    kept = Kept(tokens, left if column == "prune" else tokens, left)
                    prices[column] = 1000 * times.price(kept, False, RULES[rule])
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
                **{f"{column}_ms": price for column, price in prices.items()},
                "rest_ms": 1000 * (table.embedding + table.head[0] + table.head[1] * table.tokens),
            }


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
