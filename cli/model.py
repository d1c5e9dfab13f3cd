"""From settings to the model: with its weights, and at its kept counts."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

import diffrate
import models
from cli.entry import input_size_of, patched
from cli.schedules import NamedSchedule, chosen_schedule, fit_tokens
from cli.settings import ModelSettings
from cli.weights import Weights
from models.zoo import ModelEntry
from utils import UsageError

log = logging.getLogger(__name__)


def plain_model(
    settings: ModelSettings, entry: ModelEntry, weights: Weights, classes: int, **options: Any
) -> nn.Module:
    """The plain timm model with `weights`, and as many classes as they have, if any; fresh ones with `classes`.

    Raises:
        CheckpointError, InputSizeError: the weights, or the input's size, do not fit.
    """
    size, outputs = input_size_of(settings, entry), classes if weights.state is None else weights.head or 0
    model = models.create(entry, size, num_classes=outputs, **options)
    if weights.state is not None:
        for note in models.fit_state(model, weights.state, weights.name).notes:
            log.info(note)
    return model


def compressed(
    model: nn.Module, settings: ModelSettings, entry: ModelEntry, weights: Weights | None = None
) -> diffrate.CompressedModel:
    """Patch `model` in place, at the schedule that the flags name, else at that of its weights, else dense.

    Raises:
        ScheduleError: no such schedule, or one that does not fit.
    """
    result = patched(model, settings)
    named = chosen_schedule(settings, entry, result)
    if named is None:
        named = _held(settings, weights, result)
        if named is not None:
            _tell(named, result)
    schedule = result.dense_schedule() if named is None else named.schedule
    result.check(schedule, "" if named is None else named.where)
    result.set_kept_num(schedule.prune, schedule.merge)
    return result


def check_choices(settings: ModelSettings, model: diffrate.CompressedModel) -> None:
    """Refuse a granularity that leaves a search without choice.

    Raises:
        UsageError: names the flag and what is accepted.
    """
    if min(len(rate) for rate in model.arch_parameters()) < 2:
        limit = model.compression.patches(model.compression.space.searchable[0])
        raise UsageError(f"--granularity {settings.granularity}: accepted: from 1 to {limit - 1}")


def _held(settings: ModelSettings, weights: Weights | None, model: diffrate.CompressedModel) -> NamedSchedule | None:
    """The kept counts that the weights were saved or trained at, None where they are to keep all tokens."""
    schedule = None if weights is None else weights.schedule
    if schedule is None or settings.dense or _is_dense(schedule, model):
        return None
    assert weights is not None
    if settings.scale:
        schedule = fit_tokens(schedule, model)
    return NamedSchedule(schedule, f"checkpoint {weights.name}: ")


def _is_dense(schedule: diffrate.Schedule, model: diffrate.CompressedModel) -> bool:
    """Whether it removes nothing, in a model of as many tokens as it was made for."""
    blocks = len(model.compressible_blocks())
    rows = (schedule.merge[:blocks], (schedule.prune or ())[:blocks])
    tokens = schedule.tokens or model.compression.space.limits[0]
    return all(count == tokens for row in rows for count in row)


def _tell(named: NamedSchedule, model: diffrate.CompressedModel) -> None:
    model.check(named.schedule, named.where)
    gflops = model.flops_at(named.schedule) / 1e9
    log.info("%sat the kept counts that it holds, %.3f GFLOPs; --dense for all tokens", named.where, gflops)
