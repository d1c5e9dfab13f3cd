"""Progress: a bar on a terminal, lines elsewhere, and in the log file always."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import Cli

EVAL = ("--eval", "--num_workers", 0)


def test_lines_where_there_is_no_terminal(cli: Cli) -> None:
    code, out, err = cli(*EVAL)
    assert (code, err) == (0, "")
    assert "Test: [16/16]  eta 0:00:00" in out
    assert "images/s" in out


def test_a_bar_on_a_terminal_and_lines_in_the_log(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    monkeypatch.setenv("COLUMNS", "160")  # a bar is cut at the terminal's width
    monkeypatch.setenv("LINES", "40")
    code, out, err = cli(*EVAL, "--output_dir", tmp_path)
    assert code == 0
    assert "Test: 100%" in err
    assert "16/16" in err
    assert "acc@1 98.000" in err
    assert "Test:" not in out
    assert "* Acc@1 98.000" in out
    assert "Test: [16/16]" in (tmp_path / "log_rank0.txt").read_text()


def test_quiet_leaves_the_result(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    code, out, err = cli(*EVAL, "--quiet", "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "* Acc@1 98.000" in out
    assert "Test: [16/16]" in (tmp_path / "log_rank0.txt").read_text()
