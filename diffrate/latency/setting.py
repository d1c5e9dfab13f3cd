"""What a table of times holds for: the model, the machine, and how it is used."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch

from diffrate.blocks.forms import form_of
from diffrate.blocks.projection import projection_of
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import block_shape
from diffrate.running.machine import machine_name
from diffrate.running.precision import place_of
from diffrate.running.speed import mode_name, precision_name, precision_named

FORMAT = 2  # of the file, and of what is measured
OF_MODEL = ("tokens", "blocks", "kinds", "parameters", "image_size", "classes", "model", "rule", "mode")


class Use(NamedTuple):
    """How a model is used: images at a time, the type of its weights, as one compiled graph or not, and where."""

    batch_size: int
    dtype: torch.dtype
    compiled: bool
    device: torch.device

    def words(self) -> str:
        """For a sentence."""
        return f"batch {self.batch_size}, {precision_name(self.dtype)}, {mode_name(self.compiled)}"


def use_of(table: LatencyTable, device: torch.device) -> Use:
    """How the model was used when `table` was made, on `device`."""
    dtype = precision_named(table.setting["precision"])
    return Use(table.batch_size, dtype, table.setting["mode"] == mode_name(True), device)


def kinds_of(model: CompressedModel) -> list[tuple[str, int | None]]:
    """The kind of each compressible block: its description, and how many first tokens are read of it, None for all.

    Blocks of one kind have parts of the same types and shapes; the last one differs where little of it is read.
    """
    kinds = []
    blocks = model.compressible_blocks()
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
    """Refuse a table that says itself that it is of another model.

    Raises:
        ValueError: names what differs.
    """
    expected = setting_of(model, use_of(table, place_of(model).device))
    said = {**table.setting, "tokens": table.tokens, "blocks": list(table.order)}
    for name in OF_MODEL:
        if name in said and said[name] != expected[name]:
            raise ValueError(
                f"latency: found a table of a model with other {name} ({said[name]}); accepted: {expected[name]}"
            )
