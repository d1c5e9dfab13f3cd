"""`python -m benchmarks.gpu`: what can only be measured on a GPU, in eight minutes, as one JSON file.

Every part runs in processes of its own: an error on the GPU, or a process that hangs, ends that part alone.
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
import torch

import diffrate
import models
from benchmarks.speed import SIDES, Row, Subject, build_side, markdown, speed_row
from diffrate.atomic import UNREADABLE, first_line, whole_file
from diffrate.device import machine_name
from diffrate.files.runtimes import INPUT, OUTPUT
from diffrate.schedule import GRANULARITY, SLICED, find_schedule, make_schedule
from diffrate.timing import Use, precision_name, sliced, time_within
from sample import MODEL as SAMPLE
from utils import UsageError

PROJECT = Path(__file__).resolve().parent.parent
PUBLISHED = PROJECT / "compression_rate.json"
WHOLE, LEAST = 460, 15  # seconds of all parts together, and with how many left one is still begun
COMPILING = 120  # seconds that a model has to compile
LONGEST = 300  # characters of a line of failure
HIDDEN = ("dense_ms_per_image", "compressed_ms_per_image", "dense_gflops", "compressed_gflops")  # in the table
REDUCTIONS = {"prunes one": (1, 0), "merges one": (0, 1), "prunes and merges one": (1, 1)}
DTYPES = {"eager": (torch.float32, torch.bfloat16), "compiled": (torch.bfloat16,)}


class Setting(NamedTuple):
    """What is measured: models at GFLOPs, at batch sizes, in pairs for so many seconds; the batch size of a search for
    a speed, and those of single reductions."""

    device: torch.device
    models: dict[str, float]
    batch_sizes: tuple[int, ...]
    seconds: float
    latency_batch: int
    reduced: tuple[int, ...]


DEIT = {"vit_deit_small_patch16_224": 2.3, "vit_deit_base_patch16_224": 8.7}
SETTINGS = {
    "cuda": Setting(torch.device("cuda"), DEIT, (1, 64, 256), 2.0, 4096, (1, 64)),
    "cpu": Setting(torch.device("cpu"), {SAMPLE: 0.0242}, (1,), 0.01, 64, (1,)),  # to try the script itself
}


class Part(NamedTuple):
    """Commands that run at once, and the seconds they have."""

    name: str
    seconds: int
    commands: Sequence[Sequence[object]]


def parts(setting: Setting, scratch: Path) -> list[Part]:
    """All parts, the most important ones first; they write to the folder `scratch`."""
    device = setting.device.type
    rows = (sys.executable, "-m", "benchmarks.gpu", "--device", device, "--rows", scratch / "lock")
    # Without the project's settings: plugins may not be installed, and warnings of another torch are no failures.
    tests = (sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", PROJECT, "-q", "-p", "no:cacheprovider")
    search = (sys.executable, PROJECT / "main.py", "--device", device, "--seed", 0, "--output_dir")
    asked = {
        "target_speedup": ("--target_speedup", 1.5, "--latency_batch", setting.latency_batch),
        "gradient": ("--target_flops", 0.0242, "--search", "gradient", "--epochs", 1),
        "calibrated": ("--target_flops", 0.0242, "--search", "calibrated"),
    }
    graphs = product(setting.models, setting.batch_sizes)
    return [
        Part("numerics", 90, [(*tests, PROJECT / "tests" / "gpu")]),
        Part("eager", 110, [(*rows, "eager")]),
        Part("compiled", 180, [(*rows, "compiled", *graph) for graph in graphs]),
        Part("reductions", 45, [(*rows, "reductions")]),
        *(Part(name, 120, [(*search, scratch / name, *words)]) for name, words in asked.items()),
        Part("onnx", 60, [(*rows, "onnx")]),
    ]


def speeds(setting: Setting, lock: str, mode: str, graph: Sequence[str]) -> Iterator[Row]:
    """Rows of the models at each batch size, or of one `graph`: a model and a batch size.

    Graphs compile at once, each in a process, which takes a minute, and are then timed one after the other: `lock` is
    shared while one is built, and a measurement's alone.
    """
    import fcntl

    chosen = [(graph[0], int(graph[1]))] if graph else product(setting.models, setting.batch_sizes)
    for (name, batch), dtype in product(chosen, DTYPES[mode]):
        with Path(lock).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            signal.alarm(COMPILING)  # one that hangs would hold up the others
            subject, use = subject_of(name, setting.models[name]), Use(batch, dtype, mode == "compiled", setting.device)
            runs = [build_side(side, subject, use) for side in (*SIDES, SLICED)]
            for run in runs:
                run()
            signal.alarm(0)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield speed_row(subject, time_within(runs, setting.seconds, setting.device), use)
            fcntl.flock(file, fcntl.LOCK_UN)  # forked compilers may live on with it


def reduction_rows(setting: Setting) -> Iterator[Row]:
    """Milliseconds that a reduction adds to a block, against keeping the first tokens of each image."""
    subject = subject_of(*next(iter(setting.models.items())))
    for dtype, batch in product(DTYPES["eager"], setting.reduced):
        model = subject.compressed().to(setting.device, dtype)
        images = torch.randn(batch, 3, *model.image_size, device=setting.device, dtype=dtype)
        tokens, blocks = model.compression.space.limits[0], len(model.compressible_blocks())
        reducing = blocks - (model.read is not None)  # the last block removes no tokens that are not used
        for kind, (pruned, merged) in REDUCTIONS.items():
            left = [tokens - (pruned + merged) * block for block in range(blocks + 1)]
            schedule = make_schedule([count - pruned for count in left[:-1]], left[1:])
            run = torch.inference_mode()(model.outputs_at)
            runs = [partial(run, images, one) for one in (sliced(schedule), schedule)]
            times = time_within(runs, setting.seconds, setting.device)
            added = [1000 * (b - a) / reducing for a, b in zip(*times, strict=True)]
            row = {"model": subject.entry.name, "precision": precision_name(dtype), "batch_size": batch}
            yield row | {"reduction": kind, "ms": median(added), "ms_low": min(added), "ms_high": max(added)}


def onnx_rows(setting: Setting) -> Iterator[Row]:
    """The first model as files in onnxruntime, on the GPU, where this build of it computes there."""
    provider = f"{setting.device.type.upper()}ExecutionProvider"
    try:
        import onnxruntime
    except ImportError:
        sys.exit("absent: onnxruntime is not installed")
    if provider not in onnxruntime.get_available_providers():
        sys.exit(f"absent: onnxruntime {onnxruntime.__version__} has no {provider}")
    subject, sessions = subject_of(*next(iter(setting.models.items()))), []
    model = subject.compressed()
    current = model.compression.current()
    for schedule in (model.dense_schedule(), current, sliced(current)):
        model.schedule = schedule
        with tempfile.TemporaryDirectory() as scratch:
            file = diffrate.export(model, Path(scratch) / "model.onnx").path
            sessions.append(onnxruntime.InferenceSession(file, providers=[provider]))
        if provider not in sessions[-1].get_providers():  # it falls back to the CPU without an error
            sys.exit(f"absent: onnxruntime {onnxruntime.__version__} cannot load {provider}")
    for batch in setting.batch_sizes:
        images, runs = torch.randn(batch, 3, *subject.input_size).numpy(), []
        for session in sessions:  # images lie on the device, and the logits stay there
            binding = session.io_binding()
            binding.bind_ortvalue_input(INPUT, onnxruntime.OrtValue.ortvalue_from_numpy(images, setting.device.type, 0))
            binding.bind_output(OUTPUT, setting.device.type, 0)
            runs.append(partial(session.run_with_iobinding, binding))
        times = time_within(runs, setting.seconds, torch.device("cpu"))  # sessions wait for the GPU
        use = Use(batch, torch.float32, False, setting.device)
        yield speed_row(subject, times, use) | {"mode": f"onnxruntime, {provider}"}


def subject_of(name: str, gflops: float) -> Subject:
    """A model with fresh weights at a published schedule."""
    entry = models.entry_of(name)
    return Subject(entry, entry.input_size, find_schedule(PUBLISHED, entry.schedule_key, gflops), GRANULARITY, seed=0)


def run_part(part: Part, seconds: float, scratch: Path) -> Row:
    """The results of a part within `seconds`, with a line for each of its commands that failed."""
    more = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4", "XDG_CACHE_HOME": str(scratch)}
    options: dict[str, Any] = {"cwd": PROJECT, "env": os.environ | more, "start_new_session": True}
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
    return {"seconds": round(taken, 1), "ended": None not in codes, "failures": failures, **read("\n".join(texts))}


def _failure(code: int | None, text: str, taken: float) -> str:
    """How a command failed, in a line: its last line of output, where it ended by itself."""
    if code is None:
        return f"cut off after {taken:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return [f"exit code {code}", *filter(None, map(str.strip, text.splitlines()))][-1][:LONGEST]


def read(text: str) -> Row:
    """The results in the output of a part: rows of figures; top-1 of a search's dense and found model, and its speed;
    the numbers of tests that passed, failed and were skipped, and a line for each that failed."""
    found: Row = {"rows": [json.loads(line) for line in re.findall(r"^\{.*\}$", text, re.MULTILINE)]}
    found |= {f"{name} top-1": float(top1) for name, top1 in re.findall(r"(dense|found): \* Acc@1 ([\d.]+)", text)}
    found |= re.findall("(speed)-up: (.*)", text)
    last = "".join(re.findall(r"\d+ (?:passed|failed|error|skipped).* in [\d.]+s", text)[-1:])
    found |= {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    return found | {"lines": [line[:LONGEST] for line in re.findall("^(?:FAILED|ERROR) .*", text, re.MULTILINE)]}


def table(record: Row) -> list[str]:
    """A record as lines of Markdown: the card and its versions, a table for the figures of each part, what failed."""
    about, found = record["about"], record["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"{about['card']}, driver {about['driver']}, {versions}, {about['date']}", ""]
    figures = ("seconds", "ended", "passed", "failed", "dense top-1", "found top-1", "speed")
    summary = [{"part": name, **{figure: part.get(figure) for figure in figures}} for name, part in found.items()]
    for rows in (*(part.get("rows", []) for part in found.values()), summary):
        if rows:
            lines += [*markdown(rows, HIDDEN), ""]
    return lines + [f"- {name}: {line}" for name, part in found.items() for line in part["failures"]]


def about(device: torch.device) -> Row:
    """The card, its driver, and the versions of what runs on it."""
    asked, driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"), "unknown"
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        driver = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    versions = {"torch": str(torch.__version__), "CUDA": torch.version.cuda, "timm": timm.__version__}
    versions |= {"diffrate": diffrate.__version__, "Python": platform.python_version()}
    today = datetime.now(timezone.utc).date().isoformat()
    return {"card": machine_name(device), "driver": driver, "versions": versions, "date": today}


def measure(setting: Setting, out: Path) -> None:
    """Run all parts for which there is time, and write the results after each."""
    deadline = time.monotonic() + WHOLE
    record: Row = {"about": about(setting.device), "parts": {}}
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
    parser.add_argument("--rows", nargs="+", help=argparse.SUPPRESS)  # of a part, in its process
    args = parser.parse_args(words)
    if args.table is None and args.device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use: nothing was measured")
        return 0
    try:
        if args.table is not None:
            try:
                lines = table(json.loads(args.table.read_text(encoding="utf-8")))
            except UNREADABLE as error:
                found = f"--table {args.table}: found {first_line(error)}"
                raise UsageError(f"{found}; accepted: a file that --out left") from error
            print("\n".join(lines))
        elif args.rows:
            lock, kind, *graph = args.rows
            timed = partial(speeds, lock=lock, mode=kind, graph=graph)
            for row in {"reductions": reduction_rows, "onnx": onnx_rows}.get(kind, timed)(SETTINGS[args.device]):
                print(json.dumps(row), flush=True)
        elif args.out.is_dir() or not args.out.absolute().parent.is_dir():
            raise UsageError(f"--out {args.out}: accepted: the name of a file in a folder that is there")
        else:
            measure(SETTINGS[args.device], args.out)
    except UsageError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, too
    sys.exit(main())
