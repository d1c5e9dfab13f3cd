"""`diffrate.measure_latency`: time the parts of blocks at schedules that show each at many numbers of tokens."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle, pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffrate.blocks.block import attended, mlp_branch, removes
from diffrate.blocks.reduction import ReductionRule
from diffrate.blocks.tokens import replaced
from diffrate.budget import Budget, BudgetError, baseline_schedule
from diffrate.device import generators_kept, made_by_first, placement_of
from diffrate.latency.confirm import measured_speedup
from diffrate.latency.setting import check_folder, kinds_of, read_table, setting_of, write_table
from diffrate.latency.table import (
    BlockTimes,
    Curve,
    LatencyTable,
    asks,
    fit_curve,
    fit_prices,
    fit_terms,
    reduction_terms,
)
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.shapes import input_size
from diffrate.schedule import RULES, Kept, RuleWork, Schedule, SearchSpace
from diffrate.timing import Stopwatch, Use

KNOTS = 56  # token counts to look at, at most: kernels move in steps of 16 or 32 rows


def knots(least: int, tokens: int) -> list[int]:
    """The token counts to look at, from the fewest to all."""
    step = max(1, -(-(tokens - least) // KNOTS))
    return sorted({*range(tokens, least, -step), least})


def probing_schedules(space: SearchSpace, rng: Random) -> Iterator[Schedule]:
    """Yield schedules without end. Each takes some of the knots in falling order, with blocks that keep all tokens
    between them; when all knots were taken, they are shuffled and taken again.

    Up to a block drawn each time tokens are only pruned, so that sizes of 1 occur at few tokens, too. The rules are the
    paper's in one, and those of `OTHER_RULES` in the next ones.
    """
    spaces = cycle((space, *map(space.ruled, OTHER_RULES)))
    blocks = len(space.searchable)
    levels: list[int] = []
    while True:
        steps = rng.randint(max(1, blocks // 3), max(1, 2 * blocks // 3))
        if len(levels) < steps:
            levels = knots(space.least, space.tokens - 1)
            rng.shuffle(levels)
        chosen, levels = sorted(levels[:steps], reverse=True), levels[steps:]
        reducing = sorted(rng.sample(range(blocks), len(chosen)))
        yield _assembled(next(spaces), dict(zip(reducing, chosen, strict=True)), rng.randint(-1, blocks), rng)


def random_schedule(space: SearchSpace, rng: Random) -> Schedule:
    """A schedule of any kind: few reductions or many, early or late, small or large."""
    blocks = len(space.searchable)
    count = rng.randint(1, blocks)
    least = rng.randint(space.least, max(space.least, space.tokens // 2))
    counts = sorted((rng.randint(least, space.tokens - 1) for _ in range(count)), reverse=True)
    reducing = dict(zip(sorted(rng.sample(range(blocks), count)), counts, strict=True))
    return _assembled(space, reducing, rng.choice((-1, blocks, rng.randrange(blocks))), rng)


def _assembled(space: SearchSpace, leaving: dict[int, int], merging: int, rng: Random) -> Schedule:
    """The schedule that leaves the given numbers of tokens in some of the searchable blocks: by pruning alone before
    block `merging`, by merging from there on, with pruning before it in about every other block."""
    counts, before = [], space.tokens
    for block in range(len(space.searchable)):
        after = min(before, leaving.get(block, before))
        if space.prunes:
            pruned = rng.choice((before, rng.randint(after, before)))
            counts.append(after if block < merging else pruned)
        counts.append(after)
        before = after
    return space.schedule(counts)


class TimedRun(NamedTuple):
    """One forward pass: the tokens of each block, whether those that enter it stand for several, what its rule takes,
    and `seconds`: before the first block, of each block's attention, reduction and MLP, and after the last."""

    kept: tuple[Kept, ...]
    sized: tuple[bool, ...]
    works: tuple[RuleWork, ...]
    seconds: np.ndarray

    def blocks(self) -> Iterator[tuple[Any, ...]]:
        """Tokens, sizes, what the rule takes, and the three times of each block."""
        times = self.seconds[1:-1].reshape(-1, 3).tolist()
        return ((*block, *seconds) for *block, seconds in zip(self.kept, self.sized, self.works, times, strict=True))


