"""What `benchmarks/gpu.py` measures in processes of its own: `python -m benchmarks.gpu_rows DEVICE KIND ...`.

They print each row of figures as a line of JSON.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import diffrate
import models
from benchmarks.speed import SIDES, build_side
from benchmarks.subject import Subject
from diffrate.blocks.block import attended, mlp_branch
from diffrate.budgets.schedule import Kept, Schedule, find_schedule, make_schedule
from diffrate.budgets.space import GRANULARITY
from diffrate.exporting.runner import INPUT, OUTPUT
from diffrate.running.speed import forward_pass, mode_name, precision_name, speed_of
from diffrate.running.timing import Run, time_within
from sample import MODEL as SAMPLE

PUBLISHED = Path(__file__).resolve().parent.parent / "compression_rate.json"
COMPILING = 120  # seconds that a model has to compile
REDUCTIONS = {"prunes one": (1, 0), "merges one": (0, 1), "prunes and merges one": (1, 1)}
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What is measured where: models at GFLOPs, at batch sizes; batch sizes of reductions; seconds of a timed pair; and
    images at a time where a search asks for a speed."""

    device: torch.device
    models: tuple[tuple[str, float], ...]
    batch_sizes: tuple[int, ...]
    reduced: tuple[int, ...]
    seconds: float
    latency_batch: int


DEIT = (("vit_deit_small_patch16_224", 2.3), ("vit_deit_base_patch16_224", 8.7))
SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "cuda": Setting(torch.device("cuda"), DEIT, (1, 64, 256), (1, 64), 2.0, 4096),
        "cpu": Setting(torch.device("cpu"), ((SAMPLE, 0.0242),), (1,), (1,), 0.01, 64),  # to try the script itself
    }
)


def subject_of(name: str, gflops: float | None) -> Subject:
    """A model with fresh weights, at a published schedule or none."""
    entry = models.entry_of(name)
    schedule = None if gflops is None else find_schedule(PUBLISHED, entry.schedule_key, gflops)
    return Subject(entry, entry.input_size, schedule, GRANULARITY, seed=0)


def speed_row(
    subject: Subject, batch_size: int, precision: str, mode: str, sides: Sequence[Run], setting: Setting
) -> dict[str, Any]:
    """The dense and the compressed side, timed in pairs."""
    with models.shapes_alone():
        model = subject.compressed()
    times = time_within(sides[0], sides[1], setting.seconds, setting.device)
    speed = speed_of(times, batch_size, precision, (model.flops_at(model.dense_schedule()), model.flops()))
    return {"model": subject.entry.name, "mode": mode, **asdict(speed)}


def eager_rows(setting: Setting) -> Rows:
    """Each model in float32 and bfloat16, at each batch size."""
    for name, gflops in setting.models:
        subject = subject_of(name, gflops)
        for dtype in (torch.float32, torch.bfloat16):
            for batch in setting.batch_sizes:
                sides = [build_side(side, subject, batch, dtype, False, str(setting.device)) for side in SIDES]
                yield speed_row(subject, batch, precision_name(dtype), mode_name(False), sides, setting)


def compiled_rows(setting: Setting, name: str, batch: str, lock: str) -> Rows:
    """One model at one batch size as compiled graphs, in bfloat16. All of them compile at once, which takes a minute,
    and are then timed one after the other: `lock` is shared while one compiles, and a measurement's alone."""
    import fcntl

    with Path(lock).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        signal.alarm(COMPILING)  # one that hangs would hold up the others
        subject, size = subject_of(name, dict(setting.models)[name]), int(batch)
        sides = [build_side(side, subject, size, torch.bfloat16, True, str(setting.device)) for side in SIDES]
        for run in sides:
            run()
        signal.alarm(0)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield speed_row(subject, size, precision_name(torch.bfloat16), mode_name(True), sides, setting)
        fcntl.flock(file, fcntl.LOCK_UN)  # forked compilers may live on with it


