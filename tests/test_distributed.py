"""Two gloo processes through torchrun and `torch.distributed.launch`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROJECT = Path(__file__).parent.parent
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--master_port=29641"],
    "launch": ["torch.distributed.launch", "--nproc_per_node=2", "--use_env", "--master_port=29642"],
}


def launch(launcher: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", *LAUNCHERS[launcher], str(PROJECT / "main.py")]
    words = (*words, "--num_workers", 0)
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=200, check=False)


def last_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_evaluation_counts_every_image_once(launcher: str, tmp_path: Path) -> None:
    """1,000 images in batches of 7 on two processes: neither divides evenly."""
    done = launch(launcher, "--eval", "--load_compression_rate", "--batch-size", 7, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, str(PROJECT / "main.py"), "--eval", "--load_compression_rate", "--num_workers", "0"]
    subprocess.run([*alone, "--output_dir", str(tmp_path / "one")], check=True, capture_output=True)
    one, two = last_record(tmp_path / "one"), last_record(tmp_path / "two")
    assert two["images"] == one["images"] == 1000
    assert {name: two[name] for name in ("acc1", "acc5")} == {name: one[name] for name in ("acc1", "acc5")}
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert done.stdout.count("* Acc@1") == 1


def test_training_leaves_one_log_and_one_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    words = ("--finetune", "--model", "vit_sample_patch4_28", "--data-path", image_folder, "--batch-size", 2)
    done = launch("torchrun", *words, "--epochs", 1, "--output_dir", tmp_path, "--no-repeated-aug")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
    assert (tmp_path / "checkpoint.pth").exists()


def test_a_process_that_fails_takes_the_other_down(image_folder: Path, tmp_path: Path) -> None:
    """A damaged image that only the second process reads."""
    bad = image_folder / "val" / "cat" / "1.jpg"
    bad.write_bytes(b"not a picture")
    words = ("--eval", "--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", image_folder)
    done = launch("torchrun", *words)
    assert done.returncode != 0
    assert f"main.py: error: image {bad}: cannot be read" in done.stderr


def test_two_processes_are_one_with_twice_the_batch(image_folder: Path, tmp_path: Path) -> None:
    """The first step's update of the rates; without drop path, which draws per process."""
    words = ("--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", image_folder)
    words = (*words, "--epochs", 1, "--target_flops", 0.025, "--drop-path", 0, "--affine", 0, 0, 0)
    done = launch("launch", *words, "--batch-size", 6, "--output_dir", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    alone = [sys.executable, str(PROJECT / "main.py"), *map(str, words), "--num_workers", "0"]
    subprocess.run([*alone, "--batch-size", "12", "--output_dir", str(tmp_path / "one")], check=True)
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 0
    for index in range(len(one["rates"])):
        first, second = (content["optimizer"]["state"][index]["exp_avg"] for content in (one, two))
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
        assert first.abs().max() > 0
    assert (tmp_path / "two" / "compression_rate.json").exists()
    assert len((tmp_path / "two" / "log.txt").read_text().splitlines()) == 1
