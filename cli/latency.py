"""The seconds of a model's parts on this machine, from the file that keeps them or measured now."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import diffrate
from cli.log import share
from cli.runtime import AMP_DTYPES, Runtime
from cli.settings import LatencySettings
from diffrate.atomic import cache_folder
from diffrate.budget import Target
from diffrate.latency.measure import SECONDS
from diffrate.latency.setting import Use, setting_of
from diffrate.searching.target import check_reach

log = logging.getLogger(__name__)


def latency_table(
    settings: LatencySettings, model: diffrate.CompressedModel, runtime: Runtime, targets: Iterable[Target] = ()
) -> diffrate.LatencyTable:
    """What `model` takes at any schedule, used as the flags say. Where it has to be measured, the `targets` are
    tried first.

    Raises:
        BudgetError: it is far out of reach.
        LatencyFileError: the file that keeps it cannot be read or written.
    """
    dtype = AMP_DTYPES[settings.precision] or runtime.dtype
    use = Use(settings.batch_size, dtype, settings.compiled, runtime.device)
    setting = setting_of(model, use)
    file = settings.file or _kept_in(setting)
    log.info("latency: of %s on %s, kept in %s", use.words(), setting["machine"], file or "no file")
    check_reach(model, targets, use, file)
    with share("Latency", SECONDS, runtime) as advance:
        return diffrate.measure_latency(
            model,
            use.batch_size,
            dtype,
            device=use.device,
            compile=use.compiled,
            file=file,
            progress=advance,
        )


def _kept_in(setting: dict[str, object]) -> Path | None:
    """The file of a table in the user's cache; None where there is none."""
    folder = cache_folder("latency")
    name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"{name}.json"
