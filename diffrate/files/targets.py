"""Which files there are, what each takes, and which packages it needs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

PRECISIONS = ("float32", "bf16", "fp16")
REQUIREMENTS = "requirements-export.txt"
ONNX = ".onnx"
LEAST_OPSET = 18  # the first that torch's exporter writes
TRACES = (2, 8)  # the lowest torch that traces these models for any batch size


class ExportError(ValueError):
    """A model that cannot be exported as it was asked for, or a file that is none of an export; one line."""


@dataclass(frozen=True)
class Target:
    """A kind of file: the runtime that runs it, the packages that write and run it, the precisions it takes."""

    runtime: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    torch: tuple[int, ...]  # the lowest version that writes it


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        # onnxruntime's CPU kernels know no bfloat16.
        ONNX: Target("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), ("float32", "fp16"), (2, 9)),
        ".pt2": Target("torch", (), PRECISIONS, TRACES),
        ".xml": Target("openvino", ("openvino",), PRECISIONS, (2, 9)),
    }
)


def target_of(path: Path) -> Target:
    """The kind of file that a name's suffix asks for, with its packages at hand.

    Raises:
        ExportError: another suffix, or a package is missing.
    """
    target = TARGETS.get(path.suffix)
    if target is None:
        raise ExportError(f"{path}: found the suffix {path.suffix!r}; accepted: {', '.join(TARGETS)}")
    missing = [name for name in target.packages if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{path}: needs {', '.join(missing)}; accepted: after pip install {' '.join(missing)}, or all of "
            f"{REQUIREMENTS}"
        )
    return target


def check_torch(what: str, least: tuple[int, ...]) -> None:
    """Refuse `what` where torch is older than the version `least`.

    Raises:
        ExportError: it is.
    """
    if tuple(map(int, version("torch").split(".")[:2])) < least:
        raise ExportError(f"{what}: needs torch {'.'.join(map(str, least))}; found {version('torch')}")


def check_destination(path: Path, precision: str, opset: int | None = None) -> None:
    """Refuse a file that cannot be written, or not in `precision`, or not by the operators of `opset`.

    Raises:
        ExportError: the suffix, a package or its version, the precision, the opset or the folder.
    """
    target = target_of(path)
    if precision not in target.precisions:
        raise ExportError(
            f"{path}: found the precision {precision}; {target.runtime} accepts: {', '.join(target.precisions)}"
        )
    check_torch(str(path), target.torch)
    if opset is not None:
        _check_opset(path, opset)
    if path.is_dir():
        raise ExportError(f"{path}: found a folder; accepted: the name of a file")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: no folder {path.parent}")


def _check_opset(path: Path, opset: int) -> None:
    if path.suffix != ONNX:
        raise ExportError(f"{path}: found the opset {opset}; accepted: none, it goes with {ONNX}")
    from onnx.defs import onnx_opset_version

    if not LEAST_OPSET <= opset <= onnx_opset_version():
        raise ExportError(f"{path}: found the opset {opset}; accepted: {LEAST_OPSET} to {onnx_opset_version()}")
