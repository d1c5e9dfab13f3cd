"""Seconds as a budget: a speed-up over the dense model, or a time for an image."""

from __future__ import annotations

from diffrate.budgets.budget import Budget
from diffrate.budgets.rounding import Unit
from diffrate.budgets.schedule import Schedule
from diffrate.latency.table import LatencyTable

SPEEDUP, LATENCY = "target_speedup", "target_latency"  # what users ask for
ADVICE = {
    SPEEDUP: "; a larger batch or input size gains more",
    LATENCY: "; a larger batch, a smaller input size or a lower precision takes less per image",
}


def speedup_budget(table: LatencyTable, dense: Schedule, speedup: float) -> Budget:
    """So many times as fast as the model at its `dense` schedule."""
    whole = table.seconds(dense)
    return Budget(table.seconds, whole / speedup, Unit(SPEEDUP, "", lambda seconds: whole / seconds, ADVICE[SPEEDUP]))


def latency_budget(table: LatencyTable, seconds: float) -> Budget:
    """So many seconds for an image."""
    return Budget(table.seconds, seconds, Unit(LATENCY, " s", lambda found: found, ADVICE[LATENCY]))
