"""Searches without labels: any folder of images, the recipe of models that have none of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.test_errors import check
from tests.cli.test_search import MODEL, PAPER, checkpoint, words
from tests.conftest import Cli, write_image

FAST = ("--num_workers", 0, "--target_flops", "60%", "--epochs", 1, "--batch-size", 4, "--model", MODEL)
RECIPE = ("search_loss", "search_transform", "budget")


def recipe(out: Path) -> list[str]:
    return [checkpoint(out)["flags"][name] for name in RECIPE]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A nested folder of images, and a file that is none."""
    for index, name in enumerate(("b.png", "a.jpg", "in/c.png", "in/here/d.png")):
        write_image(tmp_path / "photographs" / name, seed=index)
    (tmp_path / "photographs" / "notes.txt").write_text("none")
    return tmp_path / "photographs"


@pytest.mark.parametrize("split", [False, True])
def test_any_folder_of_images(split: bool, cli: Cli, photographs: Path, tmp_path: Path) -> None:
    if split:
        (tmp_path / "splits").mkdir()
        photographs = photographs.rename(tmp_path / "splits" / "train").parent
    out = tmp_path / "out"
    code, text, err = cli(*FAST, "--data-path", photographs, "--output_dir", out)
    assert (code, err) == (0, "")
    assert "found: loss against dense " in text
    assert "Acc@1" not in text
    assert recipe(out) == ["distill", "eval", "held"]
    again = cli(*FAST, "--data-path", photographs, "--output_dir", out, "--resume", "auto")
    assert (again[0], again[2]) == (0, "")


def test_a_validation_split_is_scored_at_the_end_alone(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    more = ("--checkpoint", "scratch", "--data-path", image_folder, "--output_dir", tmp_path / "out")
    code, text, err = cli(*FAST, *more)
    assert (code, err) == (0, "")
    assert "found: loss against dense " in text
    assert "dense: * Acc@1" in text
    assert checkpoint(tmp_path / "out")["best_scores"] is None
    code, text, err = cli(*FAST, "--data-path", image_folder, "--output_dir", tmp_path / "other")
    assert (code, err) == (0, "")
    assert "no accuracy: --data-path" in text  # three classes, and ten outputs


def test_flags_override_the_recipe(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    more = ("--checkpoint", "scratch", "--data-path", image_folder, "--output_dir", tmp_path / "out")
    code, text, err = cli(*FAST, *more, "--search_loss", "labels", "--flops_weight", 2)
    assert (code, err) == (0, "")
    assert recipe(tmp_path / "out") == ["labels", "eval", "penalty"]
    found = checkpoint(tmp_path / "out")["flags"]
    assert (found["flops_weight"], found["flops_loss"]) == (2, "relative")
    assert "loss against dense" not in text


def test_the_papers_models_keep_the_papers_recipe(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    model = ("--model", "vit_deit_tiny_patch16_224", "--checkpoint", "scratch", "--input-size", 48, "--granularity", 1)
    run = ("--num_workers", 0, "--target_flops", "80%", "--epochs", 1, "--batch-size", 4)
    code, _, err = cli(*model, *run, "--data-path", image_folder, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert recipe(tmp_path / "out") == ["labels", "train", "penalty"]
    assert checkpoint(tmp_path / "out")["flags"]["flops_loss"] == "absolute"


def test_a_checkpoint_from_before_there_was_a_choice(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli(*words(image_folder, out, "--epochs", 1))[0] == 0
    content = checkpoint(out)
    for name in RECIPE:
        del content["flags"][name]
    torch.save(content, out / "checkpoint.pth")
    assert cli(*words(image_folder, out, "--epochs", 1, "--resume", "auto"))[0] == 0
    torch.save(content, out / "checkpoint.pth")
    other = words(image_folder, out, "--epochs", 1, "--resume", "auto", "--search_loss", "distill")
    check(cli(*other), "was made with --search_loss labels; accepted: distill")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--search_loss", "words"), "--search_loss"),
        (("--budget", "held", "--flops_weight", 2), "--flops_weight goes with a penalty; accepted: --budget penalty"),
        (("--data-path", "{empty}"), "no image files; accepted: .jpg"),
        (("--data-path", "{val}"), "val/ and no folder train/"),
        ((*PAPER, "--data-path", "{flat}"), "no folder val/"),
        ((*PAPER, "--mixup", 1, "--batch-size", 3), "--batch-size 3: accepted: an even number"),
        (("--aa", "rand-m9"), "--aa: found --search_transform eval; accepted: --search_transform train"),
        (("--mixup", 0.3), "--mixup: found --search_transform eval; accepted: --search_transform train"),
    ],
)
def test_bad_input(more: tuple[Any, ...], expected: str, cli: Cli, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "splits" / "val").mkdir(parents=True)
    places = {"empty": tmp_path / "empty", "val": tmp_path / "splits", "flat": photographs}
    given = [str(word).format(**places) for word in more]
    check(cli(*FAST, "--output_dir", tmp_path / "out", *given), expected)
