"""`--eval`, `--baseline` and `--list-models`: score a model as it is, or at uniform schedules; name all models."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from functools import partial

from torch import nn

import diffrate
import models
from cli.data import eval_loader, warn_of_turned
from cli.model import chosen_entry, compressed, for_inference, meta_model, patched, trained_model
from cli.results import report, save_model, save_schedules
from cli.resume import use_searched
from cli.runtime import Runtime
from cli.schedules import budgets_of, kept_as
from cli.settings import OFFICIAL, Settings
from diffrate.budget import Budget, baseline_schedule
from diffrate.device import generators_kept
from diffrate.files.header import is_saved_model
from diffrate.schedule import Schedule, fields_of
from diffrate.searching.target import confirmed_at
from engine import evaluate
from models.zoo import ModelEntry
from utils import UsageError


def run(settings: Settings, runtime: Runtime) -> None:
    """Score, report, and with `--save` leave the model in a file."""
    trained = trained_model(settings, runtime)
    warn_of_turned(settings, runtime, trained.val)
    model = compressed(trained.model, settings.model, trained.plan, trained.weights)
    use_searched(model, settings, trained.entry, runtime)
    save_model(settings, trained.entry, model, trained.classes, runtime)  # before its weights change precision
    running, inside = for_inference(model, settings.run.compile, settings.data.batch_size, runtime)
    scores = evaluate(
        running, eval_loader(trained.val, settings, runtime), inside, multi_label=settings.model.multi_label
    )
    report("eval", trained.entry, model, scores, runtime)


log = logging.getLogger(__name__)


def run_baseline(settings: Settings, runtime: Runtime) -> None:
    """One schedule for each target, and one line of scores where the model has a head."""
    entry, checkpoint = chosen_entry(settings.model), settings.model.checkpoint
    if entry.num_classes == 0 and (checkpoint == OFFICIAL or is_saved_model(checkpoint)):
        _list(settings, entry, runtime)
    else:
        _score(settings, runtime)


def _score(settings: Settings, runtime: Runtime) -> None:
    kind = settings.run.baseline
    trained = trained_model(settings, runtime)
    warn_of_turned(settings, runtime, trained.val)
    model = patched(trained.model, settings.model).to(runtime.device)
    loader = eval_loader(trained.val, settings, runtime)
    if kind == "random":
        model.rule = replace(model.rule, random=True)
    budgets, table = budgets_of(settings, model, runtime)
    for target, budget in budgets.items():
        again = partial(_again, settings, model)
        first = _schedule(settings, model, budget)
        with generators_kept():
            schedule, speed = confirmed_at(model, first, budget, table, runtime.device, again)
        model.set_kept_num(schedule.prune, schedule.merge)
        scores = evaluate(model, loader, runtime, multi_label=settings.model.multi_label)
        report(f"baseline {kind}", trained.entry, model, scores, runtime)
        if speed is not None:
            log.info(speed.line())
        save_schedules(settings, trained.entry, kept_as(target, model, schedule), schedule, runtime)


def _again(settings: Settings, model: diffrate.CompressedModel, budget: Budget, *_: Schedule) -> Schedule:
    """Of a corrected budget, one that is uniform, too."""
    return _schedule(settings, model, budget)


def _list(settings: Settings, entry: ModelEntry, runtime: Runtime) -> None:
    """Of a model without a head, the schedules alone: they need neither weights nor images."""
    model = meta_model(settings.model, entry)
    if any(target.timed for target in settings.model.targets):
        raise UsageError(f"--baseline {settings.run.baseline} of a model without a head: accepted: --target_flops")
    for target, budget in budgets_of(settings, model, runtime)[0].items():
        schedule = _schedule(settings, model, budget)
        for name, counts in fields_of(schedule).items():
            if counts is not None:
                log.info("%s %s", name, list(counts))
        log.info("* flops %.3f (no head to score with)", model.flops_at(schedule) / 1e9)
        save_schedules(settings, entry, kept_as(target, model, schedule), schedule, runtime)


def _schedule(settings: Settings, model: diffrate.CompressedModel, budget: Budget) -> Schedule:
    kind = settings.run.baseline
    assert kind is not None, "the mode that is asked for"
    return baseline_schedule(kind, model.compression.space, budget)


def run_list_models(settings: Settings, runtime: Runtime) -> None:
    """Print a name a line, as they are found.

    Raises:
        UsageError: there are none.
    """
    pattern = settings.run.pattern
    assert pattern is not None, "the mode that is asked for"
    if not runtime.processes.is_main:
        return
    found = False
    try:
        for name in models.supported_names(pattern, diffrate.patch.families(), _is_supported):
            print(name, flush=True)  # for pipes: not the log, which has the time before each line
            found = True
    except BrokenPipeError:  # as of `head`: nobody reads on, and Python would complain when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not found:
        raise UsageError(
            f"--list-models {pattern}: no model that can be compressed; accepted: a pattern such as 'vit_*'"
        )


def _is_supported(model: nn.Module) -> bool:
    try:
        with models.shapes_alone():
            diffrate.patch.vit(model)
    except diffrate.UnsupportedModelError:
        return False
    return True
