"""What schedules take, by a table: each part of a block at any number of tokens, from timed runs; what a table is valid
for; and its file.

All parts are fitted at once to all samples of a kind of block, by least squares of relative errors in which
outliers count less. Times over tokens are piecewise linear and never fall; what a reduction adds is linear in
the rows that it moves and in the pairs that it compares."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import timm
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from diffrate.atomic import UNREADABLE, first_line, read_json, whole_file
from diffrate.blocks.block import form_of
from diffrate.blocks.heads import projection_of
from diffrate.blocks.masked import BlockPlan
from diffrate.blocks.rates import with_gradient_of
from diffrate.device import machine_name, placement_of
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import block_shape
from diffrate.schedule import PUBLISHED, RULES, Kept, RuleWork, Schedule, check_schedule, running_counts
from diffrate.timing import SHORT_NAMES, Use, mode_name, precision_name

REWEIGHTED = 6  # times
OUTLIER = 2.0  # median deviations, from which on samples count less
SAMPLES_A_KNOT = 4.0  # at least, in the mean
BELIEVED = (0.5, 3.0)  # of a factor on a price
DOUBT = 0.02  # of a whole run's time, that a factor of 2 is believed at


@dataclass(frozen=True)
class Curve:
    """Seconds over tokens: linear between knots, and never falling."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds at numbers of tokens, `[...]`; the ends go on as they are."""
        return np.interp(tokens, self.tokens, self.seconds)


def fit_curve(
    tokens: Sequence[int], seconds: Sequence[float], knots: Sequence[int], *flags: Sequence[bool]
) -> tuple[Curve, list[tuple[float, ...]]]:
    """The curve through samples at numbers of `tokens`, with as many of the `knots` as samples suffice for, and what
    the samples take more where each of the `flags` is set: coefficients of 1, N and N^2."""
    counts, wanted = np.asarray(tokens), int(min(len(knots), len(set(tokens)), len(tokens) / SAMPLES_A_KNOT))
    chosen = [knots[round(at)] for at in np.linspace(0, len(knots) - 1, wanted)] if wanted > 1 else [knots[-1]]
    # The curve's weights are the steps from knot to knot: a row sums up the steps to what the sample reaches.
    steps = np.arange(len(chosen))
    rising = np.clip(np.interp(counts, chosen, steps)[:, None] - steps + 1, 0, 1)
    powers = np.vander(counts.astype(np.float64), 3, increasing=True)
    more = [np.asarray(flag, dtype=np.float64)[:, None] * powers for flag in flags]
    weights = _fitted(np.concatenate([rising, *more], axis=1), np.asarray(seconds), len(chosen))
    heights, *found = np.split(weights, range(len(chosen), len(weights), 3))
    return Curve(tuple(chosen), tuple(np.cumsum(heights).tolist())), [tuple(one.tolist()) for one in found]


