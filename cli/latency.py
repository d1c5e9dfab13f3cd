"""The seconds of a model's parts on this machine, from the file that keeps them or measured now."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import diffrate
from cli.settings import LatencySettings
from diffrate.latency.file import check_place
from diffrate.latency.measure import SECONDS
from diffrate.latency.setting import Use, setting_of
from processes.runtime import AMP_DTYPES, Runtime
from reporting.progress import Share

log = logging.getLogger(__name__)


def latency_table(
    settings: LatencySettings, model: diffrate.CompressedModel, runtime: Runtime
) -> diffrate.LatencyTable:
    """What `model` takes at any schedule, used as the flags say.

    Raises:
        LatencyFileError: the file that keeps it cannot be read or written.
    """
    dtype = AMP_DTYPES[settings.precision] or runtime.dtype
    use = Use(settings.batch_size, dtype, settings.compiled, runtime.device)
    setting = setting_of(model, use)
    file = settings.file or _kept_in(setting)
    log.info("latency: of %s on %s, kept in %s", use.words(), setting["machine"], file or "no file")
    with Share("Latency", SECONDS, runtime) as progress:
        return diffrate.measure_latency(
            model,
            use.batch_size,
            dtype,
            device=use.device,
            compile=use.compiled,
            file=file,
            progress=progress.advance,
        )


def _kept_in(setting: dict[str, object]) -> Path | None:
    """The file of a table where users' programs keep what can be made again; None where there is no such place."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        check_place(Path(base) / "diffrate" / "latency")
    except (RuntimeError, diffrate.LatencyFileError):  # nobody's home, or nothing may be written there
        return None
    name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / "diffrate" / "latency" / f"{name}.json"
