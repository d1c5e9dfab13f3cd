"""What `--benchmark` measures, as rows: dictionaries by the names of columns.

Rows are written as tables for readers, and as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import reduce
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import linear_regression, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffrate
import models
from cli.runtime import Runtime
from datasets import ImageLoader
from diffrate.atomic import whole_file
from diffrate.device import shapes_alone
from diffrate.files.header import target_of
from diffrate.files.runtimes import Loaded, load_exported, parts_of
from diffrate.latency.measure import OTHER_RULES
from diffrate.schedule import PUBLISHED, RULES, SLICED, Kept, Schedule, SearchSpace
from diffrate.timing import (
    SHORT_NAMES,
    PairedTimes,
    Run,
    Use,
    forward_pass,
    mode_name,
    precision_name,
    sliced,
    speed_of,
    time_in_turn,
)
from models.zoo import ModelEntry

Row = dict[str, Any]
# What headings write for parts of the columns' names, the longer ones first.
SHORT = {
    "images_per_second": "img/s",
    "share_of_ideal": "share %",
    "share_of_bound": "of bound %",
    "bound_speedup": "bound",
    "ideal_speedup": "ideal",
    "speedup_high": "highest",
    "speedup_low": "lowest",
    "ms_per_image": "ms/img",
    "batch_size": "batch",
    "compressed": "compr.",
    "memory_mib": "MiB",
    "speedup": "speed-up",
    "gflops": "GFLOPs",
    "mib": "MiB",
    "_": " ",
}


def line(row: Row) -> str:
    """A row by itself, without the model."""
    headings, cells = _cells([row], ("model",))
    return ", ".join(f"{heading} {cell}" for heading, cell in zip(headings, cells, strict=True))


def table(rows: Sequence[Row], hidden: Collection[str] = ("model",)) -> list[str]:
    """Lines of aligned columns, headings first, without the columns that are `hidden`."""
    lines = _cells(rows, hidden)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def markdown(rows: Sequence[Row], hidden: Collection[str] = ()) -> list[str]:
    """The same as a table of Markdown."""
    first, *others = (f"| {' | '.join(line)} |" for line in _cells(rows, hidden))
    return [first, "|" + "---|" * (first.count("|") - 1), *others]


def write_rows(rows: Sequence[Row], folder: Path, name: str) -> None:
    """`name`.json and `name`.csv in `folder`, as whole files."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    for ending, content in (("json", json.dumps(rows, indent=2) + "\n"), ("csv", text.getvalue())):
        with whole_file(folder / f"{name}.{ending}") as file:
            file.write(content.encode())


def _cells(rows: Sequence[Row], hidden: Collection[str]) -> list[list[str]]:
    """The headings, and below them the rows, as texts."""
    names = [name for name in rows[0] if name not in hidden]
    headings = {name: reduce(lambda text, part: text.replace(*part), SHORT.items(), name) for name in names}
    return [list(headings.values()), *([_cell(row[name], headings[name]) for name in names] for row in rows)]


def _cell(value: Any, heading: str) -> str:
    """A column whose heading ends in `%` is a share of 1."""
    if value is None:
        return "-"
    if heading.endswith("%"):
        return f"{100 * value:.0f}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


log = logging.getLogger(__name__)
SIDES = ("dense", "compressed")
SIZES = (Fraction(1), Fraction(12, 7), Fraction(16, 7))  # of the model's own input: 224, 384 and 512 pixels of 224
SHARES = (0.75, 0.5, 0.25)  # of the tokens, kept from the first compressed block on
ROWS = 13  # token counts of a kind of block
GONE = 0.1  # of the tokens, in the prices of reductions
PASSES = 3  # over the images, with loading, without, and without computing
EXPONENT = "images/s ~ ({axis})^{measured:+.2f}, by the FLOPs ^{ideal:+.2f} ({held})"
# What throughput goes with, and what is said of each where it is held.
AXES = {
    "input_size": "{input_size} pixels",
    "tokens_kept": "{kept_share:.0%} of the tokens",
    "batch_size": "batch {batch_size}",
}


@dataclass(frozen=True)
class Setting:
    """How rows are measured: at batch sizes, in precisions and modes (compiled or not), in so many timed rounds."""

    batch_sizes: Sequence[int]
    dtypes: Sequence[torch.dtype]
    modes: Sequence[bool]
    rounds: int
    device: torch.device


@dataclass(frozen=True)
class Subject:
    """The model that a benchmark is about, at an input size, rows and columns: built afresh for each measurement, with
    random weights.

    schedule: None where a benchmark has schedules of its own.
    """

    entry: ModelEntry
    input_size: models.Size
    schedule: Schedule | None
    granularity: int
    seed: int

    def dense(self) -> nn.Module:
        """The plain timm model; an InputSizeError where its patches do not tile the input."""
        torch.manual_seed(self.seed)
        return models.create(self.entry, self.input_size)

    def compressed(self) -> diffrate.CompressedModel:
        """The patched model, at the schedule if there is one, else searching."""
        model = diffrate.patch.vit(self.dense(), self.granularity, self.granularity)
        if self.schedule is not None:
            model.schedule = self.schedule
        return model

    def costs(self) -> tuple[int, int]:
        """Multiply-accumulates of an image, dense and compressed."""
        with shapes_alone():
            model = self.compressed()
        return model.flops_at(model.dense_schedule()), model.flops()


