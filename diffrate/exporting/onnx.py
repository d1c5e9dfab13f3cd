"""`.onnx`: written by torch's exporter, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from diffrate.exporting.operators import translations
from diffrate.exporting.runner import INPUT, OUTPUT, Runner
from diffrate.exporting.targets import LEAST_OPSET
from diffrate.running.quiet import errors_alone, no_warnings_of

LARGEST = 2**31 - 2**24  # bytes of weights that go into the file itself: protobuf ends at 2 GiB
BATCH = "batch"  # what the file calls the number of images
DATA = ".data"  # what the name of the file with the weights ends in, where they are beside it


def write(program: ExportedProgram, entries: dict[str, str], path: Path, opset: int = LEAST_OPSET) -> None:
    """Write `program` with `entries` as metadata, in the operators of `opset`, weights beside it in `path`.data where
    protobuf has no room."""
    import onnx
    from onnxscript import optimizer

    with _quiet():
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            custom_translation_table=translations(opset),
            optimize=False,
        )
        optimizer.fold_constants(made.model)  # the rules that come next then have half as many nodes to look at
        made.optimize()
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        value.shape = type(value.shape)([BATCH, *value.shape[1:]])  # torch calls it by a number
    made.model.metadata_props.update(entries)
    made.model.producer_name, made.model.producer_version = "diffrate", None
    made.save(path, external_data=_weights(program) > LARGEST)
    onnx.checker.check_model(path)


def run(path: Path, threads: int | None = None) -> Runner:
    """What runs the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])

    return Runner(logits, dict(session.get_modelmeta().custom_metadata_map))


def _weights(program: ExportedProgram) -> int:
    return sum(tensor.nbytes for tensor in program.state_dict.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of itself: its own deprecations, and of packages that it does not need."""
    modules = r"torch\.|onnxscript|onnx_ir|onnx\.|copyreg"
    with errors_alone("torch.onnx", "onnxscript", "onnx_ir"), no_warnings_of(modules):
        yield
