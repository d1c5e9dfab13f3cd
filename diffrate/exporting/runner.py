"""A file that has been loaded, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

INPUT, OUTPUT = "images", "logits"  # what the files call them


class Runner(NamedTuple):
    """What a file does, float32 images `[B, C, H, W]` on the CPU -> float32 logits `[B, K]`, and what it says of
    itself."""

    logits: Callable[[Tensor], Tensor]
    entries: Mapping[str, str]
