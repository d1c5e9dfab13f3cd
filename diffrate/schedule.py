"""Schedules: kept counts as plain integers, their checks and their files. Nothing here needs torch.

A schedule holds for each block how many tokens are kept after pruning and after merging, class and register
tokens included. Counts may rise from block to block: what is kept is the running minimum."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from diffrate.atomic import first_line, parse_json, read_json, whole_file

PRUNE_FIELD = "prune_kept_num"
MERGE_FIELD = "merge_kept_num"
RULES_FIELD = "rules"
TOKENS_FIELD = "tokens"


class RuleWork(NamedTuple):
    """What a rule computes, which its price in seconds depends on.

    ranks: importance, also where nothing is pruned. received: importance by the attention of all tokens, not of the
    first ones alone. halves: similarities between two halves of the tokens, not between sources and kept tokens. free:
    nothing.
    """

    ranks: bool = True
    received: bool = False
    halves: bool = False
    free: bool = False


# The reduction rules, see `blocks.rules`. State dicts hold the number of a row: new rows go to the end.
RULES: Mapping[str, RuleWork] = {
    "published": RuleWork(),
    "weighted": RuleWork(),
    "valued": RuleWork(),
    "received": RuleWork(received=True),
    "similar": RuleWork(ranks=False, halves=True),
    "similar_less_important": RuleWork(halves=True),
    "minor_into_major": RuleWork(halves=True),
    "received_halves": RuleWork(received=True, halves=True),
    "tome": RuleWork(ranks=False, halves=True),
    "pitome": RuleWork(ranks=False, halves=True),
    "random": RuleWork(),
    "sliced": RuleWork(ranks=False, free=True),
}
RULE_NAMES = tuple(RULES)
PUBLISHED, SLICED = RULE_NAMES[0], RULE_NAMES[-1]
SHOWN = 60  # characters of what is refused


class ScheduleError(ValueError):
    """A schedule that is malformed, missing, or does not fit the model."""


@dataclass(frozen=True)
class Kept:
    """Token counts of one block: entering it, after pruning, after merging. Never rising."""

    entering: int
    pruned: int
    merged: int


@dataclass(frozen=True)
class Schedule:
    """Kept counts per block as given; `prune` is None for models that only merge (CAFormer).

    tokens: how many enter the first block of the model that the schedule was made for; None where that is unknown.
    rules: by which rule each block lets tokens go, of `RULE_NAMES`; None where that is the paper's in all.
    """

    prune: tuple[int, ...] | None
    merge: tuple[int, ...]
    tokens: int | None = field(default=None, compare=False)
    rules: tuple[str, ...] | None = None

    @property
    def rule_names(self) -> tuple[str, ...]:
        """`rules` with the paper's written out."""
        return self.rules or (PUBLISHED,) * len(self.merge)


def make_schedule(
    prune: Sequence[SupportsIndex] | None,
    merge: Sequence[SupportsIndex],
    rules: Sequence[str] | str | None = None,
    where: str = "",
) -> Schedule:
    """A schedule from two sequences of integers, and the names of rules: one for all blocks, or one for each.

    Raises:
        ScheduleError: a field is no sequence, or holds something that is not an integer, or no rule.
    """
    counts = _integers(merge, MERGE_FIELD, where)
    pruned = None if prune is None else _integers(prune, PRUNE_FIELD, where)
    return Schedule(pruned, counts, rules=None if rules is None else _names(rules, len(counts), where))


def fields_of(schedule: Schedule) -> dict[str, Any]:
    """A schedule as files have it: lists of counts by name, None where it does not prune; and the rules where they are
    not the paper's, one name where all blocks have the same."""
    prune, rules = schedule.prune, schedule.rules
    fields: dict[str, Any] = {PRUNE_FIELD: None if prune is None else list(prune), MERGE_FIELD: list(schedule.merge)}
    if rules is not None:
        fields[RULES_FIELD] = rules[0] if len(set(rules)) == 1 else list(rules)
    return fields


def check_schedule(schedule: Schedule, limits: Sequence[int], prunes: bool, where: str = "", least: int = 1) -> None:
    """Refuse a schedule that does not fit a model with `least` to `limits[i]` tokens in block i.

    Raises:
        ScheduleError: made for another number of tokens, the wrong number of blocks, a count below the
            least or above the limit, or pruning counts for a model that only merges, or none for one that prunes.
    """
    if schedule.tokens is not None and schedule.tokens != limits[0]:
        raise ScheduleError(
            f"{where}made for {schedule.tokens} tokens; accepted: {limits[0]} tokens, as the model has at this input"
        )
    if schedule.rules is not None:
        _names(schedule.rules, len(limits), where)
    if prunes and schedule.prune is None:
        raise ScheduleError(f"{where}{PRUNE_FIELD}: found none; accepted: {len(limits)} counts")
    if not prunes and schedule.prune is not None:
        raise ScheduleError(f"{where}{PRUNE_FIELD}: this model only merges; accepted: none")
    for name, counts in ((PRUNE_FIELD, schedule.prune), (MERGE_FIELD, schedule.merge)):
        if counts is None:
            continue
        if len(counts) != len(limits):
            raise ScheduleError(f"{where}{name}: found {len(counts)} counts; accepted: {len(limits)}, one per block")
        for block, (count, limit) in enumerate(zip(counts, limits, strict=True)):
            if not least <= count <= limit:
                raise ScheduleError(f"{where}{name}[{block}]: found {count}; accepted: {least} to {limit}")


