"""No mode flag: search the kept counts for each of `--target_flops` in turn."""

from __future__ import annotations

import copy

import torch
from torch import nn

import diffrate
from cli.entry import patched
from cli.model import check_targets
from cli.results import log_found, save_model, save_schedules
from cli.resume import check_search, resume_path, search_identity
from cli.schedules import targets_of
from cli.search_report import Reporter, TrialReporter, log_calibrated
from cli.searched import START_SPREAD, Searched, searched_model, start_of
from cli.settings import Settings
from datasets import ImageLoader
from diffrate.searching.teacher import losses_at
from engine import evaluate
from processes.runtime import Runtime
from training.checkpoint import LAST
from training.recipe import build_criterion, build_mixup
from utils import StopSignals, UsageError


def run(settings: Settings, runtime: Runtime) -> None:
    """Search, and leave schedules, checkpoints and plots in the output folder."""
    searched = searched_model(settings, runtime)
    check_targets(settings.model, searched.entry, searched.outputs)
    batches, accumulate = len(searched.train), settings.search.accumulate
    if accumulate > batches:
        raise UsageError(f"--accum-steps {accumulate}: accepted: up to {batches}, the batches of an epoch")
    count = max(1, len(settings.model.targets))
    for index in range(count):
        # A huge model needs no second copy for the last.
        model = searched.model if index == count - 1 else copy.deepcopy(searched.model)
        _search_one(index, searched, model, runtime)


def _search_one(index: int, searched: Searched, plain: nn.Module, runtime: Runtime) -> None:
    """The search for one target, from its checkpoint if there is one, and what it leaves behind."""
    settings, entry = searched.settings, searched.entry
    search, labelled, method = settings.search, searched.labelled, settings.recipe.method
    assert method is not None
    model = patched(plain, settings.model).to(runtime.device)
    target = targets_of(settings.model, model)[index]
    # Several targets have a folder each for their checkpoints, and one file for their schedules.
    inner = runtime.inside(f"target_{target:g}") if len(settings.model.targets) > 1 else runtime
    assert inner.output_dir is not None, "flags make sure of a folder"
    train, val = searched.train, searched.val
    assert train.batch_size is not None
    identity = search_identity(settings, entry, target, train.batch_size)
    resume = resume_path(settings, inner)
    if resume is not None:
        check_search(resume, identity)
    fresh = resume is None and method != "calibrated"
    start = start_of(searched, model, target * 1e9, runtime) if fresh else None
    accumulate = search.accumulate
    with StopSignals() as signals:
        found = diffrate.search(
            model,
            train,
            target_flops=target * 1e9,
            epochs=search.epochs,
            # The best epoch is that of the paper's recipe; without labels nothing but the images is looked at.
            val=val if labelled else None,
            method=method,
            calibration=searched.calibration,
            minutes=settings.recipe.minutes,
            trials=TrialReporter(inner, signals),
            criterion=build_criterion(settings.mixing) if labelled else None,
            loss=search.loss,
            budget=search.budget,
            mixup=build_mixup(settings.mixing, model.num_classes),
            flops_loss=search.flops_loss,
            flops_weight=search.flops_weight,
            warmup=search.warmup,
            learning_rate=search.learning_rate,
            least_learning_rate=search.least_learning_rate,
            accumulate=accumulate,
            start=start,
            start_spread=START_SPREAD if settings.recipe.start == "uniform" else None,
            precision=runtime.amp or torch.float32,
            seed=search.seed,
            callback=Reporter(model, target * 1e9, (train, val), accumulate, not labelled, inner, signals),
            checkpoint=inner.output_dir / LAST,
            resume=resume,
            save_every=inner.print_freq,
            notes={"flags": {**settings.run.flags, **identity}},
        )
    file = save_schedules(settings, entry, target, found.schedule, runtime)
    scores = None if val is None else _scores(model, found, val, runtime)
    if found.calibrated is not None:
        apart = log_calibrated(found.calibrated, inner)
    else:
        apart = None if labelled else losses_at(model, [found.schedule], searched.part, runtime.amp)[0]
    save_model(settings, entry, model, searched.classes, runtime)
    log_found(settings, entry, target, model, found.schedule, scores, file, runtime, apart)


def _scores(
    model: diffrate.CompressedModel, found: diffrate.Found, val: ImageLoader, runtime: Runtime
) -> tuple[diffrate.Scores, diffrate.Scores]:
    """Of the model at what was found, where it is left, and of the dense one."""
    scores = found.scores or evaluate(model, val, runtime)
    dense = model.dense_schedule()
    model.set_kept_num(dense.prune, dense.merge)
    whole = evaluate(model, val, runtime)
    model.set_kept_num(found.schedule.prune, found.schedule.merge)
    return scores, whole
