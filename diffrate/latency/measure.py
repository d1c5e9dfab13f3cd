"""`diffrate.measure_latency`: time the parts of blocks at schedules that show each at many numbers of tokens; and the
measured speed of schedules beside the predicted one, with the correction of schedules that miss a target."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from diffrate.blocks.block import attended, mlp_branch, removes
from diffrate.blocks.reduction import ReductionRule
from diffrate.blocks.tokens import replaced
from diffrate.budget import ADVICE, SPEEDUP, WORDS, Budget, BudgetError, Target, baseline_schedule, choices_of
from diffrate.device import Group, generators_kept, made_by_first, place_for, placement_of
from diffrate.latency.table import (
    LatencyTable,
    block_times,
    check_folder,
    check_table,
    fit_prices,
    fit_terms,
    kinds_of,
    read_table,
    setting_of,
    use_of,
    write_table,
)
from diffrate.patch.base import CompressedModel, require_patched
from diffrate.patch.shapes import input_size
from diffrate.schedule import RULES, Kept, RuleWork, Schedule, SearchSpace
from diffrate.timing import PairedTimes, Stopwatch, Use, at_schedules, time_within

KNOTS = 56  # token counts to measure at, at most: kernels' times rise in steps of 16 or 32 rows


def knots(least: int, tokens: int) -> list[int]:
    """The token counts to measure at, from the fewest to all."""
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
    """One forward pass: of each block its tokens, whether those that enter it stand for several, and what its rule
    takes; and `seconds`: before the first block, of each block's attention, reduction and MLP, and after the last."""

    blocks: list[tuple[Kept, bool, RuleWork]]
    seconds: np.ndarray


@torch.inference_mode()
def timed_run(
    model: CompressedModel, parts: Sequence[Callable[..., Any]], images: Tensor, schedule: Schedule
) -> TimedRun:
    """Run `model` on `images` at `schedule`, each part of each block timed: attention, reduction and MLP."""
    attention, reduction, mlp = parts
    watch, blocks = Stopwatch(images.device), []
    watch.mark()
    entry = model.enter(images)
    state, steps = model.prepared(entry.state, schedule), model.steps(entry, schedule)
    watch.mark()
    for (block, positions, rule, kept, read), name in zip(steps, schedule.rule_names, strict=False):
        blocks.append((kept, state.size is not None, RULES[name]))
        state, seen = attention(block, positions, rule, state, kept, read)
        watch.mark()
        if removes(kept, read):
            state = reduction(rule, state, seen, kept)
        watch.mark()
        state = replaced(state, x=mlp(block, state.x))
        watch.mark()
    model.classify(state)
    watch.mark()
    return TimedRun(blocks, np.array(watch.seconds()))


