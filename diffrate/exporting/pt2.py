"""`.pt2`: torch's own file of a graph, which torch alone loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from diffrate.exporting.runner import Runner
from diffrate.running.quiet import errors_alone

METADATA = "metadata.json"  # among the file's extra files


def write(program: ExportedProgram, entries: dict[str, str], path: Path) -> None:
    """Write `program` with `entries` as JSON among its extra files."""
    torch.export.save(program, path, extra_files={METADATA: json.dumps(entries)})


def run(path: Path, threads: int | None = None) -> Runner:
    """What runs the file; torch has its number of threads for the whole process."""
    extra = {METADATA: ""}
    with errors_alone("torch.export", "torch._export"):  # what is wrong with a file, the error says
        module = torch.export.load(path, extra_files=extra).module()

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return Runner(logits, json.loads(extra[METADATA] or "{}"))
