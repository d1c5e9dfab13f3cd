"""A model as one compiled graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_model(model: nn.Module) -> Any:
    """`model` compiled as a whole for the shapes it is called with: no graph break goes unnoticed."""
    return torch.compile(model, fullgraph=True, dynamic=False)
