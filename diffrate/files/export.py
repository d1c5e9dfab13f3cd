"""Export a model to a file for another runtime, and compare the file with the live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrate.atomic import first_line
from diffrate.device import placement_of
from diffrate.evaluation import evaluating
from diffrate.files.graph import Normalization, traced
from diffrate.files.header import ExportError, Metadata, check_destination
from diffrate.files.runtimes import KINDS, Answer, load_exported, parts_of, whole_files
from diffrate.files.save import check_patched, header_of
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import input_size
from diffrate.timing import precision_name

BATCHES = (1, 5)  # neither is the one that was traced; more images come in batches of the last
# The largest difference of logits that a file may have: as it is in float32; in half precision as a share of the
# largest logit, since tokens may then go in another order.
LIMITS = {"float32": 1e-3, "fp16": 0.1, "bf16": 0.5}
NUDGE, NUDGES = 1e-5, 30  # of an image's values, more than runtimes differ by in float32; how often one is tried
LONGEST = 300  # characters of another package's message
LEAST_IMAGES = 2  # so that batches are not all of one size
Row = Sequence[float] | None  # a number for each channel


@dataclass(frozen=True)
class Agreement:
    """How a file compares with the live model on `images` images.

    difference: the largest of logits, where no tokens tie. limit: what it may be. top1: the share of images with equal
    top-1. source: whose images. ties: on how many the file differs by more, and answers as the live model does when
    the last bits of the image change: tokens are as important, or as similar, to the last bits. tied: the largest
    difference on those.
    """

    difference: float
    limit: float
    top1: float
    images: int
    source: str
    ties: int
    tied: float

    def line(self) -> str:
        """The figures as a sentence."""
        said = (
            f"largest difference from the live model {self.difference:.1e} (limit {self.limit:.0e}), "
            f"equal top-1 {self.top1:.1%} of {self.images} {self.source} images"
        )
        return said if not self.ties else f"{said}; up to {self.tied:.1e} on {self.ties} whose tokens nearly tie"


def compare(file: Answer, live: Answer, images: Tensor, precision: str, source: str) -> Agreement:
    """Run both on `images`, in batches of `BATCHES`, and compare logits."""
    first, size = BATCHES
    batches = [images[:first], *images[first:].split(size)]
    found, expected = (torch.cat([answer(batch) for batch in batches]) for answer in (file, live))
    limit = LIMITS[precision] * (1.0 if precision == "float32" else float(expected.abs().max()))
    if found.shape != expected.shape:
        raise ExportError(f"logits of the file: found {list(found.shape)}; accepted: {list(expected.shape)}")
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    differences = _largest(found - expected)
    ties = torch.zeros(len(images), dtype=torch.bool)
    generator = torch.Generator()
    for index in (differences > limit).nonzero()[:, 0]:
        draws = torch.randn(NUDGES, 1, *images[index].shape, generator=generator.manual_seed(0))
        ties[index] = any(_largest(live(images[index] * (1 + NUDGE * draw)) - found[index]) <= limit for draw in draws)
        if not ties[index]:  # of a file that is wrong on one image, it does not matter on how many
            break
    largest = [float(part.max()) if len(part) else 0.0 for part in (differences[~ties], differences[ties])]
    return Agreement(largest[0], limit, float(same), len(images), source, int(ties.sum()), largest[1])


def _largest(differences: Tensor) -> Tensor:
    """The largest absolute value of each image, `[B]`; that of anything undefined is infinite."""
    return differences.abs().nan_to_num(nan=torch.inf).flatten(1).amax(1)


@dataclass(frozen=True)
class Exported:
    """A file that was written: what it says of itself, how it compares with the live model, bytes of all its parts."""

    path: Path
    metadata: Metadata
    agreement: Agreement
    size: int


def export(
    model: CompressedModel,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    opset: int | None = None,
    images: Tensor | None = None,
) -> Exported:
    """Write `model` at its kept counts as `.onnx`, `.pt2` (torch) or `.xml` (OpenVINO): images -> logits.

    Images `[B, C, H, W]` and logits `[B, K]` are float32, B is any; `dtype` is that of the weights. With `normalize`
    the file takes images in [0, 1], and normalises them itself. `mean` and `std` are by default what timm's
    configuration of the model says, `name` what it calls the model; `classes` are words for the outputs, in order.
    `opset` is that of `.onnx`, by default 18, the lowest, which quantizers and older runtimes know; from 23
    on there is an operator for attention.

    The file is loaded again and compared with the model at two batch sizes, on `images` (two at least, as the file
    takes them) or on random ones from `seed`: there is none unless they agree, but where tokens nearly tie. The
    weights of `.xml`, and those of `.onnx` where they are more than 2 GB, are in a file beside it (`.bin`,
    `.onnx.data`). The model itself is not touched.

    Raises:
        ExportError: another suffix, a missing package or folder, a precision that the file does not take, a model that
            is not patched or cannot be traced, a file that would not agree with it or cannot be written.
    """
    check_patched(model, ExportError)
    path, precision, size = Path(path), precision_name(dtype), input_size(model)
    check_destination(path, precision, opset)
    if images is not None and (images.shape[1:] != size or images.dtype != torch.float32 or len(images) < LEAST_IMAGES):
        accepted = f"[N, {', '.join(map(str, size))}] in torch.float32, N from {LEAST_IMAGES}"
        raise ExportError(f"images: found {list(images.shape)} in {images.dtype}; accepted: {accepted}")
    metadata = _metadata(model, precision, normalize, name, classes, mean, std)
    normalization: nn.Module = nn.Identity()
    if metadata.mean is not None and metadata.std is not None:
        normalization = Normalization(metadata.mean, metadata.std)
    program = traced(model, dtype, normalization if normalize else None)
    options = {} if opset is None else {"opset": opset}
    try:
        with whole_files(path) as scratch:
            KINDS[path.suffix].write(program, metadata.entries(), scratch, **options)
            del program  # as large as the model
            agreement = _checked(model, scratch, metadata, normalization, seed, images)
    except ExportError:
        raise
    except Exception as error:  # the writers have errors of their own
        raise ExportError(f"{path}: cannot be written ({first_line(error)[:LONGEST]})") from error
    return Exported(path, metadata, agreement, sum(part.stat().st_size for part in parts_of(path)))


def _checked(
    model: CompressedModel, path: Path, metadata: Metadata, normalization: nn.Module, seed: int, images: Tensor | None
) -> Agreement:
    """How the file at `path` compares with `model`, on `images` or on random ones; an `ExportError` if it differs."""
    (device, dtype, _), source = placement_of(model), "random" if images is None else "given"
    inside, outside = (normalization, nn.Identity()) if metadata.normalizes else (nn.Identity(), normalization)

    def live(images: Tensor) -> Tensor:
        return model(inside(images).to(device, dtype), return_flop=False).float().cpu()

    with torch.inference_mode(), evaluating(model):
        if images is None:
            generator = torch.Generator().manual_seed(seed)
            shown = outside(torch.rand(sum(BATCHES), *metadata.input_size, generator=generator))
        else:
            shown = images.cpu()
        coarser = max(metadata.precision, precision_name(dtype), key=lambda name: LIMITS.get(name, 0.0))
        agreement = compare(load_exported(path).logits, live, shown, coarser, source)
    if not agreement.difference <= agreement.limit:
        raise ExportError(f"{path.name}: not written: {agreement.line()}")
    return agreement


def _metadata(
    model: Any, precision: str, normalize: bool, name: str | None, classes: Sequence[str] | None, mean: Row, std: Row
) -> Metadata:
    """What the file will say of `model`."""
    config, channels = getattr(model, "pretrained_cfg", None) or {}, input_size(model)[0]
    rows: dict[str, Any] = {}
    for field, given in (("mean", mean), ("std", std)):
        if given and len(given) != channels:
            raise ExportError(f"{field}: found {list(given)}; accepted: {channels} numbers, one per channel")
        row = given or config.get(field) or ()
        rows[field] = tuple(map(float, row)) if len(row) == channels else None  # timm keeps three of any
    if None in rows.values():
        rows = dict.fromkeys(rows)
        if normalize:
            raise ExportError("normalize: found a model without mean and std; accepted: with mean and std as well")
    if classes is not None and len(classes) != model.num_classes:
        raise ExportError(f"classes: found {len(classes)} names; accepted: {model.num_classes}, one per output")
    return Metadata(
        **header_of(model),
        **rows,
        model=name or config.get("architecture") or type(model).__name__,
        dense_gflops=model.flops_at(model.dense_schedule()) / 1e9,
        normalizes=normalize,
        precision=precision,
        classes=None if classes is None else tuple(classes),
    )
