"""Each kind of exported file: how it is written, and which runtime runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from diffrate.atomic import SCRATCH, first_line, refuse_pipe
from diffrate.device import errors_alone, no_warnings_of
from diffrate.files.graph import translations
from diffrate.files.header import LEAST_OPSET, ExportError, Metadata, target_of

INPUT, OUTPUT = "images", "logits"  # what the files call them
BATCH = "batch"  # what `.onnx` calls the number of images
LARGEST = 2**31 - 2**24  # bytes of weights that go into `.onnx` itself: protobuf ends at 2 GiB
DATA = ".data"  # what the name of the file with the weights ends in, where they are beside it
METADATA = "metadata.json"  # among the extra files of `.pt2`
WEIGHTS = ".bin"  # in place of the suffix `.xml`
SECTION = "diffrate"  # of the runtime information of `.xml`
Answer = Callable[[Tensor], Tensor]  # float32 logits `[B, K]` of float32 images `[B, C, H, W]`, on the CPU


def write_onnx(program: ExportedProgram, entries: dict[str, str], path: Path, opset: int = LEAST_OPSET) -> None:
    """Write `program` with `entries` as metadata, by the operators of `opset`; weights that protobuf has no room for go
    to `path`.data."""
    import onnx
    from onnxscript import optimizer

    # What torch's exporter says of itself: its own deprecations, and of packages that it does not need.
    modules = r"torch\.|onnxscript|onnx_ir|onnx\.|copyreg"
    with errors_alone("torch.onnx", "onnxscript", "onnx_ir"), no_warnings_of(modules):
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
    made.save(path, external_data=sum(tensor.nbytes for tensor in program.state_dict.values()) > LARGEST)
    onnx.checker.check_model(path)


def run_onnx(path: Path, threads: int | None = None) -> tuple[Answer, Mapping[str, str]]:
    """What runs the file, and what it says of itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0]), said


def write_pt2(program: ExportedProgram, entries: dict[str, str], path: Path) -> None:
    """Write `program` with `entries` as JSON among its extra files."""
    buffer = BytesIO()  # torch's writer of files ends the process where a disk is full
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(entries)})
    path.write_bytes(buffer.getbuffer())


def run_pt2(path: Path, threads: int | None = None) -> tuple[Answer, Mapping[str, str]]:
    """As `run_onnx`; torch has its number of threads for the whole process."""
    extra = {METADATA: ""}
    with errors_alone("torch.export", "torch._export"):  # what is wrong with a file, the error says
        module = torch.export.load(path, extra_files=extra).module()

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return logits, json.loads(extra[METADATA] or "{}")


def write_openvino(program: ExportedProgram, entries: dict[str, str], path: Path) -> None:
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


def run_openvino(path: Path, threads: int | None = None) -> tuple[Answer, Mapping[str, str]]:
    """As `run_onnx`, for each single request in turn."""
    import openvino

    refuse_pipe(path)
    with path.open("rb") as file:
        if not file.read(1).startswith(b"<"):  # OpenVINO would try the formats of others, and say so on the terminal
            raise ExportError("found no XML")
    core = openvino.Core()
    model = core.read_model(path)
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    request = core.compile_model(model, "CPU", options).create_infer_request()
    said: Any = model.get_rt_info(SECTION).value if model.has_rt_info(SECTION) else {}
    texts = {name: str(item) for name, item in said.items()}
    return lambda images: torch.from_numpy(request.infer([images.numpy()])[0].copy()), texts


class Kind(NamedTuple):
    """How a kind of file is written, from a program, entries, a path and for `.onnx` an opset; and how it is run."""

    write: Callable[..., None]
    run: Callable[[Path, int | None], tuple[Answer, Mapping[str, str]]]


KINDS: Mapping[str, Kind] = {
    ".onnx": Kind(write_onnx, run_onnx),
    ".pt2": Kind(write_pt2, run_pt2),
    ".xml": Kind(write_openvino, run_openvino),
}


class Loaded(NamedTuple):
    """An exported file that is ready to run, and what it says of its model."""

    logits: Answer
    metadata: Metadata


def load_exported(path: Path, threads: int | None = None) -> Loaded:
    """The file at `path`, made by `diffrate.export`, on `threads` threads or as many as its runtime takes.

    Raises:
        ExportError: it is missing, damaged, another file, or a package is missing that runs it.
    """
    target = target_of(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ExportError(f"{path}: found {found}; accepted: an exported file")
    try:
        logits, entries = KINDS[path.suffix].run(path, threads)
    except Exception as error:  # each runtime has errors of its own
        raise ExportError(f"{path}: {target.runtime} cannot read it ({first_line(error)[:200]})") from error
    return Loaded(logits, Metadata.of_entries(entries, str(path)))


def parts_of(path: Path) -> list[Path]:
    """The exported file at `path`, and that of its weights where they are beside it."""
    beside = {".onnx": path.with_name(path.name + DATA), ".xml": path.with_suffix(WEIGHTS)}
    return [path, *(part for suffix, part in beside.items() if suffix == path.suffix and part.is_file())]


@contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """A path in a scratch folder for the block to write, alone or with other files beside it. All of them move to the
    folder of `path` when the block ends well, `path` last; otherwise they are gone.

    Raises:
        OSError: the folder cannot be written.
    """
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        SCRATCH.add(Path(folder))
        try:
            yield Path(folder) / path.name
        finally:
            SCRATCH.discard(Path(folder))
        outdated = set(parts_of(path)[1:])  # weights beside a file that was there before
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
            outdated.discard(file.replace(path.with_name(file.name)))
        for file in outdated:
            file.unlink()
