"""The search from the command line: what it finds, leaves behind, survives, and refuses."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from diffrate.budget import meets_budget
from diffrate.schedule import find_schedule
from diffrate.searching.gradient import Search
from tests.cli.test_eval import scores
from tests.conftest import Cli, ran_once, write_image
from tests.forked import end_while_held_up, with_torch

PROJECT = Path(__file__).parent.parent.parent
MODEL = "vit_sample_patch4_28"
KEY = "ViT-Sample"


PAPER = ("--search_loss", "labels", "--search_transform", "train", "--budget", "penalty")


def words(folder: Path, out: Path, *more: object) -> list[str]:
    """A search of three steps an epoch on a small image folder, with the published rates."""
    base = ("--model", MODEL, "--checkpoint", "scratch", "--data-path", folder, "--output_dir", out, "--batch-size", 4)
    published = ("--arch-lr", 0.01, "--arch-min-lr", 0.001, "--granularity", 4)
    run = ("--num_workers", 0, "--target_flops", 0.025, "--print-freq", 1)
    return [str(word) for word in (*base, *published, *run, *PAPER, *more)]


def checkpoint(out: Path, name: str = "checkpoint.pth") -> dict[str, Any]:
    return torch.load(out / name, weights_only=True)


def rates(out: Path) -> list[torch.Tensor]:
    return checkpoint(out)["rates"]


def same_rates(first: Path, second: Path) -> bool:
    return all(torch.equal(a, b) for a, b in zip(rates(first), rates(second), strict=True))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images, and the output folder of a search of one epoch on it, to look at and not to write to."""
    root = tmp_path_factory.mktemp("searched")
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(("cat", "dog", "emu")):
            for index in range(count):
                write_image(root / "data" / split / name / f"{index}.jpg", seed=10 * label + index)
    ran_once(*words(root / "data", root / "out", "--epochs", 1))
    return root / "data", root / "out"


