"""`--benchmark search`, `latency` and `loading`: a step of the search, the parts of a block, the reading of images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import diffrate
from benchmarks.speed import Row, Subject, memory_mib
from cli.runtime import Runtime
from datasets import ImageLoader
from diffrate.latency.table import BlockTimes
from diffrate.schedule import Kept
from diffrate.timing import time_all_in_turn, time_in_turn

ROWS = 13  # token counts of a kind of block
GONE = 0.1  # of the tokens, in the prices of reductions
PASSES = 3


def step_row(subject: Subject, batch_size: int, rounds: int, device: torch.device) -> Row:
    """What a step of the search costs: its time against a plain step, timed in turn, and its memory against that of a
    step which also computes weight gradients."""
    use = (subject, batch_size, device)
    memory = [memory_mib(build_step, kind, *use, device=device) for kind in ("search", "weights")]
    search, plain = (build_step(kind, *use) for kind in ("search", "plain"))
    times = time_in_turn(search, plain, rounds, device)
    return {
        "model": subject.entry.name,
        "batch_size": batch_size,
        "search_seconds": median(times.baseline),
        "plain_seconds": median(times.rival),
        "time_ratio": times.ratio,
        "time_ratio_low": times.spread[0],
        "time_ratio_high": times.spread[1],
        "search_memory_mib": memory[0],
        "weights_memory_mib": memory[1],
        "memory_ratio": memory[0] / memory[1] if memory[0] and memory[1] else None,
    }


def build_step(kind: str, subject: Subject, batch_size: int, device: torch.device) -> Callable[[], None]:
    """One step on random images: `plain`, `search`, or a search that trains `weights` as well."""
    model = subject.dense() if kind == "plain" else subject.compressed()
    model = model.requires_grad_(kind == "weights").train().to(device)
    images = torch.randn(batch_size, 3, *subject.input_size, device=device)
    # Without a head, the features stand for classes: what a step costs is the same.
    outputs = subject.entry.num_classes or model.num_features
    labels = torch.randint(0, outputs, (batch_size,), device=device)
    if not isinstance(model, diffrate.CompressedModel):
        return lambda: F.cross_entropy(model(images.clone().requires_grad_(True)), labels).backward()
    for rate in model.arch_parameters():
        rate.requires_grad_(True)
    target = 0.6 * model.flops_at(model.dense_schedule())

    def step() -> None:
        logits, flops = model(images)
        (F.cross_entropy(logits, labels) + ((flops - target) / target) ** 2).backward()

    return step


def latency_rows(name: str, table: diffrate.LatencyTable) -> Iterator[Row]:
    """Milliseconds of a batch in the first block of each kind, by the tokens that enter and, of the MLP, leave it.

    sized: what attention takes more where tokens stand for several. prune, merge: what it takes that a tenth of the
    tokens goes, MLP apart; None where the kind reduces nothing. rest: outside the blocks.
    """
    for kind, times in enumerate(table.kinds):
        counts = {max(1, round(table.tokens * part / ROWS)) for part in range(1, ROWS + 1)}
        for tokens in sorted(counts, reverse=True):
            yield {
                "model": name,
                "batch_size": table.batch_size,
                "precision": table.setting["precision"],
                "mode": table.setting["mode"],
                "block": table.order.index(kind),
                "tokens": tokens,
                "attention_ms": 1000 * times.plain[tokens],
                "sized_ms": 1000 * times.sized[tokens],
                "mlp_ms": 1000 * times.after[tokens if times.read is None else times.read],
                "prune_ms": _price(times, tokens, merging=False),
                "merge_ms": _price(times, tokens, merging=True),
                "rest_ms": 1000 * table.rest(),
            }


def _price(times: BlockTimes, tokens: int, merging: bool) -> float | None:
    """Of letting a tenth of the tokens go, in milliseconds."""
    if not times.reduction or tokens < 2:
        return None
    left = tokens - max(1, round(GONE * tokens))
    return 1000 * times.price(Kept(tokens, tokens if merging else left, left), sized=False)


def loading_row(model: nn.Module, loader: ImageLoader, name: str, flops: int, runtime: Runtime) -> Row:
    """Throughputs of whole batches of `loader` alone, of `model` alone, called `name` and of `flops` an image, and of
    evaluation: medians over passes in turn."""
    model.eval()
    batch = next(iter(loader))[0].to(runtime.device, runtime.dtype)

    def compute(batches: Iterable[torch.Tensor]) -> None:
        with torch.inference_mode(), runtime.autocast():
            for images in batches:
                model(images, return_flop=False)

    runs = (
        lambda: deque(loader, maxlen=0),
        lambda: compute([batch] * len(loader)),
        lambda: compute(images.to(runtime.device, runtime.dtype, non_blocking=True) for images, _ in loader),
    )
    images = len(loader) * (loader.batch_size or 1)
    times = time_all_in_turn(runs, PASSES, runtime.device, shortest=1e-9)  # a pass is long enough
    loading, computing, both = (images / median(seconds) for seconds in times)
    return {
        "model": name,
        "batch_size": loader.batch_size,
        "gflops": flops / 1e9,
        "images": images,
        "loader_images_per_second": loading,
        "model_images_per_second": computing,
        "both_images_per_second": both,
        "bound_by": "model" if loading > computing else "loader",
    }
