"""A model as one compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def compile_model(model: nn.Module) -> Any:
    """`model` compiled as a whole for the shapes it is called with: no graph break goes unnoticed."""
    return torch.compile(model, fullgraph=True, dynamic=False)


class FixedBatch(nn.Module):
    """A compressed model that always sees `batch_size` images: a smaller batch is filled up.

    A compiled model would be compiled once more for the last batch of a data set, which takes longer
    than the batch.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size

    def forward(self, images: Tensor, return_flop: bool = False) -> Tensor:
        """Logits `[B, K]` of images `[B, 3, H, W]`, B up to the batch size; the cost is not to be had.

        Raises:
            ValueError: the cost is asked for.
        """
        if return_flop:
            raise ValueError("return_flop=True: accepted: False, the cost of a filled-up batch means nothing")
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - count, -1, -1, -1)])
        return self.model(images, return_flop=False)[:count]
