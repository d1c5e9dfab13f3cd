"""Bad input: one line that names flag, file or field, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import models
from cli.flags import check_paths, parse_flags
from tests.conftest import Cli, write_image
from utils import UsageError

SAMPLE = ("--eval", "--num_workers", 0)


def check(result: tuple[int, str, str], *expected: str) -> None:
    code, out, err = result
    assert code == 2
    assert err.startswith("main.py: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    for text in expected:
        assert text in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--eval", "--finetune"),
            ["accepted: one of --eval, --finetune, --benchmark, ", "--plot, --list-models, or none: a search"],
        ),
        (("--eval", "--model", "resnet50"), ["--model resnet50: found ResNet; accepted: a model of timm"]),
        (("--eval", "--data-path", "/nowhere", "--model", "caformer_s36"), ["--data-path /nowhere: no such folder"]),
        (("--eval", "--data-path", "."), ["--model is needed with --data-path"]),
        (("--eval", "--data-set", "CIFAR", "--model", "caformer_s36"), ["--data-set CIFAR needs --data-path"]),
        (("--eval", "--data-set", "MNIST"), ["--data-set", "MNIST", "SAMPLE"]),
        (("--eval", "--device", "cuda"), ["--device cuda", "accepted: auto, cpu"]),
        (("--eval", "--device", "abacus"), ["--device abacus: unknown"]),
        (("--eval", "--batch-size", "0"), ["--batch-size", "found 0; accepted: from 1"]),
        (("--eval", "--batch-size", "many"), ["--batch-size", "many"]),
        (("--eval", "--crop-pct", "1.5"), ["--crop-pct", "found 1.5; accepted: above 0 to 1"]),
        (("--eval", "--crop-pct", "nan"), ["--crop-pct", "found nan"]),
        (("--eval", "--amp", "fp8"), ["--amp", "fp8"]),
        (("--eval", "--no-such-flag"), ["--no-such-flag"]),
        (("--eval", "--mixup-", "1"), ["ambiguous option: --mixup-"]),
        (("--eval", "--target_flops", "2.9"), ["--target_flops needs --load_compression_rate"]),
        (
            ("--eval", "--load_compression_rate", "--target_flops", "2.9"),
            ["ViT-Sample", "0.0169, 0.0242, 0.0314, 0.0386"],
        ),
        (("--eval", "--load_compression_rate", "--target_flops", "-1"), ["--target_flops", "found -1"]),
        (("--eval", "--checkpoint", "gone.pth"), ["checkpoint gone.pth: no such file"]),
        (("--eval", "--input-size", "30"), ["--input-size 30", "multiple of 4"]),
        (("--finetune", "a.pth", "--checkpoint", "b.pth"), ["name two files"]),
        (("--finetune", "--batch-size", "3", "--mixup", "0.8"), ["--batch-size 3: accepted: an even number"]),
        (("--finetune", "--opt", "sgdd"), ["--opt sgdd", "adamw"]),
        (("--finetune", "--aa", "paint"), ["--aa paint"]),
        (("--finetune", "--aa", "rand-mxx"), ["--aa rand-mxx: found 'mxx'; accepted: a name and a number"]),
        (("--finetune", "--aa", "rand-m9-mstdx-inc1"), ["found 'mstdx'"]),
        (("--finetune", "--drop-path", "1"), ["--drop-path: found 1; accepted: from 0 to below 1"]),
        (("--eval", "--checkpoint", ""), ["--checkpoint: found an empty name"]),
        (("--init_compression_rate", "0.3"), ["ViT-Sample has no --init_compression_rate 0.3; accepted: 0.0169"]),
        (
            ("--finetune", "--epochs", "3", "--warmup-epochs", "3"),
            ["3: accepted: less than --epochs 3"],
        ),
        (("--finetune", "--batch-size", "5000"), ["--batch-size 5000"]),
        (("--finetune", "--affine", "10", "2", "0"), ["--affine", "2.0"]),
    ],
)
def test_flags(words: tuple[str, ...], expected: list[str], cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    check(cli(*words, "--num_workers", 0, "--output_dir", folder), *expected)
    assert not folder.exists() or {path.name for path in folder.iterdir()} <= {"log_rank0.txt"}


def write_rates(path: Path, prune: object, merge: object) -> Path:
    table = {"ViT-Sample": {"0.02": {"prune_kept_num": prune, "merge_kept_num": merge}}}
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    ("prune", "merge", "expected"),
    [
        ([50] * 8, [50] * 7, "merge_kept_num: found 7 counts; accepted: 8"),
        ([50] * 8, [50] * 7 + [0], "merge_kept_num[7]: found 0; accepted: 1 to 50"),
        ([51] + [50] * 7, [50] * 8, "prune_kept_num[0]: found 51; accepted: 1 to 50"),
        ([50] * 8, [50.5] * 8, "merge_kept_num[0]: found 50.5; accepted: whole numbers"),
        (None, [50] * 8, "prune_kept_num: found none; accepted: 8 counts"),
    ],
)
def test_schedules(prune: object, merge: object, expected: str, cli: Cli, tmp_path: Path) -> None:
    file = write_rates(tmp_path / "rates.json", prune, merge)
    result = cli(*SAMPLE, "--load_compression_rate", "--compression_rate_file", file)
    check(result, expected, str(file), "ViT-Sample")


GONE = "cannot be read (no such file); accepted: a file that is there"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--eval", "--checkpoint", "gone.pth"), "checkpoint gone.pth: no such file"),
        (("--eval", "--model", "test_vit", "--data-path", "gone"), "--data-path gone: no such folder"),
        (("--plot", "gone"), "--plot gone: no such folder"),
        (("--benchmark", "gone.pt2"), "gone.pt2: found no such file; accepted: an exported file"),
        (("--visualize", "figures/digit.png", "gone.png"), f"image gone.png: {GONE}"),
        (("--resume", "gone.pth"), f"--resume gone.pth: {GONE}"),
        (
            ("--eval", "--model", "vit_deit_smal_patch16_224", "--data-path", "sample"),
            "--model vit_deit_smal_patch16_224: unknown model; nearest: vit_deit_small_patch16_224, "
            "deit_small_patch16_224, vit_deit_base_patch16_224; accepted: the names of --list-models",
        ),
    ],
)
def test_paths_and_names_are_looked_for_before_torch_is_imported(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        check_paths(parse_flags(words))


def test_no_name_of_timms_is_refused_before_torch_is_imported() -> None:
    names = sorted({*timm.list_models(), *timm.models.get_deprecated_models(), *models.ZOO})
    for name in names[::80]:
        check_paths(parse_flags(["--eval", "--model", name, "--data-path", "sample"]))


def test_malformed_json_gives_line_and_column(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text('{"ViT-Sample": {\n  "0.02": oops}}')
    result = cli(*SAMPLE, "--load_compression_rate", "--compression_rate_file", file)
    check(result, "line 2 column 11", str(file))


def test_no_val(cli: Cli, image_folder: Path) -> None:
    result = cli("--eval", "--model", "vit_sample_patch4_28", "--data-path", image_folder / "train")
    check(result, f"--data-path {image_folder / 'train'}: no folder val/")


def test_an_empty_class_folder(cli: Cli, image_folder: Path) -> None:
    (image_folder / "val" / "fox").mkdir()
    check(
        cli("--eval", "--model", "vit_sample_patch4_28", "--data-path", image_folder, "--checkpoint", "scratch"), "fox"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_jpeg(cli: Cli, image_folder: Path, workers: int) -> None:
    bad = image_folder / "val" / "dog" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    words = ("--eval", "--model", "vit_sample_patch4_28", "--data-path", image_folder, "--checkpoint", "scratch")
    check(cli(*words, "--num_workers", workers), f"image {bad}: cannot be read")


def test_a_checkpoint_cut_short(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "short.pth"
    file.write_bytes(models.entry_of("vit_sample_patch4_28").weights.read_bytes()[:100_000])
    check(cli(*SAMPLE, "--checkpoint", file), f"checkpoint {file}: cannot be read, cut short")


def test_a_checkpoint_of_another_model(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {"head.weight": torch.zeros(10, 7), "cls_token": torch.zeros(1, 1, 7)}}, tmp_path / "a.pth")
    check(cli(*SAMPLE, "--checkpoint", tmp_path / "a.pth"), "does not fit", "expected [1, 1, 96] found [1, 1, 7]")


def test_classes_that_differ_from_the_head(cli: Cli, image_folder: Path) -> None:
    result = cli("--eval", "--model", "vit_sample_patch4_28", "--data-path", image_folder)
    check(result, "has 3 classes, the checkpoint's head 10")


def test_splits_that_differ(cli: Cli, image_folder: Path) -> None:
    write_image(image_folder / "train" / "fox" / "0.jpg", seed=0)
    result = cli("--finetune", "--model", "vit_sample_patch4_28", "--data-path", image_folder, "--batch-size", 2)
    check(result, "train and val differ in classes, first fox")


def test_an_output_folder_that_is_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check(cli(*SAMPLE, "--output_dir", tmp_path / "file"), f"--output_dir {tmp_path / 'file'}")


def test_a_download_that_fails(cli: Cli, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("models.weights.answers", lambda _: True)
    result = cli("--eval", "--model", "vit_base_patch16_mae", "--data-path", image_folder)
    check(result, "no route to host", "mae_finetuned_vit_base.pth", str(tmp_path), "--checkpoint")


def test_environment_variables_that_are_no_numbers(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    check(cli(*SAMPLE), "WORLD_SIZE=two")


def test_help_is_no_error(capsys: pytest.CaptureFixture[str], cli: Cli) -> None:
    with pytest.raises(SystemExit) as caught:
        cli("--help")
    assert caught.value.code == 0
    assert re.search(r"--target_flops GFLOPS", capsys.readouterr().out)
