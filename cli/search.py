"""No mode flag: search the kept counts for each target in turn; and `--sensitivity`, what each block can lose alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import diffrate
from benchmarks.speed import table
from cli.data import (
    calibration_dataset,
    check_same_classes,
    eval_dataset,
    eval_loader,
    input_size_of,
    part_loader,
    search_dataset,
    train_loader,
    warn_of_turned,
)
from cli.model import (
    Weights,
    check_choices,
    checked_plan,
    chosen_entry,
    for_inference,
    output_names,
    patched,
    plain_model,
    read_weights,
    trained_model,
)
from cli.recipe import with_recipe
from cli.results import log_found, save_model, save_schedules
from cli.resume import check_search, resume_path, search_identity
from cli.runtime import SENSITIVITY, Progress, Runtime
from cli.schedules import budgets_of, kept_as, start_schedule
from cli.settings import OFFICIAL, Settings
from datasets import DataError, ImageLoader, LabelledDataset, has_validation
from diffrate.budget import Budget, Target
from diffrate.searching.calibration import images_that_fit
from diffrate.searching.settings import GRADIENT, SearchSettings
from diffrate.searching.teacher import losses_at
from engine import LAST, Reporter, build_criterion, build_mixup, evaluate, log_calibrated
from models import entry_of
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL
from utils import StopSignals, UsageError

PART = 512  # images
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Searched:
    """A plain model with its weights, the settings with its recipe, and loaders.

    val: None where nothing can be scored. part: a part of the images, as in evaluation, to compare outputs with the
    dense ones on; calibration: more of them.
    """

    settings: Settings
    entry: ModelEntry
    model: nn.Module
    classes: Sequence[str] | None
    train: ImageLoader
    val: ImageLoader | None
    part: ImageLoader
    calibration: ImageLoader


def run(settings: Settings, runtime: Runtime) -> None:
    """Search, and leave schedules, checkpoints and plots in the output folder."""
    searched = _searched(settings, runtime)
    batches, accumulate = len(searched.train), settings.search.accumulate
    if accumulate > batches:
        raise UsageError(f"--accum-steps {accumulate}: accepted: up to {batches}, the batches of an epoch")
    model = patched(searched.model, settings.model).to(runtime.device)
    check_choices(settings.model, model)
    budgets, table = budgets_of(settings, model, runtime)
    for number, (target, budget) in enumerate(budgets.items(), start=1):
        # Several targets have a folder each for their checkpoints, and one file for their schedules.
        folder = f"{target.kind if target.timed else 'target'}_{target}"
        inner = runtime.inside(folder) if len(budgets) > 1 else runtime
        # A huge model needs no second copy for the last.
        one = model if number == len(budgets) else copy.deepcopy(model)
        _search_one(target, budget, table, searched, one, runtime, inner)


def _searched(settings: Settings, runtime: Runtime) -> Searched:
    """The model that the flags name, and its data, as its recipe asks for them.

    Raises:
        CheckpointError, DataError, ScheduleError, UsageError: one of them is not there or does not fit.
    """
    entry = chosen_entry(settings.model)
    settings = with_recipe(settings, entry)
    dropping = {"drop_path_rate": settings.model.drop_path}
    val: LabelledDataset | None
    if settings.search.labelled:
        trained = trained_model(settings, runtime, **dropping)
        model, weights, val = trained.model, trained.weights, trained.val
        outputs = weights.head or len(val.classes)
    else:
        plan = checked_plan(settings, entry)
        if settings.data.path is None and entry.name != SAMPLE_MODEL:
            raise UsageError(f"--data-path is needed: the digits that ship do not fit {entry.name}")
        weights = read_weights(settings.model, plan, runtime)
        val = _validation(settings, entry, weights)
        fresh = entry.num_classes if val is None else len(val.classes)
        outputs = fresh if weights.state is None else weights.head or 0
        model = plain_model(settings.model, entry, weights, outputs, **dropping)
    train, plain = (
        search_dataset(settings, entry, weights.head, weights.classes, augmented) for augmented in (True, False)
    )
    if settings.search.labelled and val is not None:
        check_same_classes(train, val)
    warn_of_turned(settings, runtime, train, val)
    pixels = 3 * math.prod(input_size_of(settings.model, entry))
    return Searched(
        settings,
        entry,
        model,
        weights.classes if val is None else output_names(val, outputs, weights),
        train_loader(train, settings, runtime),
        None if val is None else eval_loader(val, settings, runtime),
        part_loader(plain, PART, settings, runtime),
        part_loader(plain, images_that_fit(pixels, settings.search.images), settings, runtime),
    )


def _validation(settings: Settings, entry: ModelEntry, weights: Weights) -> LabelledDataset | None:
    """The validation split, where there is one whose classes are the model's."""
    headless = entry.num_classes == 0 if weights.state is None else weights.headless
    if headless or not has_validation(settings.data.data_set, settings.data.path):
        return None
    try:
        return eval_dataset(settings, entry, weights.head, weights.classes)
    except DataError as error:
        log.info("no accuracy: %s", error)
        return None