@torch.inference_mode()
def timed_run(
    model: CompressedModel, parts: Sequence[Callable[..., Any]], images: Tensor, schedule: Schedule
) -> TimedRun:
    """Run `model` on `images` at `schedule`, each part of each block timed: attention, reduction and MLP."""
    attention, reduction, mlp = parts
    watch = Stopwatch(images.device)
    watch.mark()
    entry = model.enter(images)
    state, steps = model.prepared(entry.state, schedule), model.steps(entry, schedule)
    watch.mark()
    kept, sized = [], []
    for block, positions, rule, counts, read in steps:
        kept.append(counts)
        sized.append(state.size is not None)
        state, seen = attention(block, positions, rule, state, counts, read)
        watch.mark()
        if removes(counts, read):
            state = reduction(rule, state, seen, counts)
        watch.mark()
        state = replaced(state, x=mlp(block, state.x))
        watch.mark()
    model.classify(state)
    watch.mark()
    works = (RULES[name] for name in schedule.rule_names[: len(kept)])
    return TimedRun(tuple(kept), tuple(sized), tuple(works), np.array(watch.seconds()))


OTHER_RULES = ("similar", "received_halves")  # are measured beside the paper's: with all that makes a rule's price
BATCH_SIZE = 8
SECONDS = 30.0  # of timed runs
RUNS = (60, 600)  # at least, whatever they take, and at most
WHOLE_RUNS = 2.0  # seconds of pairs, for each schedule that is looked at as a whole
# The schedules, with a share of the FLOPs that is left; the first ones say most, where few fit into the time.
WHOLE = (("both", 0.5), ("merge", 0.8), ("prune", 0.5), ("both", 0.8), ("merge", 0.5), ("prune", 0.8))
NOISY = 0.1  # equal runs differ by 0.6 to 6 % on an idle machine, by 11 to 48 % where its cores are taken
WARM = 3  # runs before the first that counts
DENSE_EVERY = 4  # runs: how fast the machine is at the moment

log = logging.getLogger(__name__)
Progress = Callable[[int, float], None]


