"""A process that keeps what it frees takes far fewer pages from the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from utils import keep_freed_memory
def step():
    return torch.ones(2**21) + torch.ones(2**20).repeat(2)  # 8 MiB each
def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(300):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(keep_freed_memory(), first, faults())
"""


def faults(**environment: str) -> tuple[str, int, int]:
    """Whether the allocator was told, and the page faults of many steps before and after."""
    words = [sys.executable, "-c", CODE]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    return kept, int(before), int(after)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_freed_memory_is_kept() -> None:
    kept, many, few = faults()
    if kept == "False":
        pytest.skip("another allocator")
    assert few < many / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_users_settings_stay() -> None:
    assert faults(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