def _search_one(
    target: Target,
    budget: Budget,
    table: diffrate.LatencyTable | None,
    searched: Searched,
    model: diffrate.CompressedModel,
    runtime: Runtime,
    inner: Runtime,
) -> None:
    """The search for one target, from its checkpoint if there is one, and what it leaves behind."""
    settings, entry = searched.settings, searched.entry
    assert searched.train.batch_size is not None
    identity = search_identity(settings, entry, target, searched.train.batch_size)
    resume = resume_path(settings, inner)
    if resume is not None:
        check_search(resume, identity)
    options = replace(
        _options(searched, model, resume is None),
        **{target.kind: target.value},
        latency=table,
        notes={"flags": {**settings.run.flags, **identity}},
    )
    assert inner.output_dir is not None, "flags make sure of a folder"
    last = inner.output_dir / LAST
    begun = _changed(last)

    def late() -> str:
        saved = resume is not None or _changed(last) != begun
        return "stopped: go on with --resume" if saved else "stopped, before anything was saved"

    with StopSignals(late) as signals:
        reporter = Reporter(model, options, budget, searched.train, searched.val, inner, signals)
        found = diffrate.search(
            model,
            searched.train,
            settings=options,
            # The paper's recipe takes the best epoch; without labels the search uses the images alone.
            val=searched.val if options.labelled else None,
            callback=reporter,
            trials=reporter,
            precision=inner.amp or torch.float32,
            checkpoint=last,
            save_every=inner.print_freq,
            resume=resume,
        )
    kept = kept_as(target, model, found.schedule)
    file = save_schedules(settings, entry, kept, found.schedule, runtime)
    scores = _scores(model, found, searched, inner)
    apart = None if found.calibrated is None else log_calibrated(found.calibrated, inner)
    if not options.labelled and (found.calibrated is None or found.schedule != found.calibrated.schedule):
        apart = losses_at(model, [found.schedule], searched.part, inner.amp, options.multi_label)[0]
    save_model(settings, entry, model, searched.classes, runtime)
    log_found(settings, entry, kept, budget, model, found, scores, file, runtime, apart)


def _changed(path: Path) -> int | None:
    """When the file was written, None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _options(searched: Searched, model: diffrate.CompressedModel, fresh: bool) -> SearchSettings:
    """The options of the flags, as they apply to `model` and its images; `fresh` is a search that is not resumed."""
    settings, search = searched.settings, searched.settings.search
    softmax = not search.multi_label and model.num_classes != 1
    start = None
    if fresh and search.method == GRADIENT:
        start = start_schedule(settings.model, searched.entry, model)
    return replace(
        search,
        calibration=searched.calibration,
        criterion=build_criterion(settings.mixing) if search.labelled and softmax else None,
        mixup=build_mixup(settings.mixing, model.num_classes),
        start=None if start is None else start.schedule,
    )


def _scores(
    model: diffrate.CompressedModel, found: diffrate.Found, searched: Searched, runtime: Runtime
) -> tuple[diffrate.Scores, diffrate.Scores] | None:
    """At the schedule found, at which the model is left, and with all tokens; None where there is nothing to score."""
    val, multi_label = searched.val, searched.settings.search.multi_label
    if val is None:
        return None
    scores = found.scores or evaluate(model, val, runtime, multi_label=multi_label)
    dense = model.dense_schedule()
    model.schedule = dense
    whole = evaluate(model, val, runtime, multi_label=multi_label)
    model.schedule = found.schedule
    return scores, whole


def run_sensitivity(settings: Settings, runtime: Runtime) -> None:
    """Measure, and leave a table in the log and a record of each reduction in the output folder.

    Raises:
        CheckpointError, DataError, UsageError: the model, its weights or the images are missing or do not fit.
        NonFiniteLossError: a loss is not finite.
    """
    images = settings.run.sensitivity
    assert images is not None, "the mode that is asked for"
    entry = chosen_entry(settings.model)
    plan = checked_plan(settings, entry)
    dataset = calibration_dataset(settings, entry, images)  # before anything is downloaded
    warn_of_turned(settings, runtime, dataset)
    if settings.model.checkpoint == OFFICIAL:
        _check_digits(settings, entry, entry.num_classes)
    weights = read_weights(settings.model, plan, runtime)
    _check_digits(settings, entry, entry.num_classes if weights.state is None else weights.head)
    model = patched(plain_model(settings.model, entry, weights, entry.num_classes), settings.model)
    running, inside = for_inference(model, False, settings.data.batch_size, runtime)
    assert isinstance(running, diffrate.CompressedModel), "it was not compiled"
    loader = eval_loader(dataset, settings, inside)
    blocks = len(running.compression.space.searchable)
    progress = Progress(len(loader) * blocks, "Sensitivity", len(dataset), inside)
    found = diffrate.sensitivity(
        running,
        loader,
        multi_label=settings.model.multi_label,
        device=inside.device,
        precision=inside.amp,
        callback=lambda block: progress.advance(lambda: f"block {block}"),
    )
    for one in found:
        runtime.append({"model": entry.name, **one.record()}, SENSITIVITY)
    rows = []
    for one in found:
        row = {"block": one.block, "kind": one.kind, "tokens": one.kept, "kept %": one.share, "loss": f"{one.loss:.2e}"}
        rows.append(row if one.agreement is None else row | {"top-1 as dense, %": one.agreement})
    for line in table(rows):
        log.info(line)


def _check_digits(settings: Settings, entry: ModelEntry, head: int | None) -> None:
    """Refuse the digits that ship for a model with another `head`, which was never shown any.

    Raises:
        UsageError: it has no data of its own.
    """
    if settings.data.path is None and entry.name != SAMPLE_MODEL and head != entry_of(SAMPLE_MODEL).num_classes:
        raise UsageError(
            f"--data-path is needed: the digits that ship do not fit {entry.name}; accepted: a folder of images"
        )