OTHER_RULES = ("similar", "received_halves")  # are measured beside the paper's: with all that makes a rule's price
BATCH_SIZE = 8
SECONDS = 30.0  # of timed runs
RUNS = (60, 600)  # at least, whatever they take, and at most
WHOLE_RUNS = 2.0  # seconds of pairs, for each schedule that is timed as a whole
# The schedules, with a share of the FLOPs that is left; the first ones tell most, where few fit into the time.
WHOLE = (("both", 0.5), ("merge", 0.8), ("prune", 0.5), ("both", 0.8), ("merge", 0.5), ("prune", 0.8))
ROUGH = (
    "latency: equal runs differ by %.0f %% from one to the next: times are rough, and not kept; measure again where "
    "nothing else runs"
)
NOISY = 0.1  # equal runs differ by 0.6 to 6 % on an idle machine, by 11 to 48 % where its cores are taken
WARM = 3  # runs before the first that counts
REACH = 1.15  # a few seconds tell a ratio no better: what is further away than this is out of reach
REACH_SECONDS = 2.0
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
    targets: Iterable[Target] = (),
    group: Group = None,
) -> LatencyTable:
    """Measure what `model` costs at any schedule, in seconds: from forward passes on random images in which each part
    of each block is timed, at schedules that show it at many numbers of tokens.

    A copy of the model is timed, with weights in `dtype` on `device` (by default the model's), compiled with
    `compile`. Inside an initialised process group the first process measures for all.

    Args:
        seconds: of timed runs; some runs of the whole model come on top, and a least number of runs is always made.
        file: where the table is kept, but for times that are too noisy, which a warning says. A table that is there is
            used if model, machine, versions and use are the same, and replaced otherwise.
        progress: gets the number of runs that are done, and the share of the time that is over.
        targets: of a search: one that is far out of reach is refused within seconds, before a table is measured.
        group: the processes that get the table of the first of them, as `evaluate` takes it.

    Raises:
        BudgetError: names the target, and the range in reach.
        UnsupportedModelError: the model is not patched.
        TypeError: `group` is no process group.
        ValueError: a batch size below 1, seconds not above 0, or this process is not in `group`.
        LatencyFileError: the file cannot be read or written.
    """
    require_patched(model)
    if not isinstance(batch_size, SupportsIndex) or batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}; accepted: from 1")
    if not seconds > 0:
        raise ValueError(f"seconds: found {seconds}; accepted: above 0")
    use = Use(batch_size, dtype, compile, place_for(model, device, group).device)
    path = None if file is None else Path(file)

    def read_or_measured() -> LatencyTable:
        setting = setting_of(model, use)
        if path is not None:
            if (known := read_table(path, setting)) is not None:
                return known
            check_folder(path.parent)
        with generators_kept():
            _check_reach(model, [target for target in targets if target.timed], use)
            runs, noise = _steadied(_sampled(model, use, seconds, progress))
            table = _repriced(model, use, _table(model, setting, runs))
        if noise > NOISY:
            log.warning(ROUGH, 100 * noise)
        elif path is not None:
            write_table(path, table)
        return table

    return made_by_first(read_or_measured, group)


def _check_reach(model: CompressedModel, targets: Sequence[Target], use: Use) -> None:
    """BudgetError where a speed is far out of reach of the schedule with the fewest tokens, timed beside dense."""
    if not targets:
        return
    times = measured_times(model, model.compression.space.every_block().fewest(), use, REACH_SECONDS)
    dense, least = (median(side) / use.batch_size for side in (times.baseline, times.rival))
    for target in targets:
        low, high = (1.0, times.ratio) if target.kind == SPEEDUP else (least, dense)
        if not low / REACH <= target.value <= high * REACH:
            asked, how = f"{target.kind} {target}{WORDS[target.kind]}", "measured with all tokens and with the fewest"
            accepted = f"{low:.3g} to {high:.3g}, {how} ({use.words()}){ADVICE[target.kind]}"
            raise BudgetError(f"{asked}: accepted: {accepted}")


def _sampled(model: CompressedModel, use: Use, seconds: float, progress: Progress | None) -> list[list[TimedRun]]:
    """Timed runs, in rounds that begin with a run without reductions."""
    side = copy.deepcopy(model).eval().requires_grad_(False).to(use.device, use.dtype)
    images = torch.randn(use.batch_size, *input_size(side)).to(use.device, use.dtype)
    parts, rng = (attended, ReductionRule.reduced, mlp_branch), Random(0)
    if use.compiled:  # for any number of tokens: a graph for each would take minutes
        parts = tuple(torch.compile(part, dynamic=True) for part in parts)
    schedules, dense = probing_schedules(side.compression.space.every_block(), rng), side.dense_schedule()
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


def _steadied(rounds: Sequence[Sequence[TimedRun]]) -> tuple[list[TimedRun], float]:
    """All runs, scaled to the median pace of the machine, and the median difference between a run without reductions
    and the next one, as a share. Each round begins with such a run; the pace between two of those is their mean."""
    paces = [runs[0].seconds.sum() for runs in rounds]
    usual, steadied = median(paces), []
    for runs, pace, after in zip(rounds, paces, [*paces[1:], paces[-1]], strict=True):
        steadied += [run._replace(seconds=run.seconds * (usual / ((pace + after) / 2))) for run in runs]
    return steadied, median(2 * abs(one - other) / (one + other) for one, other in pairwise(paces))


