"""What a saved file says of its model: its header alone, read without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from diffrate.budgets.schedule import (
    MERGE_FIELD,
    PRUNE_FIELD,
    TOKENS_FIELD,
    Schedule,
    ScheduleError,
    check_schedule,
)
from diffrate.files import first_line

FORMAT_FIELD = "format"
FORMAT = "diffrate 1"
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
SHOWN = 60  # characters of a refused value in a message
LONGEST = 65536  # pixels of a side: the counts of tokens that come of more are no numbers that torch takes


class SavedModelError(ValueError):
    """A file that holds no model that can be rebuilt, or a model that cannot be saved; one line."""


@dataclass(frozen=True)
class About:
    """What a saved file says of its model.

    architecture: timm's name of it.
    arguments: what `timm.create_model` gets beside the architecture's name, JSON values.
    num_classes: outputs; 0 for a model without a head.
    input_size: channels, height and width of the images, in pixels.
    mean, std: what images in [0, 1] are normalised with, per channel.
    interpolation, crop_pct: how photographs are resized, and the share of the side that is kept.
    crop_mode: timm's word for how, with sides of another ratio: cut, squashed, or with a border.
    schedule: kept counts per block, with the tokens that enter the first.
    granularity: steps between the candidates of a count in search, pruning and merging.
    gflops: 10^9 multiply-accumulates of one image at the schedule.
    versions: of diffrate, timm and torch, that the file was written with.
    name: what the one who saved it calls the model.
    classes: words for the outputs, in order.
    return_flop: whether the model's forward gives the cost beside the logits.
    """

    architecture: str
    arguments: dict[str, Any]
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    schedule: Schedule
    granularity: tuple[int, int]
    gflops: float
    versions: dict[str, str]
    crop_mode: str = CROP_MODES[0]
    name: str | None = None
    classes: tuple[str, ...] | None = None
    return_flop: bool = True

    def to_metadata(self) -> dict[str, str]:
        """The header's entries: plain text, or JSON for all that is no text; nothing for what is None."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "schedule"}
        values[PRUNE_FIELD] = self.schedule.prune
        values[MERGE_FIELD] = self.schedule.merge
        values[TOKENS_FIELD] = self.schedule.tokens
        # What JSON does not know becomes text, which no field but those of texts takes.
        return {FORMAT_FIELD: FORMAT} | {
            name: str(value) if _FIELDS[name].plain else json.dumps(value, default=str)
            for name, value in values.items()
            if value is not None and (name, value) != ("return_flop", True)  # what files without it mean
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str = "") -> About:
        """The inverse of `to_metadata`; `where` the entries come from starts the messages.

        Raises:
            SavedModelError: the entries are not ours or of a newer format, one is missing or holds what
                it cannot, or two do not fit each other.
        """
        if metadata.get(FORMAT_FIELD) != FORMAT:
            raise SavedModelError(_refusal(where, FORMAT_FIELD, metadata.get(FORMAT_FIELD), f"{FORMAT!r}"))
        values = {name: _read(metadata, name, field, where) for name, field in _FIELDS.items()}
        _check_together(values, where)
        prune, merge, tokens = (values.pop(name) for name in (PRUNE_FIELD, MERGE_FIELD, TOKENS_FIELD))
        schedule = Schedule(prune and tuple(prune), tuple(merge), tokens)
        try:
            check_schedule(schedule, (tokens,) * len(merge), prune is not None, where)
        except ScheduleError as error:
            raise SavedModelError(str(error)) from error
        values["crop_mode"] = values["crop_mode"] or CROP_MODES[0]  # of files from before there was a choice
        values["return_flop"] = values["return_flop"] is not False
        arrays = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(schedule=schedule, **{**values, **arrays})


