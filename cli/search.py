"""No mode flag: search the kept counts for each target in turn; and `--sensitivity`, what each block can lose alone."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

import diffrate
from benchmarks.speed import table as table_of
from cli import data, results
from cli.flags import parse_flags
from cli.model import (
    chosen_entry,
    for_inference,
    output_names,
    patched,
    plain_model,
    planned,
    read_weights,
    trained_model,
)
from cli.runtime import FOUND, SENSITIVITY, Progress, Runtime
from cli.schedules import budgets_of, kept_as, schedule_at
from cli.settings import OFFICIAL, PAPER, RecipeSettings, Settings
from datasets import ImageLoader
from diffrate import CompressedModel, Found, LatencyTable
from diffrate.budget import Budget, Target, uniform_schedules
from diffrate.schedule import GRANULARITY, PUBLISHED, fields_of
from diffrate.searching.calibration import images_that_fit
from diffrate.searching.settings import CALIBRATED, GRADIENT, SearchSettings, flag_of
from diffrate.searching.teacher import losses_at
from engine import LAST, Reporter, build_criterion, build_mixup, evaluate, log_calibrated, log_counts
from models import entry_of
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL
from utils import StopSignals, UsageError, make_output_dir

PART = 512  # images
# Of models that the paper has no recipe for.
OTHERS = RecipeSettings(loss="distill", transform="eval", budget="held", method=CALIBRATED)
log = logging.getLogger(__name__)


class Searched(NamedTuple):
    """A model ready to search, the settings with its recipe, and loaders.

    val: None where nothing can be scored. part: a part of the images, as in evaluation, to compare outputs with the
    dense ones on; calibration: more of them.
    """

    settings: Settings
    entry: ModelEntry
    model: CompressedModel
    classes: Sequence[str] | None
    train: ImageLoader
    val: ImageLoader | None
    part: ImageLoader
    calibration: ImageLoader


def run(settings: Settings, runtime: Runtime) -> None:
    """Search, and leave schedules, checkpoints and plots in the output folder."""
    searched = _searched(settings, runtime)
    batches, accumulate, model = len(searched.train), settings.search.accumulate, searched.model.to(runtime.device)
    if accumulate > batches:
        raise UsageError(f"--accum-steps {accumulate}: accepted: up to {batches}, the batches of an epoch")
    budgets, table = budgets_of(settings, model, runtime)
    output_dir = runtime.output_dir
    assert output_dir is not None, "flags make sure of a folder"
    for number, (target, budget) in enumerate(budgets.items(), start=1):
        # Several targets have a folder each for their checkpoints, and one file for their schedules.
        folder = f"{target.kind if target.timed else 'target'}_{target}"
        inner = replace(runtime, output_dir=make_output_dir(output_dir / folder)) if len(budgets) > 1 else runtime
        # A huge model needs no second copy for the last.
        one = searched._replace(model=model if number == len(budgets) else copy.deepcopy(model))
        found = _search_one(target, budget, table, one, inner)
        _leave(target, budget, found, one, runtime, inner)


def _searched(settings: Settings, runtime: Runtime) -> Searched:
    """The model that the flags name, and its data, as its recipe asks for them."""
    entry = chosen_entry(settings.model)
    settings = with_recipe(settings, entry)
    labelled, dropping = settings.search.labelled, settings.model.drop_path
    _, plain, weights, val = trained_model(settings, runtime, entry, labelled, drop_path_rate=dropping)
    train, unchanged = (
        data.search_dataset(settings, entry, weights.head, weights.classes, augmented) for augmented in (True, False)
    )
    if labelled and val is not None:
        data.check_same_classes(train, val)
    data.warn_of_turned(settings, runtime, train, val)
    model = patched(plain, settings.model)
    settings = _with_choices(settings, model.compression.patches - 1)
    pixels = 3 * math.prod(data.input_size_of(settings.model, entry))
    return Searched(
        settings,
        entry,
        model,
        weights.classes if val is None else output_names(val, model.num_classes, weights),
        data.train_loader(train, settings, runtime),
        None if val is None else data.eval_loader(val, settings, runtime),
        data.part_loader(unchanged, PART, settings, runtime),
        data.part_loader(unchanged, images_that_fit(pixels, settings.search.images), settings, runtime),
    )


def _with_choices(settings: Settings, most: int) -> Settings:
    """Lower the default granularity to `most`, so that each count has two candidates; refuse any other above it."""
    if (asked := settings.model.granularity) <= most:
        return settings
    if asked != GRANULARITY or most < 1:
        raise UsageError(f"--granularity {asked}: accepted: from 1 to {most}")
    log.info("granularity %d: the usual %d leaves %d patches no choice", most, asked, most + 1)
    return replace(settings, search=replace(settings.search, granularity=most))


def with_recipe(settings: Settings, entry: ModelEntry) -> Settings:
    """`settings` with what the flags leave open of a search as the model has it.

    Images as in evaluation come once each, and are neither augmented nor mixed.

    Raises:
        UsageError: images that are mixed in pairs, and batches of no pairs; an augmentation that no image would have.
    """
    # What is to meet a time has no recipe in the paper.
    timed = any(target.timed for target in settings.model.targets)
    asked, usual = settings.recipe, PAPER if entry.published and not timed else OTHERS
    recipe = replace(usual, **{name: value for name, value in vars(asked).items() if value is not None})
    if recipe.method == CALIBRATED and asked.loss == SearchSettings.loss:
        raise UsageError("--search_loss labels goes with --search gradient; hard counts are held to no labels")
    augmentation, mixing = settings.augmentation, settings.mixing
    if recipe.transform == "eval":
        _refuse_augmentation(settings)
        augmentation, mixing = replace(augmentation, repeated=False), replace(mixing, mixup=0.0, cutmix=0.0)
    if mixing.mixes and settings.data.batch_size % 2:
        raise UsageError(f"--batch-size {settings.data.batch_size}: accepted: an even number with --mixup or --cutmix")
    rule = settings.search.rule or (PUBLISHED if entry.published else None)
    search = replace(settings.search, loss=recipe.loss, budget=recipe.budget, method=recipe.method, rule=rule)
    return replace(settings, recipe=recipe, search=search, augmentation=augmentation, mixing=mixing)


def _refuse_augmentation(settings: Settings) -> None:
    """Refuse flags that say how images are augmented or mixed, where none are. Labels may be smoothed all the same."""
    usual = parse_flags(())  # the sample has defaults of its own
    for part, other in ((settings.augmentation, usual.augmentation), (settings.mixing, usual.mixing)):
        for item in fields(part):
            value, defaults = getattr(part, item.name), (item.default, getattr(other, item.name))
            if value and value not in defaults and item.name != "smoothing":
                raise UsageError(f"{flag_of(item)}: found --search_transform eval; accepted: --search_transform train")


def _search_one(
    target: Target, budget: Budget, table: LatencyTable | None, searched: Searched, runtime: Runtime
) -> Found:
    """The search for one target, from its checkpoint if there is one."""
    settings, train = searched.settings, searched.train
    assert train.batch_size is not None
    assert runtime.output_dir is not None, "flags make sure of a folder"
    identity = results.search_identity(settings, searched.entry, target, train.batch_size)
    resume, last = results.resume_path(settings, runtime), runtime.output_dir / LAST
    if resume is not None:
        content = results.read_search(resume)
        results.check_flags(resume, content, identity)
        log.info("going on from %s at epoch %d, step %d", resume, content["epoch"], content["step"])
    options = replace(
        _options(searched, resume is None),
        **{target.kind: target.value},
        latency=table,
        precision=runtime.amp or torch.float32,
        save_every=runtime.print_freq,
        notes={"flags": {**settings.run.flags, **identity}},
    )
    begun = _changed(last)

    def late() -> str:
        saved = resume is not None or _changed(last) != begun
        return "stopped: go on with --resume" if saved else "stopped, before anything was saved"

    with StopSignals(late) as signals:
        reporter = Reporter(searched.model, options, budget, train, searched.val, runtime, signals)
        return diffrate.search(
            searched.model,
            train,
            settings=replace(options, trials=reporter),
            # The paper's recipe takes the best epoch; without labels the search uses the images alone.
            val=searched.val if options.labelled else None,
            callback=reporter if options.method == GRADIENT else None,
            checkpoint=last,
            resume=resume,
        )


def _changed(path: Path) -> int | None:
    """When the file was written, None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def _options(searched: Searched, fresh: bool) -> SearchSettings:
    """The options of the flags, as they apply to the model and its images; `fresh` is a search that is not resumed."""
    settings, search, model = searched.settings, searched.settings.search, searched.model
    softmax, start = not search.multi_label and model.num_classes != 1, settings.model.start
    if start is not None and fresh and search.method == GRADIENT:
        begin = schedule_at(start, "--init_compression_rate", settings.model, searched.entry, model)
    else:
        begin = None
    return replace(
        search,
        calibration=searched.calibration,
        criterion=build_criterion(settings.mixing) if search.labelled and softmax else None,
        mixup=build_mixup(settings.mixing, model.num_classes),
        start=begin,
    )


