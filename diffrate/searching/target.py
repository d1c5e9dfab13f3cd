"""From a target to the budget that it is of one model; where it is of seconds, by a table of what schedules take."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch

from diffrate.budgets.budget import ADVICE, LATENCY, SHARE, SPEEDUP, Budget, BudgetError, Target
from diffrate.budgets.schedule import Schedule
from diffrate.group import made_by_first
from diffrate.latency.confirm import Again, Confirmed, confirmed, measured_times
from diffrate.latency.file import read_table
from diffrate.latency.measure import BATCH_SIZE, measure_latency
from diffrate.latency.setting import Use, check_table, setting_of, use_of
from diffrate.latency.table import LatencyTable
from diffrate.patch.base import CompressedModel
from diffrate.running.timing import PairedTimes
from diffrate.searching.settings import SearchSettingError

REACH = 1.15  # a few seconds tell a ratio no better: what is further away than this is out of reach
REACH_SECONDS = 2.0


def table_for(model: CompressedModel, target: Target, device: torch.device) -> LatencyTable | None:
    """What schedules take, measured with the defaults of `measure_latency`; None for a target in FLOPs.

    Raises:
        BudgetError: the target is far out of reach.
    """
    if not target.timed:
        return None
    use = Use(BATCH_SIZE, torch.float32, False, device)
    check_reach(model, [target], use)
    return measure_latency(model, use.batch_size, use.dtype, device=device)


def budget_of(model: CompressedModel, target: Target, table: LatencyTable | None) -> Budget:
    """What a target is for `model`, in reach. One in seconds goes by `table`.

    Raises:
        SearchSettingError: the table is another model's.
        BudgetError: it is out of reach.
    """
    dense = model.dense_schedule()
    if not target.timed:
        budget = Budget(model.flops_at, target.value * (model.flops_at(dense) if target.kind == SHARE else 1))
    else:
        assert table is not None
        try:
            check_table(table, model)
        except ValueError as error:
            raise SearchSettingError(str(error)) from None
        whole = table.seconds(dense)
        seconds = whole / target.value if target.kind == SPEEDUP else target.value
        budget = Budget(table.seconds, seconds, target.kind, whole)
    budget.check(model.compression.space)
    return budget


def confirmed_at(
    model: CompressedModel,
    schedule: Schedule,
    budget: Budget,
    table: LatencyTable | None,
    device: torch.device,
    again: Again | None = None,
) -> tuple[Schedule, Confirmed | None]:
    """`schedule` as it is, or, of seconds, as fast as was asked for by measurement, and its speeds.

    `again` finds a better schedule of a corrected budget than by rounding.
    """
    if not budget.timed:
        return schedule, None
    assert table is not None
    return confirmed(model, schedule, budget, table, use_of(table, device), again)


def check_reach(model: CompressedModel, targets: Iterable[Target], use: Use, file: Path | None = None) -> None:
    """Refuse a speed that the schedule with the fewest tokens is far from, before a table is measured.

    A table takes a minute; this takes a few seconds of runs in turn with the dense model, on the first process. With
    a table in `file` it takes none: that says precisely what is in reach.

    Raises:
        BudgetError: names the first of `targets` that is out of reach.
        LatencyFileError: `file` is none of a table.
    """
    timed = [target for target in targets if target.timed]
    if not timed:
        return
    fewest = model.compression.space.fewest()

    def measured() -> PairedTimes | None:
        kept = file is not None and read_table(file, setting_of(model, use)) is not None
        return None if kept else measured_times(model, fewest, use, REACH_SECONDS)

    times = made_by_first(measured)
    if times is None:
        return
    dense, least = (median(side) / use.batch_size for side in (times.baseline, times.rival))
    for target in timed:
        low, high = (1.0, times.ratio) if target.kind == SPEEDUP else (least, dense)
        if not low / REACH <= target.value <= high * REACH:
            word = " s" if target.kind == LATENCY else ""
            raise BudgetError(
                f"{target.kind} {target}{word}: accepted: {low:.3g} to {high:.3g}, measured with all tokens and with "
                f"the fewest ({use.words()}){ADVICE[target.kind]}"
            )
