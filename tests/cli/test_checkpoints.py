"""What checkpoints and files of `--save` say of themselves: kept counts, model, classes; and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrate
from diffrate.schedule import find_schedule
from tests.cli.test_errors import check
from tests.cli.test_eval import PROJECT, official_file, scores
from tests.cli.test_finetune import HALF, MODEL, PLAIN
from tests.cli.test_search import KEY, words
from tests.conftest import Cli, tensors_in, write_image

NO_WORKERS = ("--num_workers", 0)
CLASSES = ("cat", "dog", "emu")


def data(folder: Path) -> tuple[object, ...]:
    return ("--data-path", folder, *NO_WORKERS)


def last(out: Path) -> dict[str, Any]:
    """The last record of an output folder."""
    return json.loads((out / "log.txt").read_text().splitlines()[-1])


def counts(out: Path) -> tuple[list[int], list[int]]:
    return last(out)["prune_kept_num"], last(out)["merge_kept_num"]


def half() -> tuple[list[int], list[int]]:
    schedule = find_schedule(PROJECT / "compression_rate.json", KEY, 0.0242)
    return list(schedule.prune or ()), list(schedule.merge)


@pytest.fixture
def trained(cli: Cli, image_folder: Path, tmp_path: Path) -> Path:
    """The checkpoint of a training at half the tokens."""
    code, _, err = cli(*PLAIN, *data(image_folder), *HALF, "--epochs", 1, "--output_dir", tmp_path / "trained")
    assert (code, err) == (0, "")
    return tmp_path / "trained" / "checkpoint.pth"


@pytest.fixture
def saved(cli: Cli, image_folder: Path, tmp_path: Path) -> Path:
    """A file of `--save`, of fresh weights at half the tokens."""
    path = tmp_path / "half.safetensors"
    flags = ("--eval", "--model", MODEL, "--checkpoint", "scratch", *data(image_folder), *HALF)
    code, _, err = cli(*flags, "--save", path)
    assert (code, err) == (0, "")
    return path


def test_a_trained_checkpoint_runs_at_its_counts(trained: Path, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    flags = ("--eval", "--model", MODEL, "--checkpoint", trained, *data(image_folder), "--output_dir", tmp_path / "out")
    code, out, err = cli(*flags)
    assert (code, err) == (0, "")
    assert f"checkpoint {trained}: at the kept counts that it holds, 0.024 GFLOPs; --dense for all tokens" in out
    assert counts(tmp_path / "out") == half()
    assert last(tmp_path / "out")["loss"] == pytest.approx(last(trained.parent)["loss"])
    code, out, err = cli(*flags, "--dense")
    assert (code, err) == (0, "")
    assert "kept counts" not in out
    assert counts(tmp_path / "out") == ([50] * 8, [50] * 8)
    assert scores(out)[3] == 0.048


def test_a_schedule_of_the_file_goes_before(trained: Path, cli: Cli, image_folder: Path) -> None:
    flags = ("--eval", "--model", MODEL, "--checkpoint", trained, *data(image_folder), "--load_compression_rate")
    code, out, err = cli(*flags, "--target_flops", 0.0314)
    assert (code, err) == (0, "")
    assert "kept counts" not in out
    assert scores(out)[3] == 0.031


def test_counts_of_another_input_size_are_refused_or_scaled(trained: Path, cli: Cli, image_folder: Path) -> None:
    flags = ("--eval", "--model", MODEL, "--checkpoint", trained, *data(image_folder), "--input-size", 32)
    check(cli(*flags), f"checkpoint {trained}: made for 50 tokens; accepted: 65 tokens")
    assert scores(cli(*flags, "--scale_compression_rate")[1])[3] == 0.032
    assert scores(cli(*flags, "--dense")[1])[3] == 0.064


def test_a_dense_training_is_dense(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    cli(*PLAIN, *data(image_folder), "--epochs", 1, "--output_dir", tmp_path)
    flags = ("--eval", "--model", MODEL, "--checkpoint", tmp_path / "checkpoint.pth", *data(image_folder))
    for more in ((), ("--input-size", 32)):
        code, out, err = cli(*flags, *more)
        assert (code, err) == (0, "")
        assert "kept counts" not in out


@pytest.mark.parametrize("mode", [("--eval",), ("--finetune",), ("--benchmark",), ("--visualize", "a.jpg")])
def test_dense_names_no_schedule(mode: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    flags = ("--dense", "--load_compression_rate", "--output_dir", tmp_path, *NO_WORKERS)
    check(cli(*mode, *flags), "--dense keeps all tokens; accepted: no --load_compression_rate")


def check_alone(path: Path, expected: dict[str, Any], cli: Cli, folder: Path, out: Path) -> None:
    """The file alone, without `--model`, gives the scores and counts of the record `expected`."""
    code, text, err = cli("--eval", "--checkpoint", path, *data(folder), "--output_dir", out)
    assert (code, err) == (0, "")
    found = last(out)
    for name in ("model", "acc1", "acc5", "loss", "images", "gflops"):
        assert found[name] == pytest.approx(expected[name]), name
    assert "--dense for all tokens" in text


def test_what_an_evaluation_saves_evaluates_alone(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "out"
    flags = ("--eval", "--model", MODEL, "--checkpoint", "scratch", *data(image_folder), *HALF, "--save", path)
    code, text, err = cli(*flags, "--crop-pct", 0.6, "--output_dir", out)
    assert (code, err) == (0, "")
    assert f"saved {path}: 0.024 GFLOPs" in text
    check_alone(path, last(out), cli, image_folder, tmp_path / "alone")
    assert counts(tmp_path / "alone") == counts(out) == half()
    about = diffrate.about(path)
    assert (about.name, about.classes, about.num_classes, about.crop_pct) == (MODEL, CLASSES, 3, 0.6)


def test_what_a_search_saves_evaluates_alone(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """As the command says that the search ends with."""
    path, out = tmp_path / "a.safetensors", tmp_path / "out"
    code, text, err = cli(*words(image_folder, out, "--epochs", 1, "--save", path))
    assert (code, err) == (0, "")
    found = json.loads((out / "found.txt").read_text().splitlines()[-1])
    following = text.split("next: python main.py ")[1].split()
    assert following == ["--eval", "--checkpoint", str(path), "--data-path", str(image_folder)]
    check_alone(path, found, cli, image_folder, tmp_path / "alone")
    assert counts(tmp_path / "alone") == (found["prune_kept_num"], found["merge_kept_num"])


def test_what_a_training_saves_evaluates_alone(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "a.safetensors", tmp_path / "out"
    code, _, err = cli(*PLAIN, *data(image_folder), *HALF, "--epochs", 1, "--output_dir", out, "--save", path)
    assert (code, err) == (0, "")
    check_alone(path, last(out), cli, image_folder, tmp_path / "alone")
    assert diffrate.about(path).classes == CLASSES


def test_what_a_training_saves_is_what_its_checkpoint_loads(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Of averaged weights, the average."""
    path = tmp_path / "a.safetensors"
    flags = ("--epochs", 1, "--lr", 0.1, "--model-ema", "--output_dir", tmp_path, "--save", path)
    assert cli(*PLAIN, *data(image_folder), *HALF, *flags)[0] == 0
    saved, checkpoint = (tensors_in(file) for file in (path, tmp_path / "checkpoint.pth"))
    assert [key for key, value in checkpoint.items() if not torch.equal(value, saved[key])] == []
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert not torch.equal(saved["pos_embed"], content["model"]["pos_embed"])


