"""`python -m tests.faults [KILLS]`: processes killed at random moments, half of them while a file is written, and
whether what they left loads and goes on to the same end. Also a full disk, and a folder that goes while a run writes.

Figures for docs/promises.md; too slow for the tests, which have a few of each.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import diffrate
import engine
import main
from diffrate.files.runtimes import load_exported
from diffrate.schedule import read_schedules, save_schedule
from diffrate.searching import hard_counts
from tests.cli.test_finetune import PLAIN
from tests.cli.test_search import MODEL, words
from tests.conftest import write_image
from tests.forked import with_torch
from tests.tiny_models import saved_file

DAY = 86_400  # seconds
SLOW = 0.15  # seconds that each file takes to reach the disk


def data_in(root: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                write_image(root / split / name / f"{index}.png", seed=100 * label + index, brightest=100 + 150 * label)
    return root


def prepare(slow: bool) -> None:
    """Few looks at an image, checkpoints after every step, files that take their time, and a clock that is set
    forth or back by a day each time that it is asked."""
    wall = time.time
    time.time = lambda: wall() + random.SystemRandom().choice((-DAY, DAY))
    torch.set_num_threads(1)
    hard_counts.LOOKS_AN_IMAGE = 40.0
    engine.SAVE_SECONDS = -1.0
    sync = os.fsync
    if slow:
        os.fsync = lambda descriptor: (sync(descriptor), time.sleep(SLOW))[0]


def ran(command: list[str], slow: bool = False) -> int:
    prepare(slow)
    with contextlib.redirect_stdout(io.StringIO()):
        return main.main(command)


def in_process(command: list[str], slow: bool) -> Any:
    process = with_torch().Process(target=partial(ran, command, slow))
    process.start()
    return process


def tensors(value: Any, where: str = "") -> dict[str, Any]:
    """What a checkpoint holds, by its place, without what clocks say."""
    if isinstance(value, dict):
        found = {}
        for key, item in value.items():
            if not any(word in str(key) for word in ("seconds", "time", "minutes", "words", "output_dir", "resume")):
                found |= tensors(item, f"{where}/{key}")
        return found
    if isinstance(value, list | tuple):
        return {
            place: one for index, item in enumerate(value) for place, one in tensors(item, f"{where}/{index}").items()
        }
    return {where: value}


def same(one: Path, other: Path) -> bool:
    first, second = (tensors(torch.load(path, weights_only=True)) for path in (one, other))
    equal = {
        place: torch.equal(value, second[place]) if isinstance(value, torch.Tensor) else value == second[place]
        for place, value in first.items()
        if place in second
    }
    return first.keys() == second.keys() and all(equal.values())


def kills(kind: str, command: Callable[[Path], list[str]], ends: list[str], scratch: Path, number: int) -> None:
    """Kill a run at `number` random moments, each time going on to the end and comparing with an undisturbed one."""
    whole, draw, lost, during = scratch / f"{kind} whole", random.Random(0), [], 0
    start = time.monotonic()
    assert ran(command(whole)) == 0
    process = in_process(command(scratch / f"{kind} timed"), False)
    start = time.monotonic()
    process.join()
    long = time.monotonic() - start
    for count in range(number):
        out, slow = scratch / f"{kind} {count}", count % 2 == 1
        process = in_process(command(out), slow)
        process.join(draw.uniform(0.2, 1.0) * (2 if slow else 1) * long)
        during += bool(out.exists() and list(out.glob(".*-*")))
        process.kill()
        process.join()
        for path in out.glob("*.pth") if out.exists() else ():
            torch.load(path, weights_only=True)  # the last good one loads
            os.utime(path, (0, 0) if slow else None)
        code = ran([*command(out), "--resume", "auto"])
        if code or not all(same(out / name, whole / name) for name in ends):
            lost.append(count)
        else:
            shutil.rmtree(out)
    print(
        f"{kind}: tried {number}, {during} of them while a file was written, lost {len(lost)} {lost or ''}", flush=True
    )


def writers(
    kind: str, write: Callable[[Path], object], read: Callable[[Path], object], scratch: Path, number: int
) -> None:
    """Kill what writes a file again and again: there is always a whole one."""
    path, draw, lost, during = scratch / kind, random.Random(0), 0, 0
    write(path)
    for count in range(number):
        process = with_torch().Process(target=partial(again, write, path))
        process.start()
        if count % 2:  # while it is being written
            while not list(scratch.glob(f".{path.name}-*")):
                time.sleep(0.005)
        process.join(draw.uniform(0, 0.3) if count % 2 else draw.uniform(0.5, 2.5))
        process.kill()
        process.join()
        during += len(list(scratch.glob(f".{path.name}-*"))) > 0
        for left in scratch.glob(f".{path.name}-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            read(path)
        except Exception as error:
            print(kind, error)
            lost += 1
    print(f"{kind}: tried {number}, {during} of them while a file was written, lost {lost}", flush=True)


def again(write: Callable[[Path], object], path: Path) -> None:
    prepare(slow=True)
    while True:
        write(path)


def save_sample(model: Path, path: Path) -> None:
    diffrate.save(diffrate.load(model), path)


def export_sample(model: Path, path: Path) -> None:
    diffrate.export(diffrate.load(model), path)


def save_rates(schedule: diffrate.Schedule, path: Path) -> None:
    save_schedule(path, "a", 1.0, schedule)


def run_export(path: Path) -> None:
    load_exported(path)


def removed(command: Callable[[Path], list[str]], scratch: Path) -> None:
    """The output folder goes while a run writes to it: one line, exit code 2."""
    out = scratch / "removed"
    process = with_torch().Process(target=partial(reported, command(out), scratch / "line"))
    process.start()
    while not (out / "checkpoint.pth").exists():
        time.sleep(0.02)
    shutil.rmtree(out)
    process.join()
    print("output folder removed:", process.exitcode, (scratch / "line").read_text().strip(), flush=True)


def reported(command: list[str], line: Path) -> None:
    prepare(slow=True)
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main.main(command)
    line.write_text(error.getvalue())
    sys.exit(code)


def faults(number: int) -> None:
    """All of them, `number` of each kind."""
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        data, model = data_in(scratch / "data"), saved_file(scratch / "model.safetensors")
        search = lambda out: words(data, out, "--epochs", 12, "--arch-lr", 0.05)  # noqa: E731
        few = ("--model", MODEL, "--data-path", data, "--num_workers", 0, "--target_flops", "60%", "--print-freq", 1)
        calibrated = lambda out: [str(word) for word in (*few, "--search", "calibrated", "--output_dir", out)]  # noqa: E731
        tuning = (*PLAIN, "--epochs", 3, "--data-path", data, "--checkpoint", "scratch")
        finetune = lambda out: [str(word) for word in (*tuning, "--output_dir", out)]  # noqa: E731
        kills("search by gradient", search, ["checkpoint.pth"], scratch, number)
        kills("search at hard counts", calibrated, ["checkpoint.pth"], scratch, number)
        kills("fine-tuning", finetune, ["checkpoint.pth"], scratch, number)
        writers("a.safetensors", partial(save_sample, model), diffrate.load, scratch, number)
        writers("a.pt2", partial(export_sample, model), run_export, scratch, number)
        schedule = diffrate.about(model).schedule
        writers("a.json", partial(save_rates, schedule), read_schedules, scratch, number)
        removed(search, scratch)


if __name__ == "__main__":
    faults(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
