"""`--finetune --resume`: a training that was stopped goes on bit for bit, and another one's file is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrate
import engine
import main
from engine import Reporter, Training
from tests.cli.test_errors import check
from tests.cli.test_eval import scores
from tests.cli.test_finetune import FULL, HALF, MODEL, records
from tests.cli.test_search import same_rates
from tests.cli.test_search import words as search_words
from tests.conftest import Cli, write_image
from tests.forked import end_while_held_up

EPOCHS, SAVES = 3, 5  # a save for each step of an epoch and one for its scores, where saves are frequent
# Four steps an epoch, all parts of DeiT's recipe, kept counts, averaged weights.
TRAINING = (*FULL, *HALF, "--batch-size", 2, "--no-repeated-aug", "--epochs", EPOCHS, "--model-ema", "--lr", 0.1)


def words(data: Path, out: Path, *more: object) -> list[object]:
    return [*TRAINING, "--data-path", data, "--output_dir", out, *more]


def content(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pth", weights_only=True)


def by_epoch(out: Path) -> dict[int, dict[str, Any]]:
    return {record["epoch"]: record for record in records(out)}


def check_same(out: Path, whole: Path) -> None:
    """The same weights, averages of them, optimizer and scores, to the last bit."""
    found, expected = content(out), content(whole)
    assert found["position"] == expected["position"] | {"epoch": EPOCHS}
    for name in ("model", "model_ema"):
        assert found[name].keys() == expected[name].keys()
        assert [key for key, value in found[name].items() if not torch.equal(value, expected[name][key])] == []
    for index, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, found["optimizer"]["state"][index][key]) for key, value in state.items())
    assert by_epoch(out) == by_epoch(whole)


def interrupt_at_save(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A checkpoint after every step, and the end of the process, as by `kill -9`, after that many."""
    saves: list[int] = []
    original = Training.save

    def save(checkpoint: Training) -> None:
        original(checkpoint)
        saves.append(1)
        if len(saves) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr("engine.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(Training, "save", save)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, dark and bright, four images each to train on and two to score on."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                write_image(root / split / name / f"{index}.jpg", seed=100 * label + index, brightest=100 + 150 * label)
    return root


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the training that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert main.main([str(word) for word in words(folder, out)]) == 0
    return out


@pytest.mark.parametrize("saves", [2, 5], ids=["in the first epoch", "between epochs"])
def test_killed_after_a_checkpoint_it_ends_the_same(
    saves: int, whole: Path, cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = words(folder, tmp_path / "out", "--resume", "auto")
    with monkeypatch.context() as patch:
        interrupt_at_save(patch, saves)
        assert cli(*again)[0] == 130
    before = content(tmp_path / "out")["position"]
    assert (before["epoch"], before["step"]) == divmod(saves, SAVES)
    code, out, err = cli(*again)
    assert (code, err) == (0, "")
    assert (
        f"going on from {tmp_path / 'out' / 'checkpoint.pth'} at epoch {before['epoch']}, step {before['step']}" in out
    )
    check_same(tmp_path / "out", whole)


def send_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    """SIGTERM to this process when `owner.name` is called for that time."""
    calls: list[int] = []
    original = getattr(owner, name)

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, spy)


@pytest.mark.parametrize(
    ("owner", "name", "number", "place", "step"),
    [
        (engine, "_train_step", 6, "epoch 1, step 2", 2),
        (diffrate, "evaluate", 4, "while epoch 1 was scored", 4),  # of its averaged weights
    ],
    ids=["in an epoch", "while it is scored"],
)
def test_sigterm_saves_and_leaves(
    owner: Any,
    name: str,
    number: int,
    place: str,
    step: int,
    whole: Path,
    cli: Cli,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = words(folder, tmp_path / "out", "--resume", "auto")
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send_at_call(patch, owner, name, number)
        code, _, err = cli(*again)
    assert (code, err) == (130, f"main.py: stopped {'at ' * ('step' in place)}{place}: go on with --resume\n")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert content(tmp_path / "out")["position"]["step"] == step
    assert cli(*again)[0] == 0
    check_same(tmp_path / "out", whole)


@pytest.mark.parametrize(
    ("place", "number", "where"),
    [("engine:-:_train_step", 7, "epoch 1, step 2"), ("engine:Training:_score", 3, "epoch 1, step 4")],
)
def test_a_signal_ends_a_step_that_takes_long_and_saves_the_last_one(
    place: str, number: int, where: str, whole: Path, cli: Cli, folder: Path, tmp_path: Path
) -> None:
    again = words(folder, tmp_path / "out", "--resume", "auto")
    code, err = end_while_held_up(tmp_path, place, number, *again)
    assert (code, err) == (130, f"main.py: stopped at {where}: go on with --resume\n")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")} == set()
    assert cli(*again)[0] == 0
    check_same(tmp_path / "out", whole)


def test_a_training_that_is_done_is_scored_again(whole: Path, cli: Cli, folder: Path) -> None:
    before = content(whole)
    code, out, err = cli(*words(folder, whole, "--resume", "auto"))
    assert (code, err) == (0, "")
    assert f"at epoch {EPOCHS}, step 0" in out
    assert "Epoch [" not in out
    assert scores(out[: out.rindex("  best ")])[:2] == (records(whole)[-1]["acc1"], 100)
    assert content(whole)["position"] == before["position"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--lr", 0.2), "--lr 0.1; accepted: 0.2"),
        (("--epochs", 5), "--epochs 3; accepted: 5"),
        (("--batch-size", 4), "--batch-size 2; accepted: 4"),
        (("--seed", 1), "--seed 0; accepted: 1"),
        (("--mixup", 0.5), "--mixup 0.8; accepted: 0.5"),
        (("--opt", "sgd"), "--opt adamw; accepted: sgd"),
        (("--target_flops", 0.0314), "was made with kept counts [[50, "),
        (("--input-size", 32, "--scale_compression_rate"), "--input_size None; accepted: 32"),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(
    more: tuple[object, ...], expected: str, whole: Path, cli: Cli, folder: Path, tmp_path: Path
) -> None:
    check(cli(*words(folder, tmp_path, "--resume", whole / "checkpoint.pth", *more)), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"log_rank0.txt"}


def test_checkpoints_of_other_kinds_are_named(cli: Cli, folder: Path, whole: Path, tmp_path: Path) -> None:
    """A search's in a training, a training's in a search and in an evaluation, and files of weights alone."""
    searched, weights = tmp_path / "search", tmp_path / "weights.pth"
    assert cli(*search_words(folder, searched, "--epochs", 1))[0] == 0
    torch.save({"model": content(whole)["model"], "epoch": 2, "acc1": 50.0}, weights)
    again = words(folder, tmp_path / "out", "--resume")
    for path, kind in ((searched / "checkpoint.pth", "search"), (weights, "weights alone")):
        check(cli(*again, path), f"--resume {path}: found", f"({kind}); accepted: of --finetune")
    check(cli(*again, whole / "model_best.pth"), "(weights alone); accepted: of --finetune")
    evaluation = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", folder, "--num_workers", 0)
    for command in (search_words(folder, tmp_path / "out"), evaluation):
        for path, kind in ((whole / "checkpoint.pth", "finetune"), (weights, "weights alone")):
            check(cli(*command, "--resume", path), f"--resume {path}: found", f"({kind}); accepted: of a search")


@pytest.mark.parametrize("damage", ["gone", "empty", "cut short", "text", "a list"])
def test_a_file_that_is_no_checkpoint(damage: str, cli: Cli, folder: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    if damage == "a list":
        torch.save([1, 2], path)
    elif damage != "gone":
        start = (whole / "checkpoint.pth").read_bytes()[:5000]
        path.write_bytes({"empty": b"", "cut short": start, "text": b"weights\n" * 99}[damage])
    kind = "accepted: a file that is there" if damage == "gone" else "of --finetune"
    check(cli(*words(folder, tmp_path / "out", "--resume", path)), f"--resume {path}: ", "accepted: ", kind)


def test_auto_needs_a_folder(cli: Cli, folder: Path) -> None:
    check(cli(*TRAINING, "--data-path", folder, "--resume", "auto"), "--resume auto needs --output_dir")


def test_a_sweep_goes_on_bit_for_bit(cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the first search: the second has as many steps as if nothing had happened."""
    flags = search_words(folder, tmp_path, "--epochs", 1, "--resume", "auto")
    at = flags.index("0.025")
    sweep = [*flags[:at], "0.02", "0.03", *flags[at + 1 :], "--output_dir"]
    with monkeypatch.context() as patch:
        send_at_call(patch, Reporter, "on_step", 1)
        code, _, err = cli(*sweep, tmp_path / "out")
        assert (code, "go on with --resume" in err) == (130, True)
    for name in ("out", "whole"):
        assert cli(*sweep, tmp_path / name)[0] == 0
    for target in ("target_0.02", "target_0.03"):
        assert same_rates(tmp_path / "out" / target, tmp_path / "whole" / target)
