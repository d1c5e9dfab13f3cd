"""Checkpoints of a training: weights, optimizer and position, written whole, refused in another training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import diffrate
from cli.runtime import Runtime
from cli.training import Recipe
from diffrate.atomic import UNREADABLE, first_line
from utils import UsageError

KIND = "finetune"
LAST, BEST = "checkpoint.pth", "model_best.pth"
SAVE_SECONDS = 600.0  # in the middle of an epoch: a checkpoint holds three times the weights


@dataclass
class TrainingState:
    """Where a training stands: steps done in this epoch, their losses added up, the best top-1 so far."""

    epoch: int = 0
    step: int = 0
    losses: float = 0.0
    best: float | None = None


class TrainingCheckpoint:
    """The checkpoint of one training in the output folder; `flags` are what it was started with."""

    def __init__(
        self,
        model: diffrate.CompressedModel,
        recipe: Recipe,
        state: TrainingState,
        flags: Mapping[str, Any],
        runtime: Runtime,
    ) -> None:
        self.model, self.recipe, self.state, self.flags, self.runtime = model, recipe, state, flags, runtime
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether the last one is old enough for another in the middle of an epoch."""
        return time.monotonic() - self.saved > SAVE_SECONDS

    def save(self) -> None:
        """Write `checkpoint.pth`: all that is needed to go on."""
        recipe = self.recipe
        content = self._weights() | {
            "optimizer": recipe.optimizer.state_dict(),
            "scaler": recipe.scaler.state_dict(),
            "position": asdict(self.state),
        }
        self.runtime.save(content, LAST)
        self.saved = time.monotonic()

    def save_best(self) -> None:
        """Write `model_best.pth`: the weights."""
        self.runtime.save(self._weights(), BEST)

    def restore(self, path: Path) -> None:
        """Put the training back where the file left it.

        Raises:
            UsageError: the file is missing, damaged, or of something else.
        """
        content = read_training(path)
        try:
            self.model.load_state_dict(content["model"])
            if self.recipe.ema is not None:
                self.recipe.ema.module.load_state_dict(content["model_ema"])
            self.recipe.optimizer.load_state_dict(content["optimizer"])
            self.recipe.scaler.load_state_dict(content["scaler"])
            for name, value in content["position"].items():
                setattr(self.state, name, value)
        except UNREADABLE as error:
            raise UsageError(f"--resume {path}: does not fit this training ({first_line(error)})") from error

    def _weights(self) -> dict[str, Any]:
        content = {
            "mode": KIND,
            "model": self.model.state_dict(),
            "kept": self.model.get_kept_num(),
            "flags": dict(self.flags),
        }
        if self.recipe.ema is not None:
            content["model_ema"] = self.recipe.ema.module.state_dict()
        return content


def read_training(path: Path) -> dict[str, Any]:
    """The content of a training's checkpoint.

    Raises:
        UsageError: the file is missing, damaged, or of something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        where = f"--resume {path}: cannot be read ({first_line(error)})"
        raise UsageError(f"{where}; accepted: the {LAST} of --finetune") from error
    found = content.get("mode", "weights alone") if isinstance(content, dict) else type(content).__name__
    if found != KIND or "position" not in content:
        what = "weights alone" if found == KIND else found
        raise UsageError(f"--resume {path}: found a checkpoint of another kind ({what}); accepted: of --finetune")
    return content


def flags_in(path: str | Path) -> Mapping[str, Any] | None:
    """The flags of the training that left a file, None where it is no such file. Tensors are not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*UNREADABLE, SafetensorError):
        return None
    return content.get("flags") if isinstance(content, dict) and content.get("mode") == KIND else None
