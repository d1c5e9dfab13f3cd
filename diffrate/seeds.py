"""Seeds: every draw follows from a few numbers, and nothing is left over in a generator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed every generator that augmentation, mixup and dropout draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what timm's mixup draws from)
    torch.manual_seed(seed)


def step_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Draw and seed freely inside the block; after it every generator goes on as before it.

    Those of Python, NumPy, and torch, on the CPU and on every GPU in use.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what timm draws from)
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
