"""`--plot`: draw the plots of an output folder again, from its logs."""

from __future__ import annotations

import logging

from cli.settings import Settings
from drawing.plot_folder import draw_plots
from processes.runtime import Runtime

log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
    """Draw, and say what was drawn."""
    assert settings.run.folder is not None, "the mode that is asked for"
    for path in draw_plots(settings.run.folder):
        log.info("drew %s", path)
