"""Rows of figures, dictionaries by the names of columns: as tables for readers, as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from diffrate.atomic import whole_file

Row = dict[str, Any]
# What headings write for parts of the columns' names, the longer ones first.
SHORT = {
    "images_per_second": "img/s",
    "share_of_ideal": "share %",
    "ideal_speedup": "ideal",
    "speedup_high": "highest",
    "speedup_low": "lowest",
    "ms_per_image": "ms/img",
    "batch_size": "batch",
    "compressed": "compr.",
    "memory_mib": "MiB",
    "speedup": "speed-up",
    "gflops": "GFLOPs",
    "mib": "MiB",
    "_": " ",
}


def line(row: Row) -> str:
    """A row by itself, without the model."""
    headings, cells = _cells([row], ("model",))
    return ", ".join(f"{heading} {cell}" for heading, cell in zip(headings, cells, strict=True))


def table(rows: Sequence[Row], hidden: Collection[str] = ("model",)) -> list[str]:
    """Lines of aligned columns, headings first, without the columns that are `hidden`."""
    lines = _cells(rows, hidden)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def markdown(rows: Sequence[Row], hidden: Collection[str] = ()) -> list[str]:
    """The same as a table of Markdown."""
    first, *others = (f"| {' | '.join(line)} |" for line in _cells(rows, hidden))
    return [first, "|" + "---|" * (first.count("|") - 1), *others]


def write_rows(rows: Sequence[Row], folder: Path, name: str) -> None:
    """`name`.json and `name`.csv in `folder`, as whole files."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    for ending, content in (("json", json.dumps(rows, indent=2) + "\n"), ("csv", text.getvalue())):
        with whole_file(folder / f"{name}.{ending}") as file:
            file.write(content.encode())


def _cells(rows: Sequence[Row], hidden: Collection[str]) -> list[list[str]]:
    headings = {name: _heading(name) for name in rows[0] if name not in hidden}
    return [list(headings.values()), *([_cell(row[name], headings[name]) for name in headings] for row in rows)]


def _heading(name: str) -> str:
    for part, short in SHORT.items():
        name = name.replace(part, short)
    return name


def _cell(value: Any, heading: str) -> str:
    """A column whose heading ends in `%` is a share of 1."""
    if heading.endswith("%"):
        return f"{100 * value:.0f}"
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
