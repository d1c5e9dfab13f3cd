"""From flags to schedules of a file, to targets, and to the latency table that targets in seconds need."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import diffrate
import models
from cli.runtime import AMP_DTYPES, Runtime, share
from cli.settings import PROJECT, LatencySettings, ModelSettings, Settings
from diffrate.budget import FLOPS, Budget, Target
from diffrate.device import shapes_alone
from diffrate.latency.measure import SECONDS
from diffrate.latency.table import setting_of
from diffrate.schedule import Schedule, find_schedule, read_schedules, scale_schedule
from diffrate.searching.checkpoint import budget_of
from diffrate.timing import Use
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

PROJECT_RATES = PROJECT / "compression_rate.json"
TARGET_OF_SAMPLE = Target(FLOPS, 0.0242 * 1e9)  # half of the sample model's
DIGITS = 4  # of a share's GFLOPs, the name of its schedule
log = logging.getLogger(__name__)


def chosen_schedule(settings: ModelSettings, entry: ModelEntry, model: diffrate.CompressedModel) -> Schedule | None:
    """The schedule that the flags name for `model`, None for none; raises as `schedule_at`."""
    if not settings.load:
        return None
    target = settings.targets[0] if settings.targets else None
    if target is None and entry.name == SAMPLE_MODEL and settings.rate_file is None:
        target = TARGET_OF_SAMPLE
    return schedule_at(target, "--target_flops", settings, entry, model)


def schedule_at(
    target: Target | None, flag: str, settings: ModelSettings, entry: ModelEntry, model: diffrate.CompressedModel
) -> Schedule:
    """The schedule in the rate file for `target`, which `flag` gave; scaled to the tokens of `model` if asked for.

    Raises:
        ScheduleError: no such schedule, a malformed one, or one that does not fit.
    """
    file, space = settings.rate_file or PROJECT_RATES, model.compression.space
    schedule = find_schedule(file, entry.schedule_key, None if target is None else gflops_of(target, model), flag)
    if schedule.tokens is None and _tokens_of(schedule) != space.limits[0]:
        # The published file and those of earlier versions do not say it: they are for the model's own input size.
        with shapes_alone():
            own = diffrate.patch.vit(models.create(models.ZOO.get(entry.name, entry)))
        schedule = replace(schedule, tokens=own.compression.space.limits[0])
    if settings.scale:
        schedule = fit_tokens(schedule, model)
    model.check(schedule, f"{file}: {entry.schedule_key}: ")
    return schedule


def _tokens_of(schedule: Schedule) -> int:
    """The input tokens that a schedule is for; where it does not say so, the most that a block keeps."""
    return schedule.tokens or max((*schedule.merge, *(schedule.prune or ())), default=0)


def schedules_that_fit(settings: ModelSettings, entry: ModelEntry, model: diffrate.CompressedModel) -> list[Schedule]:
    """All schedules of the file for a model of as many tokens and blocks as `model`; none where it has none."""
    file, found = settings.rate_file or PROJECT_RATES, []
    for target in read_schedules(file).get(entry.schedule_key, {}):
        with suppress(diffrate.ScheduleError, ValueError):  # made for another input, or under a name of its own
            schedule = find_schedule(file, entry.schedule_key, float(target))
            model.check(schedule)
            if _tokens_of(schedule) == model.compression.space.limits[0]:
                found.append(schedule)
    return found


def gflops_of(target: Target, model: diffrate.CompressedModel) -> float:
    """A target in GFLOPs; a share is rounded to the digits that name its schedule in files."""
    if target.gflops is not None:
        return target.gflops
    dense = model.flops_at(model.dense_schedule()) / 1e9
    gflops = target.value * dense
    rounded = float(f"{gflops:.{DIGITS}g}")
    if rounded <= dense:
        return rounded
    step = 10.0 ** (math.floor(math.log10(gflops)) + 1 - DIGITS)
    return float(f"{rounded - step:.{DIGITS}g}")  # 100 % rounded up is more than there is


def fit_tokens(schedule: Schedule, model: diffrate.CompressedModel) -> Schedule:
    """`schedule` scaled to the tokens of `model`, where it was made for another number."""
    space, blocks = model.compression.space, len(model.compressible_blocks())
    counts = (schedule.merge, schedule.prune or schedule.merge)
    if schedule.tokens in (None, space.limits[0]) or any(len(row) != len(space.limits) for row in counts):
        return schedule
    # The blocks that are never compressed keep all of their tokens.
    limits = (schedule.tokens,) * blocks + schedule.merge[blocks:]
    return scale_schedule(schedule, limits, space.limits, space.prefix, space.least)


def latency_table(
    settings: LatencySettings, model: diffrate.CompressedModel, runtime: Runtime, targets: Iterable[Target] = ()
) -> diffrate.LatencyTable:
    """The seconds of `model` at any schedule, used as the flags say; `targets` are checked before it is measured."""
    dtype = AMP_DTYPES[settings.precision] or runtime.dtype
    use = Use(settings.batch_size, dtype, settings.compile, runtime.device)
    setting = setting_of(model, use)
    file = settings.file or _cache_file(setting)
    log.info("latency: of %s on %s, kept in %s", use.words(), setting["machine"], file or "no file")
    with share("Latency", SECONDS, runtime) as advance:
        return diffrate.measure_latency(
            model,
            use.batch_size,
            dtype,
            device=use.device,
            compile=use.compiled,
            file=file,
            progress=advance,
            targets=targets,
        )


def _cache_file(setting: dict[str, object]) -> Path | None:
    """The file of a table in the user's cache; None where nothing can be written there."""
    name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffrate" / "latency"
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):  # the user has no home, or may not write there
        return None
    return folder / f"{name}.json" if os.access(folder, os.W_OK) else None


def budgets_of(
    settings: Settings, model: diffrate.CompressedModel, runtime: Runtime
) -> tuple[dict[Target, Budget], diffrate.LatencyTable | None]:
    """The budget of each target for `model`, and the latency table where a target is in seconds.

    Raises:
        BudgetError: a target is out of reach; gives the range that is in reach.
        UsageError: two targets come to the same.
    """
    asked = settings.model.targets or (TARGET_OF_SAMPLE,)
    targets = [target if target.timed else Target(FLOPS, gflops_of(target, model) * 1e9) for target in asked]
    if len(set(targets)) < len(targets):
        raise UsageError(f"--target_flops {' '.join(map(str, asked))}: accepted: each once")
    timed = any(target.timed for target in targets)
    table = latency_table(settings.latency, model, runtime, targets) if timed else None
    budgets = {target: budget_of(model, target, table) for target in targets}
    for budget in budgets.values():
        budget.check(model.compression.space.every_block())
    return budgets, table


def kept_as(target: Target, model: diffrate.CompressedModel, schedule: diffrate.Schedule) -> float:
    """The GFLOPs by which files name the schedule of a target: the target's, or for seconds those of the schedule."""
    return target.gflops or float(f"{model.flops_at(schedule) / 1e9:.{DIGITS}g}")
