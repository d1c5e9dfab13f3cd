"""No mode flag: search the kept counts for each of `--target_flops` in turn."""

from __future__ import annotations

import copy

import torch

import diffrate
from cli.goals import Aim, aims_of
from cli.model import check_choices, patched
from cli.results import log_found, save_model, save_schedules
from cli.resume import check_search, resume_path, search_identity
from cli.runtime import Runtime
from cli.search_report import Reporter, TrialReporter, log_calibrated
from cli.searched import START_SPREAD, Searched, searched_model, start_of
from cli.settings import Settings
from cli.training import build_criterion, build_mixup
from cli.training_checkpoint import LAST
from datasets import ImageLoader
from diffrate.searching.teacher import losses_at
from engine import evaluate
from utils import StopSignals, UsageError


def run(settings: Settings, runtime: Runtime) -> None:
    """Search, and leave schedules, checkpoints and plots in the output folder."""
    searched = searched_model(settings, runtime)
    batches, accumulate = len(searched.train), settings.search.accumulate
    if accumulate > batches:
        raise UsageError(f"--accum-steps {accumulate}: accepted: up to {batches}, the batches of an epoch")
    model = patched(searched.model, settings.model).to(runtime.device)
    check_choices(settings.model, model)
    aims = aims_of(settings, model, runtime)
    for index, aim in enumerate(aims):
        # A huge model needs no second copy for the last.
        last = index == len(aims) - 1
        _search_one(aim, len(aims) > 1, searched, model if last else copy.deepcopy(model), runtime)


def _search_one(aim: Aim, several: bool, searched: Searched, model: diffrate.CompressedModel, runtime: Runtime) -> None:
    """The search for one target, from its checkpoint if there is one, and what it leaves behind."""
    settings, entry = searched.settings, searched.entry
    search, labelled, method = settings.search, searched.labelled, settings.recipe.method
    assert method is not None
    # Several targets have a folder each for their checkpoints, and one file for their schedules.
    inner = runtime.inside(f"{aim.target.kind}_{aim.target}") if several else runtime
    assert inner.output_dir is not None, "flags make sure of a folder"
    train, val = searched.train, searched.val
    assert train.batch_size is not None
    identity = search_identity(settings, entry, aim.target, train.batch_size)
    resume = resume_path(settings, inner)
    if resume is not None:
        check_search(resume, identity)
    fresh = resume is None and method != "calibrated"
    start = start_of(searched, model, aim.goal.budget, runtime) if fresh else None
    accumulate, multi_label = search.accumulate, settings.model.multi_label
    softmax = not multi_label and model.num_classes != 1
    with StopSignals() as signals:
        found = diffrate.search(
            model,
            train,
            **vars(aim.asked),
            latency=aim.goal.table,
            epochs=search.epochs,
            # The best epoch is that of the paper's recipe; without labels nothing but the images is looked at.
            val=val if labelled else None,
            method=method,
            calibration=searched.calibration,
            minutes=settings.recipe.minutes,
            trials=TrialReporter(inner, signals),
            criterion=build_criterion(settings.mixing) if labelled and softmax else None,
            loss=search.loss,
            multi_label=multi_label,
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
            callback=Reporter(model, aim.goal, (train, val), accumulate, not labelled, inner, signals),
            checkpoint=inner.output_dir / LAST,
            resume=resume,
            save_every=inner.print_freq,
            notes={"flags": {**settings.run.flags, **identity}},
        )
    target = aim.named(model, found.schedule)
    file = save_schedules(settings, entry, target, found.schedule, runtime)
    scores = None if val is None else _scores(model, found, val, runtime, multi_label)
    apart = None if found.calibrated is None else log_calibrated(found.calibrated, inner)
    if not labelled and (found.calibrated is None or found.schedule != found.calibrated.schedule):
        apart = losses_at(model, [found.schedule], searched.part, runtime.amp, multi_label)[0]
    save_model(settings, entry, model, searched.classes, runtime)
    log_found(settings, entry, target, aim.goal.budget, model, found, scores, file, runtime, apart)


def _scores(
    model: diffrate.CompressedModel, found: diffrate.Found, val: ImageLoader, runtime: Runtime, multi_label: bool
) -> tuple[diffrate.Scores, diffrate.Scores]:
    """Of the model at what was found, where it is left, and of the dense one."""
    scores = found.scores or evaluate(model, val, runtime, multi_label=multi_label)
    dense = model.dense_schedule()
    model.set_kept_num(dense.prune, dense.merge)
    whole = evaluate(model, val, runtime, multi_label=multi_label)
    model.set_kept_num(found.schedule.prune, found.schedule.merge)
    return scores, whole
