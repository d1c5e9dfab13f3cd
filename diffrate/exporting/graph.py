"""A compressed model as one graph of images -> logits, for batches of any size."""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from diffrate.exporting.targets import ExportError
from diffrate.patch.base import CompressedModel
from diffrate.patch.sizes import input_size

TRACED_BATCH = 2  # of one image torch would make a constant


class Normalization(NamedTuple):
    """What images in [0, 1] are normalised with, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Logits(nn.Module):
    """Logits `[B, K]` in float32 of images `[B, C, H, W]` in float32, whatever the precision of the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: CompressedModel, dtype: torch.dtype, normalization: Normalization | None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.normalizes = normalization is not None
        if normalization is not None:
            self.register_buffer("mean", torch.tensor(normalization.mean)[:, None, None])
            self.register_buffer("std", torch.tensor(normalization.std)[:, None, None])

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
        with torch.no_grad(), warnings.catch_warnings():
            # torch's own code, at what it copies from and at what it deprecates.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.|copyreg")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|copyreg")
            return torch.export.export(
                Logits(still, dtype, normalization).eval(), (images,), dynamic_shapes=({0: Dim("batch")},)
            )
    except Exception as error:  # torch has a class for each thing that it cannot trace
        raise ExportError(f"{type(model).__name__}: torch cannot trace it ({_last_words(error)})") from error


def _at_rest(model: CompressedModel, dtype: torch.dtype) -> CompressedModel:
    """A copy of `model` to trace: on the CPU, its counts fixed, without the rate logits, which nothing reads then."""
    still = copy.deepcopy(model)
    still.compression.schedule = model.compression.current()
    still.compression._parameters.clear()
    still = still.to("cpu", dtype).eval().requires_grad_(False)
    still.settle()
    return still


def _last_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
