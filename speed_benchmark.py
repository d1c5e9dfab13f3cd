"""`--benchmark`: throughput of a compressed model against the plain one, in every precision asked for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import diffrate
import models
from build import compress, dense_model, input_size_of
from diffrate.benchmark import peak_memory, time_in_turn
from diffrate.compiled import compile_model
from utils import AMP_DTYPES

SIDES = ("dense", "compressed")
HEADINGS = {
    "batch_size": "batch",
    "precision": "precision",
    "mode": "mode",
    "dense_images_per_second": "dense img/s",
    "compressed_images_per_second": "compr. img/s",
    "dense_ms_per_image": "dense ms/img",
    "compressed_ms_per_image": "compr. ms/img",
    "dense_gflops": "dense GFLOPs",
    "compressed_gflops": "compr. GFLOPs",
    "speedup": "speed-up",
    "speedup_low": "lowest",
    "speedup_high": "highest",
    "ideal_speedup": "ideal",
    "share_of_ideal": "share %",
    "dense_memory_mib": "dense MiB",
    "compressed_memory_mib": "compr. MiB",
}


@dataclass(frozen=True)
class SpeedRow:
    """One line of the table: both sides at one batch size, precision and mode.

    Times are medians over the rounds; the speed-up is the median of the rounds' ratios, with the
    lowest and the highest; memory is what a batch adds at its peak.
    """

    model: str
    batch_size: int
    precision: str
    mode: str
    dense_images_per_second: float
    compressed_images_per_second: float
    dense_ms_per_image: float
    compressed_ms_per_image: float
    dense_gflops: float
    compressed_gflops: float
    speedup: float
    speedup_low: float
    speedup_high: float
    ideal_speedup: float
    share_of_ideal: float
    dense_memory_mib: float | None
    compressed_memory_mib: float | None

    def line(self) -> str:
        """The row as a sentence."""
        return (
            f"batch {self.batch_size}, {self.precision} {self.mode}: dense {self.dense_images_per_second:.1f} "
            f"images/s, compressed {self.compressed_images_per_second:.1f} images/s, speed-up {self.speedup:.2f} "
            f"({self.speedup_low:.2f} to {self.speedup_high:.2f}), {self.share_of_ideal:.0%} of the ideal "
            f"{self.ideal_speedup:.2f}"
        )


def speed_rows(args: Namespace, device: torch.device) -> Iterator[SpeedRow]:
    """A row for each batch size, precision and mode that the flags ask for.

    Raises:
        ScheduleError: no such schedule, or one that does not fit; before anything is timed.
    """
    costs = _costs(args)
    for precision in [args.amp] if args.amp else ["off", "bf16"]:
        for compiled in (False, True) if args.compile else (False,):
            for batch_size in args.batch_sizes:
                yield _row(args, batch_size, precision, compiled, device, costs)


def build_side(
    side: str, args: Namespace, batch_size: int, precision: str, compiled: bool, device: str
) -> Callable[[], Tensor]:
    """A forward pass of the dense or the compressed model on random images; weights are random too."""
    entry = models.lookup(args.model)
    size = input_size_of(args, entry)
    torch.manual_seed(args.seed)
    dtype = AMP_DTYPES[precision] or torch.float32
    model: nn.Module = dense_model(entry, size)
    if side == "compressed":
        model = compress(model, entry, args)
    return forward_pass(model, batch_size, size, torch.device(device), dtype, compiled)


def forward_pass(
    model: nn.Module, batch_size: int, size: int, device: torch.device, dtype: torch.dtype, compiled: bool = False
) -> Callable[[], Tensor]:
    """What runs `model`, plain or compressed, on random images of `size`; the model is changed in place."""
    model = model.eval().requires_grad_(False).to(device, dtype)
    images = torch.randn(batch_size, 3, size, size, device=device, dtype=dtype)
    forward = compile_model(model) if compiled else model
    options: dict[str, Any] = {"return_flop": False} if isinstance(model, diffrate.CompressedModel) else {}

    def run() -> Tensor:
        with torch.inference_mode():
            return forward(images, **options)

    return run


def _row(
    args: Namespace, batch_size: int, precision: str, compiled: bool, device: torch.device, costs: tuple[int, int]
) -> SpeedRow:
    """Measure one row; `costs` are the multiply-accumulates of an image, dense and compressed."""
    setting = (args, batch_size, precision, compiled, str(device))
    memory = [peak_memory(build_side, side, *setting, device=device) for side in SIDES]
    times = time_in_turn(*(build_side(side, *setting) for side in SIDES), args.rounds, device)
    dense, compressed = costs
    return SpeedRow(
        model=args.model,
        batch_size=batch_size,
        precision=precision_name(precision),
        mode="compiled" if compiled else "eager",
        dense_images_per_second=batch_size / median(times.baseline),
        compressed_images_per_second=batch_size / median(times.rival),
        dense_ms_per_image=1000 * median(times.baseline) / batch_size,
        compressed_ms_per_image=1000 * median(times.rival) / batch_size,
        dense_gflops=dense / 1e9,
        compressed_gflops=compressed / 1e9,
        speedup=times.ratio,
        speedup_low=times.spread[0],
        speedup_high=times.spread[1],
        ideal_speedup=dense / compressed,
        share_of_ideal=times.ratio * compressed / dense,
        dense_memory_mib=_mib(memory[0]),
        compressed_memory_mib=_mib(memory[1]),
    )


def precision_name(amp: str) -> str:
    """What tables call the precision that `--amp` asks for."""
    return "float32" if amp == "off" else amp


def _costs(args: Namespace) -> tuple[int, int]:
    """Multiply-accumulates of an image, dense and compressed."""
    entry = models.lookup(args.model)
    with torch.device("meta"):
        model = compress(dense_model(entry, input_size_of(args, entry)), entry, args)
    return model.flops_at(model.dense_schedule()), model.flops()


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