class Side(NamedTuple):
    """One of several that are timed in turn: what its row says of it, its multiply-accumulates, what runs it, and where
    there is a bound on its speed what runs that."""

    about: Row
    precision: str
    flops: float
    run: Run
    bound: Run | None = None


def build_side(side: str, subject: Subject, use: Use) -> Callable[[], Tensor]:
    """A forward pass on random images: `dense`, `compressed`, or `sliced` to the same counts."""
    model = subject.dense() if side == "dense" else subject.compressed()
    if side == SLICED:
        model.schedule = sliced(model.schedule)
    return forward_pass(model, subject.input_size, use)


# Linux reports the memory of each process here; elsewhere memory is measured on GPUs alone.
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_mib(build: Callable[..., Run], *arguments: Any, device: torch.device) -> float | None:
    """MiB that `build(*arguments)()` adds at its peak to what is there after `build`.

    In a fresh process, which `build` and its arguments reach by pickle: what an earlier run left to the allocator
    would hide the peak. None where the system does not report it.
    """
    if device.type != "cuda" and not os.access(RESET, os.W_OK):
        return None
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([build.__module__])  # imports take seconds: once for all processes
    with context.Pool(1) as pool:
        return pool.apply(_measure, (build, arguments, device)) / 2**20


def _measure(build: Callable[..., Run], arguments: tuple[Any, ...], device: torch.device) -> int:
    run = build(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident("VmRSS")
    RESET.write_text("5")  # the peak of resident memory starts over
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Resident memory of this process in bytes, now (`VmRSS`) or at its peak (`VmHWM`), without that of files: code
    that is read for the first time is not counted."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    own, files = (int(fields[field].split()[0]) for field in (name, "RssFile"))
    return 1024 * (own - files)


def rows_in_turn(sides: Sequence[Side], batch_size: int, setting: Setting) -> Iterator[Row]:
    """A row for each of the `sides`, all timed in turn, with their bounds; its speed-up is over the first of the same
    runtime."""
    runs = [run for side in sides for run in (side.run, side.bound) if run is not None]
    seconds = dict(zip(runs, time_in_turn(runs, setting.rounds, setting.device), strict=True))
    hidden = "dense_" if len(runs) > len(sides) else ("dense_", "bound_", "share_of_bound")
    for side in sides:
        base = next(other for other in sides if other.about.get("runtime") == side.about.get("runtime"))
        times = [seconds[run] for run in (base.run, side.run, side.bound) if run is not None]
        figures = asdict(speed_of(times, batch_size, side.precision, (base.flops, side.flops)))
        yield side.about | {
            name.removeprefix("compressed_"): x for name, x in figures.items() if not name.startswith(hidden)
        }


def speed_row(subject: Subject, times: Sequence[tuple[float, ...]], use: Use) -> Row:
    """The figures of seconds as for `speed_of`."""
    speed = speed_of(times, use.batch_size, precision_name(use.dtype), subject.costs())
    return {"model": subject.entry.name, "mode": mode_name(use.compiled), **asdict(speed)}


def speed_rows(subject: Subject, setting: Setting) -> Iterator[Row]:
    """A row for each precision, mode and batch size; memory is what a batch adds at its peak."""
    for dtype, compiled, batch_size in product(setting.dtypes, setting.modes, setting.batch_sizes):
        use = Use(batch_size, dtype, compiled, setting.device)
        memory = {f"{side}_memory_mib": memory_mib(build_side, side, subject, use, device=use.device) for side in SIDES}
        runs = [build_side(side, subject, use) for side in (*SIDES, SLICED)]
        yield speed_row(subject, time_in_turn(runs, setting.rounds, use.device), use) | memory


def scaling_rows(subject: Subject, sizes: Iterable[models.Size], setting: Setting) -> Iterator[Row]:
    """The rows for every one of the input `sizes` that the model allows, batch size, and share of tokens, in the first
    precision.

    `tokens_kept` of `tokens` go through the blocks after the first compressed one. `input_size` is the input's side, or
    that of a square of as many pixels.
    """
    for size in sizes:
        sized, side = replace(subject, input_size=size), round(math.sqrt(size[0] * size[1]))
        try:
            sized.dense()
        except models.InputSizeError as error:
            log.info("%d pixels left out: %s", side, error)
            continue
        for batch_size in setting.batch_sizes:
            use = Use(batch_size, setting.dtypes[0], False, setting.device)
            sides = [_side_of(sized, share, use) for share in (1.0, *SHARES)]
            for row in rows_in_turn(sides, batch_size, setting):
                yield {"model": subject.entry.name, "input_size": side} | row


def _side_of(subject: Subject, share: float, use: Use) -> Side:
    """The model with a share of its tokens; with all of them the plain one."""
    model = subject.compressed()
    space = model.compression.space
    model.schedule = schedule = share_schedule(space, share)
    about = {"tokens": space.tokens, "tokens_kept": schedule.merge[space.searchable[0]], "kept_share": share}
    run = forward_pass(subject.dense() if share == 1 else model, subject.input_size, use)
    return Side(about, precision_name(use.dtype), model.flops(), run)


def share_schedule(space: SearchSpace, share: float) -> Schedule:
    """`share` of the tokens from the first block that may reduce on, the others merged into them."""
    kept = max(1, round(share * space.tokens))
    choices = (space.tokens, kept) if space.prunes else (kept,)
    return space.schedule(choices * len(space.searchable))


def exponents(rows: Sequence[Row]) -> Iterator[Row]:
    """Images per second grow as an axis to the power `measured`, by the FLOPs to the power `ideal`, with the other two
    axes `held`: the slopes of logarithms, by least squares."""
    for axis in AXES:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            held = ", ".join(text.format_map(row) for name, text in AXES.items() if name != axis)
            groups.setdefault(held, []).append(row)
        # The speed-ups along the tokens kept do not depend on how the machine's pace changes between rows.
        paced = "speedup" if axis == "tokens_kept" else "images_per_second"
        for held, group in groups.items():
            if len({row[axis] for row in group}) > 1:
                along, speeds, costs = ([math.log(row[name]) for row in group] for name in (axis, paced, "gflops"))
                measured, ideal = linear_regression(along, speeds).slope, -linear_regression(along, costs).slope
                yield {"axis": axis.replace("_", " "), "measured": measured, "ideal": ideal, "held": held}


class File(NamedTuple):
    """An exported file that has been loaded, with the seconds that took and its size with all its parts."""

    path: Path
    loaded: Loaded
    seconds: float
    mib: float


def open_file(path: Path) -> File:
    """Load an exported file on as many threads as torch takes, and see how long that takes; an ExportError where it is
    none, or a package is missing."""
    import_module(target_of(path).runtime)  # not the file's to wait for
    start = time.perf_counter()
    loaded = load_exported(path, torch.get_num_threads())
    seconds = time.perf_counter() - start
    return File(path, loaded, seconds, sum(part.stat().st_size for part in parts_of(path)) / 2**20)


def file_rows(subject: Subject, files: Sequence[File], setting: Setting) -> Iterator[Row]:
    """For each batch size a row for the dense model and the one at the schedule, in each mode, and for each file;
    memory is what a batch adds at its peak. The bound of a file is a file, too."""
    with TemporaryDirectory() as folder:
        bounds = [_bound_of(file, subject, Path(folder)) for file in files]
        yield from _file_rows(subject, list(zip(files, bounds, strict=True)), setting)


def _bound_of(file: File, subject: Subject, folder: Path) -> Loaded | None:
    """The file of the same model, runtime and precision that loses as many tokens by slicing; None where it loses
    none."""
    said = file.loaded.metadata
    model = replace(subject, schedule=said.schedule).compressed()
    if said.schedule.merge == model.dense_schedule().merge:
        return None
    log.info("exporting the bound of %s", file.path.name)
    model.schedule = sliced(said.schedule)
    (dtype,) = (dtype for dtype in (torch.float32, *SHORT_NAMES) if precision_name(dtype) == said.precision)
    made = diffrate.export(model, folder / file.path.name, dtype=dtype)
    return load_exported(made.path, torch.get_num_threads())


def _file_rows(subject: Subject, files: Sequence[tuple[File, Loaded | None]], setting: Setting) -> Iterator[Row]:
    for batch_size in setting.batch_sizes:
        sides = []
        for compiled, (side, flops) in product(setting.modes, zip(SIDES, subject.costs(), strict=True)):
            of = (side, subject, Use(batch_size, torch.float32, compiled, setting.device))
            memory = memory_mib(build_side, *of, device=setting.device)
            about = {"subject": f"{side} model", "runtime": mode_name(compiled), "file_mib": None, "load_seconds": None}
            bound = build_side(SLICED, *of[1:]) if side == "compressed" else None
            sides.append(Side(about | {"memory_mib": memory}, "float32", flops, build_side(*of), bound))
        for file, bounded in files:
            said, name, runtime = file.loaded.metadata, file.path.name, target_of(file.path).runtime
            of = (file.path, batch_size, torch.get_num_threads())
            memory = memory_mib(build_file, *of, device=torch.device("cpu"))
            about = {"subject": name, "runtime": runtime, "file_mib": file.mib, "load_seconds": file.seconds}
            run, bound = _runner(file.loaded, batch_size), bounded and _runner(bounded, batch_size)
            sides.append(Side(about | {"memory_mib": memory}, said.precision, 1e9 * said.gflops, run, bound))
        yield from rows_in_turn(sides, batch_size, setting)


def build_file(path: Path, batch_size: int, threads: int) -> Callable[[], Tensor]:
    """What runs an exported file on random images."""
    return _runner(load_exported(path, threads), batch_size)


def _runner(loaded: Loaded, batch_size: int) -> Callable[[], Tensor]:
    images = torch.rand(batch_size, *loaded.metadata.input_size)
    return lambda: loaded.logits(images)


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

    def compute(batches: Iterable[Tensor]) -> None:
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