def reduction_rows(setting: Setting) -> Rows:
    """Milliseconds that letting tokens go adds to a block, against tokens that are cut off for nothing."""
    subject = subject_of(setting.models[0][0], None)
    for dtype in (torch.float32, torch.bfloat16):
        for batch in setting.reduced:
            model = subject.compressed()
            images = torch.randn(batch, 3, *model.image_size, device=setting.device, dtype=dtype)
            tokens, blocks = model.compression.space.limits[0], len(model.compressible_blocks())
            reducing = blocks - (model.read is not None)  # the last block lets none go that nothing reads
            for kind, (pruned, merged) in REDUCTIONS.items():
                left = [tokens - (pruned + merged) * block for block in range(blocks + 1)]
                prune, merge = [count - pruned for count in left[:-1]], left[1:]
                model.set_kept_num(prune, merge)
                reduced = forward_pass(model, batch, model.image_size, setting.device, dtype)
                cut = partial(sliced_pass, model, images, make_schedule(prune, merge))
                times = time_within(cut, reduced, setting.seconds, setting.device)
                added = [1000 * (b - a) / reducing for a, b in zip(times.baseline, times.rival, strict=True)]
                row = {"model": subject.entry.name, "precision": precision_name(dtype), "batch_size": batch}
                yield row | {"reduction": kind, "ms": median(added), "ms_low": min(added), "ms_high": max(added)}


@torch.inference_mode()
def sliced_pass(model: diffrate.CompressedModel, images: Tensor, schedule: Schedule) -> Tensor:
    """Logits of images `[B, 3, H, W]` where each block keeps its first tokens, as many as `schedule` leaves it."""
    entry = model.enter(images)
    state = model.prepared(entry.state, schedule)
    for block, positions, kept, read in model.steps(entry, schedule):
        whole = Kept(kept.entering, kept.entering, kept.entering)
        state, _ = attended(block, positions, model.rules, state, whole, read)
        state = state._replace(x=mlp_branch(block, state.x[:, : kept.merged]))
    return model.classify(state)


def onnx_rows(setting: Setting, scratch: str) -> Rows:
    """The first model as files in onnxruntime, on the GPU, where this build of it computes there."""
    provider = f"{setting.device.type.upper()}ExecutionProvider"
    try:
        import onnxruntime
    except ImportError:
        sys.exit("absent: onnxruntime is not installed")
    if provider not in onnxruntime.get_available_providers():
        sys.exit(f"absent: onnxruntime {onnxruntime.__version__} has no {provider}")
    subject, sessions = subject_of(*setting.models[0]), []
    model = subject.compressed()
    for side, schedule in zip(SIDES, (model.dense_schedule(), model.compression.current()), strict=True):
        model.set_kept_num(schedule.prune, schedule.merge)
        file = diffrate.export(model, Path(scratch) / f"{side}.onnx").path
        sessions.append(onnxruntime.InferenceSession(file, providers=[provider]))
        if provider not in sessions[-1].get_providers():  # it falls back to the CPU without an error
            sys.exit(f"absent: onnxruntime {onnxruntime.__version__} cannot load {provider}")
    waiting = replace(setting, device=torch.device("cpu"))  # sessions wait for the GPU: the host's clock tells
    for batch in setting.batch_sizes:
        images = torch.randn(batch, 3, *subject.input_size).numpy()
        runs = [_bound(session, images, setting.device.type) for session in sessions]
        yield speed_row(subject, batch, "float32", f"onnxruntime, {provider}", runs, waiting)


def _bound(session: Any, images: Any, device: str) -> Run:
    """What runs a session on images that lie on the device, where the logits stay."""
    from onnxruntime import OrtValue

    binding = session.io_binding()
    binding.bind_ortvalue_input(INPUT, OrtValue.ortvalue_from_numpy(images, device, 0))
    binding.bind_output(OUTPUT, device, 0)
    return lambda: session.run_with_iobinding(binding)


KINDS = {"eager": eager_rows, "compiled": compiled_rows, "reductions": reduction_rows, "onnx": onnx_rows}

if __name__ == "__main__":
    place, kind, *arguments = sys.argv[1:]
    for row in KINDS[kind](SETTINGS[place], *arguments):
        print(json.dumps(row), flush=True)
