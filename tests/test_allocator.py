"""A process that keeps what it frees takes far fewer pages from the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from utils import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    return torch.ones(2**21) + torch.ones(2**20).repeat(2)  # 8 MiB each
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(300):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str, **environment: str) -> tuple[str, int]:
    """Whether the allocator was told, and the page faults of many steps."""
    words = [sys.executable, "-c", CODE, word]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_freed_memory_is_kept() -> None:
    kept, few = faults("keep")
    if kept == "False":
        pytest.skip("another allocator")
    assert few < faults("leave")[1] / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_users_settings_stay() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