def test_an_evaluation_in_other_precision_saves_the_weights_as_they_were(
    cli: Cli, saved: Path, image_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "again.safetensors"
    assert cli("--eval", "--checkpoint", saved, *data(image_folder), "--amp", "bf16", "--save", path)[0] == 0
    first, second = (tensors_in(file) for file in (saved, path))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_classes_of_the_file_decide(saved: Path, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """A part of its classes scores against its outputs, another class is refused by name."""
    part = tmp_path / "part"
    write_image(part / "val" / "emu" / "0.jpg", seed=1)
    code, _, err = cli("--eval", "--checkpoint", saved, *data(part))
    assert (code, err) == (0, "")
    write_image(image_folder / "val" / "fox" / "0.jpg", seed=1)
    check(cli("--eval", "--checkpoint", saved, *data(image_folder)), "class fox", "the checkpoint's, cat, dog, emu")


def test_a_picture_is_called_by_the_classes_of_the_file(saved: Path, cli: Cli, tmp_path: Path) -> None:
    photograph = PROJECT / "figures" / "chelsea.jpg"
    code, _, err = cli("--visualize", photograph, "--checkpoint", saved, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    record = last(tmp_path / "out")
    for seen in ("dense", "compressed"):
        assert any(name in str(record[seen]) for name in CLASSES), record
    assert record["kept"] == running(half())
    assert (tmp_path / "out" / "chelsea_tokens.png").exists()


def running(rows: tuple[list[int], list[int]]) -> list[int]:
    """Tokens after each block."""
    left, kept = 50, []
    for pair in zip(*rows, strict=True):
        left = min(left, *pair)
        kept.append(left)
    return kept


def test_a_training_goes_on_from_the_file_at_its_counts(
    saved: Path, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    flags = ("--finetune", saved, *data(image_folder), "--batch-size", 4, "--epochs", 1, "--lr", 1e-9)
    code, out, err = cli(*flags, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert f"checkpoint {saved}: at the kept counts that it holds, 0.024 GFLOPs" in out
    assert "start fresh" not in out
    content = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert tuple(content["kept"]) == half()
    before = tensors_in(saved)
    torch.testing.assert_close(content["model"]["head.weight"], before["head.weight"], atol=1e-5, rtol=0)
    assert cli(*flags, "--dense", "--output_dir", tmp_path / "dense")[0] == 0
    assert last(tmp_path / "dense")["gflops"] == pytest.approx(0.048, abs=0.001)


def test_a_benchmark_takes_the_counts_of_the_file(saved: Path, cli: Cli, tmp_path: Path) -> None:
    flags = ("--benchmark", "--checkpoint", saved, "--batch-size", 1, "--rounds", 1, "--amp", "off")
    code, _, err = cli(*flags, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert last(tmp_path / "out")["compressed_gflops"] == pytest.approx(0.0242, abs=0.0003)


@pytest.mark.parametrize("mode", ["--eval", "--finetune", "--benchmark"])
def test_another_model_beside_the_file_is_refused(mode: str, saved: Path, cli: Cli, image_folder: Path) -> None:
    flags = (mode, "--model", "vit_deit_tiny_patch16_224", "--checkpoint", saved, *data(image_folder))
    check(cli(*flags), "--model vit_deit_tiny_patch16_224", f"{saved} holds {MODEL}; accepted: {MODEL}, or no --model")


def test_the_users_folder_is_found_after_an_equals_sign(
    saved: Path, cli: Cli, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the shell leaves the `~` as it is."""
    monkeypatch.setenv("HOME", str(saved.parent))
    code, _, err = cli("--eval", f"--checkpoint=~/{saved.name}", "--data-path=~/data", *NO_WORKERS)
    assert (code, err) == (0, "")


def test_its_own_model_beside_the_file_is_fine(saved: Path, cli: Cli, image_folder: Path) -> None:
    code, _, err = cli("--eval", "--model", MODEL, "--checkpoint", saved, *data(image_folder))
    assert (code, err) == (0, "")


def test_timms_names(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """The same model with the same schedules, also beside a file of it under its published name. `test_names.py` has
    all names."""
    name, published = "deit_tiny_patch16_224.fb_in1k", "vit_deit_tiny_patch16_224"
    file, path = official_file(published, tmp_path / "official.pth"), tmp_path / "a.safetensors"
    small = ("--input-size", 96, "--load_compression_rate", "--scale_compression_rate")
    flags = ("--eval", "--checkpoint", file, *data(image_folder), *small, "--target_flops", 0.8)
    found = [cli(*flags, "--model", model, "--save", path) for model in (name, published)]
    assert [(code, err) for code, _, err in found] == [(0, "")] * 2
    assert scores(found[0][1]) == scores(found[1][1])
    code, out, err = cli("--eval", "--model", name, "--checkpoint", path, *data(image_folder))
    assert (code, err) == (0, "")
    assert scores(out) == scores(found[0][1])


@pytest.mark.parametrize(
    ("damage", "mode"),
    [
        ("cut short", "--eval"),
        ("cut in its header", "--finetune"),
        ("a byte", "--visualize"),
        ("text", "--finetune"),
        ("empty", "--visualize"),
        ("gone", "--eval"),
    ],
)
def test_a_damaged_file(damage: str, mode: str, saved: Path, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    header = whole.index(b"merge_kept_num")
    damaged = {
        "cut short": whole[:-1000],
        "cut in its header": whole[:50],
        "a byte": whole[:header] + b"?" + whole[header + 1 :],
        "text": b"weights\n" * 9,
        "empty": b"",
    }
    if damage == "gone":
        saved.unlink()
    else:
        saved.write_bytes(damaged[damage])
    photograph = (PROJECT / "figures" / "chelsea.jpg",) if mode == "--visualize" else ()
    for more in ((), ("--model", MODEL)):
        flags = (mode, *photograph, *more, "--checkpoint", saved, *data(image_folder), "--output_dir", tmp_path / "out")
        check(cli(*flags), str(saved))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--eval", "--save", "a.pth"), "--save a.pth: accepted: a name that ends in .safetensors"),
        (("--eval", "--save", "a"), "--save a: accepted: a name that ends in .safetensors"),
        (("--eval", "--save", "gone/a.safetensors"), "--save gone/a.safetensors: no folder gone"),
        (("--eval", "--save", "folder.safetensors"), "--save folder.safetensors: found a folder"),
        (("--finetune", "--save", "folder.safetensors"), "--save folder.safetensors: found a folder"),
        (("--benchmark", "--save", "a.safetensors"), "--save goes with a search, --eval and --finetune"),
        (("--baseline", "both", "--save", "a.safetensors"), "--save goes with a search, --eval and --finetune"),
        (("--visualize", "a.jpg", "--save", "a.safetensors"), "--save goes with a search, --eval and --finetune"),
        (("--target_flops", 0.02, 0.03, "--save", "a.safetensors"), "--save: found 2 targets; accepted: one"),
    ],
)
def test_places_that_are_refused(
    flags: tuple[object, ...],
    expected: str,
    cli: Cli,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is trained or scored."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    scratch = ("--model", MODEL, "--checkpoint", "scratch", *data(image_folder), "--output_dir", tmp_path / "out")
    result = cli(*flags, *scratch)
    check(result, expected)
    assert result[1] == ""
    assert not list(tmp_path.glob("*.safetensors/*"))


@pytest.mark.parametrize(("kind", "value"), [("pth", float("nan")), ("safetensors", float("inf"))])
def test_weights_that_are_no_numbers(
    kind: str, value: float, saved: Path, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    model = diffrate.load(saved)
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias[5] = value  # type: ignore[index]
    path = tmp_path / f"bad.{kind}"
    if kind == "pth":
        torch.save({"model": model.state_dict()}, path)
    else:
        diffrate.save(model, path, name=MODEL, classes=CLASSES)
    for mode in ("--eval", "--finetune"):
        flags = (mode, "--model", MODEL, "--checkpoint", path, *data(image_folder))
        check(cli(*flags), f"checkpoint {path}: blocks.3.mlp.fc1.bias holds NaN or infinite values")


def test_a_file_that_is_no_checkpoint_is_refused_without_advice_to_run_it(cli: Cli) -> None:
    result = cli("--eval", "--checkpoint", PROJECT / "README.md")
    check(result, "README.md: cannot be read, cut short or not a checkpoint (not plain tensors); accepted: ")
    assert "weights_only" not in result[2]
