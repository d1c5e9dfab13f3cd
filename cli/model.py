"""From settings to the model: which one, its weights, and its kept counts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import diffrate
import models
from cli.schedules import NamedSchedule, chosen_schedule, fit_tokens, targets_of
from cli.settings import FROM_SCRATCH, OFFICIAL, ModelSettings, Settings
from diffrate.budgets.rounding import check_target
from diffrate.budgets.schedule import ScheduleError, make_schedule
from diffrate.saving.about import About, about, is_saved_model
from models.zoo import ModelEntry, find
from processes.group import local_main_first
from processes.runtime import Runtime
from training.transforms import View
from utils import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: tensors, None for fresh ones; what to call it in messages; the kept counts
    that it was saved or trained at; the names of its outputs."""

    state: models.StateDict | None
    name: str
    schedule: diffrate.Schedule | None = None
    classes: tuple[str, ...] | None = None

    @property
    def head(self) -> int | None:
        """The number of classes of its head, None where there is none."""
        return None if self.state is None else models.head_classes(self.state)


def chosen_entry(settings: ModelSettings) -> ModelEntry:
    """The model that `--model` names, or that a file of `--save` says it holds.

    Raises:
        UnknownModelError, UsageError: there is no such model, or the two say different things.
    """
    assert settings.name is not None, "flags make sure of a name"
    if not is_saved_model(settings.checkpoint):
        return models.lookup(settings.name)
    saved = about(settings.checkpoint)
    known = saved.name or saved.architecture
    if settings.name not in (known, saved.architecture) and models.lookup(settings.name).name != known:
        raise UsageError(
            f"--model {settings.name}: {settings.checkpoint} holds {known}; accepted: {known}, or no --model"
        )
    return _entry_of(saved, known)


def view_of(settings: Settings, entry: ModelEntry) -> View:
    """How a picture becomes the model's input."""
    crop_pct = settings.data.crop_pct or entry.crop_pct
    return View(input_size_of(settings.model, entry), crop_pct, entry.mean, entry.std, entry.interpolation)


def input_size_of(settings: ModelSettings, entry: ModelEntry) -> int:
    """Side of the input in pixels."""
    return settings.input_size or entry.input_size


def read_weights(settings: ModelSettings, entry: ModelEntry, runtime: Runtime) -> Weights:
    """What `--checkpoint` names.

    Raises:
        CheckpointError: it cannot be fetched or read, or gives no numbers.
        ScheduleError: it was trained at counts that are none.
    """
    if settings.checkpoint == FROM_SCRATCH:
        return Weights(None, FROM_SCRATCH)
    with local_main_first(runtime.processes):  # one download for all processes of a machine
        official = settings.checkpoint == OFFICIAL
        source = models.official_file(entry, runtime.bar) if official else settings.checkpoint
        state = models.read_state(source, runtime.bar)
    name = str(source)
    models.check_finite(state, name)
    if is_saved_model(name):
        saved = about(name)
        return Weights(state, name, saved.schedule, saved.classes)
    return Weights(state, name, _trained_at(state, name))


def plain_model(
    settings: ModelSettings, entry: ModelEntry, weights: Weights, classes: int, **options: Any
) -> nn.Module:
    """The plain timm model with `weights`, and as many classes as they have; fresh ones with `classes`.

    Raises:
        CheckpointError, InputSizeError: the weights, or the input's size, do not fit.
    """
    size = input_size_of(settings, entry)
    model = models.create(entry, size, num_classes=weights.head or classes, **options)
    if weights.state is not None:
        models.fit_state(model, weights.state, weights.name)
    return model


def patched(model: nn.Module, settings: ModelSettings) -> diffrate.CompressedModel:
    """Patch `model` in place, ready to search.

    Raises:
        RateError: a granularity that leaves no choice.
    """
    return diffrate.patch.vit(model, settings.granularity, settings.granularity)


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


def meta_model(settings: ModelSettings, entry: ModelEntry, classes: int | None = None) -> diffrate.CompressedModel:
    """The patched model without memory for its weights: shapes are enough to cost it."""
    with torch.device("meta"):
        options = {} if classes is None else {"num_classes": classes}
        return patched(models.create(entry, input_size_of(settings, entry), **options), settings)


def check_targets(settings: ModelSettings, entry: ModelEntry, classes: int) -> None:
    """Refuse targets that no schedule meets, and a granularity without choice, before anything is trained.

    Raises:
        BudgetError, UsageError: names the flag and what is accepted.
    """
    model = meta_model(settings, entry, classes)
    if min(len(rate) for rate in model.arch_parameters()) < 2:
        limit = model.compression.patches(model.compression.space.searchable[0])
        raise UsageError(f"--granularity {settings.granularity}: accepted: from 1 to {limit - 1}")
    for target in targets_of(settings, model):
        check_target(target * 1e9, model.compression.space, model.flops_at)


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


def _trained_at(state: models.StateDict, name: str) -> diffrate.Schedule | None:
    """The kept counts among a checkpoint's tensors, None where there are none."""
    found = state.get("compression._extra_state")
    if found is None or found.numel() == 0:
        return None
    *prune, merge = found.tolist()
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state else None  # CAFormer has no such embedding
    try:
        return replace(make_schedule(prune[0] if prune else None, merge), tokens=tokens)
    except ScheduleError as error:
        raise ScheduleError(f"checkpoint {name}: {error}") from error


def _entry_of(saved: About, name: str) -> ModelEntry:
    """What a saved file says, as a row of the zoo.

    Raises:
        UsageError: its images are none that the command line reads.
    """
    channels, height, width = saved.input_size
    if channels != 3 or height != width:
        raise UsageError(
            f"{name}: the file's input_size is {list(saved.input_size)}; accepted here: square images of 3 channels"
        )
    published = find(name)
    inputs: dict[str, Any] = {
        "architecture": saved.architecture,
        "options": saved.arguments,
        "num_classes": saved.num_classes,
        "input_size": saved.input_size[1],
        "crop_pct": saved.crop_pct,
        "mean": saved.mean,
        "std": saved.std,
        "interpolation": saved.interpolation,
    }
    if published is not None:
        return replace(published, **inputs)
    return ModelEntry(name=name, schedule_key=name, weights=None, **inputs)
