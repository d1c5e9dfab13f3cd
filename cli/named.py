"""From settings to a model at its kept counts, with words for its outputs: of modes that need no labels."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data import ImageNetInfo

import diffrate
from cli.data import eval_dataset
from cli.entry import meta_model
from cli.model import compressed, plain_model
from cli.resume import use_searched
from cli.runtime import Runtime
from cli.settings import Settings
from cli.trained import output_names
from cli.weights import Weights, read_weights
from datasets import IMAGENET_CLASSES
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL


def named_model(
    settings: Settings, entry: ModelEntry, runtime: Runtime
) -> tuple[diffrate.CompressedModel, Sequence[str] | None]:
    """The model that the flags name, and words for its outputs, None where nobody says.

    Raises:
        CheckpointError, DataError, ScheduleError, UsageError: the weights, the data or the schedule are not there or
            do not fit.
    """
    meta_model(settings.model, entry)  # what compression does not take, before anything is downloaded
    weights = read_weights(settings.model, entry, runtime)
    model = compressed(plain_model(settings.model, entry, weights, entry.num_classes), settings.model, entry, weights)
    use_searched(model, settings, entry, runtime)
    return model.to(runtime.device), _class_names(settings, entry, weights, model.num_classes)


def _class_names(settings: Settings, entry: ModelEntry, weights: Weights, outputs: int) -> Sequence[str] | None:
    """A name for each of `outputs`: the weights' classes, else ImageNet's words, or the data's classes.

    Raises:
        DataError: the data that the flags name are not there.
    """
    if not outputs:
        return []
    info = ImageNetInfo()
    own = weights.classes if weights.classes is not None and set(weights.classes) != set(info.label_names()) else None
    if own is None and outputs == IMAGENET_CLASSES:
        return [info.index_to_description(index).split(",")[0] for index in range(outputs)]
    names = own
    if names is None and (settings.data.path is not None or entry.name == SAMPLE_MODEL):
        names = output_names(eval_dataset(settings, entry, None, None), outputs)
    return names
