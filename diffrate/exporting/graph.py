"""A compressed model as one graph of images -> logits, for batches of any size."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from diffrate.atomic import first_line
from diffrate.exporting.targets import ExportError
from diffrate.patch.base import CompressedModel
from diffrate.patch.sizes import input_size
from diffrate.running.quiet import no_warnings_of

TRACED_BATCH = 2  # of one image torch would make a constant


class Normalization(NamedTuple):
    """What images in [0, 1] are normalised with, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def columns(self) -> tuple[Tensor, Tensor]:
        """Mean and std as images take them, `[C, 1, 1]`."""
        return torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]

    def apply(self, images: Tensor) -> Tensor:
        """Normalise images in [0, 1]."""
        mean, std = self.columns()
        return (images - mean) / std


class Logits(nn.Module):
    """Logits `[B, K]` in float32 of images `[B, C, H, W]` in float32, whatever the precision of the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CompressedModel, dtype: torch.dtype, normalization: Normalization | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.normalizes = normalization is not None
        if normalization is not None:
            for name, column in zip(normalization._fields, normalization.columns(), strict=True):
                self.register_buffer(name, column)

    def forward(self, images: Tensor) -> Tensor:
        """Of the model at its kept counts."""
        if self.normalizes:
            images = (images - self.mean) / self.std
        return self.model(images.to(self.dtype), return_flop=False).float()


def traced(model: CompressedModel, dtype: torch.dtype, normalization: Normalization | None) -> ExportedProgram:
    """`model` at its kept counts as a graph on the CPU, with weights in `dtype`; the model itself is not touched.

    Raises:
        ExportError: torch cannot trace it.
    """
    still = _at_rest(model, dtype)
    images = torch.zeros(TRACED_BATCH, *input_size(model))
    try:
        # torch's own code, at what it copies from and at what it deprecates.
        with torch.no_grad(), no_warnings_of(r"torch\.|copyreg"):
            return torch.export.export(
                Logits(still, dtype, normalization).eval(), (images,), dynamic_shapes=({0: Dim("batch")},)
            )
    except Exception as error:  # torch has a class for each thing that it cannot trace
        raise ExportError(f"{type(model).__name__}: torch cannot trace it ({first_line(error)})") from error


def _at_rest(model: CompressedModel, dtype: torch.dtype) -> CompressedModel:
    """A copy of `model` to trace: on the CPU, its counts fixed, without the rate logits, which nothing reads then."""
    still = copy.deepcopy(model)
    still.compression.schedule = model.compression.current()
    still.compression._parameters.clear()
    still = still.to("cpu", dtype).eval().requires_grad_(False)
    still.settle()
    return still
