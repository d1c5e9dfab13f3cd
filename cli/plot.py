"""`--plot`, and the plots at the end of a run: from the logs in an output folder to files beside them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from cli import plots
from cli.plots import Record
from cli.runtime import FOUND, LATENCY, LOG, SCALING, SENSITIVITY, SPEED, STEPS, WORK, Runtime
from cli.settings import Settings
from diffrate.atomic import whole_file
from diffrate.schedule import ScheduleError
from utils import UsageError

DPI = 110
# The file of each plot, and the logs with its figures.
PLOTS = {
    "accuracy.png": (plots.accuracy_figure, LOG, FOUND),
    "kept_tokens.png": (plots.kept_tokens_figure, LOG, FOUND),
    "search_counts.png": (plots.search_figure, STEPS),
    "search_work.png": (plots.work_figure, WORK),
    "sensitivity.png": (plots.sensitivity_figure, SENSITIVITY),
    "speed.png": (plots.speed_figure, SPEED),
    "scaling.png": (plots.scaling_figure, SCALING),
    "latency.png": (plots.latency_figure, LATENCY),
}
log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
    """Draw every plot that the logs in the folder, and in the folders of its targets, have the figures for.

    Raises:
        UsageError: there is no such folder, no figure in it, or a log that is damaged.
    """
    folder = settings.run.folder
    assert folder is not None, "the mode that is asked for"
    if not folder.is_dir():
        raise UsageError(f"--plot {folder}: no such folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--plot {folder}: cannot be written")
    written = _draw_all(folder)
    if not written:
        raise UsageError(f"--plot {folder}: nothing to draw; accepted: the output folder of a run that scored or timed")
    for path in written:
        log.info("drew %s", path)


def plot_run(folder: Path) -> None:
    """The plots of a folder that a run has just written its figures to."""
    try:
        _draw_all(folder)
    except UsageError as error:  # the figures are safe; what is damaged was there before
        log.warning("no plots: %s", error)


def _draw_all(folder: Path) -> list[Path]:
    written = []
    for place in (folder, *sorted(folder.glob("target_*"))):
        logs = {name: _records(place / name) for _, *names in PLOTS.values() for name in names}
        for name, (draw, *names) in PLOTS.items():
            records = [record for log_name in names for record in logs[log_name]]
            try:
                figure = draw(records) if records else None
            except (KeyError, TypeError, ValueError, IndexError, ScheduleError) as error:
                raise UsageError(
                    f"{place}: no figures for {name} ({error!r}); accepted: logs as a run left them"
                ) from error
            if figure is not None:
                with whole_file(place / name) as file:
                    figure.savefig(file, format="png", dpi=DPI)
                written.append(place / name)
    return written


def _records(path: Path) -> list[Record]:
    """The rows of a benchmark's file, or the objects of a log, a line each; none where there is no file."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if path.suffix == ".json":
        return _rows(text, path, 0, "rows of a benchmark")
    lines = enumerate(text.splitlines(), start=1)
    return [record for number, line in lines for record in _rows(line, path, number, "a JSON object a line")]


def _rows(text: str, path: Path, line: int, accepted: str) -> list[Record]:
    """The objects of a list in JSON, or the one on this `line`, where it is no 0."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: line {line or error.lineno}: {error.msg}; accepted: {accepted}") from error
    rows = [found] if line else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}:{f' line {line}:' if line else ''} accepted: {accepted}")
    return rows
