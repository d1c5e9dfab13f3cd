"""How many steps of a search by gradient fit into the time that there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from diffrate.group import least
from diffrate.searching.checkpoint import read_checkpoint
from diffrate.searching.loop import Search
from diffrate.searching.settings import Course

TIMED = 3  # steps, after one to warm up; the fastest counts


def paced(course: Course, seconds: float, a_step: float) -> Course:
    """As much of `course` as fits: fewer epochs, and at least one step."""
    fitting = max(1, int(seconds / a_step))
    steps = min(course.steps, fitting)
    epochs = max(1, min(course.settings.epochs, fitting // steps))
    return replace(course, settings=replace(course.settings, epochs=epochs), steps=steps)


def paced_here(search: Search, loader: Any, seconds: float) -> Course:
    """As much of the course of `search` as fits into `seconds` where it runs, on the first batches of `loader`.

    The same in all processes.
    """
    device = search.means.place.device
    a_step = max(1e-6, search.seconds_a_step(loader, TIMED))
    fitting = paced(search.course, seconds, a_step)
    total = least(fitting.settings.epochs * fitting.steps, device)
    return paced(search.course, float(total), 1.0)


def paced_before(course: Course, path: Path) -> Course:
    """As much of `course` as the search in a checkpoint was to run.

    Raises:
        SearchCheckpointError: as `read_checkpoint`.
    """
    before = read_checkpoint(path).get("settings", {})
    total = int(before.get("epochs", course.settings.epochs)) * int(before.get("steps", course.steps))
    return paced(course, float(total), 1.0)
