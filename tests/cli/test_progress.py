"""Progress: a bar on a terminal, lines elsewhere, and in the log file always."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli


def evaluation(folder: Path) -> tuple[object, ...]:
    """Of nine images in batches of four."""
    model = ("--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--batch-size", 4)
    return ("--eval", *model, "--data-path", folder, "--num_workers", 0)


def test_lines_where_there_is_no_terminal(cli: Cli, image_folder: Path) -> None:
    code, out, err = cli(*evaluation(image_folder))
    assert (code, err) == (0, "")
    assert "Test: [3/3]  eta 0:00:00" in out
    assert "images/s" in out


def test_a_bar_on_a_terminal_and_lines_in_the_log(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    monkeypatch.setenv("COLUMNS", "160")  # a bar is cut at the terminal's width
    monkeypatch.setenv("LINES", "40")
    code, out, err = cli(*evaluation(image_folder), "--output_dir", tmp_path)
    assert code == 0
    (acc1,) = re.findall(r"\* Acc@1 (\S+)", out)
    assert "Test: 100%" in err
    assert "3/3" in err
    assert f"acc@1 {acc1}" in err
    assert "Test:" not in out
    assert "Test: [3/3]" in (tmp_path / "log_rank0.txt").read_text()


def test_quiet_leaves_the_result(cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    code, out, err = cli(*evaluation(image_folder), "--quiet", "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "* Acc@1 " in out
    assert "Test: [3/3]" in (tmp_path / "log_rank0.txt").read_text()