def about(path: str | Path) -> About:
    """What the file at `path` says of its model. Reads the header only, and needs no torch.

    Raises:
        SavedModelError: the file is missing, damaged, or not one that `save` wrote.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise SavedModelError(f"{path}: found {found}; accepted: a file written by diffrate.save")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
    except (OSError, SafetensorError) as error:
        raise SavedModelError(
            f"{path}: cannot be read ({first_line(error)}); accepted: a file written by diffrate.save"
        ) from error
    return About.from_metadata(metadata or {}, f"{path}: ")


def is_saved_model(path: str | Path) -> bool:
    """Whether a local file was written by `diffrate.save`, of whatever format; damaged or missing ones are not."""
    try:
        with safe_open(str(Path(path).expanduser()), framework="np") as file:
            return (file.metadata() or {}).get(FORMAT_FIELD, "").startswith(FORMAT.split()[0])
    except (OSError, SafetensorError):
        return False


def is_argument(value: Any) -> bool:
    """Whether a value that JSON gives can be an argument: text, number, truth value or none, or an array of those."""
    return _is_scalar(value) or _array_of(_is_scalar)(value)


class _Field(NamedTuple):
    """The values that an entry of the header takes, in words and as a check, and how it is written."""

    accepted: str
    fits: Callable[[Any], bool]
    plain: bool = False
    optional: bool = False


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # infinite ones and NaN are not


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or _is_number(value)


def _is_extent(value: Any) -> bool:
    return _is_count(value) and value <= LONGEST


def _array_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def fits_all(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and bool(value) and all(map(fits, value))

    return fits_all


def _are_arguments(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_argument, value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_FIELDS: dict[str, _Field] = {
    "architecture": _Field("the name of a timm model", _is_line, plain=True),
    "arguments": _Field("an object of numbers, texts and arrays of them", _are_arguments),
    "num_classes": _Field("a whole number from 0", _is_whole),
    "input_size": _Field(f"channels, height and width, whole numbers from 1 to {LONGEST}", _array_of(_is_extent, 3)),
    "mean": _Field("an array of numbers", _array_of(_is_number)),
    "std": _Field("an array of numbers above 0", _array_of(_is_positive)),
    "interpolation": _Field(f"one of {', '.join(INTERPOLATIONS)}", INTERPOLATIONS.__contains__, plain=True),
    "crop_pct": _Field("a number above 0", _is_positive),
    "crop_mode": _Field(f"one of {', '.join(CROP_MODES)}", CROP_MODES.__contains__, plain=True, optional=True),
    PRUNE_FIELD: _Field("an array of whole numbers from 1", _array_of(_is_count), optional=True),
    MERGE_FIELD: _Field("an array of whole numbers from 1", _array_of(_is_count)),
    TOKENS_FIELD: _Field("a whole number from 1", _is_count),
    "granularity": _Field("two whole numbers from 1", _array_of(_is_count, 2)),
    "gflops": _Field("a number from 0", lambda value: _is_number(value) and value >= 0),
    "versions": _Field("an object of texts", _are_texts),
    "return_flop": _Field("true or false", lambda value: isinstance(value, bool), optional=True),
    "name": _Field("a line of text", _is_line, plain=True, optional=True),
    "classes": _Field("an array of texts", _array_of(lambda value: isinstance(value, str)), optional=True),
}


def _read(metadata: Mapping[str, str], name: str, field: _Field, where: str) -> Any:
    """The value of one entry, None where it may be missing and is."""
    text = metadata.get(name)
    if text is None and field.optional:
        return None
    try:
        value = text if text is None or field.plain else json.loads(text)
    except (ValueError, RecursionError):  # not JSON, a number of too many digits, or nested too deeply
        value = None
    if not field.fits(value):
        raise SavedModelError(_refusal(where, name, text, field.accepted))
    return value


def _check_together(values: Mapping[str, Any], where: str) -> None:
    """Refuse entries whose lengths do not fit the numbers of channels and of outputs."""
    channels = values["input_size"][0]
    lengths = (3,) if channels == 3 else (channels, 3)  # timm keeps three for models of other channels
    for name in ("mean", "std"):
        if len(values[name]) not in lengths:
            accepted = " or ".join(f"{length} numbers" for length in lengths)
            raise SavedModelError(_refusal(where, name, json.dumps(values[name]), accepted))
    classes, outputs = values["classes"], values["num_classes"]
    if classes is not None and len(classes) != outputs:
        raise SavedModelError(f"{where}classes: found {len(classes)} names; accepted: {outputs}, one per output")


def _refusal(where: str, name: str, text: str | None, accepted: str) -> str:
    found = "none" if text is None else repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    return f"{where}{name}: found {found}; accepted: {accepted}"
