"""Models without a head: what they can be used for, and what says that it needs one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import diffrate
import models
from benchmarks.speed import Subject, build_step
from diffrate.schedule import find_schedule
from tests.cli.test_errors import check
from tests.cli.test_eval import scores
from tests.conftest import Cli, write_image

NAME = "vit_small_patch14_reg4_dinov2.lvd142m"
MODEL = ("--model", NAME, "--input-size", 56)
FAST = ("--num_workers", 0)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint of `test_vit` without a head."""
    torch.save(models.create(models.entry_of("test_vit"), 64, num_classes=0).state_dict(), tmp_path / "bare.pth")
    return tmp_path / "bare.pth"


@pytest.mark.parametrize("mode", [("--eval",), ("--target_flops", "50%", "--search_loss", "labels"), ()])
def test_labels_need_a_head(mode: tuple[str, ...], cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    mode = mode or ("--eval", "--checkpoint", "official")
    result = cli(*mode, *MODEL, "--data-path", image_folder, "--output_dir", tmp_path / "out")
    check(result, f"--model {NAME}: has no head", "accepted: --checkpoint FILE with a head")


@pytest.mark.parametrize(
    "mode",
    [
        ("--eval",),
        ("--target_flops", 1, "--search_loss", "labels"),
        ("--baseline", "merge", "--target_flops", 1),
    ],
)
def test_so_do_files_without_one(
    mode: tuple[object, ...], cli: Cli, bare: Path, image_folder: Path, tmp_path: Path
) -> None:
    flags = ("--model", "test_vit", "--input-size", 64, "--checkpoint", bare, "--data-path", image_folder)
    check(cli(*mode, *flags, "--output_dir", tmp_path / "out"), f"checkpoint {bare}: has no head")


@pytest.mark.parametrize("loss", ["distill", "tokens"])
def test_the_dense_model_takes_the_place_of_labels(
    loss: str, cli: Cli, bare: Path, image_folder: Path, tmp_path: Path
) -> None:
    flags = ("--model", "test_vit", "--input-size", 64, "--checkpoint", bare, "--data-path", image_folder / "train")
    out = tmp_path / "out"
    run = ("--target_flops", "70%", "--granularity", 1, "--epochs", 1, "--batch-size", 4, "--output_dir", out, *FAST)
    code, text, err = cli(*flags, *run, "--search_loss", loss, "--save", tmp_path / "found.safetensors")
    assert (code, err) == (0, "")
    assert "found: loss against dense " in text
    assert "Acc@1" not in text
    assert diffrate.about(tmp_path / "found.safetensors").num_classes == 0


def test_fine_tuning_starts_a_fresh_head(cli: Cli, bare: Path, image_folder: Path, tmp_path: Path) -> None:
    flags = ("--model", "test_vit", "--input-size", 64, "--data-path", image_folder, *FAST)
    out = tmp_path / "out"
    code, text, err = cli("--finetune", bare, *flags, "--epochs", 1, "--batch-size", 4, "--output_dir", out)
    assert (code, err) == (0, "")
    assert f"{bare}: there is no head; head.weight, head.bias start fresh" in text
    code, text, _ = cli("--eval", *flags, "--checkpoint", out / "checkpoint.pth")
    assert code == 0
    assert len(scores(text)) == 4


def test_a_baseline_leaves_its_schedule(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("--baseline", "merge", "--target_flops", "50%", *MODEL, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "(no head to score with)" in out
    table = json.loads((tmp_path / "compression_rate.json").read_text())
    (target,) = table[NAME]
    schedule = find_schedule(tmp_path / "compression_rate.json", NAME, float(target))
    assert schedule.tokens == 4 * 4 + 5  # with class and register tokens
    flags = ("--load_compression_rate", "--target_flops", target)
    flags = (*flags, "--compression_rate_file", tmp_path / "compression_rate.json", "--checkpoint", "scratch")
    write_image(tmp_path / "in.png", seed=1, size=90)
    code, out, err = cli("--visualize", tmp_path / "in.png", *MODEL, *flags, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "in.png: no head -> " in out
    assert "dense" not in json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    with Image.open(tmp_path / "in.png") as page:
        page.load()


def test_a_search_step_can_be_measured() -> None:
    entry = models.entry_of(NAME)
    subject = Subject(replace(entry, options={"depth": 3}), (56, 56), None, 1, 0)
    for kind in ("plain", "search"):
        build_step(kind, subject, 2, torch.device("cpu"))()


def test_a_file_without_a_head_is_saved_and_drawn(cli: Cli, tmp_path: Path) -> None:
    model = diffrate.patch.vit(models.create(models.entry_of("test_vit"), (48, 96), num_classes=0))
    model.set_kept_num([19] * 6, [19, 10, 10, 10, 10, 10])
    diffrate.save(model, tmp_path / "bare.safetensors", name="mine")
    write_image(tmp_path / "in.png", seed=1, size=90)
    code, out, err = cli(
        "--visualize", tmp_path / "in.png", "--checkpoint", tmp_path / "bare.safetensors", "--output_dir", tmp_path
    )
    assert (code, err) == (0, "")
    assert "no head" in out
    result = cli("--eval", "--checkpoint", tmp_path / "bare.safetensors")
    check(result, "has no head")
