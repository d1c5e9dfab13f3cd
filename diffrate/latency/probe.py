"""One forward pass with the time of each part of each block, where it really runs: after the part before it, with
weights as cold as they are in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffrate.blocks.block import attended, mlp_branch, reduced, removes
from diffrate.blocks.tokens import replaced
from diffrate.budgets.schedule import Kept, Schedule
from diffrate.patch.base import CompressedModel
from diffrate.running.timing import Stopwatch

Parts = tuple[Callable[..., Any], ...]  # `attended`, `reduced` and `mlp_branch` of a block


class TimedRun(NamedTuple):
    """One forward pass: the tokens of each block, whether those that enter it stand for several, and `seconds`: before
    the first block, of each block's attention, reduction and MLP, and after the last."""

    kept: tuple[Kept, ...]
    sized: tuple[bool, ...]
    seconds: np.ndarray

    def blocks(self) -> Iterator[tuple[Any, ...]]:
        """Tokens, sizes and the three times of each block."""
        times = self.seconds[1:-1].reshape(-1, 3).tolist()
        return ((*block, *seconds) for *block, seconds in zip(self.kept, self.sized, times, strict=True))


def parts_of(compiled: bool) -> Parts:
    """The parts of a block; compiled for any number of tokens, since one for each would take minutes."""
    parts = attended, reduced, mlp_branch
    return tuple(torch.compile(part, dynamic=True) for part in parts) if compiled else parts


@torch.inference_mode()
def timed_run(model: CompressedModel, parts: Parts, images: Tensor, schedule: Schedule) -> TimedRun:
    """Run `model` on `images` at `schedule`, each part of each block timed."""
    attention, reduction, mlp = parts
    watch = Stopwatch(images.device)
    watch.mark()
    entry = model.enter(images)
    state, steps = model.prepared(entry.state, schedule), model.steps(entry, schedule)
    watch.mark()
    kept, sized = [], []
    for block, positions, counts, read in steps:
        kept.append(counts)
        sized.append(state.size is not None)
        state, importance = attention(block, positions, model.rule, state, counts, read)
        watch.mark()
        if removes(counts, read):
            state = reduction(model.rule, state, importance, counts)
        watch.mark()
        state = replaced(state, x=mlp(block, state.x))
        watch.mark()
    model.classify(state)
    watch.mark()
    return TimedRun(tuple(kept), tuple(sized), np.array(watch.seconds()))
