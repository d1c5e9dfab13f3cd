"""What a search works with: the model, the images it is searched on, and those it is scored on, if any."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

import diffrate
from cli.data import (
    check_same_classes,
    eval_dataset,
    eval_loader,
    input_size_of,
    part_loader,
    search_dataset,
    train_loader,
    warn_of_turned,
)
from cli.model import Weights, checked_plan, chosen_entry, output_names, plain_model, read_weights, trained_model
from cli.recipe import with_recipe
from cli.runtime import Runtime
from cli.schedules import start_schedule
from cli.settings import Settings
from datasets import DataError, ImageLoader, LabelledDataset, has_validation
from diffrate.schedule import Schedule
from diffrate.searching.calibration import images_that_fit
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

PART = 512  # images
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Searched:
    """A plain model with its weights, the settings with its recipe, and loaders.

    val: None where nothing can be scored. part: a part of the images, as in evaluation; calibration: more of them.
    """

    settings: Settings
    entry: ModelEntry
    model: nn.Module
    classes: Sequence[str] | None
    train: ImageLoader
    val: ImageLoader | None
    part: ImageLoader
    calibration: ImageLoader


def searched_model(settings: Settings, runtime: Runtime) -> Searched:
    """The model that the flags name, and its data, as its recipe asks for them.

    Raises:
        CheckpointError, DataError, ScheduleError, UsageError: one of them is not there or does not fit.
    """
    entry = chosen_entry(settings.model)
    settings = with_recipe(settings, entry)
    dropping = {"drop_path_rate": settings.model.drop_path}
    val: LabelledDataset | None
    if settings.search.labelled:
        trained = trained_model(settings, runtime, **dropping)
        model, weights, val = trained.model, trained.weights, trained.val
        outputs = weights.head or len(val.classes)
    else:
        plan = checked_plan(settings, entry)
        if settings.data.path is None and entry.name != SAMPLE_MODEL:
            raise UsageError(f"--data-path is needed: the digits that ship do not fit {entry.name}")
        weights = read_weights(settings.model, plan, runtime)
        val = _validation(settings, entry, weights)
        fresh = entry.num_classes if val is None else len(val.classes)
        outputs = fresh if weights.state is None else weights.head or 0
        model = plain_model(settings.model, entry, weights, outputs, **dropping)
    train, plain = (
        search_dataset(settings, entry, weights.head, weights.classes, augmented) for augmented in (True, False)
    )
    if settings.search.labelled:
        assert val is not None
        check_same_classes(train, val)
    warn_of_turned(settings, runtime, train, *([] if val is None else [val]))
    pixels = 3 * math.prod(input_size_of(settings.model, entry))
    return Searched(
        settings,
        entry,
        model,
        weights.classes if val is None else output_names(val, outputs, weights),
        train_loader(train, settings, runtime),
        None if val is None else eval_loader(val, settings, runtime),
        part_loader(plain, PART, settings, runtime),
        part_loader(plain, images_that_fit(pixels, settings.search.images), settings, runtime),
    )


def start_of(searched: Searched, model: diffrate.CompressedModel) -> Schedule | None:
    """Where the search of `model` begins, None for all candidates alike."""
    named = start_schedule(searched.settings.model, searched.entry, model)
    return None if named is None else named.schedule


def _validation(settings: Settings, entry: ModelEntry, weights: Weights) -> LabelledDataset | None:
    """The validation split, where there is one whose classes are the model's."""
    headless = entry.num_classes == 0 if weights.state is None else weights.headless
    if headless or not has_validation(settings.data.data_set, settings.data.path):
        return None
    try:
        return eval_dataset(settings, entry, weights.head, weights.classes)
    except DataError as error:
        log.info("no accuracy: %s", error)
        return None
