"""`--resume`: which checkpoint it names, whether that is this run's, and the schedule of a searched one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffrate
import models
from cli.recipe import PAPER
from cli.runtime import Runtime
from cli.schedules import fit_tokens
from cli.settings import Settings, declared, dest_of
from diffrate.budget import LATENCY, SPEEDUP, Target
from diffrate.searching.checkpoint import read_checkpoint, searched_schedule
from diffrate.searching.settings import FLAGS, OPTIONS, flag_of
from engine import LAST, digest, read_training
from models.zoo import ModelEntry
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


def resume_path(settings: Settings, runtime: Runtime) -> Path | None:
    """The checkpoint that `--resume` names; for `auto` the output folder's, None while there is none."""
    resume = settings.run.resume
    if resume is None:
        return None
    if resume != AUTO:
        return Path(resume)
    if runtime.output_dir is None:
        raise UsageError("--resume auto needs --output_dir")
    path = runtime.output_dir / LAST
    return path if path.exists() else None


def search_identity(settings: Settings, entry: ModelEntry, target: Target, batch_size: int) -> dict[str, Any]:
    """The flags that decide how a search goes on: with other values, it is another search."""
    search, use = settings.search, settings.latency
    speed = {"latency_batch": use.batch_size, "latency_precision": use.precision, "compile": use.compile}
    saved = {FLAGS[name].removeprefix("--"): value for name, value in search.record().items() if name in FLAGS}
    return {
        "model": entry.name,
        "target_flops": target.gflops,
        **{kind: target.value if target.kind == kind else None for kind in (SPEEDUP, LATENCY)},
        **(speed if target.timed else {}),
        **saved,
        "batch-size": batch_size,
        "search": search.method,
        "search_transform": settings.recipe.transform,
        "exif": settings.data.exif,
    }


def check_search(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another search than that of `identity`.

    Raises:
        UsageError: names the flag that differs; or the file is missing, damaged, or of another kind.
    """
    content = _read_search(path)
    _check(path, content, identity)
    log.info("going on from %s at epoch %d, step %d", path, content["epoch"], content["step"])


def training_flags(
    settings: Settings,
    entry: ModelEntry,
    model: diffrate.CompressedModel,
    steps: int,
    teacher: diffrate.CompressedModel | None = None,
) -> dict[str, Any]:
    """The flags that decide how a training goes on, its kept counts and updates an epoch, for its checkpoint.

    With a teacher, the weights that it started from, too: it is made of them again.
    """
    flags = {name: value for name, value in settings.run.flags.items() if name in HELD}
    kept = [list(counts or ()) for counts in model.get_kept_num()]
    started = {} if teacher is None else {STARTED: digest(teacher)}
    identity = {"model": entry.name, "batch-size": settings.data.batch_size, KEPT: kept, STEPS: steps}
    return flags | identity | started


def check_training(path: Path, flags: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another training than that of `flags`.

    Raises:
        UsageError: as `check_search`.
    """
    _check(path, read_training(path), flags)


def use_searched(model: diffrate.CompressedModel, settings: Settings, entry: ModelEntry, runtime: Runtime) -> None:
    """Give `model` the schedule of the search that `--resume` names, if it names one.

    Raises:
        UsageError: there is none, or it is damaged or of another model.
    """
    if settings.run.resume is None:
        return
    path = resume_path(settings, runtime)
    if path is None:
        raise UsageError(f"--resume auto: no {LAST} in --output_dir {runtime.output_dir}")
    content = _read_search(path)
    _check(path, content, {"model": entry.name})
    schedule = searched_schedule(path)
    if schedule.tokens is None and not settings.model.scale:  # older files do not say it
        _check(path, content, {"input_size": settings.run.flags["input_size"]})
    if settings.model.scale:
        schedule = fit_tokens(schedule, model)
    model.check(schedule, f"--resume {path}: ")
    model.schedule = schedule


def _read_search(path: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(path)
    except diffrate.SearchCheckpointError as error:
        raise UsageError(f"--resume {error}") from error


def _check(path: Path, content: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = content.get("flags", {})
    for name, value in expected.items():
        parsed = dest_of(name)
        made = found.get(name, found.get(parsed, EARLIER.get(parsed)))
        if made != value and not (name == "model" and _same_model(str(made), value)):
            called = name if name in (KEPT, STEPS, STARTED) else f"--{name}"
            raise UsageError(f"--resume {path}: was made with {called} {made}; accepted: {value}, as in this run")


def _same_model(made: str, name: str) -> bool:
    """Whether two names differ in a pretrained tag that one of them does not say."""
    bare = models.bare_name(name)
    return models.bare_name(made) == bare and bare in (made, name)
