"""How a compressed model runs when its weights are at rest: in which precision, compiled or not."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

import diffrate
from cli.runtime import Runtime
from diffrate.running.compiled import FixedBatch, compile_model


def for_inference(
    model: diffrate.CompressedModel, compiled: bool, batch_size: int, runtime: Runtime
) -> tuple[nn.Module, Runtime]:
    """`model` on the device of `runtime` as it is to run, and the runtime that goes with it.

    On a CPU the weights themselves take the precision of `--amp`, in place: autocast would go back to
    float32 between layers. Elsewhere autocast it is, as published.
    """
    model = model.to(runtime.device)
    if runtime.amp is not None and runtime.device.type == "cpu":
        model = model.to(runtime.amp)
        runtime = replace(runtime, amp=None, dtype=runtime.amp)
    return (FixedBatch(compile_model(model), batch_size) if compiled else model), runtime
