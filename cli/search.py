"""No mode flag: search the kept counts for each of `--target_flops` in turn."""

from __future__ import annotations

import copy
from dataclasses import replace

import diffrate
from cli.goals import budgets_of, kept_as
from cli.model import check_choices, patched
from cli.results import log_found, save_model, save_schedules
from cli.resume import check_search, resume_path, search_identity
from cli.runtime import Runtime
from cli.searched import Searched, searched_model, start_of
from cli.settings import Settings
from cli.training import build_criterion, build_mixup
from diffrate.budget import Budget, Target
from diffrate.searching.settings import GRADIENT, SearchSettings
from engine import Searching, found_scores, loss_apart, search
from utils import UsageError


def run(settings: Settings, runtime: Runtime) -> None:
    """Search, and leave schedules, checkpoints and plots in the output folder."""
    searched = searched_model(settings, runtime)
    batches, accumulate = len(searched.train), settings.search.accumulate
    if accumulate > batches:
        raise UsageError(f"--accum-steps {accumulate}: accepted: up to {batches}, the batches of an epoch")
    model = patched(searched.model, settings.model).to(runtime.device)
    check_choices(settings.model, model)
    budgets, table = budgets_of(settings, model, runtime)
    for index, (target, budget) in enumerate(budgets.items()):
        last, several = index == len(budgets) - 1, len(budgets) > 1
        # Several targets have a folder each for their checkpoints, and one file for their schedules.
        folder = f"{target.kind if target.timed else 'target'}_{target}"
        inner = runtime.inside(folder) if several else runtime
        # A huge model needs no second copy for the last.
        one = model if last else copy.deepcopy(model)
        _search_one(target, budget, table, searched, one, runtime, inner)


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
    fresh = resume is None and settings.search.method == GRADIENT
    chosen = replace(
        _means(searched, model),
        **{target.kind: target.value},
        latency=table,
        start=start_of(searched, model) if fresh else None,
        notes={"flags": {**settings.run.flags, **identity}},
    )
    searching = Searching(chosen, budget, searched.train, searched.val, searched.part, inner)
    found = search(model, searching, resume)
    kept = kept_as(target, model, found.schedule)
    file = save_schedules(settings, entry, kept, found.schedule, runtime)
    scores = found_scores(model, found, searching)
    apart = loss_apart(model, found, searching)
    save_model(settings, entry, model, searched.classes, runtime)
    log_found(settings, entry, kept, budget, model, found, scores, file, runtime, apart)


def _means(searched: Searched, model: diffrate.CompressedModel) -> SearchSettings:
    """The options of the flags, with what they mean for `model` and its images."""
    settings, search = searched.settings, searched.settings.search
    softmax = not search.multi_label and model.num_classes != 1
    return replace(
        search,
        calibration=searched.calibration,
        criterion=build_criterion(settings.mixing) if search.labelled and softmax else None,
        mixup=build_mixup(settings.mixing, model.num_classes),
    )
