"""A model of transformers in files, as its `save_pretrained` leaves them in a folder or a repository of the hub: read
without transformers, by the readers of `diffrate.convert`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg

from diffrate.atomic import UNREADABLE, first_line, load_tensors, read_json
from diffrate.blocks.block import UnsupportedModelError
from diffrate.converting.layout import Plan, State
from diffrate.converting.transformers_vits import plan_of_files
from diffrate.files.header import REFERENCE, SavedModelError, fetch
from diffrate.hub import HUB
from diffrate.patch.shapes import Size, as_size

CONFIG, PROCESSOR, PROCESSORS = "config.json", "preprocessor_config.json", "processor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or in parts, which a file of this name and `INDEX` lists
INDEX = ".index.json"
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
REFUSED = ("crop_pct", "rescale_offset", "do_flip_channel_order")  # other pixels than the command line makes
# These resize to more than the size that they say.
LARGER = ("LevitFeatureExtractor", "LevitImageProcessor", "LevitImageProcessorFast")
# What may be unsaid, of which step.
USUAL = {"resample": "do_resize", "image_mean": "do_normalize", "image_std": "do_normalize"}
KNOWN = ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_convert_rgb", "do_reduce_labels")
# Whose one number for a size is the shorter side's, where that of others is both sides'.
SHORTEST = ("CLIPFeatureExtractor", "CLIPImageProcessor", "BitImageProcessor")


Inputs = tuple[Size, dict[str, Any], list[str]]  # height and width, timm's words for the rest, and what was adapted


class Folder(NamedTuple):
    """A folder, or with `hf-hub:` a repository, and the content of its `config.json`."""

    source: str
    config: dict[str, Any]

    def file(self, name: str) -> Path | None:
        """The file called `name`, downloaded on first use; None where it is not there."""
        try:
            path = fetch(_within(self.source, name))
        except SavedModelError:
            return None
        return path if path.is_file() else None

    def plan(self, size: Size | None = None, shapes: bool = False) -> Plan:
        """The timm model that it stands for, for images of `size` or its own; with `shapes`, tensors without storage.

        Raises:
            UnsupportedModelError: names the file, and what it has or lacks.
        """
        tensors = self._tensors(shapes)
        try:
            return plan_of_files(self.config, tensors, size)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a reader stumbles over in other files than these
            field = getattr(error, "name", None)  # of a configuration that lacks it
            found = f"found no {field}" if field else f"{type(error).__name__} ({first_line(error)}) while it was read"
            accepted = "what its class has, as save_pretrained writes it"
            raise UnsupportedModelError(f"{CONFIG} and its weights: {found}; accepted: {accepted}") from error

    def classes(self, outputs: int) -> tuple[str, ...] | None:
        """What `config.json` calls the outputs; None where it has no words for them.

        Raises:
            UnsupportedModelError: these are other than so many.
        """
        labels = self.config.get("id2label")
        if not labels:
            return None
        if not isinstance(labels, dict) or {str(number) for number in range(outputs)} != labels.keys():
            found = f"{len(labels)} labels" if hasattr(labels, "__len__") else repr(labels)
            raise UnsupportedModelError(f"{CONFIG}: found id2label of {found}; accepted: 0 to {outputs - 1}")
        names = tuple(str(labels[str(number)]) for number in range(outputs))
        return None if names == tuple(f"LABEL_{number}" for number in range(outputs)) else names

    def inputs(self, plan: Plan) -> Inputs:
        """What its images are like, by `preprocessor_config.json`.

        Raises:
            UnsupportedModelError: names the field, and what is accepted.
        """
        usual, own = get_pretrained_cfg(plan.architecture), as_size(plan.arguments["img_size"])
        assert usual is not None, "one of timm's"
        facts: dict[str, Any] = {name: getattr(usual, name) for name in ("mean", "std", "interpolation")}
        facts |= {"crop_mode": "squash", "crop_pct": 1.0}
        said = {} if (path := self.file(PROCESSOR)) is None else _read_json(path)
        if not said and (path := self.file(PROCESSORS)) is not None:  # where transformers 5 keeps several processors
            said = _read_json(path).get("image_processor") or {}
        if not said:
            shown = f"mean {list(facts['mean'])}, std {list(facts['std'])}, {own[0]}x{own[1]} pixels"
            return own, facts, [f"{self.source}: no {PROCESSOR}; images as usual for its layout: {shown}"]
        try:
            return _inputs(said, own, facts)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"{PROCESSOR}: {first_line(error)}") from error

    def _tensors(self, shapes: bool) -> State:
        state: State = {}
        for name in self._parts():
            file = self.file(name) if Path(name).name == name else None
            if file is None:
                accepted = f"{' or '.join(WEIGHTS)}, or {WEIGHTS[0]}{INDEX} and all that it names"
                raise UnsupportedModelError(f"found no file {name}; accepted: {accepted}")
            try:
                state |= _read(file, shapes)
            except (*UNREADABLE, SafetensorError) as error:
                accepted = "accepted: tensors, as save_pretrained writes them"
                raise UnsupportedModelError(f"{name}: cannot be read ({first_line(error)}); {accepted}") from error
        return state

    def _parts(self) -> list[str]:
        """The names of the files of weights."""
        for whole in WEIGHTS:
            if self.file(whole) is not None:
                return [whole]
            if (index := self.file(whole + INDEX)) is not None:
                found = _read_json(index).get("weight_map")
                return sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
        return [WEIGHTS[0]]


def open_folder(source: str) -> Folder | None:
    """What lies in a folder, or in the repository that `hf-hub:` names; None where there is no such thing.

    Raises:
        UnsupportedModelError: it has no `config.json` that can be read.
    """
    hub = source.startswith(HUB)
    if not (REFERENCE.fullmatch(source) if hub else Path(source).is_dir()):
        return None
    path = Folder(source, {}).file(CONFIG)
    if path is None and not hub:
        raise UnsupportedModelError(f"found no {CONFIG} in it; accepted: a folder of transformers' save_pretrained")
    return None if path is None else Folder(source, _read_json(path))


def _within(source: str, name: str) -> str:
    """How to name a file of a folder or of a repository."""
    if not source.startswith(HUB):
        return str(Path(source) / name)
    repository, at, revision = source.partition("@")
    return f"{repository}/{name}{at}{revision}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path.name}: cannot be read ({first_line(error)}); accepted: JSON") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path.name}: found {type(content).__name__}; accepted: a JSON object")
    return content


def _read(file: Path, shapes: bool) -> State:
    if file.suffix != ".safetensors":
        state = load_tensors(file)
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("no names and tensors")
        return {name: tensor.to("meta") for name, tensor in state.items()} if shapes else state
    if not shapes:
        return load_file(file)
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in found.items()}


def _inputs(said: Mapping[str, Any], own: Size, facts: dict[str, Any]) -> Inputs:
    """What a processor's file says of images, where `facts` are what it need not say; ValueError names a field."""
    others = [name for name, value in said.items() if name.startswith("do_") and name not in KNOWN and value]
    notes = [f"{PROCESSOR}: {name} is left out" for name in others]
    said = {name: value for name, value in said.items() if value is not None}
    for name in REFUSED:
        if said.get(name):
            raise ValueError(f"found {name} {said[name]!r}; accepted: none")
    if (kind := _kind_of(said)) in LARGER:
        raise ValueError(f"found the {kind}; accepted: processors that resize to the size that they say")
    unsaid = [name for name, step in USUAL.items() if name not in said and said.get(step, True)]
    if unsaid:
        notes.append(f"{PROCESSOR}: no {', '.join(unsaid)}; as usual for its layout")
    factor = said.get("rescale_factor", 1 / 255)
    if not said.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise ValueError(f"found rescale_factor {factor}; accepted: 1 / 255, with do_rescale")
    resample = said.get("resample")
    if resample is not None:
        if resample not in range(len(RESAMPLE)):
            raise ValueError(f"found resample {resample!r}; accepted: 0 to {len(RESAMPLE) - 1}, {', '.join(RESAMPLE)}")
        facts["interpolation"] = RESAMPLE[resample]
    for name, key, none in (("mean", "image_mean", (0.0,) * 3), ("std", "image_std", (1.0,) * 3)):
        found = said.get(key) or facts[name]
        if not said.get("do_normalize", True):
            found = none
        three = isinstance(found, list | tuple) and len(found) == 3
        if not three or not all(math.isfinite(value) and value > (name == "mean") * -1e9 for value in found):
            raise ValueError(f"found {key} {found}; accepted: three numbers{', above 0' if name == 'std' else ''}")
        facts[name] = tuple(map(float, found))
    size, shortest = _sides(said.get("size"), said)
    crop, _ = _sides(said.get("crop_size"), said) if said.get("do_center_crop") else (None, False)
    if not said.get("do_resize", True) or size is None:
        size, shortest = crop or own, False
        notes.append(f"{PROCESSOR}: images keep no size of their own, and are resized to {size[0]}x{size[1]}")
    if shortest:
        facts["crop_mode"] = "center"
        if crop is None:
            notes.append(f"{PROCESSOR}: no crop_size; the centre of an image is cut out as a square")
    wanted = crop or size
    shares = {inner / outer for inner, outer in zip(wanted, size, strict=True)}
    if len(shares) > 1 or max(shares) > 1 or (shortest and wanted[0] != wanted[1]):
        raise ValueError(f"found crop_size {list(wanted)} of size {list(size)}; accepted: the same share of both sides")
    facts["crop_pct"] = shares.pop()
    if math.floor(wanted[0] / facts["crop_pct"]) < size[0]:  # timm divides, and rounds down
        facts["crop_pct"] = math.nextafter(facts["crop_pct"], 0.0)
    return wanted, facts, notes


def _kind_of(said: Mapping[str, Any]) -> Any:
    """The class of a processor, by the field of either name."""
    return said.get("image_processor_type") or said.get("feature_extractor_type")


def _sides(size: Any, said: Mapping[str, Any]) -> tuple[Size | None, bool]:
    """Height and width, and whether they are what the shorter side becomes."""
    if size is None:
        return None, False
    if not isinstance(size, dict):
        return as_size(size, "size"), _kind_of(said) in SHORTEST and not isinstance(size, list)
    names = {name for name, side in size.items() if side is not None}
    if names == {"height", "width"}:
        return as_size([size["height"], size["width"]], "size"), False
    if names == {"shortest_edge"}:
        return as_size(size["shortest_edge"], "size"), True
    raise ValueError(f"found the size {size}; accepted: height and width, or shortest_edge")
