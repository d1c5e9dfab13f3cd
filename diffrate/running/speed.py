"""`diffrate.benchmark`: how much faster a compressed model is than with all its tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.budgets.schedule import Schedule
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.sizes import channels_of
from diffrate.running import ROUNDS
from diffrate.running.compiled import compile_model
from diffrate.running.precision import place_of
from diffrate.running.timing import PairedTimes, time_in_turn
from diffrate.seeds import generators_kept

SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Speed:
    """Both sides at one batch size and precision, timed in turn.

    Times are medians over the rounds; the speed-up is the median of the rounds' ratios, with the lowest
    and the highest; FLOPs are multiply-accumulates of an image, and their ratio is the ideal.
    """

    batch_size: int
    precision: str
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

    @property
    def setting(self) -> str:
        """What was timed, for a sentence."""
        return self.precision

    def line(self) -> str:
        """The figures as a sentence."""
        return (
            f"batch {self.batch_size}, {self.setting}: dense {self.dense_images_per_second:.1f} images/s, "
            f"compressed {self.compressed_images_per_second:.1f} images/s, speed-up {self.speedup:.2f} "
            f"({self.speedup_low:.2f} to {self.speedup_high:.2f}), {self.share_of_ideal:.0%} of the ideal "
            f"{self.ideal_speedup:.2f}"
        )


def benchmark(
    model: CompressedModel,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    *,
    rounds: int = ROUNDS,
    device: torch.device | str | None = None,
    compile: bool = False,
) -> Speed:
    """Time `model` at its kept counts against the same model at its dense schedule, on random images.

    In turn, `rounds` times, with weights in `dtype` on `device` (by default where the model is), as
    compiled graphs with `compile`. Copies are timed: the model itself is not touched.

    Raises:
        UnsupportedModelError: the model is not patched.
        ValueError: a batch size or a number of rounds below 1.
    """
    require_patched(model)
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: found {value}; accepted: from 1")
    place = place_of(model, device)
    current, whole = model.compression.current(), model.dense_schedule()
    sides = at_schedules(model, (whole, current), batch_size, place.device, dtype, compile)
    times = time_in_turn(sides[0], sides[1], rounds, place.device)
    return speed_of(times, batch_size, precision_name(dtype), (model.flops_at(whole), model.flops_at(current)))


def at_schedules(
    model: CompressedModel,
    schedules: Sequence[Schedule],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
) -> list[Callable[[], Tensor]]:
    """What runs a copy of `model` at each of the `schedules`, on random images."""
    sides = []
    with generators_kept():
        for schedule in schedules:
            side = copy.deepcopy(model)
            side.set_kept_num(schedule.prune, schedule.merge)
            sides.append(forward_pass(side, batch_size, model.image_size, device, dtype, compiled))
    return sides


def forward_pass(
    model: nn.Module,
    batch_size: int,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """What runs `model`, plain or compressed, on random images of `size`, rows and columns; it is changed in place."""
    model = model.eval().requires_grad_(False).to(device, dtype)
    channels = channels_of(model)
    images = torch.randn(batch_size, channels, *size, device=device, dtype=dtype)
    forward = compile_model(model) if compiled else model
    options: dict[str, Any] = {"return_flop": False} if isinstance(model, CompressedModel) else {}

    def run() -> Tensor:
        with torch.inference_mode():
            return forward(images, **options)

    return run


def speed_of(times: PairedTimes, batch_size: int, precision: str, costs: tuple[int, int]) -> Speed:
    """The figures of `times`, dense and compressed, whose images cost `costs` multiply-accumulates."""
    dense, compressed = costs
    seconds, fewer = median(times.baseline), median(times.rival)
    return Speed(
        batch_size=batch_size,
        precision=precision,
        dense_images_per_second=batch_size / seconds,
        compressed_images_per_second=batch_size / fewer,
        dense_ms_per_image=1000 * seconds / batch_size,
        compressed_ms_per_image=1000 * fewer / batch_size,
        dense_gflops=dense / 1e9,
        compressed_gflops=compressed / 1e9,
        speedup=times.ratio,
        speedup_low=times.spread[0],
        speedup_high=times.spread[1],
        ideal_speedup=dense / compressed,
        share_of_ideal=times.ratio * compressed / dense,
    )


def precision_name(dtype: torch.dtype) -> str:
    """What tables call a precision."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def precision_named(name: str) -> torch.dtype:
    """The precision that tables call so."""
    return next((dtype for dtype, short in SHORT_NAMES.items() if short == name), None) or getattr(torch, name)


def mode_name(compiled: bool) -> str:
    """What tables call a way to run: as one compiled graph, or eager."""
    return "compiled" if compiled else "eager"
