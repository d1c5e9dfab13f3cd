"""Throughput of a compressed model against the plain one, in turn, in one process.

Machines drift: each round times both sides back to back, and what counts is the median of the
rounds' ratios, not any absolute time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.patch.base import CompressedModel


@dataclass(frozen=True)
class Comparison:
    """Seconds per batch of both sides, round by round, and what the FLOPs promise."""

    batch_size: int
    plain_seconds: tuple[float, ...]
    compressed_seconds: tuple[float, ...]
    ideal: float

    @property
    def ratios(self) -> list[float]:
        """Speed-up of each round."""
        pairs = zip(self.plain_seconds, self.compressed_seconds, strict=True)
        return [plain / compressed for plain, compressed in pairs]

    def record(self) -> dict[str, Any]:
        """The figures for a JSON line."""
        return {
            "batch_size": self.batch_size,
            "plain_images_per_second": self.batch_size / median(self.plain_seconds),
            "compressed_images_per_second": self.batch_size / median(self.compressed_seconds),
            "speedup": median(self.ratios),
            "speedup_range": [min(self.ratios), max(self.ratios)],
            "ideal_speedup": self.ideal,
        }

    def line(self) -> str:
        """The figures for a reader."""
        figures = self.record()
        low, high = figures["speedup_range"]
        return (
            f"batch {self.batch_size}: plain {figures['plain_images_per_second']:.1f} images/s, "
            f"compressed {figures['compressed_images_per_second']:.1f} images/s, "
            f"speed-up {figures['speedup']:.2f} ({low:.2f} to {high:.2f}), "
            f"ideal {self.ideal:.2f}, share of the ideal {figures['speedup'] / self.ideal:.0%}"
        )


@torch.inference_mode()
def compare_speed(
    plain: nn.Module, compressed: CompressedModel, images: Tensor, rounds: int, amp: torch.dtype | None
) -> Comparison:
    """Time both models on `images` `[B, 3, H, W]`, `rounds` times in turn after a warm-up."""
    plain.eval()
    compressed.eval()
    device = images.device
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        sides = (lambda: plain(images), lambda: compressed(images, return_flop=False))
        for side in sides:  # warm-up: allocations, kernel choices
            side()
        pairs = [tuple(_seconds(side, device) for side in sides) for _ in range(rounds)]
    return Comparison(
        batch_size=len(images),
        plain_seconds=tuple(pair[0] for pair in pairs),
        compressed_seconds=tuple(pair[1] for pair in pairs),
        ideal=compressed.flops_at(compressed.dense_schedule()) / compressed.flops(),
    )


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
