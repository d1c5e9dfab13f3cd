"""`--export`: the model as a file for another runtime."""

from __future__ import annotations

import logging

import torch

import diffrate
from cli.data import pictures
from cli.model import chosen_entry, named_model
from cli.runtime import AMP_DTYPES, Runtime
from cli.settings import Settings
from datasets import DataError
from diffrate.files.export import LEAST_IMAGES
from diffrate.files.graph import Normalization
from models.zoo import ModelEntry

log = logging.getLogger(__name__)
CHECKED = 32  # images of --data-path that a file is compared on


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
    images = None if settings.data.path is None else _pictures(settings, entry)
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
        images=images,
    )
    log.info("exported %s: %.3f GFLOPs, %.1f MiB", path, made.metadata.gflops, made.size / 2**20)
    agreement = made.agreement
    log.info(agreement.line())
    runtime.record(
        {
            "mode": "export",
            "model": entry.name,
            "file": str(path),
            "gflops": made.metadata.gflops,
            **{name: getattr(agreement, name) for name in ("difference", "top1", "images", "ties", "tied")},
        }
    )


def _pictures(settings: Settings, entry: ModelEntry) -> torch.Tensor:
    """Images of `--data-path` to compare the file on, as it takes them.

    Raises:
        DataError: there are none, or too few.
    """
    path = settings.data.path
    images = pictures(settings, entry, CHECKED)
    if len(images) < LEAST_IMAGES:
        raise DataError(f"--data-path {path}: found {len(images)} images; accepted: {LEAST_IMAGES} or more")
    log.info("comparing on %d images of %s", len(images), path)
    if not settings.run.export_normalize:
        return images
    normalization = Normalization(entry.mean, entry.std)
    return images * normalization.std + normalization.mean  # the file does what the transform has done
