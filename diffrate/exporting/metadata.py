"""What an exported file says of its model, as entries of plain text, whatever the kind of file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffrate.budgets.schedule import Schedule
from diffrate.exporting.targets import ExportError
from diffrate.saving.about import FORMAT_FIELD, Header, arrays_as_tuples

FORMAT = "diffrate export 1"


@dataclass(frozen=True, kw_only=True)
class Metadata(Header):
    """What an exported file says of its model, beside what all files say.

    model: what its maker calls it. dense_gflops: as `gflops`, with all tokens.
    normalizes: whether the file normalises images itself, and takes them in [0, 1].
    precision: of the weights; images and logits are float32 in any.
    """

    model: str
    dense_gflops: float
    normalizes: bool
    precision: str

    def entries(self) -> dict[str, str]:
        """JSON for each field, and for the format's name."""
        return {name: json.dumps(value) for name, value in {FORMAT_FIELD: FORMAT, **asdict(self)}.items()}

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
            schedule = Schedule(**arrays_as_tuples(values.pop("schedule")))
            return cls(schedule=schedule, **arrays_as_tuples(values))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{where}: damaged metadata ({error}); accepted: a file of --export") from error
