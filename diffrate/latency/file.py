"""A table of times as a file: JSON that says what it holds, and is used again only where all of that is equal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffrate.files import UNREADABLE, first_line, whole_file
from diffrate.latency.curves import AttentionTimes, Curve
from diffrate.latency.table import BlockTimes, LatencyTable


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
        return _from_plain(content)
    except FileNotFoundError:
        return None
    except (*UNREADABLE, RecursionError) as error:
        raise LatencyFileError(
            f"{path}: cannot be read ({first_line(error)}); accepted: a file of measured times, or none"
        ) from error


def check_place(folder: Path) -> None:
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
    check_place(path.parent)
    try:
        with whole_file(path) as file:
            file.write((json.dumps(_plain(table), indent=1) + "\n").encode())
    except OSError as error:
        raise LatencyFileError(f"{path}: cannot be written ({first_line(error)})") from error


def _plain(table: LatencyTable) -> dict[str, Any]:
    kinds = [
        {
            "attention": {"tokens": kind.attention.plain.tokens, "seconds": kind.attention.plain.seconds},
            "attention_asked": kind.attention.asked,
            "attention_sized": kind.attention.sized,
            "mlp": {"tokens": kind.mlp.tokens, "seconds": kind.mlp.seconds},
            "reduction": kind.reduction,
            "read": kind.read,
        }
        for kind in table.kinds
    ]
    return {
        "what": "measured seconds of the parts of a model's blocks, for a batch",
        "setting": table.setting,
        "kinds": kinds,
        "order": table.order,
        "embedding": table.embedding,
        "head": table.head,
        "tokens": table.tokens,
        "batch_size": table.batch_size,
    }


def _from_plain(content: dict[str, Any]) -> LatencyTable:
    kinds = tuple(
        BlockTimes(
            AttentionTimes(_curve(kind["attention"]), tuple(kind["attention_asked"]), tuple(kind["attention_sized"])),
            _curve(kind["mlp"]),
            tuple(kind["reduction"]),
            kind["read"],
        )
        for kind in content["kinds"]
    )
    head = content["head"]
    return LatencyTable(
        content["setting"],
        kinds,
        tuple(content["order"]),
        float(content["embedding"]),
        (float(head[0]), float(head[1])),
        int(content["tokens"]),
        int(content["batch_size"]),
    )


def _curve(plain: dict[str, Any]) -> Curve:
    return Curve(tuple(plain["tokens"]), tuple(plain["seconds"]))
