"""`--sensitivity`: the table, the records and the plot, with and without labels, flags and a head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import models
from tests.cli.test_errors import check
from tests.conftest import Cli

FAST = ("--num_workers", 0)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sensitivity.txt").read_text().splitlines()]


@pytest.mark.usefixtures("painted")
def test_the_sample_needs_no_flag(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, err = cli("--sensitivity", 8, "--batch-size", 5, *FAST)
    assert (code, err) == (0, "")
    out = tmp_path / "output"
    found = records(out)
    assert len(found) == 8 * 2 * 5
    assert {one["images"] for one in found} == {8}
    first = found[0]
    assert (first["model"], first["block"], first["kind"]) == ("vit_sample_patch4_28", 0, "prune")
    assert (first["kept"], first["tokens"], first["share"]) == (38, 50, 0.76)
    assert 0 < first["loss"] < found[4]["loss"]
    assert "block   kind  tokens  kept %      loss  top-1 as dense, %" in text
    assert f"    0  prune      38      76  {first['loss']:.2e}" in text
    drawn = (out / "sensitivity.png").read_bytes()
    (out / "sensitivity.png").unlink()
    code, text, err = cli("--plot", out)
    assert (code, err) == (0, "")
    assert (out / "sensitivity.png").read_bytes() == drawn
    assert str(Path("output") / "sensitivity.png") in text or str(out / "sensitivity.png") in text
    with Image.open(out / "sensitivity.png") as picture:
        picture.load()


def test_images_come_from_all_over_the_training_split(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Classes are none of the model's: labels count for nothing. Files that are not chosen may be damaged."""
    for name in ("cat", "dog", "emu"):
        for index in (1, 2, 3):
            (image_folder / "train" / name / f"{index}.jpg").write_bytes(b"damaged")
    torch.save(models.create(models.entry_of("test_vit"), 64, num_classes=7).state_dict(), tmp_path / "seven.pth")
    flags = ("--model", "test_vit", "--input-size", 64, "--checkpoint", tmp_path / "seven.pth", *FAST)
    flags = (*flags, "--data-path", image_folder, "--output_dir", tmp_path)
    assert cli("--sensitivity", 3, *flags)[::2] == (0, "")
    assert {one["images"] for one in records(tmp_path)} == {3}
    check(cli("--sensitivity", *flags), "1.jpg: cannot be read", "accepted: a whole image file")


@pytest.mark.usefixtures("painted")
def test_a_model_without_a_head(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    torch.save(models.create(models.entry_of("test_vit"), 64, num_classes=0).state_dict(), tmp_path / "bare.pth")
    flags = ("--model", "test_vit", "--input-size", 64, "--checkpoint", tmp_path / "bare.pth", *FAST)
    flags = (*flags, "--batch-size", 5)
    code, text, err = cli("--sensitivity", *flags, "--data-path", image_folder, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "top-1" not in text
    assert {(one["agreement"], one["images"]) for one in records(tmp_path)} == {(None, 12)}
    assert (tmp_path / "sensitivity.png").exists()
    check(cli("--sensitivity", *flags, "--output_dir", tmp_path), "--data-path is needed", "do not fit test_vit")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--sensitivity", 0), ["--sensitivity", "found 0; accepted: from 1"]),
        (("--sensitivity", "many"), ["--sensitivity", "many"]),
        (("--sensitivity", "--eval"), ["accepted: one of", "--sensitivity"]),
        (("--sensitivity", "--load_compression_rate"), ["--load_compression_rate goes with --eval"]),
        (("--sensitivity", "--target_flops", 0.02), ["--target_flops needs --load_compression_rate"]),
        (("--sensitivity", "--save", "small.safetensors"), ["--save goes with"]),
        (("--sensitivity", "--model", "test_vit", "--data-path", "gone"), ["--data-path gone: no such folder"]),
        (("--sensitivity", "--model", "vit_small_patch14_reg4_dinov2.lvd142m"), ["--data-path is needed"]),
        (("--sensitivity", "--batch-size", 1, 2), ["--batch-size: found 2 sizes"]),
    ],
)
def test_bad_input_is_one_line(words: tuple[object, ...], said: list[str], cli: Cli, tmp_path: Path) -> None:
    check(cli(*words, "--output_dir", tmp_path), *said)


def test_a_folder_without_training_images(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    flags = ("--model", "test_vit", "--data-path", tmp_path, "--output_dir", tmp_path)
    check(cli("--sensitivity", *flags), "no folder train/", "accepted: both, or images without splits")


def test_a_folder_of_images_without_labels(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for index, image in enumerate(sorted((image_folder / "train").rglob("*.jpg"))):
        shutil.copy(image, tmp_path / "flat" / f"{index:03d}.jpg")
    torch.save(models.create(models.entry_of("test_vit"), 64, num_classes=7).state_dict(), tmp_path / "seven.pth")
    flags = ("--model", "test_vit", "--input-size", 64, "--checkpoint", tmp_path / "seven.pth", *FAST)
    for name, folder in (("flat", tmp_path / "flat"), ("split", image_folder)):
        code, _, err = cli("--sensitivity", *flags, "--data-path", folder, "--output_dir", tmp_path / f"of_{name}")
        assert (code, err) == (0, "")
    assert records(tmp_path / "of_flat") == records(tmp_path / "of_split")
