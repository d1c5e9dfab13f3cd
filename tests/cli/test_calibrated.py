"""`--search calibrated` on few images: what they print and leave, resumption, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffrate.searching import hard_counts
from tests.cli.test_errors import check
from tests.cli.test_search import MODEL
from tests.conftest import Cli

FAST = ("--num_workers", 0, "--target_flops", "60%", "--model", MODEL)


def works(folder: Path) -> dict[str, list[float]]:
    """What the records of a folder say was spent, by search."""
    found: dict[str, list[float]] = {}
    for line in (folder / "search_work.txt").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["search"], []).append(record["work"])
    return found


@pytest.mark.usefixtures("painted")
def test_images_without_labels_are_all_that_it_takes(
    cli: Cli, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hard_counts, "LOOKS_AN_IMAGE", 40)
    out = tmp_path / "out"
    words = (*FAST, "--data-path", photographs, "--output_dir", out)
    code, text, err = cli(*words)
    assert (code, err) == (0, "")
    assert "calibrated search: 8 images, up to " in text
    assert "on images held back: calibrated " in text
    assert "chosen: " in text
    assert "found: loss against dense " in text
    spent = works(out)
    assert spent["calibrated"] == sorted(spent["calibrated"])
    assert spent["uniform"] == [0.0] * 4  # the published rule's, and the best one by another rule
    assert (out / "search_work.png").exists()
    again = cli(*words, "--resume", "auto")
    assert (again[0], again[2]) == (0, "")

    def found(text: str) -> list[str]:
        return [line.split("] ", 1)[-1] for line in text.splitlines() if "found " in line]

    assert found(again[1]) == found(text)


def test_minutes_leave_a_gradient_search_fewer_steps(cli: Cli, photographs: Path, tmp_path: Path) -> None:
    """Far less than a step takes: one is made. What goes on has as many as what stopped."""
    words = (*FAST, "--search", "gradient", "--batch-size", 4, "--minutes", 1e-6, "--data-path", photographs)
    code, _, err = cli(*words, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert works(tmp_path)["gradient"] == [12.0]
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (content["settings"]["epochs"], content["settings"]["steps"], content["epoch"]) == (1, 1, 1)
    again = cli(*words[:-4], "--minutes", 10, *words[-2:], "--output_dir", tmp_path, "--resume", "auto")
    assert (again[0], again[2]) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--search", "calibrated", "--search_loss", "labels"), "--search_loss labels goes with"),
        *(
            (("--search", "calibrated", f"--{flag}", value), f"--{flag} goes with --search gradient; accepted: without")
            for flag, value in (("epochs", 5), ("arch_lr", 0.5), ("accum_steps", 2), ("budget", "held"))
        ),
        (
            ("--search", "calibrated", "--init_compression_rate", 0.0242),
            "--init_compression_rate goes with --search gr",
        ),
        (("--minutes", 0), "found 0; accepted: above 0"),
        (("--search", "random"), "invalid choice"),
    ],
)
def test_refusals(words: tuple[object, ...], message: str, cli: Cli, photographs: Path) -> None:
    check(cli(*FAST, "--data-path", photographs, *words), message)
