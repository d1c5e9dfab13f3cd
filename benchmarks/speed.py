"""`--benchmark`: throughput of a compressed model against the plain one, in every precision asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import diffrate
import models
from benchmarks.subject import Subject
from diffrate.running.speed import forward_pass, mode_name, precision_name, speed_of
from diffrate.running.timing import peak_memory, time_in_turn

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
class SpeedRow(diffrate.Speed):
    """One line of the table: both sides at one batch size, precision and mode.

    Memory is what a batch adds at its peak.
    """

    model: str
    mode: str
    dense_memory_mib: float | None
    compressed_memory_mib: float | None

    @property
    def setting(self) -> str:
        return f"{self.precision} {self.mode}"


def speed_rows(
    subject: Subject,
    batch_sizes: Iterable[int],
    dtypes: Iterable[torch.dtype],
    modes: Iterable[bool],
    rounds: int,
    device: torch.device,
) -> Iterator[SpeedRow]:
    """A row for each precision, mode (compiled or not) and batch size."""
    with models.shapes_alone():
        model = subject.compressed()
    costs = model.flops_at(model.dense_schedule()), model.flops()
    for dtype in dtypes:
        for compiled in modes:
            for batch_size in batch_sizes:
                yield _row(subject, batch_size, dtype, compiled, rounds, device, costs)


def build_side(
    side: str, subject: Subject, batch_size: int, dtype: torch.dtype, compiled: bool, device: str
) -> Callable[[], Tensor]:
    """A forward pass of the dense or the compressed model on random images."""
    model = subject.dense() if side == "dense" else subject.compressed()
    return forward_pass(model, batch_size, subject.input_size, torch.device(device), dtype, compiled)


def _row(
    subject: Subject,
    batch_size: int,
    dtype: torch.dtype,
    compiled: bool,
    rounds: int,
    device: torch.device,
    costs: tuple[int, int],
) -> SpeedRow:
    """Measure one row; `costs` are the multiply-accumulates of an image, dense and compressed."""
    setting = (subject, batch_size, dtype, compiled, str(device))
    memory = [peak_memory(build_side, side, *setting, device=device) for side in SIDES]
    times = time_in_turn(*(build_side(side, *setting) for side in SIDES), rounds, device)
    return SpeedRow(
        **asdict(speed_of(times, batch_size, precision_name(dtype), costs)),
        model=subject.entry.name,
        mode=mode_name(compiled),
        dense_memory_mib=_mib(memory[0]),
        compressed_memory_mib=_mib(memory[1]),
    )


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
