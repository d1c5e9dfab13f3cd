"""`--finetune --distill`: the dense model, with the weights that a training starts from, beside the labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import engine
import main
import models
from tests.cli.test_errors import check
from tests.cli.test_finetune import FULL, HALF, MODEL, PLAIN, records
from tests.cli.test_finetune_resume import check_same, content, interrupt_at_save
from tests.conftest import Cli, tensors_in, write_image
from tests.forked import two_mains
from tests.tiny_models import saved_file

WEIGHT = 0.75
TRAINING = (*FULL, *HALF, "--no-repeated-aug", "--epochs", 3, "--model-ema", "--lr", 0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, dark, grey and bright, four images each to train on and two to score on."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog", "emu")):
            for index in range(count):
                write_image(root / split / name / f"{index}.jpg", seed=100 * label + index, brightest=60 + 90 * label)
    return root


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights with a head for the folder's classes."""
    out = tmp_path_factory.mktemp("start")
    words = (*PLAIN, "--data-path", data, "--checkpoint", models.entry_of(MODEL).weights, "--epochs", 1)
    assert main.main([str(word) for word in (*words, "--output_dir", out)]) == 0
    return out / "checkpoint.pth"


@pytest.fixture(scope="module")
def whole(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the training that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert main.main([str(word) for word in taught(start, data, out)]) == 0
    return out


def taught(start: Path, data: Path, out: Path, *more: object) -> list[object]:
    return [*TRAINING, "--checkpoint", start, "--distill", WEIGHT, "--data-path", data, "--output_dir", out, *more]


def test_the_loss_is_of_labels_and_dense_outputs_by_their_weights() -> None:
    outputs, dense = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    loss = F.cross_entropy(outputs, labels)
    soft = F.kl_div(outputs.log_softmax(-1), dense.softmax(-1), reduction="batchmean")
    for weight in (0.0, 0.25, 1.0):
        expected = (1 - weight) * loss + weight * soft
        torch.testing.assert_close(engine.distilled(loss, outputs, dense, weight), expected)


def test_the_teacher_keeps_all_tokens_and_its_weights(
    start: Path, cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees the images that the trained model does, mixed; its outputs are those of the weights at the start."""
    seen: list[tuple[Any, ...]] = []
    step = engine._train_step

    def spy(model: Any, training: Any, *rest: Any) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        models_ = (model, training.teacher)
        handles = [one.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for one in models_]
        loss = step(model, training, *rest)
        for handle in handles:
            handle.remove()
        seen.append((*inputs, training.teacher))
        return loss

    monkeypatch.setattr(engine, "_train_step", spy)
    assert cli(*taught(start, data, tmp_path))[0] == 0
    assert all(student is dense for student, dense, _ in seen)
    teacher = seen[-1][-1]
    assert not teacher.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    prune, merge = teacher.get_kept_num()
    assert set(prune) == set(merge) == {50}
    held, first = teacher.state_dict(), tensors_in(start)
    assert all(torch.equal(held[name], value) for name, value in first.items() if "compression" not in name)
    assert not torch.equal(content(tmp_path)["model"]["pos_embed"], held["pos_embed"])


def test_it_changes_the_weights_and_is_not_in_the_checkpoint(
    whole: Path, start: Path, cli: Cli, data: Path, tmp_path: Path
) -> None:
    assert cli(*taught(start, data, tmp_path, "--distill", 0))[0] == 0  # the last one counts
    alone, found = content(tmp_path), content(whole)
    assert found.keys() == alone.keys()
    assert found["model"].keys() == alone["model"].keys()
    assert not torch.equal(found["model"]["pos_embed"], alone["model"]["pos_embed"])
    assert (found["flags"]["distill"], alone["flags"]["distill"]) == (WEIGHT, None)


def test_killed_after_a_checkpoint_it_ends_the_same(
    whole: Path, start: Path, cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = taught(start, data, tmp_path / "out", "--resume", "auto")
    with monkeypatch.context() as patch:
        interrupt_at_save(patch, 10)  # in the last epoch
        assert cli(*again)[0] == 130
    code, out, err = cli(*again)
    assert (code, err) == (0, "")
    assert "going on from" in out
    check_same(tmp_path / "out", whole)


def test_another_teacher_is_another_training(whole: Path, start: Path, cli: Cli, data: Path) -> None:
    resume = ("--resume", whole / "checkpoint.pth")
    for weight, word in ((0.5, "0.5"), (0, "None")):
        words = taught(start, data, whole, *resume, "--distill", weight)
        check(cli(*words), f"was made with --distill {WEIGHT}; accepted: {word}, as in this run")
    words = taught(whole / "model_best.pth", data, whole, *resume)
    check(cli(*words), "was made with starting weights ", "; accepted: ", ", as in this run")


def test_what_makes_no_teacher_is_refused(cli: Cli, data: Path, tmp_path: Path) -> None:
    for words in (("--finetune", "--distill"), ("--finetune", "scratch", "--distill", "0.5")):
        check(cli(*words), "--distill needs weights to start from; accepted: --finetune CHECKPOINT")
    check(cli("--eval", "--distill"), "--distill goes with --finetune")
    check(cli("--finetune", "official", "--distill", "1.5"), "--distill", "accepted: from 0 to 1")
    words = (*PLAIN, "--data-path", data, "--epochs", 1, "--distill")
    result = cli(*words, "--checkpoint", models.entry_of(MODEL).weights)
    check(result, "--distill: ", "head.weight, head.bias start fresh", "accepted: weights with the data's classes")


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_it_takes_the_same_course(
    cli: Cli, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "compile_model", partial(torch.compile, fullgraph=True, dynamic=False, backend="eager"))
    words = ("--finetune", saved_file(tmp_path / "tiny.safetensors"), "--data-path", data, "--distill", "--epochs", 1)
    words = (*words, "--batch-size", 4, "--num_workers", 0)
    words = (*words, "--lr", 1e-3, "--unscale-lr", "--affine", 0, 0, 0)
    losses = []
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        assert cli(*words, *more, "--output_dir", tmp_path / name)[0] == 0
        losses.append([record["train_loss"] for record in records(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_two_processes_share_it(start: Path, data: Path, tmp_path: Path) -> None:
    words = (*PLAIN, *HALF, "--checkpoint", start, "--data-path", data, "--distill", "--batch-size", 2)
    for done in two_mains(tmp_path, *words, "--epochs", 1, "--output_dir", tmp_path):
        assert (done.code, done.err) == (0, "")
    assert len(records(tmp_path)) == 1
    assert (tmp_path / "checkpoint.pth").exists()