def _leave(target: Target, budget: Budget, found: Found, searched: Searched, runtime: Runtime, inner: Runtime) -> None:
    """Leave the schedule in files, and the model at it; log its accuracy against dense, or its loss against the dense
    outputs, its speed if that was asked for, and the next command to type."""
    settings, entry, model, val = searched.settings, searched.entry, searched.model, searched.val
    schedule, dense, multi_label = found.schedule, model.dense_schedule(), settings.search.multi_label
    gflops = kept_as(target, model, schedule)
    file = results.save_schedules(settings, entry, gflops, schedule, runtime)
    scores = None
    if val is not None:
        reached = found.scores or evaluate(model, val, inner, multi_label=multi_label)
        model.schedule = dense
        scores = reached, evaluate(model, val, inner, multi_label=multi_label)
        model.schedule = schedule
    apart = None if found.calibrated is None else log_calibrated(found.calibrated, inner)
    if not settings.search.labelled and (found.calibrated is None or schedule != found.calibrated.schedule):
        apart = losses_at(model, [schedule], searched.part, inner.amp, multi_label)[0]
    results.save_model(settings, entry, model, searched.classes, runtime)
    log_counts(fields_of(schedule), "found ")
    flops, whole = model.flops_at(schedule), model.flops_at(dense)
    of_dense = f"{100 * flops / whole:.0f} % of dense"
    if apart is not None:
        log.info("found: loss against dense %#.3g flops %.3f (%s)", apart, flops / 1e9, of_dense)
    if scores is not None:
        runtime.append(results.record_of("eval", entry, model, dense, scores[1]), FOUND)
        # To draw beside it: the uniform schedules of the same budget that the model can run.
        beside = uniform_schedules(model.compression.space, budget)
        uniform = {kind: fields_of(beside[kind]) for kind in ("prune", "merge", "both") if kind in beside}
        more = {"target_gflops": gflops, "uniform": uniform}
        runtime.append(results.record_of("found", entry, model, schedule, scores[0]) | more, FOUND)
        (name, now), (_, before) = (one.ranked for one in scores)
        log.info("dense: %s", scores[1].line(whole))
        log.info("found: %s (%s, %s %+.3f)", scores[0].line(flops), of_dense, name, now - before)
    if found.speed is not None:
        runtime.record({"mode": "speed", "model": entry.name, **asdict(found.speed)})
        log.info(found.speed.line())
    if file is not None:
        log.info("next: %s", results.next_command(settings, entry, gflops, file))


