"""What one step of the search costs: time against a plain step, memory against training weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffrate
from benchmarks.subject import Subject
from diffrate.running.timing import PairedTimes, peak_memory, time_in_turn

Step = Callable[[], None]


@dataclass(frozen=True)
class StepCost:
    """Times of a search step against a plain one, and the memory that a step adds, in bytes."""

    batch_size: int
    times: PairedTimes
    search_memory: int | None
    weights_memory: int | None

    @property
    def memory_ratio(self) -> float | None:
        """The search's memory over that of a search which also computes weight gradients."""
        if self.search_memory is None or self.weights_memory is None:
            return None
        return self.search_memory / self.weights_memory

    def record(self) -> dict[str, Any]:
        """The figures for a JSON line."""
        return {
            "batch_size": self.batch_size,
            "search_seconds": median(self.times.baseline),
            "plain_seconds": median(self.times.rival),
            "time_ratio": self.times.ratio,
            "time_ratio_range": self.times.spread,
            "search_memory": self.search_memory,
            "weights_memory": self.weights_memory,
            "memory_ratio": self.memory_ratio,
        }

    def lines(self) -> list[str]:
        """The figures for a reader."""
        low, high = self.times.spread
        lines = [
            f"batch {self.batch_size}: a search step takes {self.times.ratio:.2f} ({low:.2f} to {high:.2f}) of the "
            "time of a plain forward and backward to the input"
        ]
        if self.search_memory and self.weights_memory:
            lines.append(
                f"and {self.memory_ratio:.2f} of the memory of a search step that also computes weight gradients "
                f"({self.search_memory / 2**20:.0f} of {self.weights_memory / 2**20:.0f} MiB)"
            )
        return lines


def search_cost(subject: Subject, batch_size: int, rounds: int, device: torch.device) -> StepCost:
    """Time the steps in turn in this process, and their memory each in a fresh one."""
    search_memory, weights_memory = (
        peak_memory(build_step, kind, subject, batch_size, device, device=device) for kind in ("search", "weights")
    )
    search, plain = (build_step(kind, subject, batch_size, device) for kind in ("search", "plain"))
    times = time_in_turn(search, plain, rounds, device)
    return StepCost(batch_size, times, search_memory, weights_memory)


def build_step(kind: str, subject: Subject, batch_size: int, device: torch.device) -> Step:
    """One step on random images: `plain`, `search`, or a search that trains `weights` as well."""
    model = subject.dense() if kind == "plain" else subject.compressed()
    model = model.requires_grad_(kind == "weights").train().to(device)
    images = torch.randn(batch_size, 3, *subject.input_size, device=device)
    # Without a head, the features stand for classes: what a step costs is the same.
    outputs = subject.entry.num_classes or model.num_features
    labels = torch.randint(0, outputs, (batch_size,), device=device)
    if not isinstance(model, diffrate.CompressedModel):
        return _plain_step(model, images, labels)
    for rate in model.arch_parameters():
        rate.requires_grad_(True)
    return _search_step(model, images, labels)


def _plain_step(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    def step() -> None:
        F.cross_entropy(model(images.clone().requires_grad_(True)), labels).backward()

    return step


def _search_step(model: diffrate.CompressedModel, images: Tensor, labels: Tensor) -> Step:
    target = 0.6 * model.flops_at(model.dense_schedule())

    def step() -> None:
        logits, flops = model(images)
        (F.cross_entropy(logits, labels) + ((flops - target) / target) ** 2).backward()

    return step