@pytest.mark.usefixtures("painted")
def test_a_search_meets_its_budget_and_leaves_everything_behind(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = cli(*words(image_folder, out, "--epochs", 2, "--tensorboard"))
    assert (code, err) == (0, "")
    assert {path.name for path in out.iterdir() if not path.name.startswith("events.")} == {
        *("checkpoint.pth", "model_best.pth", "compression_rate.json", "log.txt", "log_rank0.txt"),
        *("found.txt", "search_steps.txt", "accuracy.png", "kept_tokens.png", "search_counts.png"),
    }
    schedule = find_schedule(out / "compression_rate.json", KEY, 0.025)
    records = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert all(meets_budget(record["gflops"], 0.025) for record in records)
    assert list(schedule.merge) in [record["merge_kept_num"] for record in records]
    assert records[-1]["lr"] == pytest.approx(0.001)
    losses = EventAccumulator(str(out)).Reload().Scalars("train_loss")
    assert [event.step for event in losses] == [0, 1]
    assert [event.value for event in losses] == pytest.approx([record["train_loss"] for record in records])
    content = checkpoint(out)
    assert content["flags"]["target_flops"] == 0.025
    assert content["flags"]["data_path"] == str(image_folder)
    assert {"rates", "schedule", "optimizer", "scheduler", "scaler", "epoch", "random"} <= set(content)
    next_command = text.split("next: python main.py ")[1].splitlines()[0].split()
    code, text, err = cli(*next_command, "--num_workers", 0)
    assert (code, err) == (0, "")
    assert scores(text)[3] == 0.025


def test_resumed_evaluation_takes_the_searched_schedule(searched: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    data, out = searched[0], tmp_path / "out"
    shutil.copytree(searched[1], out)
    flags = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", data, "--num_workers", 0)
    loaded = cli(*flags, "--load_compression_rate", "--compression_rate_file", out / "compression_rate.json")
    for name in ("checkpoint.pth", "model_best.pth"):
        resumed = cli(*flags, "--resume", out / name)
        assert scores(resumed[1]) == scores(loaded[1])
    assert scores(cli(*flags, "--resume", "auto", "--output_dir", out)[1]) == scores(loaded[1])


def test_the_search_moves_towards_the_target(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    cli(*words(image_folder, tmp_path / "out", "--epochs", 10, "--arch-lr", 0.2, "--flops_weight", 50))
    records = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    gap = [abs(record["train_gflops"] - 0.025) for record in records]
    assert gap[-1] < 0.5 * gap[0]


def test_a_run_repeats_with_its_seed_whatever_the_workers(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    for name, more in {"a": (), "b": ("--num_workers", 2), "c": ("--seed", 5)}.items():
        cli(*words(image_folder, tmp_path / name, "--epochs", 1, *more))
    assert same_rates(tmp_path / "a", tmp_path / "b")
    assert not same_rates(tmp_path / "a", tmp_path / "c")


def test_accumulated_batches_are_one_large_batch(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    plain = ("--epochs", 1, "--drop-path", 0, "--no-repeated-aug")
    cli(*words(image_folder, tmp_path / "large", *plain, "--batch-size", 8))
    cli(*words(image_folder, tmp_path / "small", *plain, "--batch-size", 4, "--accum-steps", 2))
    for large, small in zip(rates(tmp_path / "large"), rates(tmp_path / "small"), strict=True):
        torch.testing.assert_close(large, small, atol=1e-5, rtol=0)


def test_a_sweep_searches_each_target_into_one_file(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    flags = words(image_folder, tmp_path / "out", "--epochs", 1)
    at = flags.index("0.025")
    code, _, err = cli(*flags[:at], 0.02, 0.03, *flags[at + 1 :])
    assert (code, err) == (0, "")
    for target in (0.02, 0.03):
        assert find_schedule(tmp_path / "out" / "compression_rate.json", KEY, target)
        assert (tmp_path / "out" / f"target_{target:g}" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        *((("prune",), None), (("both",), None), (("merge", "--rule", "similar"), "similar")),
        *((("random",), "random"), (("tome",), "tome"), (("pitome",), "pitome")),
    ],
    ids=str,
)
def test_baselines_evaluate_and_save(
    flags: tuple[str, ...], rule: str | None, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    code, text, err = cli(*words(image_folder, tmp_path / "out", "--baseline", *flags))
    assert (code, err) == (0, "")
    assert scores(text)[3] == 0.025
    found = find_schedule(tmp_path / "out" / "compression_rate.json", KEY, 0.025)
    assert found.rules == (None if rule is None else (rule,) * 8)


def test_a_search_by_gradient_takes_a_rule_and_goes_on_with_it_alone(
    cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    flags = words(image_folder, tmp_path / "out", "--epochs", 1, "--rule", "minor_into_major")
    code, text, err = cli(*flags)
    assert (code, err) == (0, "")
    assert "found rules minor_into_major\n" in text
    found = find_schedule(tmp_path / "out" / "compression_rate.json", KEY, 0.025)
    assert found.rules == ("minor_into_major",) * 8
    flags[flags.index("minor_into_major")] = "tome"
    code, _, err = cli(*flags, "--resume", "auto")
    assert code == 2
    assert "--rule" in err


def test_a_search_starts_from_a_schedule(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    cli(*words(image_folder, tmp_path / "base", "--baseline", "both"))
    file = tmp_path / "base" / "compression_rate.json"
    more = ("--init_compression_rate", 0.025, "--compression_rate_file", file, "--granularity", 1)
    cli(*words(image_folder, tmp_path / "out", "--epochs", 1, "--arch-lr", 1e-9, "--arch-min-lr", 0, *more))
    start, found = (find_schedule(path, KEY, 0.025) for path in (file, tmp_path / "out" / "compression_rate.json"))
    assert all(abs(a - b) <= 1 for a, b in zip(start.merge, found.merge, strict=True))


def test_warmup_leaves_the_cost_out_of_the_first_epoch(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    more = ("--epochs", 1, "--arch-lr", 0.1)
    cli(*words(image_folder, tmp_path / "warm", *more, "--warmup_compression_rate"))
    cli(*words(image_folder, tmp_path / "free", *more, "--flops_weight", 0))
    cli(*words(image_folder, tmp_path / "full", *more))
    assert same_rates(tmp_path / "warm", tmp_path / "free")
    assert not same_rates(tmp_path / "warm", tmp_path / "full")


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Search._backward
    calls: list[int] = []

    def breaks(search: Search, batches: Any) -> torch.Tensor:
        calls.append(1)
        return original(search, batches) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(Search, "_backward", breaks)
    code, _, err = cli(*words(image_folder, tmp_path / "out", "--epochs", 2))
    assert code == 2
    assert "the loss is " in err
    assert "epoch 1, step 1; the last checkpoint is good" in err
    monkeypatch.undo()
    cli(*words(image_folder, tmp_path / "out", "--epochs", 2, "--resume", "auto"))
    cli(*words(image_folder, tmp_path / "whole", "--epochs", 2))
    assert same_rates(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--granularity", 1), "--granularity 4; accepted: 1"),
        (("--target_flops", 0.03), "--target_flops 0.025; accepted: 0.03"),
        (("--arch-lr", 0.02), "--arch-lr 0.01; accepted: 0.02"),
        (("--seed", 1), "--seed 0; accepted: 1"),
    ],
)
def test_a_checkpoint_of_another_search_is_refused(
    more: tuple[object, ...], expected: str, searched: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    data, out = searched
    again = words(data, tmp_path / "again", "--epochs", 1, *more)
    code, _, err = cli(*again, "--resume", out / "checkpoint.pth")
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1


def test_the_usual_granularity_gives_way_where_there_are_few_patches(
    cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    few = ("--model", "test_vit", "--checkpoint", "scratch", "--input-size", 32, "--data-path", image_folder)
    fast = ("--search", "gradient", "--epochs", 1, "--batch-size", 4, "--num_workers", 0, "--target_flops", "60%")
    code, out, err = cli(*few, *fast, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "granularity 3: the usual 4 leaves 4 patches no choice" in out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--target_flops", 0.06), "accepted: 0.003403 to 0.04831"),
        (("--target_flops", 0.001), "accepted: 0.003403 to 0.04831"),
        (("--granularity", 0), "--granularity: found 0"),
        (("--resume", "gone.pth"), "--resume gone.pth: cannot be read"),
        (("--arch-min-lr", 0.5), "--arch-min-lr 0.5: accepted: up to --arch-lr 0.01"),
        (("--accum-steps", 9), "--accum-steps 9: accepted: up to 3"),
        (("--target_flops", 0.02, 0.03, 0.02), "--target_flops 0.02 0.03 0.02: accepted: each once"),
        (("--granularity", 49), "--granularity 49: accepted: from 1 to 48"),
        (("--arch-lr", "inf"), "--arch-lr: found inf"),
        (("--seed", 2**32), "--seed: found 4294967296; accepted: from 0 to 4294967295"),
        (("--compile",), "--compile goes with --eval, --finetune and --benchmark"),
        (("--load_compression_rate",), "goes with --eval"),
        (("--init_compression_rate", 9), "no --init_compression_rate 9"),
        (("--baseline", "best"), "--baseline"),
        (("--baseline", "tome", "--rule", "similar"), "--baseline tome has its own"),
        (("--rule", "pitome"), "rule: found 'pitome' by gradient; accepted: another"),
    ],
)
def test_bad_input(more: tuple[object, ...], expected: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    code, _, err = cli(*words(image_folder, tmp_path / "out", *more))
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_change(path: Path, before: float, runs: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and runs():
        if path.exists() and path.stat().st_mtime > before:
            return
        time.sleep(0.01)


def test_killed_twice_at_random_the_search_ends_the_same(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """`kill -9` after a checkpoint was written and a random while later: the same rates, bit for bit. `tests.faults`
    kills more often."""
    more = ("--epochs", 12, "--resume", "auto", "--arch-lr", 0.05)
    path = tmp_path / "killed" / "checkpoint.pth"
    draw = random.Random(0)
    for _ in range(2):
        before = path.stat().st_mtime if path.exists() else 0.0
        process = with_torch().Process(target=main.main, args=(words(image_folder, tmp_path / "killed", *more),))
        process.start()
        wait_for_change(path, before, process.is_alive)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
    assert checkpoint(tmp_path / "killed")["epoch"] < 12
    for name in ("killed", "whole"):
        code, _, err = cli(*words(image_folder, tmp_path / name, *more))
        assert (code, err) == (0, "")
    assert checkpoint(tmp_path / "killed")["epoch"] == 12
    assert same_rates(tmp_path / "killed", tmp_path / "whole")


def test_an_interrupt_saves_and_leaves(image_folder: Path, tmp_path: Path) -> None:
    """The process itself; SIGTERM in the middle of a sweep is in `test_finetune_resume.py`."""
    path = tmp_path / "out" / "checkpoint.pth"
    process = start(words(image_folder, tmp_path / "out", "--epochs", 300))
    wait_for_change(path, 0.0, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "go on with --resume" in err
    assert "Traceback" not in err
    assert checkpoint(tmp_path / "out")["epoch"] < 300
    assert [file for file in path.parent.iterdir() if file.name.startswith(".")] == []


STEP, CALIBRATING = "diffrate.searching.gradient:Search:_update", "diffrate.searching.search:-:search_at_hard_counts"
SAVING = "diffrate.files.save:-:save_file"
EVAL = ("--model", MODEL, "--checkpoint", "scratch", "--eval", "--num_workers", 1)


@pytest.mark.parametrize(
    ("place", "number", "line"),
    [
        (STEP, 3, "stopped: go on with --resume"),
        (CALIBRATING, 1, "stopped, before anything was saved"),
        (SAVING, 1, "stopped"),
    ],
)
def test_a_signal_ends_what_takes_long(place: str, number: int, line: str, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given: list[Any] = words(image_folder, out)
    if place == CALIBRATING:
        given = [*EVAL[:4], "--data-path", image_folder, "--output_dir", out, "--search", "calibrated"]
        given += ["--target_flops", 0.025, "--batch-size", 4]
    elif place == SAVING:
        given = [*EVAL, "--data-path", image_folder, "--output_dir", out, "--save", out / "a.safetensors"]
        out.mkdir()
    assert end_while_held_up(tmp_path, place, number, *given) == (130, f"main.py: {line}\n")
    assert [
        path for path in out.iterdir() if path.name.startswith(".") or (place == SAVING and path.suffix != ".txt")
    ] == []


def test_a_search_of_slow_steps_saves_between_them(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than every few steps: a signal loses no more than a step that takes long."""
    saves: list[int] = []
    monkeypatch.setattr("diffrate.searching.gradient.SAVE_SECONDS", -1.0)
    save = Search._save
    monkeypatch.setattr(Search, "_save", lambda search: (saves.append(search.step), save(search)))
    assert cli(*words(image_folder, tmp_path / "out", "--epochs", 2, "--print-freq", 100))[0] == 0
    assert saves == [1, 2, 3, 0, 1, 2, 3, 0]
