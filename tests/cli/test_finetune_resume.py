"""`--finetune --resume`: a training that was stopped goes on bit for bit, and another one's file is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrate
import engine
import training.checkpoint
from tests.cli.test_errors import check
from tests.cli.test_finetune import FULL, HALF, PLAIN, PROJECT, records
from tests.cli.test_search import words as search_words
from tests.conftest import Cli
from training.checkpoint import TrainingCheckpoint

EPOCHS = 3
# Six steps an epoch, all parts of DeiT's recipe, kept counts, averaged weights.
TRAINING = (*FULL, *HALF, "--batch-size", 2, "--no-repeated-aug", "--epochs", EPOCHS, "--model-ema", "--lr", 0.1)


def words(folder: Path, out: Path, *more: object) -> list[object]:
    return [*TRAINING, "--data-path", folder, "--output_dir", out, *more]


def content(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pth", weights_only=True)


def check_same(out: Path, whole: Path) -> None:
    """The same weights, averages of them, optimizer and scores, to the last bit."""
    found, expected = content(out), content(whole)
    assert found["position"] == expected["position"] | {"epoch": EPOCHS}
    for name in ("model", "model_ema"):
        assert found[name].keys() == expected[name].keys()
        assert [key for key, value in found[name].items() if not torch.equal(value, expected[name][key])] == []
    for index, state in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, found["optimizer"]["state"][index][key]) for key, value in state.items())
    assert {record["epoch"]: record for record in records(out)} == {record["epoch"]: record for record in records(whole)}


def interrupt_at_save(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A checkpoint after every step, and the end of the process, as by `kill -9`, after that many."""
    saves: list[int] = []
    original = TrainingCheckpoint.save

    def save(checkpoint: TrainingCheckpoint) -> None:
        original(checkpoint)
        saves.append(1)
        if len(saves) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.checkpoint, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(TrainingCheckpoint, "save", save)


@pytest.fixture
def whole(cli: Cli, image_folder: Path, tmp_path: Path) -> Path:
    """The output folder of the training that nothing stopped."""
    code, _, err = cli(*words(image_folder, tmp_path / "whole"))
    assert (code, err) == (0, "")
    return tmp_path / "whole"


@pytest.mark.parametrize("saves", [2, 7, 14], ids=["in the first epoch", "between epochs", "in the last epochs"])
def test_killed_after_a_checkpoint_it_ends_the_same(
    saves: int, whole: Path, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = words(image_folder, tmp_path / "out", "--resume", "auto")
    with monkeypatch.context() as patch:
        interrupt_at_save(patch, saves)
        assert cli(*again)[0] == 130
    before = content(tmp_path / "out")["position"]
    assert (before["epoch"], before["step"]) == (saves // 7, saves % 7)
    code, out, err = cli(*again)
    assert (code, err) == (0, "")
    assert f"going on from {tmp_path / 'out' / 'checkpoint.pth'} at epoch {saves // 7}, step {saves % 7}" in out
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
        (engine, "_train_step", 9, "epoch 1, step 3", 3),
        (diffrate, "evaluate", 3, "while epoch 1 was scored", 6),
        (diffrate, "evaluate", 4, "while epoch 1 was scored", 6),  # the averaged weights
    ],
    ids=["in an epoch", "while it is scored", "while its averaged weights are scored"],
)
def test_sigterm_saves_and_leaves(
    owner: Any,
    name: str,
    number: int,
    place: str,
    step: int,
    whole: Path,
    cli: Cli,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = words(image_folder, tmp_path / "out", "--resume", "auto")
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send_at_call(patch, owner, name, number)
        code, _, err = cli(*again)
    assert (code, err) == (130, f"main.py: stopped {'at ' * ('step' in place)}{place}: go on with --resume\n")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert content(tmp_path / "out")["position"]["step"] == step
    assert cli(*again)[0] == 0
    check_same(tmp_path / "out", whole)


def test_a_process_killed_in_an_epoch_goes_on(whole: Path, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    again = words(image_folder, tmp_path / "out", "--resume", "auto", "--print-freq", 1)
    often = "import sys, main, training.checkpoint as it; it.SAVE_SECONDS = -1.0; main.main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", often, *map(str, again)], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "checkpoint.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.communicate()[1] == b""
    position = content(tmp_path / "out")["position"]
    assert position["epoch"] < EPOCHS
    assert cli(*again)[0] == 0
    check_same(tmp_path / "out", whole)


def test_a_training_that_is_done_is_scored_again(whole: Path, cli: Cli, image_folder: Path) -> None:
    before = content(whole)
    code, out, err = cli(*words(image_folder, whole, "--resume", "auto"))
    assert (code, err) == (0, "")
    assert f"at epoch {EPOCHS}, step 0" in out
    assert "Epoch [" not in out
    assert content(whole)["position"] == before["position"]


def test_auto_begins_where_there_is_nothing_to_go_on_from(whole: Path) -> None:
    """As the fixture did: `whole` was made without `--resume`, and the tests above with it."""
    assert content(whole)["position"]["epoch"] == EPOCHS


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--lr", 0.2), "--lr 0.1; accepted: 0.2"),
        (("--epochs", 5), "--epochs 3; accepted: 5"),
        (("--batch-size", 4), "--batch_sizes [2]; accepted: [4]"),
        (("--seed", 1), "--seed 0; accepted: 1"),
        (("--mixup", 0.5), "--mixup 0.8; accepted: 0.5"),
        (("--opt", "sgd"), "--opt adamw; accepted: sgd"),
        (("--target_flops", 0.0314), "--kept counts"),
        (("--input-size", 32, "--scale_compression_rate"), "--input_size None; accepted: 32"),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(
    more: tuple[object, ...], expected: str, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    cli(*words(image_folder, tmp_path, "--epochs", 1))
    before = (tmp_path / "checkpoint.pth").read_bytes()
    check(cli(*words(image_folder, tmp_path, "--resume", "auto", *more)), expected)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
