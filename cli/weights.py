"""From settings to weights: what they are, and the kept counts that they were made at."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import diffrate
import models
from cli.distributed import local_main_first
from cli.entry import input_size_of, meta_model
from cli.runtime import Runtime
from cli.settings import FROM_SCRATCH, OFFICIAL, ModelSettings
from diffrate.budgets.schedule import ScheduleError, make_schedule
from diffrate.saving.about import about, is_saved_model
from models.zoo import ModelEntry
from training.checkpoint import flags_in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds: tensors under timm's names, None for fresh ones; what to call it in messages; the
    kept counts that it was saved or trained at; the names of its outputs."""

    state: models.StateDict | None
    name: str
    schedule: diffrate.Schedule | None = None
    classes: tuple[str, ...] | None = None

    @property
    def head(self) -> int | None:
        """The number of classes of its head, None where there is none."""
        return None if self.state is None else models.head_classes(self.state)

    @property
    def headless(self) -> bool:
        """Whether they are no classifier's: there is nothing to compare labels with."""
        return self.state is not None and self.head is None


def read_weights(settings: ModelSettings, entry: ModelEntry, runtime: Runtime) -> Weights:
    """What `--checkpoint` names.

    Raises:
        CheckpointError: it cannot be fetched or read, or gives no numbers.
        ScheduleError: it was trained at counts that are none.
    """
    if settings.checkpoint == FROM_SCRATCH:
        return Weights(None, FROM_SCRATCH)
    size, made_at = input_size_of(settings, entry), _made_at(settings, entry)
    with local_main_first(runtime.processes):  # one download for all processes of a machine
        if settings.checkpoint == OFFICIAL:
            read = models.read_official(entry, size, runtime.bar)
        else:
            read = models.read_file(entry, settings.checkpoint, size, runtime.bar, made_at)
    models.check_finite(read.state, read.name)
    for note in read.notes:
        log.info(note)
    if is_saved_model(read.name):
        header = about(read.name)
        return Weights(read.state, read.name, header.schedule, header.classes)
    schedule = _trained_at(read.found, read.name)
    if schedule is not None:
        schedule = replace(schedule, tokens=_tokens_of(read.found, settings, entry, made_at))
    return Weights(read.state, read.name, schedule)


def _made_at(settings: ModelSettings, entry: ModelEntry) -> models.Size | None:
    """Rows and columns of the images that a file says its weights are for, None where it says nothing."""
    if is_saved_model(settings.checkpoint):
        return entry.input_size
    flags = flags_in(settings.checkpoint)
    if flags is None:
        return None
    size = flags.get("input_size") or entry.input_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _trained_at(found: models.StateDict, name: str) -> diffrate.Schedule | None:
    """The kept counts among a checkpoint's tensors as `found`, None where there are none."""
    held = found.get("compression._extra_state")
    if held is None or held.numel() == 0:
        return None
    *prune, merge = held.tolist()
    try:
        return make_schedule(prune[0] if prune else None, merge)
    except ScheduleError as error:
        raise ScheduleError(f"checkpoint {name}: {error}") from error


def _tokens_of(
    found: models.StateDict, settings: ModelSettings, entry: ModelEntry, made_at: models.Size | None
) -> int | None:
    """Input tokens of the model that a checkpoint is of, None where nothing in it tells."""
    model: Any = meta_model(replace(settings, input_size=made_at), entry)
    theirs, ours = found.get("pos_embed"), getattr(model, "pos_embed", None)
    if made_at is not None:
        return model.compression.space.limits[0]
    if theirs is None or ours is None:
        return None
    # Some models add positions to class and register tokens, too, and some do not.
    return theirs.shape[1] + model.compression.space.limits[0] - ours.shape[1]