def run_sensitivity(settings: Settings, runtime: Runtime) -> None:
    """Measure, and leave a table in the log and a record of each reduction in the output folder."""
    images, entry = settings.run.sensitivity, chosen_entry(settings.model)
    assert images is not None, "the mode that is asked for"
    plan = planned(settings, entry)
    dataset = data.some_images(settings, entry, images)  # before anything is downloaded
    data.warn_of_turned(settings, runtime, dataset)
    if settings.model.checkpoint == OFFICIAL:
        _check_digits(settings, entry, entry.num_classes)
    weights = read_weights(settings.model, plan, runtime)
    _check_digits(settings, entry, entry.num_classes if weights.state is None else weights.head)
    model = patched(plain_model(settings.model, entry, weights, entry.num_classes), settings.model)
    running, inside = for_inference(model, False, settings.data.batch_size, runtime)
    assert isinstance(running, CompressedModel), "it was not compiled"
    loader = data.eval_loader(dataset, settings, inside)
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
    rows = []
    for one in found:
        runtime.append({"model": entry.name, **one.record()}, SENSITIVITY)
        row = {"block": one.block, "kind": one.kind, "tokens": one.kept, "kept %": one.share, "loss": f"{one.loss:.2e}"}
        rows.append(row if one.agreement is None else row | {"top-1 as dense, %": one.agreement})
    for line in table_of(rows):
        log.info(line)


def _check_digits(settings: Settings, entry: ModelEntry, head: int | None) -> None:
    """Refuse the digits that ship for a model with another `head`, which was never shown any."""
    if settings.data.path is None and entry.name != SAMPLE_MODEL and head != entry_of(SAMPLE_MODEL).num_classes:
        raise UsageError(
            f"--data-path is needed: the digits that ship do not fit {entry.name}; accepted: a folder of images"
        )