def _repriced(model: CompressedModel, use: Use, table: LatencyTable) -> LatencyTable:
    """The table with the prices of reductions with which it agrees with runs of the whole model, in turn with dense:
    pruned, merged, and both, in every block.

    Reductions are many short operations, which take a little longer in a model whose parts are not timed.
    """
    space, schedules, seen = model.compression.space, [], []
    dense = model.dense_schedule()
    for kind, share in WHOLE:
        with suppress(BudgetError):
            schedules.append(baseline_schedule(kind, space, Budget(model.flops_at, share * model.flops_at(dense))))
    begun = time.monotonic()
    for schedule in schedules:
        if seen and time.monotonic() - begun > WHOLE_RUNS * len(schedules):
            break
        going, merging = table.prices(schedule)
        taken = table.seconds(dense) / measured_speedup(model, schedule, use, WHOLE_RUNS)
        seen.append((table.seconds(schedule) - going - merging, going, merging, taken))
    return table.repriced(*fit_prices(*zip(*seen, strict=True))) if seen else table


def _table(model: CompressedModel, setting: dict[str, Any], runs: Sequence[TimedRun]) -> LatencyTable:
    space, order = model.compression.space, tuple(setting["blocks"])
    levels = knots(space.least, space.limits[0])
    rows: list[list[Any]] = [[] for _ in setting["kinds"]]
    for run in runs:
        for kind, block, seconds in zip(order, run.blocks, run.seconds[1:-1].reshape(-1, 3).tolist(), strict=True):
            rows[kind].append((*block, *seconds))
    leaving = [[1.0, run.blocks[-1][0].merged] for run in runs]
    constant, slope = fit_terms(leaving, [run.seconds[-1] for run in runs])
    kinds = tuple(block_times(*kind, levels) for kind in zip(rows, dict(kinds_of(model)).values(), strict=True))
    before = float(median(run.seconds[0] for run in runs))
    return LatencyTable(setting, kinds, order, before, (constant, slope), space.limits[0], setting["batch_size"])


CONFIRMED = 8.0  # seconds of timed pairs
CHECK_SECONDS = 5.0  # the same, of `check_predictions` for a schedule
CLOSE = 0.03  # of what was asked: what is slower is rounded again, and what is faster spends the rest, once
CORRECTIONS = 3

# From a corrected budget, the schedule found before, and that schedule rounded to it, to a better schedule.
Again = Callable[[Budget, Schedule, Schedule], Schedule]


@dataclass(frozen=True)
class Confirmed:
    """A schedule's speed: as asked for, as predicted by the table, and as measured in turn with the dense model.

    In the unit of the target: how many times as fast as dense, or seconds of an image. words: how the model is used.
    """

    asked: float
    predicted: float
    measured: float
    option: str
    words: str

    def line(self) -> str:
        """As text."""
        if self.option == SPEEDUP:
            figures = f"speed-up: asked {self.asked:.2f}, predicted {self.predicted:.2f}, measured {self.measured:.2f}"
        else:
            asked, predicted, measured = (1000 * value for value in (self.asked, self.predicted, self.measured))
            figures = f"latency: asked {asked:.3g} ms, predicted {predicted:.3g} ms, measured {measured:.3g} ms"
        return f"{figures} ({self.words})"


