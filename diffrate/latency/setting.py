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
from diffrate.running.merging import merges_compiled
from diffrate.running.precision import place_of
from diffrate.running.speed import mode_name, precision_name

FORMAT = 2  # of the file, and of what is measured
OF_MODEL = ("tokens", "blocks", "kinds", "parameters", "image_size", "classes", "model", "rule", "mode")


class Use(NamedTuple):
    """How a model is used: images at a time, the type of its weights, as one compiled graph or not, where, and whether
    merging alone is compiled."""

    batch_size: int
    dtype: torch.dtype
    compiled: bool
    device: torch.device
    merging: bool = False

    @property
    def mode(self) -> str:
        """What tables call it."""
        return mode_name(self.compiled, self.merging)

    def words(self) -> str:
        """For a sentence."""
        return f"batch {self.batch_size}, {precision_name(self.dtype)}, {self.mode}"


def use_for(model: CompressedModel, batch_size: int, dtype: torch.dtype, compiled: bool, device: torch.device) -> Use:
    """How `model` would be used there."""
    return Use(batch_size, dtype, compiled, device, not compiled and merges_compiled(model, device))


def use_of(table: LatencyTable, device: torch.device) -> Use:
    """How the model was used when `table` was made, on `device`."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(table.setting["precision"])
    dtype = kind or getattr(torch, table.setting["precision"])
    mode = table.setting["mode"]
    return Use(table.batch_size, dtype, mode == mode_name(True), device, mode == mode_name(False, True))


class Kinds(NamedTuple):
    """The kinds of compressible blocks, described; the kind of each block; how many tokens are read of each kind."""

    names: tuple[str, ...]
    order: tuple[int, ...]
    read: tuple[int | None, ...]


def kinds_of(model: CompressedModel) -> Kinds:
    """Blocks of one kind have parts of the same types and shapes; the last one differs where little of it is read."""
    blocks = model.compressible_blocks()
    names: dict[str, int] = {}
    order, read = [], []
    for index, block in enumerate(blocks):
        shape, attention = block_shape(block), getattr(block, form_of(block).attention)
        shown = {"projections": shape.projections, "mixing": shape.mixing, "mlp": shape.mlp}
        of_it = model.read if index == len(blocks) - 1 else None
        heads = projection_of(attention)
        name = f"{type(block).__name__} {type(heads).__name__} {shown}, read {'all' if of_it is None else of_it}"
        if name not in names:
            names[name] = len(names)
            read.append(of_it)
        order.append(names[name])
    return Kinds(tuple(names), tuple(order), tuple(read))


def setting_of(model: CompressedModel, use: Use) -> dict[str, Any]:
    """Everything that times depend on, as plain values by name."""
    kinds = kinds_of(model)
    rates = {id(rate) for rate in model.arch_parameters()}
    return {
        "format": FORMAT,
        "machine": machine_name(use.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "batch_size": use.batch_size,
        "precision": precision_name(use.dtype),
        "mode": use.mode,
        "model": type(model).__name__,
        "rule": str(model.rule),
        "image_size": list(model.image_size),
        "tokens": model.compression.space.limits[0],
        "parameters": sum(weight.numel() for weight in model.parameters() if id(weight) not in rates),
        "classes": model.num_classes,
        "kinds": list(kinds.names),
        "blocks": list(kinds.order),
    }


def check_table(table: LatencyTable, model: CompressedModel) -> None:
    """Refuse a table that says itself that it is of another model.

    Raises:
        ValueError: names what differs.
    """
    use = use_of(table, place_of(model).device)
    expected = setting_of(model, use_for(model, use.batch_size, use.dtype, use.compiled, use.device))
    said = {**table.setting, "tokens": table.tokens, "blocks": list(table.order)}
    for name in OF_MODEL:
        if name in said and said[name] != expected[name]:
            raise ValueError(
                f"latency: found a table of a model with other {name} ({said[name]}); accepted: {expected[name]}"
            )
