"""How a model computes: devices, precision, seeds, compiled graphs, fewer messages of torch; and the process group."""

from __future__ import annotations

import logging
import platform
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffrate.atomic import first_line

Made = TypeVar("Made")
Group: TypeAlias = "dist.ProcessGroup | None"  # processes that work together; None for torch's default group


def seed_everything(seed: int) -> None:
    """Seed every generator that augmentation, mixup and dropout draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what timm's mixup draws from)
    torch.manual_seed(seed)


def step_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def generators_kept(*own: torch.Generator) -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch, on the CPU and on every GPU in use, and `own` ones after the
    block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what timm draws from)
    states = [generator.get_state() for generator in own]
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


# What fills a tensor in place when a model is built, most of the time that it takes without storage.
FILLING = frozenset(["uniform_", "normal_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"])


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Build models inside on the meta device: without storage, and in little time."""
    with torch.device("meta"), _WithoutFilling():
        yield


class _WithoutFilling(TorchFunctionMode):
    """Skips the filling of tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        skipped = func.__name__ in FILLING and values and values[0].is_meta
        return values[0] if skipped else func(*values, **(named or {}))


def machine_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the instruction set that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # elsewhere than on Linux
        lines = []
    names = sorted({line.partition(":")[2].strip() for line in lines if line.startswith("model name")})
    name = ", ".join(names) or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


class Placement(NamedTuple):
    """The device of a model, the type of its weights, which its images take, and the processes that work together."""

    device: torch.device
    dtype: torch.dtype
    group: Group = None

    def take(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        return images.to(self.device, self.dtype, non_blocking=True)


def placement_of(model: nn.Module, device: torch.device | str | None = None) -> Placement:
    """Where `model` is, or is to be."""
    weight = next(model.parameters())
    return Placement(weight.device if device is None else torch.device(device), weight.dtype)


def place_for(model: object, device: torch.device | str | None, group: Group = None) -> Placement:
    """`placement_of` as users ask for it.

    Raises:
        TypeError: `model` is none of torch, or `group` no process group.
        ValueError: there are no weights, or they have no storage; there is no such device to compute on; or this
            process is not in `group`.
    """
    _check_group(group)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}; accepted: a torch.nn.Module")
    weight = next(model.parameters(), None)
    if weight is None or weight.is_meta:
        found = "no weights" if weight is None else "weights without storage, on the device meta"
        raise ValueError(f"model: found {found}; accepted: weights on a CPU or GPU")
    try:
        place = placement_of(model, device)
        if place.device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=place.device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"device: found {device!r} ({first_line(error)}); accepted: cpu, or a GPU") from error
    return place._replace(group=group)


def default_precision(device: torch.device) -> torch.dtype | None:
    """The default of autocast: float16 on a GPU, as published, and none elsewhere."""
    return torch.float16 if device.type == "cuda" else None


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `precision`; disabled for None and float32. A ValueError for others."""
    if precision not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"precision: found {precision!r}; accepted: torch.bfloat16, torch.float16, torch.float32, None"
        )
    enabled = precision is not None and precision != torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else None, enabled=enabled)


@contextmanager
def errors_alone(*names: str) -> Iterator[None]:
    """Let the loggers of these names log errors alone, inside the block."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextmanager
def no_warnings_of(modules: str) -> Iterator[None]:
    """Ignore warnings from modules whose names match this pattern, inside the block."""
    with warnings.catch_warnings():
        for category in (UserWarning, DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=modules)
        yield


def compile_model(model: nn.Module) -> Any:
    """Compile `model` as one graph for the shapes it is called with; a graph break is an error."""
    return torch.compile(model, fullgraph=True, dynamic=False)


class FixedBatch(nn.Module):
    """A compressed model that always sees `batch_size` images: a smaller batch is filled up, which takes less time than
    compiling once more for the last batch of a data set."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.model, self.batch_size = model, batch_size

    def forward(self, images: Tensor, return_flop: bool = False) -> Tensor:
        """Logits `[B, K]` of images `[B, 3, H, W]`, B up to the batch size, without a cost (a ValueError)."""
        if return_flop:
            raise ValueError("return_flop=True: accepted: False, the cost of a filled-up batch means nothing")
        count = len(images)
        if count < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - count, -1, -1, -1)])
        return self.model(images, return_flop=False)[:count]


# The processes that work together, if there are several. Every call names their group: others would never answer.


def rank(group: Group) -> int:
    """This process's number within the group, 0 for a single one."""
    return dist.get_rank(group) if _joined() else 0


def world(group: Group) -> int:
    """How many processes there are."""
    return dist.get_world_size(group) if _joined() else 1


def all_sum(values: Tensor, group: Group) -> Tensor:
    """`values` summed over all processes, in place; unchanged for a single one."""
    if _joined():
        dist.all_reduce(values, group=group)
    return values


def made_by_first(make: Callable[[], Made], group: Group) -> Made:
    """What the first process makes, in all of them, which wait for it; an error there is raised in all."""
    made: Any = made_by_each(lambda: make() if rank(group) == 0 else None, group)
    return all_parts(made, group)[0]


def made_by_each(make: Callable[[], Made], group: Group) -> Made:
    """What this process makes; where one of them fails, its error is raised in all: none waits for one that ends."""
    made: Any = None
    error: Exception | None = None
    try:
        made = make()
    except Exception as failed:
        error = failed
    failures = [failed for failed in all_parts(error, group) if failed is not None]
    if failures:
        raise error or failures[0]
    return made


def all_parts(part: Any, group: Group) -> list[Any]:
    """The `part` of every process, in their order; for a single one its own alone."""
    if not _joined():
        return [part]
    parts: list[Any] = [None] * world(group)
    dist.all_gather_object(parts, part, group=group)
    return parts


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check_group(group: object) -> None:
    """Refuse what is no process group with a TypeError, and one that this process is not in with a ValueError."""
    if group is None:
        return
    accepted = "a process group of torch.distributed with this process in it, or None"
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        with suppress(ValueError):  # it was destroyed
            dist.get_rank(group)
            return
    elif not dist.is_available() or group is not dist.GroupMember.NON_GROUP_MEMBER:  # `new_group` gives it to others
        raise TypeError(f"group: found {type(group).__name__}; accepted: {accepted}")
    raise ValueError(f"group: found one without this process; accepted: {accepted}")
