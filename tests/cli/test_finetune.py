"""Training the weights at fixed rates through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine
import models
from cli.evaluate import FEW, with_augmentation, with_rate
from cli.flags import parse_flags
from cli.settings import Settings
from diffrate.schedule import find_schedule
from engine import step_rate
from tests.cli.test_errors import check
from tests.conftest import Cli, tensors_in, write_image

PROJECT = Path(__file__).parent.parent.parent
MODEL = "vit_sample_patch4_28"
FULL = (
    *("--finetune", "--model", MODEL, "--num_workers", 0, "--batch-size", 4),
    # DeiT's recipe for photographs, where the sample's own is milder
    *("--repeated-aug", "--aa", "rand-m9-mstd0.5-inc1", "--color-jitter", 0.3, "--reprob", 0.25, "--hflip", 0.5),
    *("--mixup", 0.8, "--cutmix", 1.0, "--drop-path", 0.1),
)
PLAIN = (
    *FULL,
    *("--no-repeated-aug", "--aa", "none", "--color-jitter", 0, "--reprob", 0, "--hflip", 0),
    *("--mixup", 0, "--cutmix", 0, "--drop-path", 0),
)
HALF = ("--load_compression_rate", "--target_flops", 0.0242)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_training_at_rates_learns_and_drops_tokens(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dark, grey and bright images, told apart at half the FLOPs; the last block but one sees what it is to keep."""
    seen: list[int] = []
    step = engine._train_step

    def spy(model: Any, *rest: Any) -> torch.Tensor:
        handle = model.blocks[-2].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        loss = step(model, *rest)
        handle.remove()
        return loss

    monkeypatch.setattr(engine, "_train_step", spy)
    words = (*PLAIN, "--data-path", image_folder, "--epochs", 12, "--lr", 1e-3, "--unscale-lr")
    code, out, err = cli(*words, *HALF, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "training from scratch" in out
    losses = [record["train_loss"] for record in records(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]
    assert set(seen) == {min(find_schedule(PROJECT / "compression_rate.json", "ViT-Sample", 0.0242).merge[:-1])}
    assert records(tmp_path)[-1]["gflops"] == pytest.approx(0.024, abs=0.0005)


@pytest.mark.usefixtures("painted")
def test_what_it_leaves_behind_evaluates(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    data = ("--data-path", image_folder)
    cli(*PLAIN, *data, "--epochs", 2, "--output_dir", tmp_path, *HALF)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        *("checkpoint.pth", "model_best.pth", "log.txt", "log_rank0.txt", "accuracy.png")
    }
    last = records(tmp_path)[-1]
    evaluate = ("--eval", "--model", MODEL, *data, "--num_workers", 0, "--checkpoint", tmp_path / "checkpoint.pth")
    _, _, err = cli(*evaluate, *HALF, "--output_dir", tmp_path / "again")
    assert err == ""
    again = records(tmp_path / "again")[-1]
    assert (again["acc1"], again["loss"]) == pytest.approx((last["acc1"], last["loss"]))


def test_it_starts_from_a_checkpoint_with_a_fresh_head(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    file = models.entry_of(MODEL).weights
    words = (*PLAIN, "--data-path", image_folder, "--epochs", 1, "--lr", 1e-9, "--output_dir", tmp_path)
    code, out, _ = cli(*words, "--checkpoint", file)
    assert code == 0
    assert "head.weight, head.bias start fresh" in out
    trained = tensors_in(tmp_path / "checkpoint.pth")
    shipped = tensors_in(file)
    torch.testing.assert_close(trained["pos_embed"], shipped["pos_embed"], atol=1e-5, rtol=0)
    assert trained["head.weight"].shape == (3, 96)


def test_the_whole_recipe_runs_and_averages(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Every part of DeiT's recipe at once, and the averaged weights are what loads."""
    words = (*FULL, "--data-path", image_folder, "--epochs", 2, "--output_dir", tmp_path)
    code, _, err = cli(*words, "--clip-grad", 1.0, "--model-ema", "--amp", "bf16")
    assert (code, err) == (0, "")
    assert all("ema_acc1" in record for record in records(tmp_path))
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    loaded = tensors_in(tmp_path / "checkpoint.pth")
    assert torch.equal(loaded["pos_embed"], content["model_ema"]["pos_embed"])
    assert not torch.equal(loaded["pos_embed"], content["model"]["pos_embed"])


def test_the_learning_rate_warms_up_and_ends_at_its_minimum(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = (*PLAIN, "--data-path", image_folder, "--epochs", 10, "--output_dir", tmp_path)
    cli(*words, "--warmup-epochs", 2, "--lr", 1e-3, "--unscale-lr", "--min-lr", 1e-5)
    rates = [record["train_lr"] for record in records(tmp_path)]
    assert rates[0] < 5e-4
    assert max(rates) > 8e-4  # the cosine has begun during the warm-up, as in DeiT's recipe
    assert rates[-1] == pytest.approx(1e-5, abs=1e-5)


def test_a_run_repeats_with_its_seed(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = (*FULL, "--data-path", image_folder)
    losses = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cli(*words, "--epochs", 2, "--lr", 0.1, "--seed", seed, "--output_dir", tmp_path / name)
        losses.append([record["train_loss"] for record in records(tmp_path / name)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_loss_that_is_no_number_stops_with_the_step(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = (*PLAIN, "--data-path", image_folder, "--epochs", 5, "--lr", 1e30, "--unscale-lr", "--opt", "sgd")
    code, _, err = cli(*words, "--warmup-epochs", 0, "--output_dir", tmp_path)
    assert code == 2
    assert "the loss is nan at epoch 0, step " in err
    assert not (tmp_path / "checkpoint.pth").exists()


def settled(words: tuple[object, ...], images: int, batch_size: int, processes: int = 1) -> Settings:
    """The settings of a training on so many images."""
    runtime: Any = SimpleNamespace(processes=SimpleNamespace(world=processes, is_main=True))
    settings = parse_flags([*map(str, words), "--data-path", "x"])
    return with_rate(with_augmentation(settings, images), images, batch_size, runtime)


@pytest.mark.parametrize("name", [name for name, entry in models.ZOO.items() if entry.published])
def test_the_papers_recipe_is_that_of_its_models(name: str) -> None:
    words = ("--finetune", "official", "--model", name)
    for batch_size, processes in ((64, 1), (256, 4)):
        assert settled(words, 1_281_167, batch_size, processes) == parse_flags([*words, "--data-path", "x"])
    training = settled(words, 1_281_167, 8).training
    assert (step_rate(training, 8), training.least_learning_rate) == pytest.approx((1e-5 * 64 / 512, 1e-6))


@pytest.mark.parametrize(
    ("start", "images", "epochs", "rate", "mixup"),
    [
        ("scratch", 240, 100, 1e-3, 0.0),
        ("a.pth", FEW, 30, 5e-5, 0.0),
        ("scratch", FEW + 1, 300, 5e-4 * 64 / 512, 0.8),
        ("a.pth", FEW + 1, 30, 1e-5 * 64 / 512, 0.8),
    ],
)
def test_defaults_go_by_what_is_trained(start: str, images: int, epochs: int, rate: float, mixup: float) -> None:
    words = ("--finetune", start, "--model", "vit_tiny_patch16_224")
    for batch_size in (16, 64):
        for more in ((), ("--unscale-lr",)):
            found = settled((*words, *more), images, batch_size)
            unscaled = rate if images <= FEW or not more else rate * 512 / 64
            assert step_rate(found.training, batch_size) == pytest.approx(unscaled)
            assert (found.training.epochs, found.mixing.mixup) == (epochs, mixup)
            assert found.augmentation.repeated == (mixup > 0)
    given = settled((*words, "--lr", 1e-3, "--epochs", 7, "--mixup", 0.5, "--repeated-aug"), images, 64)
    assert step_rate(given.training, 64) == 1e-3 * 64 / 512
    assert (given.training.epochs, given.mixing.mixup, given.augmentation.repeated) == (7, 0.5, True)


def test_a_training_of_few_images_learns_by_default(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = ("--finetune", "--model", MODEL, "--data-path", image_folder, "--num_workers", 0, "--epochs", 9)
    code, out, err = cli(*words, "--batch-size", 4, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "12 images, 9 epochs, learning rate 0.001 at 4 images a step (--lr 0.128 for 512); by default --aa " in out
    losses, rates = ([record[name] for record in records(tmp_path)] for name in ("train_loss", "train_lr"))
    assert losses[-1] < 0.7 * losses[0]
    assert max(rates) > 5e-4
    assert rates[-1] < 0.1 * max(rates)


def test_a_rate_below_its_end_is_said_or_refused(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    words = (*PLAIN, "--data-path", image_folder, "--epochs", 3, "--lr", 1e-5, "--output_dir", tmp_path)
    code, out, _ = cli(*words)
    assert code == 0
    below = "learning rate 7.81e-08 at 4 images a step (--lr 1e-05 for 512)"
    assert f"warning: {below} lies below the usual --min-lr 1e-06, and ends at 7.81e-09\n" in out
    rates = [record["train_lr"] for record in records(tmp_path)]
    assert rates == sorted(rates, reverse=True)
    check(cli(*words, "--min-lr", 1e-6), f"--min-lr 1e-06: found a {below}; accepted: up to that, or another --lr")
    assert "lies below" not in cli(*words, "--sched", "constant")[1]


def test_a_head_of_one_output_is_refused(cli: Cli, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / split / "all" / "1.png", seed=1)
    words = (*PLAIN, "--data-path", tmp_path)
    check(cli(*words), f"--data-path {tmp_path}: found one class; accepted: two or more")
    check(cli(*words, "--multi-label"), "--multi-label goes with a search, --eval, ")
