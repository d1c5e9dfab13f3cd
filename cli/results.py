"""What a run leaves behind: scores in the log, schedules in files, the next command to type. And going on from it:
which checkpoint `--resume` names, whether that is this run's, and the schedule of a searched one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import diffrate
import models
from cli.runtime import RATES, Runtime
from cli.schedules import PROJECT_RATES, fit_tokens
from cli.settings import OFFICIAL, PAPER, Settings, declared, dest_of, size_words
from diffrate import CompressedModel, Scores
from diffrate.budget import LATENCY, SPEEDUP, Target
from diffrate.schedule import Schedule, fields_of, save_schedule
from diffrate.searching.checkpoint import read_checkpoint, searched_schedule
from diffrate.searching.settings import FLAGS, OPTIONS, flag_of
from engine import LAST, digest
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

AUTO = "auto"
# No flags, but what several come to.
KEPT, STEPS, STARTED = "kept counts", "updates an epoch", "starting weights"
OF_A_TRAINING = ("epochs", "granularity", "seed")  # too, of the options of a search
# The flags that a training goes on with, of those that are not told by what they come to.
HELD = {
    dest_of(flag_of(item))
    for item in declared()
    if item.metadata["saved"] and (item.name in OF_A_TRAINING or OPTIONS.get(item.name) is not item)
}
# The flags from before there was a choice.
EARLIER = {dest_of(flag): OPTIONS[name].default for name, flag in FLAGS.items()}
EARLIER |= {"search_transform": PAPER.transform, "exif": False}
log = logging.getLogger(__name__)


def report(mode: str, entry: ModelEntry, compressed: CompressedModel, scores: Scores, runtime: Runtime) -> None:
    """Record the scores of a model at its kept counts, and log the published closing line."""
    runtime.record(record_of(mode, entry, compressed, compressed.compression.current(), scores))
    log.info(scores.line(compressed.flops()))


def save_model(
    settings: Settings, entry: ModelEntry, compressed: CompressedModel, classes: Sequence[str] | None, runtime: Runtime
) -> None:
    """Leave the model where `--save` says, if it says so; main process only."""
    path = settings.run.save
    if path is not None and runtime.processes.is_main:
        if settings.data.crop_pct is not None:  # what its scores were measured at
            compressed.pretrained_cfg["crop_pct"] = settings.data.crop_pct
        diffrate.save(compressed, path, name=entry.name, classes=classes)
        log.info("saved %s: %.3f GFLOPs", path, compressed.flops() / 1e9)


def save_schedules(
    settings: Settings, entry: ModelEntry, target: float, schedule: Schedule, runtime: Runtime
) -> Path | None:
    """Add a schedule to `compression_rate.json` in the output folder, and to the project's when asked.

    Gives the file to load it from, None where it was not saved. Main process only."""
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
        words += [f"--model {quote(str(name))}", *data, f"--checkpoint {quote(settings.model.checkpoint)}"]
    if settings.model.text_head is not None:
        words.append(f"--text-head {quote(str(settings.model.text_head))}")
    if settings.model.input_size is not None:
        words.append(f"--input-size {size_words(settings.model.input_size)}")
    return " ".join(words)


def resume_path(settings: Settings, runtime: Runtime) -> Path | None:
    """The checkpoint that `--resume` names; for `auto` the output folder's, None while there is none."""
    resume = settings.run.resume
    if resume != AUTO:
        return None if resume is None else Path(resume)
    if runtime.output_dir is None:
        raise UsageError("--resume auto needs --output_dir")
    path = runtime.output_dir / LAST
    return path if path.exists() else None


def search_identity(settings: Settings, entry: ModelEntry, target: Target, batch_size: int) -> dict[str, Any]:
    """The flags that decide how a search goes on: with other values, it is another search."""
    search, use = settings.search, settings.latency
    speed = {"latency_batch": use.batch_size, "latency_precision": use.precision, "compile": use.compile}
    return {
        "model": entry.name,
        "target_flops": target.gflops,
        **{kind: target.value if target.kind == kind else None for kind in (SPEEDUP, LATENCY)},
        **(speed if target.timed else {}),
        **{FLAGS[name].removeprefix("--"): value for name, value in search.record().items() if name in FLAGS},
        "batch-size": batch_size,
        "search": search.method,
        "search_transform": settings.recipe.transform,
        "exif": settings.data.exif,
        "text-head": settings.run.flags["text_head"],
    }


def training_flags(
    settings: Settings, entry: ModelEntry, model: CompressedModel, steps: int, teacher: CompressedModel | None
) -> dict[str, Any]:
    """The flags that decide how a training goes on, its kept counts and updates an epoch, for its checkpoint.

    With a teacher, the weights that it started from, too: it is made of them again.
    """
    flags = {name: value for name, value in settings.run.flags.items() if name in HELD}
    kept = [list(counts or ()) for counts in model.get_kept_num()]
    flags |= {"model": entry.name, "batch-size": settings.data.batch_size, KEPT: kept, STEPS: steps}
    return flags if teacher is None else flags | {STARTED: digest(teacher)}


def use_searched(model: CompressedModel, settings: Settings, entry: ModelEntry, runtime: Runtime) -> None:
    """Give `model` the schedule of the search that `--resume` names, if it names one.

    Raises:
        UsageError: there is none, or it is damaged or of another model.
    """
    if settings.run.resume is None:
        return
    path = resume_path(settings, runtime)
    if path is None:
        raise UsageError(f"--resume auto: no {LAST} in --output_dir {runtime.output_dir}")
    content = read_search(path)
    check_flags(path, content, {"model": entry.name})
    schedule = searched_schedule(path)
    if settings.model.scale:
        schedule = fit_tokens(schedule, model)
    elif schedule.tokens is None:  # older files do not say it
        check_flags(path, content, {"input_size": settings.run.flags["input_size"]})
    model.check(schedule, f"--resume {path}: ")
    model.schedule = schedule


def read_search(path: Path) -> dict[str, Any]:
    """The content of a search's checkpoint.

    Raises:
        UsageError: the file is missing, damaged, or of another kind.
    """
    try:
        return read_checkpoint(path)
    except diffrate.SearchCheckpointError as error:
        raise UsageError(f"--resume {error}") from error


def check_flags(path: Path, content: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another run than that of the flags `expected`.

    Raises:
        UsageError: names the flag that differs.
    """
    found = content.get("flags", {})
    for name, value in expected.items():
        parsed = dest_of(name)
        made = found.get(name, found.get(parsed, EARLIER.get(parsed)))
        if made == value:
            continue
        if name == "model":  # the same where one of the two names does not say the pretrained tag of the other
            bare = models.bare_name(value)
            if models.bare_name(str(made)) == bare and bare in (made, value):
                continue
        called = name if name in (KEPT, STEPS, STARTED) else f"--{name}"
        raise UsageError(f"--resume {path}: was made with {called} {made}; accepted: {value}, as in this run")
