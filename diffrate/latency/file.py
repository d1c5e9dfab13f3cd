"""A table of times as a file: JSON that says what it holds, and is used again only where all of that is equal."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from diffrate.atomic import UNREADABLE, first_line, whole_file
from diffrate.latency.curves import Curve
from diffrate.latency.table import BlockTimes, LatencyTable

WHAT = "measured seconds of the parts of a model's blocks, for a batch"


class LatencyFileError(ValueError):
    """A file of times that cannot be read or written."""


def read_table(path: Path, setting: dict[str, Any]) -> LatencyTable | None:
    """The table at `path` if it was made for `setting`; None where there is none, or another's.

    Raises:
        LatencyFileError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["setting"] != setting:
            return None
        kinds = []
        for kind in content["kinds"]:
            curves = {name: _made(Curve, kind[name]) for name in ("attention", "mlp")}
            kinds.append(_made(BlockTimes, kind | curves))
        return _made(LatencyTable, content | {"kinds": kinds})
    except FileNotFoundError:
        return None
    except (*UNREADABLE, RecursionError) as error:
        raise LatencyFileError(
            f"{path}: cannot be read ({first_line(error)}); accepted: a file of measured times, or none"
        ) from error


def check_folder(folder: Path) -> None:
    """Make sure of a `folder` to write into, which is made where there is none.

    Raises:
        LatencyFileError: there can be none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LatencyFileError(f"{folder}: cannot be written to ({first_line(error)}); accepted: a folder") from error
    if not os.access(folder, os.W_OK):
        raise LatencyFileError(f"{folder}: cannot be written to; accepted: a folder of yours")


def write_table(path: Path, table: LatencyTable) -> None:
    """Leave the table at `path`, in a folder that is made where there is none.

    Raises:
        LatencyFileError: it cannot be written.
    """
    check_folder(path.parent)
    try:
        with whole_file(path) as file:
            file.write((json.dumps({"what": WHAT, **asdict(table)}, indent=1) + "\n").encode())
    except OSError as error:
        raise LatencyFileError(f"{path}: cannot be written ({first_line(error)})") from error


def _made(kind: type[Any], content: dict[str, Any]) -> Any:
    """A `kind` of dataclass of its fields in a file, where tuples are lists."""
    values = {item.name: content[item.name] for item in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
