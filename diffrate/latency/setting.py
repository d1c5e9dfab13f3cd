"""What a table of times is valid for (the model, the machine, and how it is used), and its file."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
import torch

from diffrate.atomic import UNREADABLE, first_line, read_json, whole_file
from diffrate.blocks.block import form_of
from diffrate.blocks.heads import projection_of
from diffrate.device import machine_name, placement_of
from diffrate.latency.table import BlockTimes, Curve, LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import block_shape
from diffrate.timing import SHORT_NAMES, Use, mode_name, precision_name

WHAT = "measured seconds of the parts of a model's blocks, for a batch"


class LatencyFileError(ValueError):
    """A file of times that cannot be read or written."""


def read_table(path: Path, setting: dict[str, Any]) -> LatencyTable | None:
    """The table at `path` if it was made for `setting`; None where there is no file, or one of another setting.
    LatencyFileError where the file holds no table."""
    try:
        content = read_json(path)
        if content["setting"] != setting:
            return None
        kinds = [
            _made(BlockTimes, kind | {name: _made(Curve, kind[name]) for name in ("attention", "mlp")})
            for kind in content["kinds"]
        ]
        return _made(LatencyTable, content | {"kinds": kinds})
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise LatencyFileError(
            f"{path}: cannot be read ({first_line(error)}); accepted: a file of measured times, or none"
        ) from error


def check_folder(folder: Path) -> None:
    """Make `folder` where there is none; LatencyFileError where it cannot be made, or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LatencyFileError(f"{folder}: cannot be written to ({first_line(error)}); accepted: a folder") from error


def write_table(path: Path, table: LatencyTable) -> None:
    """Write the table to `path`, in a folder that is made where there is none; LatencyFileError where that fails."""
    check_folder(path.parent)
    try:
        with whole_file(path) as file:
            file.write((json.dumps({"what": WHAT, **asdict(table)}, indent=1) + "\n").encode())
    except OSError as error:
        raise LatencyFileError(f"{path}: cannot be written ({first_line(error)})") from error


def _made(kind: type[Any], content: dict[str, Any]) -> Any:
    """A dataclass `kind` from its fields in a file, where tuples are lists."""
    values = {item.name: content[item.name] for item in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


FORMAT = 3  # of the file, and of what is measured
OF_MODEL = ("tokens", "blocks", "kinds", "parameters", "image_size", "classes", "model", "rule", "mode")


def use_of(table: LatencyTable, device: torch.device) -> Use:
    """How the model was used when `table` was made, on `device`."""
    name = table.setting["precision"]
    dtype = {short: dtype for dtype, short in SHORT_NAMES.items()}.get(name) or getattr(torch, name)
    return Use(table.batch_size, dtype, table.setting["mode"] == mode_name(True), device)


def kinds_of(model: CompressedModel) -> list[tuple[str, int | None]]:
    """The kind of each compressible block: its description, and how many of its first tokens are used, None for all.

    Blocks of one kind have parts of the same types and shapes; the last one differs where few of its tokens are used.
    """
    kinds, blocks = [], model.compressible_blocks()
    for block in blocks:
        shape, heads = block_shape(block), projection_of(getattr(block, form_of(block).attention))
        shown = {"projections": shape.projections, "mixing": shape.mixing, "mlp": shape.mlp}
        read = model.read if block is blocks[-1] else None
        name = f"{type(block).__name__} {type(heads).__name__} {shown}, read {'all' if read is None else read}"
        kinds.append((name, read))
    return kinds


def setting_of(model: CompressedModel, use: Use) -> dict[str, Any]:
    """Everything that times depend on, as plain values by name."""
    kinds = [name for name, _ in kinds_of(model)]
    different = list(dict.fromkeys(kinds))
    rates = {id(rate) for rate in model.arch_parameters()}
    return {
        "format": FORMAT,
        "machine": machine_name(use.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "batch_size": use.batch_size,
        "precision": precision_name(use.dtype),
        "mode": mode_name(use.compiled),
        "model": type(model).__name__,
        "rule": str(model.rule),
        "image_size": list(model.image_size),
        "tokens": model.compression.space.limits[0],
        "parameters": sum(weight.numel() for weight in model.parameters() if id(weight) not in rates),
        "classes": model.num_classes,
        "kinds": different,
        "blocks": [different.index(kind) for kind in kinds],
    }


def check_table(table: LatencyTable, model: CompressedModel) -> None:
    """ValueError where the table is of another model, as far as it shows that; names what differs."""
    expected = setting_of(model, use_of(table, placement_of(model).device))
    said = {**table.setting, "tokens": table.tokens, "blocks": list(table.order)}
    for name in OF_MODEL:
        if name in said and said[name] != expected[name]:
            raise ValueError(
                f"latency: found a table of a model with other {name} ({said[name]}); accepted: {expected[name]}"
            )
