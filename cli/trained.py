"""The trained model, and the validation split that it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cli.data import check_data_root, eval_dataset
from cli.entry import chosen_entry, meta_model
from cli.model import plain_model
from cli.schedules import chosen_schedule
from cli.settings import OFFICIAL, Settings
from cli.weights import Weights, read_weights
from datasets import DataError, LabelledDataset
from diffrate.budgets.budget import SHARE
from models.zoo import ModelEntry
from processes.runtime import Runtime
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError


@dataclass(frozen=True)
class Trained:
    """A plain model with its weights, and what it was and is evaluated on."""

    entry: ModelEntry
    model: nn.Module
    weights: Weights
    val: LabelledDataset

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the model's outputs, None where nobody says."""
        return output_names(self.val, self.model.num_classes, self.weights)


def trained_model(settings: Settings, runtime: Runtime, **options: Any) -> Trained:
    """The model with the weights that the flags name; `options` go to timm's constructor.

    Raises:
        CheckpointError, DataError, ScheduleError, UsageError: one of them is not there or does not fit.
    """
    entry = chosen_entry(settings.model)
    check_inputs(settings, entry)
    if entry.num_classes == 0 and settings.model.checkpoint == OFFICIAL:
        raise _no_head(entry.name)  # before anything is downloaded
    weights = read_weights(settings.model, entry, runtime)
    if weights.headless:
        raise _no_head(f"{entry.name}, checkpoint {weights.name}")
    try:
        val = eval_dataset(settings, entry, weights.head, weights.classes)
    except DataError as error:
        if settings.data.path is not None or entry.name == SAMPLE_MODEL:
            raise
        raise UsageError(f"--data-path is needed: the digits that ship do not fit {entry.name} ({error})") from error
    return Trained(entry, plain_model(settings.model, entry, weights, len(val.classes), **options), weights, val)


def check_inputs(settings: Settings, entry: ModelEntry) -> None:
    """Refuse what can be refused before any weights are downloaded or read.

    Raises:
        DataError, ScheduleError, UsageError: the data folder or the schedule is not there, or the model is
            none that compression takes.
    """
    check_data_root(settings.data)
    model = meta_model(settings.model, entry)
    if all(target.kind != SHARE for target in settings.model.targets):  # what a share means depends on the classes
        chosen_schedule(settings.model, entry, model)


def _no_head(name: str) -> UsageError:
    return UsageError(
        f"--model {name}: has no head, and so no classes to compare with labels; accepted: --checkpoint FILE with a "
        f"head, such as --finetune {OFFICIAL} leaves"
    )


def output_names(data: LabelledDataset, outputs: int, weights: Weights | None = None) -> Sequence[str] | None:
    """The names of a model's `outputs`: its weights' own, else the classes of its data."""
    if weights is not None and weights.classes is not None and len(weights.classes) == outputs:
        return weights.classes
    return list(data.classes) if len(data.classes) == outputs else None
