"""Weights and images that depend on names and shapes alone: what the golden vectors were made with.

Each tensor is uniform noise seeded by the CRC-32 of its name in the official layout, scaled by its
role, so that any loader of official checkpoints can rebuild the same model.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1) that belong to `name`."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return generator.random(shape or (1,)).reshape(shape)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float64 parameter `name`."""
    values = noise(name, shape)
    if name.endswith(("cls_token", "pos_embed")):
        values = values - 0.5
    elif len(shape) > 1:
        values = (2 * values - 1) * 1.6 * np.sqrt(3 / np.prod(shape[1:]))
    elif name.endswith("bias"):
        values = 0.4 * (values - 0.5)
    else:
        values = 1 + 0.4 * (values - 0.5)
    return torch.from_numpy(np.ascontiguousarray(values))


def state_dict(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A whole checkpoint from its names and shapes."""
    return {name: tensor(name, tuple(shape)).to(dtype) for name, shape in shapes.items()}


def images(batch: int, size: int) -> Tensor:
    """Normalised input images `[batch, 3, size, size]` in float64."""
    return torch.from_numpy(4 * (noise(f"images{batch}x{size}", (batch, 3, size, size)) - 0.5))
