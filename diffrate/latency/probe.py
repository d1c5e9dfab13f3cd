"""One forward pass with the time of each part of each block, where it really runs: after the part before it, with
weights as cold as they are in the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffrate.blocks.block import attended, mlp_branch, reduced, removes
from diffrate.blocks.tokens import TokenState, replaced
from diffrate.budgets.schedule import Kept, Schedule
from diffrate.patch.base import CompressedModel


class BlockSample(NamedTuple):
    """The seconds of one block's parts. sized: whether tokens that enter stand for several."""

    block: int
    kept: Kept
    sized: bool
    attention: float
    reduction: float
    mlp: float


class RunSample(NamedTuple):
    """The seconds of one forward pass: before the first block, in each, and after the last, of its tokens."""

    embedding: float
    blocks: tuple[BlockSample, ...]
    head: float
    leaving: int

    def total(self) -> float:
        """All of it."""
        blocks = sum(part.attention + part.reduction + part.mlp for part in self.blocks)
        return self.embedding + blocks + self.head


class Clock(Protocol):
    """Marks moments on a device."""

    def mark(self) -> None:
        """What was asked of the device until now ends here."""
        ...

    def seconds(self) -> list[float]:
        """Between each two marks; waits for the device."""
        ...


class HostClock:
    """Of devices that compute while they are asked."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        """Now."""
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two marks."""
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


class CudaClock:
    """Of a GPU, by its events: what it waits for the host counts, as it does in use."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.events = device, []

    def mark(self) -> None:
        """Here in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.events.append(event)

    def seconds(self) -> list[float]:
        """Between each two marks."""
        torch.cuda.synchronize(self.device)
        pairs = zip(self.events, self.events[1:], strict=False)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


class Parts(NamedTuple):
    """The functions that a block is made of, as they are or compiled."""

    attended: Callable[..., tuple[TokenState, Tensor | None]]
    reduced: Callable[..., TokenState]
    mlp: Callable[[Any, Tensor], Tensor]


def parts_of(compiled: bool) -> Parts:
    """The parts of a block; compiled for any number of tokens, since one for each would take minutes."""
    if not compiled:
        return Parts(attended, reduced, mlp_branch)
    return Parts(*(torch.compile(part, dynamic=True) for part in (attended, reduced, mlp_branch)))  # type: ignore[arg-type]


def clock_of(device: torch.device) -> Clock:
    """A clock that has not been started."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@torch.inference_mode()
def timed_run(model: CompressedModel, parts: Parts, images: Tensor, schedule: Schedule) -> RunSample:
    """Run `model` on `images` at `schedule`, each part of each block timed."""
    clock = clock_of(images.device)
    clock.mark()
    entry = model.enter(images)
    state, steps = model.prepared(entry.state, schedule), model.steps(entry, schedule)
    clock.mark()
    kept, sized = [], []
    for block, positions, counts, read in steps:
        kept.append(counts)
        sized.append(state.size is not None)
        state, importance = parts.attended(block, positions, model.rule, state, counts, read)
        clock.mark()
        if removes(counts, read):
            state = parts.reduced(model.rule, state, importance, counts)
        clock.mark()
        state = replaced(state, x=parts.mlp(block, state.x))
        clock.mark()
    model.classify(state)
    clock.mark()
    embedding, *inner, head = clock.seconds()
    blocks = tuple(
        BlockSample(number, counts, has_sizes, *inner[3 * number : 3 * number + 3])
        for number, (counts, has_sizes) in enumerate(zip(kept, sized, strict=True))
    )
    return RunSample(embedding, blocks, head, kept[-1].merged)