def scale_schedule(
    schedule: Schedule, old_limits: Sequence[int], new_limits: Sequence[int], class_token: int, least: int = 1
) -> Schedule:
    """Scale `schedule` from a model with at most `old_limits[i]` tokens in block i to one with `new_limits[i]`.

    The same share of the patches is kept, rounded, and `least` tokens at least; the `class_token` class and register
    tokens (True is one) all stay. A ScheduleError for other numbers of blocks.
    """
    if not isinstance(schedule, Schedule):
        raise ScheduleError(f"schedule: found {type(schedule).__name__}; accepted: a Schedule")
    for counts in (schedule.prune or schedule.merge, old_limits, new_limits):
        if len(counts) != len(schedule.merge):
            raise ScheduleError(f"found {len(counts)} counts; accepted: {len(schedule.merge)}, one per block")

    def scaled(counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            max(least, class_token + round((count - class_token) * (new - class_token) / (old - class_token)))
            for count, old, new in zip(counts, old_limits, new_limits, strict=True)
        )

    prune = None if schedule.prune is None else scaled(schedule.prune)
    return Schedule(prune, scaled(schedule.merge), new_limits[0], schedule.rules)


def running_counts(schedule: Schedule, tokens: int) -> list[Kept]:
    """The tokens of each block when `tokens` enter the first: the running minimum."""
    counts = []
    prune = schedule.prune if schedule.prune is not None else (tokens,) * len(schedule.merge)
    for prune_kept, merge_kept in zip(prune, schedule.merge, strict=True):
        pruned = min(tokens, prune_kept)
        merged = min(pruned, merge_kept)
        counts.append(Kept(tokens, pruned, merged))
        tokens = merged
    return counts


def read_schedules(path: Path) -> dict[str, Any]:
    """The schedule file at `path`, entries unchecked: `{model key: {target: fields}}`.

    Raises:
        ScheduleError: the file is missing, not JSON, or not of that shape.
    """
    accepted = "accepted: JSON, an object of models, each an object of targets"
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise ScheduleError(f"{path}: cannot be read ({first_line(error)}); {accepted}") from error
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ScheduleError(f"{path}: {accepted}")
    return table


def find_schedule(path: Path, key: str, target_flops: float | None, flag: str = "--target_flops") -> Schedule:
    """The schedule of model `key` for a target in GFLOPs; `11.50` finds `11.5`.

    Without a target the model's only entry is taken. Counts may be JSON arrays or, as in files of the original
    DiffRate, arrays inside strings.

    Raises:
        ScheduleError: no such entry (the message lists those that exist), or a malformed one.
    """
    table = read_schedules(path)
    if key not in table:
        raise ScheduleError(f"{path}: no schedules for {key}; accepted: {', '.join(table) or 'nothing, it is empty'}")
    targets: dict[str, Any] = table[key]
    if not targets:
        raise ScheduleError(f"{path}: {key} is empty")
    if target_flops is None and len(targets) != 1:
        raise ScheduleError(f"{path}: {key} needs {flag}; accepted: {', '.join(targets)}")
    found = [name for name in targets if target_flops is None or _number(name) == target_flops]
    if not found:
        raise ScheduleError(f"{path}: {key} has no {flag} {target_flops:g}; accepted: {', '.join(targets)}")
    if len(found) > 1:
        raise ScheduleError(f"{path}: {key}: found {' and '.join(found)}; accepted: one schedule for a target")
    where = f"{path}: {key} {found[0]} "
    fields = targets[found[0]]
    if not isinstance(fields, dict) or MERGE_FIELD not in fields:
        raise ScheduleError(f"{where}{MERGE_FIELD}: found none; accepted: an array of counts")
    schedule = make_schedule(fields.get(PRUNE_FIELD), fields[MERGE_FIELD], fields.get(RULES_FIELD), where)
    tokens = fields.get(TOKENS_FIELD)
    if TOKENS_FIELD in fields and (type(tokens) is not int or tokens < 2):
        raise ScheduleError(f"{where}{TOKENS_FIELD}: found {tokens!r}; accepted: a whole number from 2")
    return replace(schedule, tokens=tokens)


