"""Rows of figures as a table for readers, plain or in Markdown, and as JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffrate.files import whole_file


def table(rows: Sequence[Any], headings: Mapping[str, str]) -> list[str]:
    """Lines of aligned columns: the fields of `rows` that `headings` names, headings first.

    A field whose heading ends in `%` is a share of 1.
    """
    lines = _cells(rows, headings)
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def markdown(rows: Sequence[Any], headings: Mapping[str, str]) -> list[str]:
    """The same as a table of Markdown."""
    first, *others = (f"| {' | '.join(line)} |" for line in _cells(rows, headings))
    return [first, "|" + "---|" * len(headings), *others]


def write_rows(rows: Sequence[Any], folder: Path, name: str) -> None:
    """`name`.json and `name`.csv in `folder`, as whole files; `rows` are dataclass instances."""
    content = [asdict(row) for row in rows]
    with whole_file(folder / f"{name}.json") as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(content[0]))
    writer.writeheader()
    writer.writerows(content)
    with whole_file(folder / f"{name}.csv") as file:
        file.write(text.getvalue().encode())


def _cells(rows: Sequence[Any], headings: Mapping[str, str]) -> list[list[str]]:
    lines = [[_cell(getattr(row, name), heading) for name, heading in headings.items()] for row in rows]
    return [list(headings.values()), *lines]


def _cell(value: Any, heading: str) -> str:
    if heading.endswith("%"):
        return f"{100 * value:.0f}"
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
