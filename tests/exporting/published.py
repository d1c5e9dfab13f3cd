"""`python -m tests.exporting.published NAME TARGET...`: exported models of published schedules against the live ones.

Weights are random, and larger than fresh ones, so that it shows in the logits which tokens go.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import diffrate
import models
from cli.schedules import PROJECT_RATES
from diffrate.files.runtimes import load_exported
from diffrate.schedule import find_schedule

BATCHES = (1, 3, 8)  # from one file
SPREAD = 0.02  # added to the weights


def compressed(name: str, gflops: float) -> diffrate.CompressedModel:
    """The model `name` at its published schedule."""
    entry = models.entry_of(name)
    torch.manual_seed(0)
    model = diffrate.patch.vit(models.create(entry)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(SPREAD * torch.randn_like(parameter))
    schedule = find_schedule(PROJECT_RATES, entry.schedule_key, gflops)
    model.set_kept_num(schedule.prune, schedule.merge)
    return model


def difference(model: diffrate.CompressedModel, path: Path) -> tuple[float, float, int]:
    """The largest difference of the file's logits at `BATCHES`, the largest logit, and the bytes of the file."""
    made, found, largest = diffrate.export(model, path), 0.0, 0.0
    run = load_exported(path).logits
    images = torch.rand(sum(BATCHES), *made.metadata.input_size, generator=torch.Generator().manual_seed(1))
    for batch in images.split(BATCHES):
        expected = model(batch, return_flop=False)
        found = max(found, float((run(batch) - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    return found, largest, made.size


def main(words: Sequence[str]) -> None:
    """Print a row for each schedule."""
    name, *targets = words
    suffix = targets.pop() if targets[-1].startswith(".") else ".onnx"
    for target in targets:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            found, largest, size = difference(compressed(name, float(target)), Path(folder) / f"model{suffix}")
        print(f"| {name} | {target} | {suffix} | {found:.1e} of {largest:.1f} | {size / 2**20:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
