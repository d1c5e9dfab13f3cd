"""Two gloo processes: through `torch.distributed.launch`, which is torchrun by an older name, and by its variables."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Cli, free_port
from tests.forked import as_command, ended, started, two_mains

PROJECT = Path(__file__).parent.parent.parent
LAUNCHER = ("torch.distributed.launch", "--nproc_per_node=2", "--use_env")
PAPER = ("--search_loss", "labels", "--search_transform", "train", "--budget", "penalty")
SEARCH = (
    "--model",
    "vit_sample_patch4_28",
    "--checkpoint",
    "scratch",
    "--target_flops",
    0.025,
    "--print-freq",
    1,
    *PAPER,
)


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    port = f"--master_port={free_port()}"
    command = [sys.executable, "-W", "ignore", "-m", *LAUNCHER, port, str(PROJECT / "main.py")]
    words = (*words, "--num_workers", 0)
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=200, check=False)


def last_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def test_evaluation_counts_every_image_once(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Nine images in batches of two on two processes: neither divides evenly."""
    words = ("--eval", "--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", image_folder)
    words = (*words, "--load_compression_rate", "--batch-size", 2, "--output_dir")
    done = launch(*words, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert cli(*words, tmp_path / "one", "--num_workers", 0)[0] == 0
    one, two = last_record(tmp_path / "one"), last_record(tmp_path / "two")
    assert two["images"] == one["images"] == 9
    assert {name: two[name] for name in ("acc1", "acc5")} == {name: one[name] for name in ("acc1", "acc5")}
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert done.stdout.count("* Acc@1") == 1


def test_sensitivity_is_that_of_all_images(cli: Cli, tmp_path: Path) -> None:
    words = ("--sensitivity", 3, "--output_dir")
    assert [done.code for done in two_mains(tmp_path, *words, tmp_path / "two")] == [0, 0]
    assert cli(*words, tmp_path / "one", "--num_workers", 0)[0] == 0
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "sensitivity.txt").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two)
    for alone, both in zip(one, two, strict=True):
        assert both.pop("loss") == pytest.approx(alone.pop("loss"), abs=1e-5)
        assert both.pop("agreement") == pytest.approx(alone.pop("agreement"))
        assert both == alone


def test_a_process_that_fails_takes_the_other_down(image_folder: Path, tmp_path: Path) -> None:
    """A damaged image that only the second process reads."""
    bad = image_folder / "val" / "cat" / "1.jpg"
    bad.write_bytes(b"not a picture")
    words = ("--eval", "--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", image_folder)
    run = partial(as_command, (*words, "--num_workers", 0))
    first, second = ended(started(run, tmp_path), tmp_path)
    assert (first.code, second.code) == (1, 2)
    assert f"main.py: error: image {bad}: cannot be read" in second.err


def test_two_processes_are_one_with_twice_the_batch(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """The first step's update of the rates; without drop path, which draws per process."""
    words = ("--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", image_folder, *PAPER)
    words = (*words, "--epochs", 1, "--target_flops", 0.025, "--drop-path", 0, "--affine", 0, 0, 0)
    for done in two_mains(tmp_path, *words, "--batch-size", 6, "--output_dir", tmp_path / "two"):
        assert (done.code, done.err) == (0, "")
    assert cli(*words, "--batch-size", 12, "--output_dir", tmp_path / "one", "--num_workers", 0)[0] == 0
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 0
    for index in range(len(one["rates"])):
        first, second = (content["optimizer"]["state"][index]["exp_avg"] for content in (one, two))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
        assert first.abs().max() > 0
    assert (tmp_path / "two" / "compression_rate.json").exists()
    assert len((tmp_path / "two" / "log.txt").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_takes_the_other_down(lost: int, image_folder: Path, tmp_path: Path) -> None:
    """The one that is left has to notice by itself, within a minute."""
    words = (*SEARCH, "--data-path", image_folder, "--epochs", 500, "--batch-size", 2, "--output_dir", tmp_path)
    both = started(partial(as_command, (*words, "--num_workers", 0)), tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "checkpoint.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    both[lost].kill()
    both[1 - lost].join(60)
    code, _, err = ended(both, tmp_path)[1 - lost]
    assert code == 1
    assert err.splitlines()[-1].startswith(f"main.py: error: process {1 - lost} stops: another process is gone (")
    assert "Traceback" not in err