def measured_times(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> PairedTimes:
    """Time copies of `model`, dense and at `schedule`, in pairs for so many `seconds`."""
    runs = at_schedules(model, (model.dense_schedule(), schedule), use)
    return PairedTimes(*time_within(runs, seconds, use.device))


def measured_speedup(model: CompressedModel, schedule: Schedule, use: Use, seconds: float) -> float:
    """How many times as fast as dense `model` is at `schedule`: the median of pairs."""
    return 1.0 if schedule == model.dense_schedule() else measured_times(model, schedule, use, seconds).ratio


def confirmed(
    model: CompressedModel,
    schedule: Schedule,
    space: SearchSpace,
    budget: Budget,
    table: LatencyTable,
    again: Again | None = None,
    group: Group = None,
) -> tuple[Schedule, Confirmed]:
    """`schedule` and its speeds, or another where it is measured to be slower or faster than asked: the budget, of
    seconds, is corrected by the ratio of measured and predicted. The first process of `group` measures for all.

    `again` finds a better schedule of the corrected budget than rounding among the choices of `space` does. Without
    it, a schedule that is faster than asked stays.
    """
    use = use_of(table, placement_of(model).device)

    def seconds_at(schedule: Schedule) -> float:
        """Of an image, measured; of a speed-up, the table's of the dense model over the measured ratio."""
        if budget.kind == SPEEDUP:
            return budget.whole / measured_speedup(model, schedule, use, CONFIRMED)
        return median(measured_times(model, schedule, use, CONFIRMED).rival) / use.batch_size

    found = []
    corrected, slowest, spent = budget, budget.target / (1 - CLOSE), again is None
    while True:
        cost = made_by_first(partial(seconds_at, schedule), group)
        found.append((cost, schedule))
        fast = cost < budget.target / (1 + CLOSE)
        if len(found) > CORRECTIONS or (cost <= slowest and (spent or not fast)):
            break
        spent = spent or fast
        corrected = replace(corrected, target=corrected.target * (budget.target / cost))
        ruled = space.ruled(schedule.rule_names)
        try:
            other = corrected.rounded(choices_of(schedule, ruled), ruled)
            other = other if again is None else again(corrected, schedule, other)
        except BudgetError:  # no schedule is that fast
            break
        if other == schedule:
            break
        schedule = other
    enough = [one for one in found if one[0] <= slowest]
    # Of those that are fast enough, the slowest removes least.
    cost, schedule = max(enough, key=lambda one: one[0]) if enough else min(found, key=lambda one: one[0])
    asked, predicted, measured = map(budget.of, (budget.target, table.seconds(schedule), cost))
    return schedule, Confirmed(asked, predicted, measured, budget.kind, use.words())


@dataclass(frozen=True)
class PredictionCheck:
    """The speed-ups of schedules over dense, as predicted and as measured."""

    schedules: tuple[Schedule, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """The error of each predicted time, as a share of the measured one."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return tuple(abs(measured / predicted - 1) for predicted, measured in pairs)

    def line(self) -> str:
        """As text."""
        middle, worst = 100 * median(self.errors), 100 * max(self.errors)
        return f"prediction: median error {middle:.1f} %, worst {worst:.1f} % over {len(self.errors)} schedules"


def check_predictions(
    model: CompressedModel,
    table: LatencyTable,
    schedules: Iterable[Schedule],
    *,
    seconds: float = CHECK_SECONDS,
    device: torch.device | str | None = None,
    callback: Callable[[Schedule, float, float], None] | None = None,
) -> PredictionCheck:
    """Compare the speed-ups that `table` predicts of `model` at `schedules` with measured ones, in pairs for so many
    `seconds` each.

    `callback` gets each schedule, its predicted and its measured speed-up.

    Raises:
        ScheduleError: a schedule does not fit the model.
        ValueError: no schedule, seconds not above 0, or a table of another model.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: found {seconds}; accepted: above 0")
    check_table(table, model)
    use, whole = use_of(table, placement_of(model, device).device), table.seconds(model.dense_schedule())
    rows = []
    for schedule in schedules:
        model.check(schedule)
        predicted = whole / table.seconds(schedule)
        rows.append((schedule, predicted, measured_speedup(model, schedule, use, seconds)))
        if callback is not None:
            callback(*rows[-1])
    if not rows:
        raise ValueError("schedules: found none; accepted: one at least")
    return PredictionCheck(*zip(*rows, strict=True))
