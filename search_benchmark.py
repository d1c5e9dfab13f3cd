"""What one step of the search costs: time against a plain step, memory against training weights."""

from __future__ import annotations

import multiprocessing
import resource
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffrate
import models
from build import dense_model, input_size_of, patch

Step = Callable[[], None]
KINDS = ("plain", "search", "weights")


@dataclass(frozen=True)
class StepCost:
    """Seconds of both sides, round by round, and the memory that a step adds, in bytes."""

    batch_size: int
    plain_seconds: tuple[float, ...]
    search_seconds: tuple[float, ...]
    search_memory: int
    weights_memory: int

    @property
    def ratios(self) -> list[float]:
        """Search over plain, round by round."""
        return [search / plain for plain, search in zip(self.plain_seconds, self.search_seconds, strict=True)]

    def record(self) -> dict[str, Any]:
        """The figures for a JSON line."""
        return {
            "batch_size": self.batch_size,
            "plain_seconds": median(self.plain_seconds),
            "search_seconds": median(self.search_seconds),
            "time_ratio": median(self.ratios),
            "time_ratio_range": [min(self.ratios), max(self.ratios)],
            "search_memory": self.search_memory,
            "weights_memory": self.weights_memory,
            "memory_ratio": self.search_memory / self.weights_memory,
        }

    def line(self) -> str:
        """The figures for a reader."""
        low, high = min(self.ratios), max(self.ratios)
        share = self.search_memory / self.weights_memory
        return (
            f"batch {self.batch_size}: a search step takes {median(self.ratios):.2f} ({low:.2f} to {high:.2f}) of a "
            f"plain forward and backward to the input, and {share:.2f} of the memory of a search step that also "
            f"computes weight gradients ({self.search_memory / 2**20:.0f} of {self.weights_memory / 2**20:.0f} MiB)"
        )


def search_cost(args: Namespace, device: torch.device) -> StepCost:
    """Time the steps in turn in this process, and their memory each in a fresh one."""
    plain, search = (build_step(kind, args, device) for kind in KINDS[:2])
    for step in (plain, search):
        step()
    pairs = [(_seconds(plain, device), _seconds(search, device)) for _ in range(args.rounds)]
    return StepCost(
        batch_size=args.batch_size,
        plain_seconds=tuple(pair[0] for pair in pairs),
        search_seconds=tuple(pair[1] for pair in pairs),
        search_memory=step_memory("search", args, device),
        weights_memory=step_memory("weights", args, device),
    )


def build_step(kind: str, args: Namespace, device: torch.device) -> Step:
    """One step on random images: `plain`, `search`, or a search that trains `weights` as well."""
    entry = models.lookup(args.model)
    size = input_size_of(args, entry)
    torch.manual_seed(args.seed)
    model = dense_model(entry, size).requires_grad_(kind == "weights").train()
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    labels = torch.randint(0, entry.num_classes, (args.batch_size,), device=device)
    if kind == "plain":
        return _plain_step(model.to(device), images, labels)
    compressed = patch(model, entry, args).to(device)
    for rate in compressed.arch_parameters():
        rate.requires_grad_(True)
    return _search_step(compressed, images, labels)


def step_memory(kind: str, args: Namespace, device: torch.device) -> int:
    """Bytes that a step adds at its peak to what the process holds before it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (kind, args, str(device)))


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


def _measure(kind: str, args: Namespace, device: str) -> int:
    step = build_step(kind, args, torch.device(device))
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
