"""`--export`: the model as a file for another runtime."""

from __future__ import annotations

import logging

import torch

import diffrate
from cli.entry import chosen_entry
from cli.named import named_model
from cli.settings import Settings
from processes.runtime import AMP_DTYPES, Runtime

log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
    """Write the file that `--export` names, and say how it compares with the model; main process only.

    Raises:
        CheckpointError, DataError, ScheduleError, UsageError: the model is not there or does not fit.
        ExportError: it cannot be written, or would not agree with the model.
    """
    path = settings.run.export
    assert path is not None, "the mode that is asked for"
    entry = chosen_entry(settings.model)
    model, names = named_model(settings, entry, runtime)
    if not runtime.processes.is_main:
        return
    made = diffrate.export(
        model,
        path,
        dtype=AMP_DTYPES.get(settings.run.export_dtype) or torch.float32,
        normalize=settings.run.export_normalize,
        opset=settings.run.export_opset,
        name=entry.name,
        classes=names or None,
        mean=entry.mean,
        std=entry.std,
        seed=settings.run.seed,
    )
    log.info("exported %s: %.3f GFLOPs, %.1f MiB", path, made.metadata.gflops, made.size / 2**20)
    log.info(made.agreement.line())
    agreement = made.agreement
    runtime.record(
        {
            "mode": "export",
            "model": entry.name,
            "file": str(path),
            "gflops": made.metadata.gflops,
            "difference": agreement.difference,
            "top1": agreement.top1,
        }
    )
