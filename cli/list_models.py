"""`--list-models`: the names of the models that can be compressed."""

from __future__ import annotations

import os
import sys

from torch import nn

import diffrate
import models
from cli.runtime import Runtime
from cli.settings import Settings
from utils import UsageError


def run(settings: Settings, runtime: Runtime) -> None:
    """Print a name a line, as they are found.

    Raises:
        UsageError: there are none.
    """
    pattern = settings.run.pattern
    assert pattern is not None, "the mode that is asked for"
    if not runtime.processes.is_main:
        return
    found = False
    try:
        for name in models.supported_names(pattern, diffrate.patch.families(), _is_supported):
            print(name, flush=True)  # for pipes: not the log, which has the time before each line
            found = True
    except BrokenPipeError:  # as of `head`: nobody reads on, and Python would complain when it closes the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if not found:
        raise UsageError(
            f"--list-models {pattern}: no model that can be compressed; accepted: a pattern such as 'vit_*'"
        )


def _is_supported(model: nn.Module) -> bool:
    try:
        with models.shapes_alone():
            diffrate.patch.vit(model)
    except diffrate.UnsupportedModelError:
        return False
    return True
