"""`--baseline`: score uniform schedules that meet `--target_flops`."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import diffrate
from cli.data import eval_loader, warn_of_turned
from cli.goals import budgets_of, kept_as
from cli.model import chosen_entry, meta_model, patched, trained_model
from cli.results import report, save_schedules
from cli.runtime import Runtime
from cli.settings import OFFICIAL, Settings
from diffrate.blocks.reduction import RandomImportance
from diffrate.budget import Budget, baseline_schedule
from diffrate.device import generators_kept
from diffrate.files.header import is_saved_model
from diffrate.schedule import Schedule, fields_of
from diffrate.searching.target import confirmed_at
from engine import evaluate
from models.zoo import ModelEntry
from utils import UsageError

log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
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
        model.rule = replace(model.rule, importance=RandomImportance(model.rule.importance.queries))
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
