"""`python -m benchmarks.gpu`: what can only be known on a GPU, in eight minutes, in one JSON file.

Every part is processes of its own: an error on the GPU, or one that hangs, ends that part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch

import benchmarks.speed
import diffrate
from benchmarks.gpu_rows import SETTINGS, Setting
from benchmarks.tables import markdown
from diffrate.files import UNREADABLE, first_line, whole_file
from diffrate.running.machine import machine_name
from utils import UsageError

PROJECT = Path(__file__).resolve().parent.parent
WHOLE, LEAST = 460, 15  # seconds of all parts together, and with how many left one is still begun
LONGEST = 300  # characters of a line of failure
SPEEDS = {"model": "model", **benchmarks.speed.HEADINGS}
SPEEDS = {name: heading for name, heading in SPEEDS.items() if not name.endswith(("_mib", "_ms_per_image", "_gflops"))}
PRICES = {"reduction": "a block", "precision": "precision", "batch_size": "batch"}
PRICES |= {"ms": "ms a block", "ms_low": "lowest", "ms_high": "highest"}
SEARCHES = {"name": "search", "seconds": "seconds", "ended": "ended by itself", "dense": "dense top-1"}
SEARCHES |= {"found": "found top-1", "speed": "speed"}


@dataclass(frozen=True)
class Part:
    """Commands that run at once, the seconds they have, and what their output comes to."""

    name: str
    seconds: int
    commands: Sequence[Sequence[object]]
    read: Callable[[str], dict[str, Any]]


def parts(setting: Setting, scratch: Path) -> list[Part]:
    """All parts, the most important ones first; `scratch` is theirs to write to."""
    device = setting.device.type
    rows = (sys.executable, "-m", "benchmarks.gpu_rows", device)
    # Without the project's settings: plugins may not be installed, and warnings of another torch are no failures.
    tests = (sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", PROJECT, "-q", "-p", "no:cacheprovider")
    search = (sys.executable, PROJECT / "main.py", "--device", device, "--seed", 0, "--output_dir")
    asked = {
        "target_speedup": ("--target_speedup", 1.5, "--latency_batch", setting.latency_batch),
        "gradient": ("--target_flops", 0.0242, "--search", "gradient", "--epochs", 1),
        "calibrated": ("--target_flops", 0.0242, "--search", "calibrated"),
    }
    graphs = [(name, batch) for name, _ in setting.models for batch in setting.batch_sizes]
    return [
        Part("numerics", 90, [(*tests, PROJECT / "tests" / "gpu")], read_tests),
        Part("eager", 110, [(*rows, "eager")], read_rows),
        Part("compiled", 180, [(*rows, "compiled", *graph, scratch / "lock") for graph in graphs], read_rows),
        *(Part(name, 120, [(*search, scratch / name, *words)], read_search) for name, words in asked.items()),
        Part("reductions", 60, [(*rows, "reductions")], read_rows),
        Part("onnx", 120, [(*rows, "onnx", scratch)], read_rows),
    ]


def run_part(part: Part, seconds: float, scratch: Path) -> dict[str, Any]:
    """What a part comes to within `seconds`, with a line for each of its commands that failed."""
    more = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4", "XDG_CACHE_HOME": str(scratch)}
    options: dict[str, Any] = {"cwd": PROJECT, "env": {**os.environ, **more}, "start_new_session": True}
    begun, running, codes = time.monotonic(), [], []
    outputs = [scratch / f"{part.name}{index}.txt" for index in range(len(part.commands))]
    try:
        for words, output in zip(part.commands, outputs, strict=True):
            with output.open("w") as file:
                running.append(subprocess.Popen([*map(str, words)], stdout=file, stderr=subprocess.STDOUT, **options))
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, begun + seconds - time.monotonic()))
    finally:
        for process in running:
            codes.append(process.poll())
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it started
            process.wait()
    taken = time.monotonic() - begun
    texts = [output.read_text(errors="replace") for output in outputs]
    failures = [_failure(code, text, taken) for code, text in zip(codes, texts, strict=True) if code != 0]
    return {"seconds": round(taken, 1), "ended": None not in codes, "failures": failures, **part.read("\n".join(texts))}


def _failure(code: int | None, text: str, taken: float) -> str:
    """In a line how a command failed: its last line, where it ended by itself."""
    if code is None:
        return f"cut off after {taken:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return [f"exit code {code}", *filter(None, map(str.strip, text.splitlines()))][-1][:LONGEST]


def read_rows(text: str) -> dict[str, Any]:
    """The rows that `gpu_rows` printed."""
    return {"rows": [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]}


def read_tests(text: str) -> dict[str, Any]:
    """How many tests passed, failed and were left out, and a line for each that failed."""
    last = (text.splitlines() or [""])[-1]
    words = ("passed", "failed", "error", "skipped")
    counts = {word: sum(map(int, re.findall(rf"(\d+) {word}", last))) for word in words}
    return counts | {"lines": [line[:LONGEST] for line in re.findall("^(?:FAILED|ERROR) .*", text, re.MULTILINE)]}


def read_search(text: str) -> dict[str, Any]:
    """Top-1 of the dense model and of what was found, and its speed; None for what the search did not come to."""
    top1 = dict(re.findall(r"(dense|found): \* Acc@1 ([\d.]+)", text))
    numbers = {name: float(top1[name]) if name in top1 else None for name in ("dense", "found")}
    return numbers | {"speed": (re.findall("speed-up: (.*)", text) or [None])[-1]}


def table(record: Mapping[str, Any]) -> list[str]:
    """A record as lines of Markdown: the card and its versions, a table for each kind of figures, what failed."""
    about, found = record["about"], record["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"{about['card']}, driver {about['driver']}, {versions}, {about['date']}", ""]
    tests = found.get("numerics", {})
    if "passed" in tests:
        lines += [f"`pytest tests/gpu`: {tests['passed']} passed, {tests['failed']} failed", ""]
    speeds = [row for name in ("eager", "compiled", "onnx") for row in found.get(name, {}).get("rows", [])]
    prices = found.get("reductions", {}).get("rows", [])
    searches = [{"name": name, **part} for name, part in found.items() if "speed" in part]
    for rows, headings in ((speeds, SPEEDS), (prices, PRICES), (searches, SEARCHES)):
        if rows:
            lines += [*markdown([SimpleNamespace(**row) for row in rows], headings), ""]
    return lines + [f"- {name}: {line}" for name, part in found.items() for line in part["failures"]]


def about(device: torch.device) -> dict[str, Any]:
    """The card, its driver, and the versions of what runs on it."""
    asked, driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), "unknown"
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        driver = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    versions = {"torch": str(torch.__version__), "CUDA": torch.version.cuda, "timm": timm.__version__}
    versions |= {"diffrate": diffrate.__version__, "Python": platform.python_version()}
    today = datetime.now(timezone.utc).date().isoformat()
    return {"card": machine_name(device), "driver": driver, "versions": versions, "date": today}


def measure(setting: Setting, out: Path) -> None:
    """Run all parts for which there is time, and write what there is after each."""
    deadline = time.monotonic() + WHOLE
    record: dict[str, Any] = {"about": about(setting.device), "parts": {}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for part in parts(setting, Path(folder)):
            left = min(part.seconds, deadline - time.monotonic())
            try:
                found = run_part(part, left, Path(folder)) if left > LEAST else {"failures": ["left out: no time left"]}
            except Exception as error:
                found = {"failures": [first_line(error)[:LONGEST]]}
            record["parts"][part.name] = found
            with whole_file(out) as file:
                file.write((json.dumps(record, indent=2) + "\n").encode())
            print("; ".join([f"{part.name}: {found.get('seconds', 0)} s", *found["failures"]]), flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file for the figures, default gpu.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print such a file as Markdown, and measure nothing")
    parser.add_argument("--device", choices=list(SETTINGS), default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.table is None and args.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use: nothing was measured")
        return 0
    try:
        if args.table is not None:
            print("\n".join(_table_of(args.table)))
        elif args.out.is_dir() or not args.out.absolute().parent.is_dir():
            raise UsageError(f"--out {args.out}: accepted: the name of a file in a folder that is there")
        else:
            measure(SETTINGS[args.device], args.out)
    except UsageError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2
    return 0


def _table_of(path: Path) -> list[str]:
    try:
        return table(json.loads(path.read_text(encoding="utf-8")))
    except UNREADABLE as error:
        raise UsageError(f"--table {path}: found {first_line(error)}; accepted: a file that --out left") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, too
    sys.exit(main())
