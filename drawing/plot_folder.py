"""`--plot`, and the plots at the end of a run: from the logs in an output folder to files beside them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from diffrate.budgets.schedule import ScheduleError
from diffrate.files import whole_file
from drawing.plots import (
    Record,
    accuracy_figure,
    kept_tokens_figure,
    latency_figure,
    scaling_figure,
    search_figure,
    sensitivity_figure,
    speed_figure,
    work_figure,
)
from reporting.records import FOUND, LATENCY, LOG, SCALING, SENSITIVITY, SPEED, STEPS, WORK
from utils import UsageError

DPI = 110
log = logging.getLogger(__name__)


def draw_plots(folder: Path) -> list[Path]:
    """Write every plot that the logs in `folder`, and in the folders of its targets, have the figures for.

    Raises:
        UsageError: there is no such folder, no figure in it, or a log that is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"--plot {folder}: no such folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--plot {folder}: cannot be written")
    written = _draw_all(folder)
    if not written:
        raise UsageError(f"--plot {folder}: nothing to draw; accepted: the output folder of a run that scored or timed")
    return written


def plot_run(folder: Path) -> None:
    """The plots of a folder that a run has just written its figures to."""
    try:
        _draw_all(folder)
    except UsageError as error:  # the figures are safe; what is damaged was there before
        log.warning("no plots: %s", error)


def _draw_all(folder: Path) -> list[Path]:
    return [path for place in (folder, *sorted(folder.glob("target_*"))) for path in _draw_folder(place)]


def _draw_folder(folder: Path) -> list[Path]:
    records, steps = _lines(folder / LOG) + _lines(folder / FOUND), _lines(folder / STEPS)
    speed, scaling = _table(folder / SPEED), _table(folder / SCALING)
    plots: list[tuple[str, Callable[[list[Record]], Figure | None], list[Record]]] = [
        ("accuracy.png", accuracy_figure, records),
        ("kept_tokens.png", kept_tokens_figure, records),
        ("search_counts.png", search_figure, steps),
        ("search_work.png", work_figure, _lines(folder / WORK)),
        ("sensitivity.png", sensitivity_figure, _lines(folder / SENSITIVITY)),
        ("speed.png", speed_figure, speed),
        ("scaling.png", scaling_figure, scaling),
        ("latency.png", latency_figure, _table(folder / LATENCY)),
    ]
    written = []
    for name, draw, data in plots:
        try:
            figure = draw(data) if data else None
        except (KeyError, TypeError, ValueError, IndexError, ScheduleError) as error:
            raise UsageError(
                f"{folder}: no figures for {name} ({error!r}); accepted: logs as a run left them"
            ) from error
        if figure is not None:
            with whole_file(folder / name) as file:
                figure.savefig(file, format="png", dpi=DPI)
            written.append(folder / name)
    return written


def _lines(path: Path) -> list[Record]:
    """The JSON objects of a log, a line each; none where there is no log."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        records.append(_object(line, f"{path}: line {number}"))
    return records


def _table(path: Path) -> list[Record]:
    """The rows of a benchmark's file; none where there is no file."""
    if not path.exists():
        return []
    try:
        rows = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: line {error.lineno}: {error.msg}; accepted: rows of a benchmark") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: accepted: rows of a benchmark")
    return rows


def _object(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: {error.msg}; accepted: a JSON object a line") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: accepted: a JSON object a line")
    return record


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
