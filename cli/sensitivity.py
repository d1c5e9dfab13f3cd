"""`--sensitivity`: what each block can lose alone, as a table, as records, and as a plot."""

from __future__ import annotations

import logging

import diffrate
from benchmarks.speed import table
from cli.data import calibration_dataset, eval_loader, warn_of_turned
from cli.log import Progress
from cli.model import checked_plan, chosen_entry, for_inference, patched, plain_model, read_weights
from cli.runtime import SENSITIVITY, Runtime
from cli.settings import OFFICIAL, Settings
from models import entry_of
from models.zoo import ModelEntry
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

log = logging.getLogger(__name__)


def run(settings: Settings, runtime: Runtime) -> None:
    """Measure, and leave a table in the log and a record of each reduction in the output folder.

    Raises:
        CheckpointError, DataError, UsageError: the model, its weights or the images are missing or do not fit.
        NonFiniteLossError: a loss is not finite.
    """
    images = settings.run.sensitivity
    assert images is not None, "the mode that is asked for"
    entry = chosen_entry(settings.model)
    plan = checked_plan(settings, entry)
    dataset = calibration_dataset(settings, entry, images)  # before anything is downloaded
    warn_of_turned(settings, runtime, dataset)
    if settings.model.checkpoint == OFFICIAL:
        _check_digits(settings, entry, entry.num_classes)
    weights = read_weights(settings.model, plan, runtime)
    _check_digits(settings, entry, entry.num_classes if weights.state is None else weights.head)
    model = patched(plain_model(settings.model, entry, weights, entry.num_classes), settings.model)
    running, inside = for_inference(model, False, settings.data.batch_size, runtime)
    assert isinstance(running, diffrate.CompressedModel), "it was not compiled"
    loader = eval_loader(dataset, settings, inside)
    blocks = len(running.compression.space.searchable)
    progress = Progress(len(loader) * blocks, "Sensitivity", len(dataset), inside)
    found = diffrate.sensitivity(
        running,
        loader,
        multi_label=settings.model.multi_label,
        device=inside.device,
        precision=inside.amp,
        callback=lambda block: progress.advance(lambda: f"block {block}"),
    )
    for one in found:
        runtime.append({"model": entry.name, **one.record()}, SENSITIVITY)
    rows = []
    for one in found:
        row = {"block": one.block, "kind": one.kind, "tokens": one.kept, "kept %": one.share, "loss": f"{one.loss:.2e}"}
        rows.append(row if one.agreement is None else row | {"top-1 as dense, %": one.agreement})
    for line in table(rows):
        log.info(line)


def _check_digits(settings: Settings, entry: ModelEntry, head: int | None) -> None:
    """Refuse the digits that ship for a model with another `head`, which was never shown any.

    Raises:
        UsageError: it has no data of its own.
    """
    if settings.data.path is None and entry.name != SAMPLE_MODEL and head != entry_of(SAMPLE_MODEL).num_classes:
        raise UsageError(
            f"--data-path is needed: the digits that ship do not fit {entry.name}; accepted: a folder of images"
        )
