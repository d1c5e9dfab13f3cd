"""Files that earlier versions left do what they did then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrate.budgets.schedule import find_schedule
from tests.cli.test_eval import PROJECT, scores
from tests.cli.test_search import KEY, MODEL, rates, words
from tests.conftest import Cli

GOLDEN = PROJECT / "tests" / "golden"
STOPPED, END = "search_2026-11-23.pth", "search_2026-11-23_end.pth"
DECODING = 1e-4  # versions of Pillow may decode JPEG differently


def content(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / name, weights_only=True)


def farthest(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def test_a_search_goes_on_to_the_same_end(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    end = content(END)
    assert farthest(content(STOPPED)["rates"], end["rates"]) > 100 * DECODING
    code, out, err = cli(*words(image_folder, tmp_path, "--epochs", 4, "--resume", GOLDEN / STOPPED))
    assert (code, err) == (0, "")
    assert "at epoch 1, step 2" in out
    assert farthest(rates(tmp_path), end["rates"]) < DECODING
    found = find_schedule(tmp_path / "compression_rate.json", KEY, 0.025)
    assert (list(found.prune or ()), list(found.merge)) == end["best_schedule"]


@pytest.mark.parametrize("name", [STOPPED, END])
def test_an_evaluation_takes_its_schedule(name: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", image_folder, "--num_workers", 0)
    code, out, err = cli(*words, "--resume", GOLDEN / name, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "log.txt").read_text())
    expected = content(name)
    assert (record["prune_kept_num"], record["merge_kept_num"]) == expected["best_schedule"]
    assert scores(out)[3] == 0.025
    assert record["loss"] == pytest.approx(expected["best_scores"]["loss"], abs=1e-3)


def test_other_flags_are_refused(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    code, _, err = cli(*words(image_folder, tmp_path, "--epochs", 5, "--resume", GOLDEN / STOPPED))
    assert code == 2
    assert "--epochs 4; accepted: 5" in err