def measure_latency(
    model: CompressedModel,
    batch_size: int = BATCH_SIZE,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str | None = None,
    compile: bool = False,
    seconds: float = SECONDS,
    file: str | Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure what `model` costs at any schedule, in seconds: from forward passes on random images in which each part
    of each block is timed, at schedules that show it at many numbers of tokens.

    A copy of the model is timed, with weights in `dtype` on `device` (by default the model's), compiled with
    `compile`. Inside an initialised process group the first process measures for all.

    Args:
        seconds: of timed runs; some runs of the whole model come on top, and a least number of runs is always made.
        file: where the table is kept. A table that is there is used if model, machine, versions and use are the same,
            and replaced otherwise.
        progress: gets the number of runs that are done, and the share of the time that is over.

    Raises:
        UnsupportedModelError: the model is not patched.
        ValueError: a batch size below 1, or seconds not above 0.
        LatencyFileError: the file cannot be read or written.

    A warning is logged where times are too noisy to be kept in `file`.
    """
    require_patched(model)
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}; accepted: from 1")
    if not seconds > 0:
        raise ValueError(f"seconds: found {seconds}; accepted: above 0")
    use = Use(batch_size, dtype, compile, placement_of(model, device).device)
    return made_by_first(lambda: _read_or_measured(model, use, seconds, None if file is None else Path(file), progress))


def _read_or_measured(
    model: CompressedModel, use: Use, seconds: float, file: Path | None, progress: Progress | None
) -> LatencyTable:
    setting = setting_of(model, use)
    known = None if file is None else read_table(file, setting)
    if known is not None:
        return known
    if file is not None:
        check_folder(file.parent)
    with generators_kept():
        rounds = _sampled(model, use, seconds, progress)
        table = _repriced(model, use, _table(model, setting, _steadied(rounds)), _whole_schedules(model))
    noise = _noise(rounds)
    if noise > NOISY:
        log.warning(
            "latency: equal runs differ by %.0f %% from one to the next: times are rough, and not kept; measure again "
            "where nothing else runs",
            100 * noise,
        )
    elif file is not None:
        write_table(file, table)
    return table


def _sampled(model: CompressedModel, use: Use, seconds: float, progress: Progress | None) -> list[list[TimedRun]]:
    """Timed runs, in rounds that begin with a run without reductions."""
    side = copy.deepcopy(model).eval().requires_grad_(False).to(use.device, use.dtype)
    images = torch.randn(use.batch_size, *input_size(side)).to(use.device, use.dtype)
    parts, rng = (attended, ReductionRule.reduced, mlp_branch), Random(0)
    if use.compiled:  # for any number of tokens: a graph for each would take minutes
        parts = tuple(torch.compile(part, dynamic=True) for part in parts)
    schedules, dense = probing_schedules(side.compression.space, rng), side.dense_schedule()
    for schedule in [dense, *(next(schedules) for _ in range(WARM))]:
        timed_run(side, parts, images, schedule)
    rounds: list[list[TimedRun]] = []
    begun, done = time.monotonic(), 0
    while done < RUNS[1] and (done < RUNS[0] or time.monotonic() - begun < seconds):
        turn = [dense, *(next(schedules) for _ in range(DENSE_EVERY))]
        rounds.append([timed_run(side, parts, images, schedule) for schedule in turn])
        done += len(turn)
        if progress is not None:
            shares = (time.monotonic() - begun) / seconds, done / RUNS[1]
            progress(done, min(1.0, max(shares), done / RUNS[0]))
    return rounds


def _noise(rounds: Sequence[Sequence[TimedRun]]) -> float:
    """The median difference between a run without reductions and the next one, as a share."""
    paces = [samples[0].seconds.sum() for samples in rounds]
    return median(2 * abs(one - other) / (one + other) for one, other in pairwise(paces))


def _steadied(rounds: Sequence[Sequence[TimedRun]]) -> list[TimedRun]:
    """All samples, scaled to the median pace of the machine: each round begins with a run without reductions, and the
    pace between two of those is their mean."""
    paces = [samples[0].seconds.sum() for samples in rounds]
    usual = median(paces)
    between = [(one + other) / 2 for one, other in zip(paces, [*paces[1:], paces[-1]], strict=True)]
    return [
        sample._replace(seconds=sample.seconds * (usual / pace))
        for samples, pace in zip(rounds, between, strict=True)
        for sample in samples
    ]


def _repriced(model: CompressedModel, use: Use, table: LatencyTable, schedules: Sequence[Schedule]) -> LatencyTable:
    """The table with the prices of reductions with which it agrees with runs of the whole model, in turn with dense.

    Reductions are many short operations, which take a little longer in a model whose parts are not timed.
    """
    whole, seen = table.seconds(model.dense_schedule()), []
    begun = time.monotonic()
    for schedule in schedules:
        if seen and time.monotonic() - begun > WHOLE_RUNS * len(schedules):
            break
        going, merging = table.prices(schedule)
        taken = whole / measured_speedup(model, schedule, use, WHOLE_RUNS)
        seen.append((table.seconds(schedule) - going - merging, going, merging, taken))
    return table.repriced(*fit_prices(*zip(*seen, strict=True))) if seen else table


def _whole_schedules(model: CompressedModel) -> list[Schedule]:
    """Some with a reduction in every block: pruned, merged, and both."""
    space, found = model.compression.space, []
    dense = model.flops_at(space.dense())
    for kind, share in WHOLE:
        if space.prunes or kind == "merge":
            with suppress(BudgetError):
                found.append(baseline_schedule(kind, space, Budget(model.flops_at, share * dense)))
    return found


def _table(model: CompressedModel, setting: dict[str, Any], samples: Sequence[TimedRun]) -> LatencyTable:
    space, order = model.compression.space, tuple(setting["blocks"])
    levels = knots(space.least, space.limits[0])
    rows: list[list[Any]] = [[] for _ in setting["kinds"]]
    for sample in samples:
        for kind, row in zip(order, sample.blocks(), strict=True):
            rows[kind].append(row)
    leaving = [[1.0, sample.kept[-1].merged] for sample in samples]
    constant, slope = fit_terms(leaving, [sample.seconds[-1] for sample in samples])
    return LatencyTable(
        setting=setting,
        kinds=tuple(_kind(*kind, levels) for kind in zip(rows, dict(kinds_of(model)).values(), strict=True)),
        order=order,
        embedding=float(median(sample.seconds[0] for sample in samples)),
        head=(constant, slope),
        tokens=space.limits[0],
        batch_size=setting["batch_size"],
    )


def _kind(rows: Sequence[Any], read: int | None, levels: Sequence[int]) -> BlockTimes:
    """The times of one kind of block, from rows of `TimedRun.blocks`."""
    kept, sized, works, attention, _, mlp = zip(*rows, strict=True)
    going = [removes(one, read) for one in kept]
    asked = [removing and asks(one, work) for removing, one, work in zip(going, kept, works, strict=True)]
    of_all = [asks and work.received for asks, work in zip(asked, works, strict=True)]
    flags = ([one and not other for one, other in zip(asked, of_all, strict=True)], of_all, sized)
    plain, (first, received, more_sized) = fit_curve([one.entering for one in kept], attention, levels, *flags)
    after = Curve((read,), (median(mlp),)) if read is not None else fit_curve([k.merged for k in kept], mlp, levels)[0]
    reducing = [row for row, removing in zip(rows, going, strict=True) if removing]
    reduction: tuple[float, ...] = ()
    if reducing:
        reduction = fit_terms([reduction_terms(*row[:3]) for row in reducing], [row[4] for row in reducing])
    return BlockTimes(plain, first, received, more_sized, after, reduction, read)
