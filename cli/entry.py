"""From settings to which model: its entry, what its inputs are like, its shape."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

import diffrate
import models
from cli.settings import OFFICIAL, ModelSettings, Settings
from diffrate.files import first_line
from diffrate.saving.about import About, about, is_saved_model
from models.zoo import ModelEntry, find
from training.transforms import View
from utils import UsageError


def chosen_entry(settings: ModelSettings) -> ModelEntry:
    """The model that `--model` names, or that a file of `--save` says it holds.

    A pretrained tag of timm's is in its name where these are the weights.

    Raises:
        UnknownModelError, UsageError: there is no such model, or the two say different things.
    """
    assert settings.name is not None, "flags make sure of a name"
    if not is_saved_model(settings.checkpoint):
        entry = models.entry_of(settings.name)
        return entry if settings.checkpoint == OFFICIAL else replace(entry, name=models.bare_name(entry.name))
    saved = about(settings.checkpoint)
    known = saved.name or saved.architecture
    names = (known, saved.architecture)
    if settings.name not in names and models.bare_name(models.entry_of(settings.name).name) != models.bare_name(known):
        raise UsageError(
            f"--model {settings.name}: {settings.checkpoint} holds {known}; accepted: {known}, or no --model"
        )
    return _entry_of(saved, known)


def view_of(settings: Settings, entry: ModelEntry) -> View:
    """How a picture becomes the model's input."""
    size, crop_pct = input_size_of(settings.model, entry), settings.data.crop_pct or entry.crop_pct
    return View(size, crop_pct, entry.mean, entry.std, entry.interpolation, entry.crop_mode)


def input_size_of(settings: ModelSettings, entry: ModelEntry) -> models.Size:
    """Rows and columns of the input in pixels."""
    return settings.input_size or entry.input_size


def built(settings: ModelSettings, entry: ModelEntry, **options: int) -> nn.Module:
    """The plain model with fresh weights.

    Raises:
        InputSizeError, UsageError: timm does not build it for images of this size, for whatever reason it has.
    """
    size = input_size_of(settings, entry)
    try:
        return models.create(entry, size, **options)
    except models.InputSizeError:
        raise
    except Exception as error:
        rows, columns = size
        raise UsageError(
            f"--model {settings.name}: timm builds none for {rows} by {columns} pixels ({first_line(error)})"
        ) from error


def patched(model: nn.Module, settings: ModelSettings) -> diffrate.CompressedModel:
    """Patch `model` in place, ready to search.

    Raises:
        UsageError: compression does not take this model.
        RateError: a granularity that leaves no choice.
    """
    try:
        return diffrate.patch.vit(model, settings.granularity, settings.granularity)
    except diffrate.UnsupportedModelError as error:
        raise UsageError(f"--model {settings.name}: {error}") from error


def meta_model(settings: ModelSettings, entry: ModelEntry, classes: int | None = None) -> diffrate.CompressedModel:
    """The patched model without memory for its weights: shapes are enough to cost it.

    Raises:
        InputSizeError, UsageError: the input's size does not fit, or compression does not take this model.
    """
    with models.shapes_alone():
        return patched(built(settings, entry, **({} if classes is None else {"num_classes": classes})), settings)


def _entry_of(saved: About, name: str) -> ModelEntry:
    """What a saved file says, as a row of the zoo.

    Raises:
        UsageError: its images are none that the command line reads.
    """
    channels, rows, columns = saved.input_size
    if channels != 3:
        raise UsageError(
            f"{name}: the file's input_size is {list(saved.input_size)}; accepted here: images of 3 channels"
        )
    inputs: dict[str, Any] = {
        "architecture": saved.architecture,
        "options": {key: tuple(value) if isinstance(value, list) else value for key, value in saved.arguments.items()},
        "num_classes": saved.num_classes,
        "input_size": (rows, columns),
        "crop_pct": saved.crop_pct,
        "crop_mode": saved.crop_mode,
        "mean": saved.mean,
        "std": saved.std,
        "interpolation": saved.interpolation,
        "config": None,
    }
    published = find(name)
    if published is not None:
        return replace(published, **inputs)
    key = name
    with suppress(models.UnknownModelError):  # schedules are filed by names of timm's with their tags
        key = models.full_name(name)
    return ModelEntry(name=name, schedule_key=key, weights=None, **inputs)
