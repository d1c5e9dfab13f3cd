"""Loader processes: they leave signals to the main process, and go when it ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.cli.test_search import MODEL, PAPER
from tests.conftest import Cli

PROJECT = Path(__file__).parents[2]
LOADER = """
import os, signal, time
import torch
from torch.utils.data import TensorDataset
from cli.data import _leave_signals
from datasets import ImageLoader, Samples

images = Samples(TensorDataset(torch.arange(16.0)))
kept = ImageLoader(images, batch_size=4, num_workers=1, persistent_workers=True, worker_init_fn=_leave_signals)
kept.itself = kept  # freed by nothing but the end of the process
batches = list(kept)
"""
SIGNALLED = """
worker = kept._iterator._workers[0]
other = os.fork()
if not other:
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    os._exit(0)
os.waitpid(other, 0)
time.sleep(0.5)
assert len(list(kept)) == 4 and worker.is_alive()
"""

BASE = ("--model", MODEL, "--batch-size", 4, "--num_workers", 1)
FRESH = ("--checkpoint", "scratch")
MODES = {
    "gradient": (*FRESH, *PAPER, "--epochs", 1, "--target_flops", 0.025),
    "calibrated": (*FRESH, "--search", "calibrated", "--minutes", 0.02, "--target_flops", 0.025),
    "fine-tuning": ("--finetune", "scratch", "--epochs", 1),
    "evaluation": ("--eval", *FRESH),
}

says_who = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals do not say who sent them here")


@says_who
def test_they_go_when_the_process_ends_and_not_when_others_signal() -> None:
    command = [sys.executable, "-c", LOADER + SIGNALLED]
    done = subprocess.run(command, cwd=PROJECT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("mode", MODES)
def test_none_are_left_when_a_run_ends(mode: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Not even until garbage is collected: at the end of a process torch waits five seconds for each."""
    gc.collect()
    gc.disable()
    try:
        code, _, err = cli(*MODES[mode], *BASE, "--data-path", image_folder, "--output_dir", tmp_path / "out")
        left = [thing for thing in gc.get_objects() if type(thing) is _MultiProcessingDataLoaderIter]
    finally:
        gc.enable()
    assert (code, left) == (0, []), err
