"""`python -m tests.many`: four processes by torchrun, with unequal numbers of images and with fewer images than
processes; one that stands still; a search of two that goes on in one; signals to a launcher and to one process; and a
search of 5,000 schedules.

Figures for docs/promises.md; too slow for the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import torch.distributed as dist

import cli.runtime
import diffrate
import main
from diffrate.searching.hard_counts import CalibrationObserver
from diffrate.searching.trials import TrialRecord
from tests.cli.test_search import words
from tests.conftest import free_port
from tests.faults import data_in
from tests.forked import Ended, as_command, ended, started
from tests.library.test_processes import SIZES

PARTS = {"unequal": (5, 3, 2, 2), "fewer images than processes": (1, 1, 1, 0)}


def as_rank(folder: Path) -> None:
    """One of those that torchrun starts: search and evaluate on its part of the images, and leave what comes."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.set_num_threads(1)
    for name, parts in PARTS.items():
        torch.manual_seed(0)
        images, labels = torch.randn(sum(parts), 3, 32, 32), torch.arange(sum(parts)) % 5
        part = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        loader = [(image[None], label[None]) for image, label in zip(images[part], labels[part], strict=True)]
        for method in ("gradient", "calibrated"):
            torch.manual_seed(0)
            model = diffrate.patch.vit(timm.create_model("vit_tiny_patch16_224", **SIZES), 1, 1)
            options = {"method": method, **({"work": 200.0} if method == "calibrated" else {})}
            try:
                diffrate.search(model, loader, share=0.8, **options)
                error = ""
            except ValueError as refused:
                error = str(refused)
            scores = diffrate.evaluate(model, loader)
            with torch.inference_mode():
                logits = model.eval()(images, return_flop=False)
            kept = model.get_kept_num()
            outcome = {"kept": kept, "logits": logits, "images": scores.images, "loss": scores.loss, "error": error}
            torch.save(outcome, folder / f"{name} {method} {rank}.pth")
    cli.runtime.leave_group()


def torchrun(*command: object) -> list[str]:
    base = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--master_port={free_port()}")
    return [*map(str, (*base, *command))]


def by_torchrun(scratch: Path) -> None:
    """Equal logits, schedules and errors in all processes."""
    command = torchrun("--nproc_per_node=4", "-m", "tests.many", scratch)
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    for name in PARTS:
        for method in ("gradient", "calibrated"):
            outcomes = [torch.load(scratch / f"{name} {method} {rank}.pth", weights_only=True) for rank in range(4)]
            logits = [outcome.pop("logits") for outcome in outcomes]
            assert all(torch.equal(other, logits[0]) for other in logits)
            assert all(other == outcomes[0] for other in outcomes)
            print(f"{name}, {method}: equal in 4", outcomes[0]["error"], flush=True)


def impatient(command: Sequence[object]) -> None:
    cli.runtime.PATIENCE = timedelta(seconds=6)
    as_command(command)


def until_saved(out: Path) -> None:
    while not (out / "checkpoint.pth").exists():
        time.sleep(0.1)


def signalled(scratch: Path, command: Callable[..., list[str]]) -> None:
    """One process stands still, or gets SIGTERM: the other ends with one line."""
    for number, lost in ((signal.SIGSTOP, 0), (signal.SIGSTOP, 1), (signal.SIGTERM, 0), (signal.SIGTERM, 1)):
        folder = scratch / f"{number.name} {lost}"
        folder.mkdir()
        both = started(partial(impatient, command(folder / "out", "--epochs", 900)), folder)
        until_saved(folder / "out")
        os.kill(both[lost].pid or 0, number)
        begun = time.monotonic()
        both[1 - lost].join(60)
        seconds = time.monotonic() - begun
        both[lost].join(10)
        both[lost].kill()
        done: list[Ended] = ended(both, folder)
        print(f"{number.name} to process {lost}, after {seconds:.1f} s:", *(f"{one.code} {one.err!r}" for one in done))


def launcher_signalled(scratch: Path, command: Callable[..., list[str]]) -> None:
    """SIGTERM to torchrun: both processes save and end, and the search goes on."""
    out = scratch / "launched"
    words = command(out, "--epochs", 900)
    with (scratch / "launched.txt").open("w") as file:
        run = subprocess.Popen(torchrun("--nproc_per_node=2", "main.py", *words), stdout=file, stderr=file)
        until_saved(out)
        run.send_signal(signal.SIGTERM)
        code = run.wait(60)
    lines = [line for line in (scratch / "launched.txt").read_text().splitlines() if line.startswith("main.py:")]
    print("SIGTERM to torchrun:", code, lines, flush=True)


def elsewhere(scratch: Path, command: Callable[..., list[str]]) -> None:
    """What two processes began, one refuses by name."""
    out, error = scratch / "launched", io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main.main(command(out, "--epochs", 900, "--resume", "auto"))
    print("two processes, then one:", code, error.getvalue().strip(), flush=True)


class Watched(CalibrationObserver):
    """Memory, open files, threads and temporary files from a tenth of `most` schedules on."""

    def __init__(self, most: int) -> None:
        self.most, self.tried, self.next = most, 0, most // 10

    def on_trials(self, record: TrialRecord) -> None:
        self.tried = record.trials
        if self.tried >= self.next:
            self.next += self.most // 10
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # what is freed counts no longer
                ctypes.CDLL(None).malloc_trim(0)
            files = len(list(Path("/proc/self/fd").iterdir()))
            left = len(list(Path(tempfile.gettempdir()).iterdir()))
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            print(self.tried, int(status["VmRSS"].split()[0]), files, int(status["Threads"]), left, flush=True)

    def stop(self) -> bool:
        return self.tried >= self.most


def long_search(scratch: Path, most: int = 5000) -> None:
    (scratch / "temporary").mkdir()
    tempfile.tempdir = str(scratch / "temporary")  # others use the system's
    model = diffrate.patch.vit(timm.create_model("vit_tiny_patch16_224", **SIZES | {"depth": 6}), 1, 1)
    watched, loader = Watched(most), [torch.randn(16, 3, 32, 32) for _ in range(2)]
    options = {"method": "calibrated", "work": 1e9, "trials": watched, "checkpoint": scratch / "long.pth"}
    print("schedules tried, RSS in kB, open files, threads, files in the temporary folder:", flush=True)
    with contextlib.suppress(diffrate.StoppedError):
        diffrate.search(model, loader, share=0.6, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        as_rank(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as folder:
            scratch = Path(folder)
            command = partial(words, data_in(scratch / "data"))
            by_torchrun(scratch)
            signalled(scratch, command)
            launcher_signalled(scratch, command)
            elsewhere(scratch, command)
            long_search(scratch)
