"""One safetensors file for a compressed model, and the model from the file alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import diffrate
from diffrate.atomic import first_line, whole_path
from diffrate.files import header as hub
from diffrate.files.header import CROP_MODES, About, SavedModelError, about
from diffrate.files.rebuild import architecture_of, check_alike, constructor_arguments, rebuild
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import input_size
from diffrate.schedule import Schedule, ScheduleError

COUNTS = "compression._extra_state"


def save(
    model: CompressedModel, path: str | Path, *, name: str | None = None, classes: Sequence[str] | None = None
) -> None:
    """Write `model` to one safetensors file, whole or not at all.

    The file holds the weights in their precision, the rate logits, the kept counts (those of the rate
    logits while none are set) and what it takes to build the model again. `name` is what the caller
    calls it, `classes` are words for its outputs, in order.

    Raises:
        SavedModelError: `model` is not patched, was not made by `timm.create_model`, or has parts that
            timm's arguments do not stand for; `classes` are not one per output; the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise SavedModelError(f"{path}: found a folder; accepted: the name of a file")
    described = _describe(model, name, classes)
    check_alike(model, rebuild(described))
    try:
        with whole_path(path) as scratch:
            save_file(_tensors(model, described.schedule), scratch, described.to_metadata())
    except (OSError, SafetensorError) as error:
        raise SavedModelError(f"{path}: cannot be written ({first_line(error)})") from error


def load(path: str | Path, *, device: torch.device | str = "cpu") -> CompressedModel:
    """The model that `save` wrote to the file at `path`, on `device`, in evaluation mode.

    It has its weights in the precision of the file, and its kept counts set. `hf-hub:USER/NAME` takes
    `model.safetensors` of that repository, `hf-hub:USER/NAME/FILE` another file, and a revision may
    follow: `hf-hub:USER/NAME@REVISION`.

    Raises:
        SavedModelError: the file is missing, damaged or not of ours, or is of a model that the timm that
            is installed does not build.
    """
    path = hub.fetch(str(path)) if str(path).startswith(hub.PREFIX) else Path(path)
    where = f"{path}: "
    described = about(path)
    tensors = _read_tensors(path)
    _check_depth(described, len(tensors), where)
    model = rebuild(described, where)
    _check_header(model, described, where)
    try:
        model.check(described.schedule, where)
    except ScheduleError as error:
        raise SavedModelError(str(error)) from error
    model.compression.schedule = described.schedule
    _check_tensors(model, tensors, where)
    _fill(model, tensors, device)
    return model.eval()


def header_of(model: CompressedModel) -> dict[str, Any]:
    """What saved and exported files both say of `model` at its kept counts."""
    schedule = model.compression.current()
    return {
        "schedule": replace(schedule, tokens=model.compression.space.limits[0]),
        "gflops": model.flops_at(schedule) / 1e9,
        "input_size": input_size(model),
        "versions": {"diffrate": diffrate.__version__, "timm": timm.__version__, "torch": str(torch.__version__)},
    }


def _describe(model: CompressedModel, name: str | None, classes: Sequence[str] | None) -> About:
    """What the file will say of `model`, checked as it will be when it is read."""
    if not isinstance(model, CompressedModel):
        raise SavedModelError(f"found {type(model).__name__}; accepted: a model that diffrate.patch has patched")
    if isinstance(classes, str):
        raise SavedModelError(f"classes: found {classes!r}; accepted: a sequence of texts, one per output")
    module: Any = model
    architecture, config = architecture_of(model), module.pretrained_cfg
    described = About(
        **header_of(model),
        architecture=architecture,
        arguments=constructor_arguments(model),
        num_classes=module.num_classes,
        **{name: config.get(name) for name in ("mean", "std", "interpolation", "crop_pct")},
        crop_mode=config.get("crop_mode") or CROP_MODES[0],
        granularity=(model.compression.granularity["prune"], model.compression.granularity["merge"]),
        name=name,
        classes=None if classes is None else tuple(classes),
        return_flop=model.return_flop,
    )
    return About.from_metadata(described.to_metadata())


def _tensors(model: CompressedModel, schedule: Schedule) -> dict[str, Tensor]:
    """All tensors of `model` on the CPU, by name: what its state dict has, and buffers that it leaves out."""
    state = dict(model.named_buffers()) | model.state_dict()
    fixed = copy.copy(model.compression)  # the model itself may be in search: it stays without a schedule
    fixed.schedule = schedule
    state[COUNTS] = fixed.get_extra_state()
    # Copies, since a file takes no two tensors in one storage.
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, in the file's own pages."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SavedModelError(f"{path}: cannot be read ({first_line(error)})") from error


def _check_depth(described: About, tensors: int, where: str) -> None:
    """Refuse depths that there are not the tensors for: the blocks of some would take for ever to build."""
    for name in ("depth", "depths"):
        found = described.arguments.get(name, 1)
        depths = found if isinstance(found, list) else [found]
        if any(isinstance(depth, int) and not 1 <= depth <= tensors for depth in depths):
            raise SavedModelError(
                f"{where}arguments: found {name} {found}; accepted: from 1 to the {tensors} tensors of the file"
            )


def _check_header(model: CompressedModel, described: About, where: str) -> None:
    """Refuse a header that contradicts the model built from its other entries."""
    module: Any = model
    for name, built in {"num_classes": module.num_classes, "input_size": input_size(model)}.items():
        found = getattr(described, name)
        if found != built:
            raise SavedModelError(f"{where}{name}: found {found}; accepted: {built}, as the arguments make it")


def _check_tensors(model: CompressedModel, tensors: dict[str, Tensor], where: str) -> None:
    """Refuse tensors that are not those of `model`, or other counts than the header's."""
    expected = dict(model.named_buffers()) | model.state_dict()
    for name in expected | tensors:
        found = _shown(tensors.get(name))
        accepted = _shown(expected.get(name))
        if found != accepted:
            raise SavedModelError(f"{where}{name}: found {found}; accepted: {accepted}")
    found, accepted = tensors[COUNTS].tolist(), expected[COUNTS].tolist()
    if found != accepted:
        raise SavedModelError(f"{where}{COUNTS}: found {found}; accepted: {accepted}, as in the header")


def _shown(tensor: Tensor | None) -> str:
    """Shape and type of a tensor; all floating types are one, since a model may be in any."""
    if tensor is None:
        return "nothing"
    return f"{'floating' if tensor.is_floating_point() else tensor.dtype} {list(tensor.shape)}"


def _fill(model: CompressedModel, tensors: dict[str, Tensor], device: torch.device | str) -> None:
    """Put copies of `tensors` on `device` in the place of those of `model`, with their types.

    Copies, since a file may change while the model is in use, and aligns tensors to no more than 8 bytes,
    where kernels may round otherwise. The counts are Python's integers: they stay where they are.
    """
    copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items() if name != COUNTS}
    copies[COUNTS] = tensors[COUNTS]
    state = model.state_dict().keys()
    model.load_state_dict({name: copies[name] for name in state}, strict=True, assign=True)
    for name in tensors.keys() - state:  # buffers that the constructor computes
        place, _, buffer = name.rpartition(".")
        model.get_submodule(place).register_buffer(buffer, copies[name], persistent=False)
