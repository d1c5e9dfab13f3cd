"""`.xml`: OpenVINO's graph, with the weights in a `.bin` beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from diffrate.exporting.runner import INPUT, OUTPUT, Runner
from diffrate.running.quiet import no_warnings_of

WEIGHTS = ".bin"  # in place of the suffix
SECTION = "diffrate"  # of the file's runtime information


def write(program: ExportedProgram, entries: dict[str, str], path: Path) -> None:
    """Write `program` with `entries` as runtime information."""
    import openvino

    sizes = list(next(node.meta["val"].shape for node in program.graph.nodes if node.name == INPUT))
    with no_warnings_of(r"torch\.|openvino|copyreg"):
        model: Any = openvino.convert_model(program)
    model.reshape([-1, *sizes[1:]])
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    for name, text in entries.items():
        model.set_rt_info(text, [SECTION, name])
    openvino.save_model(model, path, compress_to_fp16=False)


def run(path: Path, threads: int | None = None) -> Runner:
    """What runs the file, for each single request in turn."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.numpy()])[0].copy())

    said: Any = model.get_rt_info(SECTION).value if model.has_rt_info(SECTION) else {}
    return Runner(logits, {name: str(item) for name, item in said.items()})
