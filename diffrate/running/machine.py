"""Which machine this is, as far as the speed of a model depends on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CPUS = Path("/proc/cpuinfo")


def machine_name(device: torch.device) -> str:
    """The GPU, or the CPU and which of its instructions torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = _CPUS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # elsewhere than on Linux
        lines = []
    names = sorted({line.partition(":")[2].strip() for line in lines if line.startswith("model name")})
    name = ", ".join(names) or platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