def fit_terms(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of `terms` `[S, F]` that give `seconds` `[S]`, none below 0."""
    columns = np.asarray(terms, dtype=np.float64)
    return tuple(_fitted(columns, np.asarray(seconds), columns.shape[1]).tolist())


MERGING_TERMS = range(3, 9)  # of those of a reduction's price: three for rules of each kind


def reduction_terms(kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> list[float]:
    """What the time of a block's reduction depends on: a constant, the tokens that enter, those left after pruning;
    where it merges a constant, the tokens before merging, the pairs of sources and destinations, each for the rules
    that compare halves and for the others; and sizes."""
    pairs = kept.pruned**2 / 4 if work.halves else (kept.pruned - kept.merged) * kept.merged
    merging, none = [1.0, float(kept.pruned), float(pairs)], [0.0] * (len(MERGING_TERMS) // 2)
    if kept.merged == kept.pruned:
        merging = none
    both = [*none, *merging] if work.halves else [*merging, *none]
    return [1.0, float(kept.entering), float(kept.pruned), *both, float(sized)]


def asks(kept: Kept, work: RuleWork) -> bool:
    """Whether a block removes tokens, and asks for their importance."""
    return kept.merged < kept.entering and (work.ranks or (kept.pruned < kept.entering and not work.free))


def fit_prices(
    rest: Sequence[float], going: Sequence[float], merging: Sequence[float], taken: Sequence[float]
) -> tuple[float, float]:
    """Two factors, for the price of removing tokens and for what merging adds to it, with which these and the `rest`
    sum up to the seconds `taken` by whole runs; 1 as far as the runs do not show otherwise."""
    whole = np.asarray(taken, dtype=np.float64)
    columns = np.concatenate([np.stack([going, merging], axis=1) / whole[:, None], DOUBT * np.eye(2)])
    wanted = np.concatenate([1 - np.asarray(rest) / whole, [DOUBT, DOUBT]])
    first, second = lsq_linear(columns, wanted, bounds=BELIEVED, method="bvls").x.tolist()
    return first, second


def _fitted(columns: np.ndarray, seconds: np.ndarray, rising: int) -> np.ndarray:
    """The weights of `columns` `[S, F]` that give `seconds` `[S]`; the first `rising` not below 0."""
    least = np.concatenate([np.zeros(rising), np.full(columns.shape[1] - rising, -np.inf)])
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-12)
    trust, weights = np.ones(len(seconds)), np.zeros(columns.shape[1])
    for _ in range(REWEIGHTED):
        rows = trust / seconds
        found = lsq_linear(columns / scale * rows[:, None], seconds * rows, bounds=(least, np.inf), method="bvls")
        weights = found.x / scale
        apart = np.abs(columns @ weights / seconds - 1)
        limit = OUTLIER * max(float(np.median(apart)), 1e-6)
        trust = np.sqrt(np.minimum(1.0, limit / np.maximum(apart, 1e-12)))
    return weights


LEAST = 0.5  # of the plain attention's time, that attention takes where importance is asked for


@dataclass(frozen=True)
class BlockTimes:
    """Seconds that a batch takes in the parts of one kind of block.

    attention: over the tokens that enter; attention_asked, attention_received, attention_sized: what it takes more
    where their importance is asked for, by the attention of the first tokens or of all, and where they stand for
    several, as coefficients of 1, N and N^2. mlp: over the tokens that leave.
    reduction: coefficients of `reduction_terms`, none where nothing is reduced. read: how many first tokens are all
    that is left, of a last block of which no more is read; None for all.
    """

    attention: Curve
    attention_asked: tuple[float, ...]
    attention_received: tuple[float, ...]
    attention_sized: tuple[float, ...]
    mlp: Curve
    reduction: tuple[float, ...]
    read: int | None

    # Lists by the number of tokens:

    @cached_property
    def plain(self) -> list[float]:
        """Attention without a reduction and with sizes of 1."""
        return self.attention.at(self._counts).tolist()

    @cached_property
    def asked(self) -> tuple[list[float], list[float]]:
        """What attention takes more where importance is asked for: by that of the first tokens, and of all tokens.
        Negative where another, faster attention is used then."""
        least = -LEAST * np.asarray(self.plain)
        return self._more(self.attention_asked, least), self._more(self.attention_received, least)

    @cached_property
    def sized(self) -> list[float]:
        """What attention takes more where tokens stand for several."""
        return self._more(self.attention_sized, 0.0)

    @cached_property
    def after(self) -> list[float]:
        """The MLP."""
        return self.mlp.at(self._counts).tolist()

    @property
    def _counts(self) -> np.ndarray:
        return np.arange(self.attention.tokens[-1] + 1)

    def _more(self, coefficients: Sequence[float], least: np.ndarray | float) -> list[float]:
        powers = np.vander(self._counts.astype(np.float64), 3, increasing=True)
        return np.maximum(least, powers @ np.asarray(coefficients)).tolist()

    def seconds(self, kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> float:
        """One block of a batch; `sized` where tokens that enter stand for several, and what its rule takes."""
        seconds = self.plain[kept.entering] + (self.sized[kept.entering] if sized else 0.0)
        if self.read is not None:
            return seconds + self.after[self.read]
        return seconds + self.price(kept, sized, work) + self.after[kept.merged]

    def price(self, kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> float:
        """What removing tokens takes, their importance included; 0 where none are removed."""
        asked = self.asked[work.received][kept.entering] if self.reduction and asks(kept, work) else 0.0
        return asked + sum(self.prices(kept, sized, work))

    def prices(self, kept: Kept, sized: bool, work: RuleWork = RULES[PUBLISHED]) -> tuple[float, float]:
        """What removing tokens takes without their importance, in two parts: at all, and what merging adds to it."""
        if kept.merged == kept.entering or not self.reduction or work.free:
            return 0.0, 0.0
        terms = reduction_terms(kept, sized, work)
        parts = [weight * term for weight, term in zip(self.reduction, terms, strict=True)]
        merging = sum(parts[term] for term in MERGING_TERMS)
        return sum(parts) - merging, merging


def block_times(rows: Sequence[Any], read: int | None, knots: Sequence[int]) -> BlockTimes:
    """The times of one kind of block. A row is one block in one run: its tokens, whether they have sizes, the work of
    its rule, and the seconds of attention, reduction and MLP. `read` is as in `BlockTimes`."""
    kept, sized, works, attention, _, mlp = zip(*rows, strict=True)
    asked = [read is None and asks(one, work) for one, work in zip(kept, works, strict=True)]
    received = [one and work.received for one, work in zip(asked, works, strict=True)]
    flags = ([one and not other for one, other in zip(asked, received, strict=True)], received, sized)
    plain, (more, more_received, more_sized) = fit_curve([one.entering for one in kept], attention, knots, *flags)
    reducing = [row for row in rows if read is None and row[0].merged < row[0].entering]
    reduction: tuple[float, ...] = ()
    if reducing:
        reduction = fit_terms([reduction_terms(*row[:3]) for row in reducing], [row[4] for row in reducing])
    after = Curve((read,), (median(mlp),)) if read is not None else fit_curve([k.merged for k in kept], mlp, knots)[0]
    return BlockTimes(plain, more, more_received, more_sized, after, reduction, read)


@dataclass(frozen=True)
class LatencyTable:
    """The seconds of one model on one machine.

    setting: what was measured, plain values by name. kinds: of blocks; order: which each block is of. embedding:
    seconds of a batch before the first block; head: after the last, a constant and a slope over the tokens left.
    tokens: that enter the first block.
    """

    setting: dict[str, Any]
    kinds: tuple[BlockTimes, ...]
    order: tuple[int, ...]
    embedding: float
    head: tuple[float, float]
    tokens: int
    batch_size: int

    def steps(self, schedule: Schedule) -> Iterator[tuple[BlockTimes, Kept, bool, RuleWork]]:
        """The times of each block, its tokens, whether those that enter stand for several, and what its rule takes."""
        sized, counts = False, running_counts(schedule, self.tokens)
        for kept, kind, rule in zip(counts, self.order, schedule.rule_names, strict=False):
            yield self.kinds[kind], kept, sized, RULES[rule]
            sized = sized or kept.merged < kept.pruned

    def seconds(self, schedule: Schedule) -> float:
        """Of one image at `schedule`; a ScheduleError where that is for fewer blocks, or other tokens."""
        # CAFormer's schedules go on with counts for blocks that are in no table.
        limits = (self.tokens,) * max(len(self.order), len(schedule.merge))
        check_schedule(schedule, limits, schedule.prune is not None, "schedule: ")
        total, leaving = self.embedding, self.tokens
        for times, kept, sized, work in self.steps(schedule):
            total += times.seconds(kept, sized, work)
            leaving = kept.merged
        return (total + self.head[0] + self.head[1] * leaving) / self.batch_size

    def prices(self, schedule: Schedule) -> tuple[float, float]:
        """What the reductions of `schedule` take of its `seconds`: at all, and what merging adds to it."""
        prices = [times.prices(kept, sized, work) for times, kept, sized, work in self.steps(schedule)]
        return sum(going for going, _ in prices) / self.batch_size, sum(more for _, more in prices) / self.batch_size

    def repriced(self, going: float, merging: float) -> LatencyTable:
        """The same with the prices of reductions times `going`, and what merging adds to them times `merging`."""

        def reduction(weights: tuple[float, ...]) -> tuple[float, ...]:
            return tuple((merging if term in MERGING_TERMS else going) * part for term, part in enumerate(weights))

        return replace(self, kinds=tuple(replace(kind, reduction=reduction(kind.reduction)) for kind in self.kinds))


SMOOTHED = 16  # tokens to both sides that a slope is taken over: kernels move in steps, and would have none between


def expected_seconds(table: LatencyTable, plans: Sequence[BlockPlan], rules: tuple[str, ...] | None = None) -> Tensor:
    """Of one image, for the plans of all blocks and the `rules` of a schedule."""
    prunes = any(plan.prune is not None for plan in plans)
    merged = tuple(plan.merged for plan in plans)
    schedule = Schedule(tuple(plan.pruned for plan in plans) if prunes else None, merged, rules=rules)
    soft = plans[0].cost[0].new_zeros(())
    for plan, step in zip(plans, table.steps(schedule), strict=True):
        soft = soft + _block(plan, *step)
    return with_gradient_of(soft.new_tensor(table.seconds(schedule)), soft / table.batch_size)


def _block(plan: BlockPlan, times: BlockTimes, kept: Kept, sized: bool, work: RuleWork) -> Tensor:
    """What carries the gradient of a block's seconds, for a batch."""
    entering, leaving = plan.cost
    soft = entering * _slope(times.plain, kept.entering)
    if times.read is not None:
        return soft
    soft = soft + leaving * _slope(times.after, kept.merged)
    fewer = max(1, kept.merged - 1)
    pruning = 0.0 if plan.prune is None else times.price(Kept(kept.entering, fewer, fewer), sized, work)
    merging = times.price(Kept(kept.entering, kept.entering, fewer), sized, work)
    # The probabilities that a choice keeps fewer than the tokens that are there: the least important one goes.
    prune = 0.0 if plan.prune is None else 1 - plan.prune.survival[plan.entering - 1]
    merge = 0.0 if plan.merge is None else 1 - plan.merge.survival[plan.pruned - 1]
    return soft + pruning * (1 - (1 - prune) * (1 - merge)) + max(0.0, merging - pruning) * merge


def _slope(seconds: Sequence[float], tokens: int) -> float:
    """Of a curve at every number of tokens, around one."""
    low, high = max(0, tokens - SMOOTHED), min(len(seconds) - 1, tokens + SMOOTHED)
    return (seconds[high] - seconds[low]) / max(1, high - low)


WHAT = "measured seconds of the parts of a model's blocks, for a batch"


class LatencyFileError(ValueError):
    """A file of times that cannot be read or written."""


def read_table(path: Path, setting: dict[str, Any]) -> LatencyTable | None:
    """The table at `path` if it was made for `setting`; None where there is no file, or one of another setting.
    LatencyFileError where the file holds no table."""
    try:
        content = read_json(path)
        if content["setting"] != setting:
            return None
        kinds = [
            _made(BlockTimes, kind | {name: _made(Curve, kind[name]) for name in ("attention", "mlp")})
            for kind in content["kinds"]
        ]
        return _made(LatencyTable, content | {"kinds": kinds})
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        raise LatencyFileError(
            f"{path}: cannot be read ({first_line(error)}); accepted: a file of measured times, or none"
        ) from error


def check_folder(folder: Path) -> None:
    """Make `folder` where there is none; LatencyFileError where it cannot be made, or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LatencyFileError(f"{folder}: cannot be written to ({first_line(error)}); accepted: a folder") from error


def write_table(path: Path, table: LatencyTable) -> None:
    """Write the table to `path`, in a folder that is made where there is none; LatencyFileError where that fails."""
    check_folder(path.parent)
    try:
        with whole_file(path) as file:
            file.write((json.dumps({"what": WHAT, **asdict(table)}, indent=1) + "\n").encode())
    except OSError as error:
        raise LatencyFileError(f"{path}: cannot be written ({first_line(error)})") from error


def _made(kind: type[Any], content: dict[str, Any]) -> Any:
    """A dataclass `kind` from its fields in a file, where tuples are lists."""
    values = {item.name: content[item.name] for item in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


FORMAT = 3  # of the file, and of what is measured
OF_MODEL = ("tokens", "blocks", "kinds", "parameters", "image_size", "classes", "model", "rule", "mode")


def use_of(table: LatencyTable, device: torch.device) -> Use:
    """How the model was used when `table` was made, on `device`."""
    name = table.setting["precision"]
    dtype = {short: dtype for dtype, short in SHORT_NAMES.items()}.get(name) or getattr(torch, name)
    return Use(table.batch_size, dtype, table.setting["mode"] == mode_name(True), device)


def kinds_of(model: CompressedModel) -> list[tuple[str, int | None]]:
    """The kind of each compressible block: its description, and how many of its first tokens are used, None for all.

    Blocks of one kind have parts of the same types and shapes; the last one differs where few of its tokens are used.
    """
    kinds, blocks = [], model.compressible_blocks()
    for block in blocks:
        shape, heads = block_shape(block), projection_of(getattr(block, form_of(block).attention))
        shown = {"projections": shape.projections, "mixing": shape.mixing, "mlp": shape.mlp}
        read = model.read if block is blocks[-1] else None
        name = f"{type(block).__name__} {type(heads).__name__} {shown}, read {'all' if read is None else read}"
        kinds.append((name, read))
    return kinds


def setting_of(model: CompressedModel, use: Use) -> dict[str, Any]:
    """Everything that times depend on, as plain values by name."""
    kinds = [name for name, _ in kinds_of(model)]
    different = list(dict.fromkeys(kinds))
    rates = {id(rate) for rate in model.arch_parameters()}
    return {
        "format": FORMAT,
        "machine": machine_name(use.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "batch_size": use.batch_size,
        "precision": precision_name(use.dtype),
        "mode": mode_name(use.compiled),
        "model": type(model).__name__,
        "rule": str(model.rule),
        "image_size": list(model.image_size),
        "tokens": model.compression.space.limits[0],
        "parameters": sum(weight.numel() for weight in model.parameters() if id(weight) not in rates),
        "classes": model.num_classes,
        "kinds": different,
        "blocks": [different.index(kind) for kind in kinds],
    }


def check_table(table: LatencyTable, model: CompressedModel) -> None:
    """ValueError where the table is of another model, as far as it shows that; names what differs."""
    expected = setting_of(model, use_of(table, placement_of(model).device))
    said = {**table.setting, "tokens": table.tokens, "blocks": list(table.order)}
    for name in OF_MODEL:
        if name in said and said[name] != expected[name]:
            raise ValueError(
                f"latency: found a table of a model with other {name} ({said[name]}); accepted: {expected[name]}"
            )
