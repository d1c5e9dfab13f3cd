"""What becomes of memory that was freed: glibc hands large pieces back to the system, which makes each page anew for
the next batch. At large batches that takes up to a third of a forward pass on a CPU, more in some processes than in
others, so that the times of one say little of another's."""

from __future__ import annotations

import ctypes
import os

# glibc's numbers of the two settings, and what they are set to: pieces up to which it keeps, bytes that it may hold.
_MMAP_THRESHOLD, _PIECE = -3, 2**30
_TRIM_THRESHOLD, _HELD = -1, 2**31 - 1
OWN_CHOICE = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, from here on; False where the allocator is another than glibc's, or users
    have settings of their own in `OWN_CHOICE`."""
    if any(os.environ.get(name) for name in OWN_CHOICE):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _PIECE)) and bool(mallopt(_TRIM_THRESHOLD, _HELD))
