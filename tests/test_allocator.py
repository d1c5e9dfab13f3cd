"""A process that keeps what it frees takes far fewer pages from the system."""

from __future__ import annotations

import resource
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.forked import ended, started
from utils import keep_freed_memory


def step() -> torch.Tensor:
    """48 MiB each: of less than 32, glibc gives back some or none, by what else lies in the heap."""
    return torch.ones(3 * 2**22) + torch.ones(3 * 2**21).repeat(2)


def take_and_free(keep: bool) -> None:
    """Print whether the allocator was told, and the page faults of many steps."""
    kept = keep and keep_freed_memory()
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def faults(keep: bool, folder: Path) -> tuple[str, int]:
    """What a process of its own prints."""
    folder.mkdir()
    (done,) = ended(started(partial(take_and_free, keep), folder, 1), folder)
    kept, count = done.out.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_freed_memory_is_kept(tmp_path: Path) -> None:
    kept, few = faults(True, tmp_path / "kept")
    if kept == "False":
        pytest.skip("another allocator")
    assert few < faults(False, tmp_path / "left")[1] / 10


def test_users_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("it is told"))
    assert keep_freed_memory() is False
