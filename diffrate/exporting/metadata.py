"""What an exported file says of its model, as entries of plain text, whatever the kind of file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffrate.budgets.schedule import Schedule
from diffrate.exporting.targets import ExportError

FORMAT_FIELD, FORMAT = "format", "diffrate export 1"


@dataclass(frozen=True)
class Metadata:
    """What an exported file says of its model.

    model: what its maker calls it. schedule: kept counts per block, with the tokens that enter the first.
    gflops, dense_gflops: 10^9 multiply-accumulates of one image, at the schedule and with all tokens.
    input_size: channels, height and width of the images, in pixels.
    mean, std: what images in [0, 1] are normalised with, per channel; None where the model does not say.
    normalizes: whether the file does that itself, and takes images in [0, 1].
    precision: of the weights; images and logits are float32 in any.
    classes: words for the outputs, in order. versions: of diffrate, timm and torch, that the file was made with.
    """

    model: str
    schedule: Schedule
    gflops: float
    dense_gflops: float
    input_size: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalizes: bool
    precision: str
    classes: tuple[str, ...] | None
    versions: dict[str, str]

    def entries(self) -> dict[str, str]:
        """JSON for each field, and for the format's name."""
        return {FORMAT_FIELD: json.dumps(FORMAT)} | {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def of_entries(cls, entries: Mapping[str, str], where: str) -> Metadata:
        """The inverse of `entries`; `where` they come from starts the message.

        Raises:
            ExportError: they are not of an export, or one is missing or damaged.
        """
        if entries.get(FORMAT_FIELD) != json.dumps(FORMAT):
            found = entries.get(FORMAT_FIELD, "none")
            raise ExportError(f"{where}: found the format {found}; accepted: {json.dumps(FORMAT)}, a file of --export")
        try:
            values: dict[str, Any] = {name: json.loads(entries[name]) for name in cls.__dataclass_fields__}
            schedule = values.pop("schedule")
            prune = schedule["prune"] and tuple(schedule["prune"])
            arrays = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(schedule=Schedule(prune, tuple(schedule["merge"]), schedule["tokens"]), **{**values, **arrays})
        except (KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{where}: damaged metadata ({error}); accepted: a file of --export") from error
