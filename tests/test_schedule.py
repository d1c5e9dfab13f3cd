"""Schedules: reading, finding, checking, and the running minimum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffrate.schedule import Schedule, ScheduleError, check_schedule, find_schedule, make_schedule, running_counts

COUNTS = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def write(path: Path, table: Any) -> Path:
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


@given(st.data(), COUNTS)
def test_running_counts_never_rise_and_never_exceed_the_schedule(data: st.DataObject, merge: list[int]) -> None:
    prune = data.draw(st.lists(st.integers(1, 50), min_size=len(merge), max_size=len(merge)))
    counts = running_counts(Schedule(tuple(prune), tuple(merge)), 50)
    entering = 50
    for block, kept in enumerate(counts):
        assert kept.entering == entering
        assert kept.pruned == min(entering, prune[block])
        assert kept.merged == min(kept.pruned, merge[block])
        entering = kept.merged
    assert counts[-1].merged == min(50, *prune, *merge)


def test_running_counts_without_pruning() -> None:
    counts = running_counts(Schedule(None, (9, 12, 4)), 10)
    assert [(kept.entering, kept.pruned, kept.merged) for kept in counts] == [(10, 10, 9), (9, 9, 9), (9, 9, 4)]


@pytest.mark.parametrize("fields", [[5, 4], "[5, 4]"])
def test_arrays_and_the_published_strings_read_alike(tmp_path: Path, fields: Any) -> None:
    file = write(tmp_path / "rates.json", {"M": {"11.5": {"prune_kept_num": fields, "merge_kept_num": fields}}})
    assert find_schedule(file, "M", 11.50) == Schedule((5, 4), (5, 4))
    assert find_schedule(file, "M", None) == Schedule((5, 4), (5, 4))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('{"M": {"1.0": {,}}}', "line 1 column 16"),
        ("[1, 2]", "an object of models"),
        ({"M": [1]}, "an object of models"),
        ({"K": {}}, "no schedules for M; accepted: K"),
        ({"M": {}}, "M is empty"),
        ({"M": {"2.0": {"merge_kept_num": [1]}, "3.0": {}}}, "no --target_flops 1; accepted: 2.0, 3.0"),
        ({"M": {"1.0": {"prune_kept_num": [1]}}}, "merge_kept_num: found none"),
        ({"M": {"1.0": {"merge_kept_num": "[1, "}}}, "found '[1, '"),
        ({"M": {"1.0": {"merge_kept_num": 7}}}, "found 7"),
        ({"M": {"1.0": {"merge_kept_num": [3, 2.0]}}}, "merge_kept_num[1]: found 2.0; accepted: whole numbers"),
        ({"M": {"1.0": {"merge_kept_num": [True]}}}, "merge_kept_num[0]: found True"),
        ({"M": {"1.0": {"merge_kept_num": [None]}}}, "merge_kept_num[0]: found None"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, table: Any, expected: str) -> None:
    file = write(tmp_path / "rates.json", table)
    with pytest.raises(ScheduleError) as caught:
        find_schedule(file, "M", 1.0)
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"gone\.json: cannot be read"):
        find_schedule(tmp_path / "gone.json", "M", 1.0)


@pytest.mark.parametrize(
    ("prune", "merge", "expected"),
    [
        ([9, 9], [9, 9, 9], "prune_kept_num: found 2 counts; accepted: 3"),
        ([9, 9, 9], [9, 9], "merge_kept_num: found 2 counts; accepted: 3"),
        ([9, 0, 9], [9, 9, 9], "prune_kept_num[1]: found 0; accepted: 1 to 9"),
        ([9, 9, 9], [9, 9, 10], "merge_kept_num[2]: found 10; accepted: 1 to 9"),
        ([9, 9, -3], [9, 9, 9], "prune_kept_num[2]: found -3"),
        (None, [9, 9, 9], "prune_kept_num: found none"),
    ],
)
def test_schedules_that_do_not_fit(prune: list[int] | None, merge: list[int], expected: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        check_schedule(make_schedule(prune, merge), (9, 9, 9), prunes=True)
    assert expected in str(caught.value)


def test_a_merging_model_takes_no_pruning() -> None:
    with pytest.raises(ScheduleError, match="only merges"):
        check_schedule(make_schedule([1], [1]), (9,), prunes=False)