def save_schedule(path: Path, key: str, target_flops: float, schedule: Schedule) -> None:
    """Add the schedule of model `key` for a target in GFLOPs to the file at `path`, or replace it.

    The other entries stay, and those of a model are in rising order; a missing file is made.

    Raises:
        ScheduleError: the file is there but malformed, or cannot be written.
    """
    table = read_schedules(path) if path.exists() else {}
    targets = table.setdefault(key, {})
    name = next((name for name in targets if _number(name) == target_flops), f"{target_flops:g}")
    targets[name] = {kind: kept for kind, kept in fields_of(schedule).items() if kept is not None}
    if schedule.tokens is not None:
        targets[name][TOKENS_FIELD] = schedule.tokens
    table[key] = dict(sorted(targets.items(), key=lambda item: _number(item[0]) or 0))
    # One line for each array of counts.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda array: json.dumps(json.loads(array[0])), json.dumps(table, indent=2))
    try:
        with whole_file(path) as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise ScheduleError(f"{path}: cannot be written ({error.strerror})") from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _integers(values: Any, name: str, where: str) -> tuple[int, ...]:
    try:
        items = list(parse_json(values) if isinstance(values, str) else values)
    except (ValueError, TypeError) as error:
        found = repr(values[:SHOWN] if isinstance(values, str) else values)
        raise ScheduleError(f"{where}{name}: found {found}; accepted: an array of counts") from error
    counts = []
    for block, value in enumerate(items):
        try:
            if isinstance(value, bool):
                raise TypeError
            counts.append(operator.index(value))
        except TypeError as error:
            raise ScheduleError(f"{where}{name}[{block}]: found {value!r}; accepted: whole numbers") from error
    return tuple(counts)


def _names(values: Any, blocks: int, where: str) -> tuple[str, ...] | None:
    """The rules of so many blocks; None for the paper's in all."""
    names = (values,) * blocks if isinstance(values, str) else values
    if not isinstance(names, Sequence) or len(names) != blocks or not all(name in RULE_NAMES for name in names):
        accepted = f"one of {', '.join(RULE_NAMES)}, or {blocks} of them"
        raise ScheduleError(f"{where}{RULES_FIELD}: found {str(values)[:SHOWN]!r}; accepted: {accepted}")
    return None if set(names) == {PUBLISHED} else tuple(names)


GRANULARITY = 4  # tokens between the candidates of a count, as published


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a model.

    limits: the most tokens of each block of a schedule, prefix included.
    searchable: the blocks with choices; the others stay whole. As published these are all but the first, and but the
        last of a model without a class token.
    prunes: whether each has a pruning choice before its merging choice.
    prefix: the first tokens, which always stay: class, distillation, registers.
    least: the fewest tokens that a block may keep: the prefix, and one more where no class token is in it.
    rules: by which rule each block lets tokens go, as of `Schedule`.
    """

    limits: tuple[int, ...]
    searchable: tuple[int, ...]
    prunes: bool
    prefix: int
    least: int = 1
    rules: tuple[str, ...] | None = None

    def ruled(self, names: Sequence[str] | str) -> SearchSpace:
        """The same choices, with the rule of that name in all blocks, or one for each block."""
        return replace(self, rules=_names(names, len(self.limits), ""))

    def every_block(self) -> SearchSpace:
        """The same with choices in all blocks, where the model may prune: the published choices of CAFormer stay."""
        return replace(self, searchable=tuple(range(len(self.limits)))) if self.prunes else self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The choices of a block, in order."""
        return ("prune", "merge") if self.prunes else ("merge",)

    @property
    def choices(self) -> list[tuple[int, str]]:
        """The block and the kind of every choice, in order."""
        return [(block, kind) for block in self.searchable for kind in self.kinds]

    @property
    def tokens(self) -> int:
        """Tokens that enter a searchable block when nothing was removed."""
        return self.limits[self.searchable[0]]

    def dense(self) -> Schedule:
        """The schedule that removes nothing."""
        return Schedule(self.limits if self.prunes else None, self.limits, self.limits[0])

    def fewest(self) -> Schedule:
        """The schedule that removes all that it may."""
        return self.schedule([self.least] * len(self.choices))

    def schedule(self, counts: Sequence[int]) -> Schedule:
        """The schedule of one count per choice, in block order, prune before merge. A count above a block's tokens, as
        rounding an expected count up may give, is lowered to them."""
        rows = {kind: list(self.limits) for kind in self.kinds}
        for (block, kind), count in zip(self.choices, counts, strict=True):
            rows[kind][block] = min(count, self.limits[block])
        prune = tuple(rows["prune"]) if self.prunes else None
        return Schedule(prune, tuple(rows["merge"]), self.limits[0], self.rules)
