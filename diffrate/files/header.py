"""What saved and exported files say of their model, and which kinds of exported files there are. No torch here."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from safetensors import SafetensorError, safe_open

from diffrate.atomic import first_line, parse_json, refuse_pipe
from diffrate.hub import HUB, hub_or_cache
from diffrate.schedule import (
    MERGE_FIELD,
    PRUNE_FIELD,
    RULE_NAMES,
    RULES_FIELD,
    TOKENS_FIELD,
    Schedule,
    ScheduleError,
    check_schedule,
)

REFERENCE = re.compile(HUB + r"(?P<repository>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")
FORMAT_FIELD = "format"
FORMAT = "diffrate 1"
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
SHOWN = 60  # characters of a refused value in a message
LONGEST = 65536  # pixels of a side: the counts of tokens that come of more are no numbers that torch takes
_NAMES = """
    act_layer attn_drop_rate attn_gated attn_layer attn_only_layer_scale attn_pool_mlp_ratio attn_pool_num_heads
    attn_type bias class_token depth depths dims drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim
    embed_norm_layer embed_proj_type enable_patch_interpolator expansion_ratio fc_norm final_norm global_pool head_dim
    img_size in_chans init_values kernel_size layer_scale_init_values mlp_bias mlp_ratio no_embed_class norm_layer
    num_classes num_heads num_kv_heads num_reg_tokens padding patch_size patchify_channels_last pool_include_prefix
    pos_drop_rate pos_embed pos_embed_align_corners pos_embed_antialias pos_embed_ar_preserving pos_embed_grid_size
    pos_embed_interp_mode pos_embed_use_grid_sample pre_norm proj_bias proj_drop_rate qk_norm qkv_bias qkv_fused
    ref_feat_shape reg_tokens rel_pos_dim rel_pos_type res_scale_init_values rope_grid_indexing rope_grid_offset
    rope_jitter_coords rope_mrope_section rope_ref_feat_shape rope_rescale_coords rope_rotate_half rope_shift_coords
    rope_temperature rope_type scale_attn_inner scale_attn_inner_norm scale_attn_norm scale_mlp scale_mlp_norm
    shared_rel_pos swiglu_align_to swiglu_mlp use_abs_pos_emb use_fc_norm use_key_only_attn_mask use_mlp_head
    use_naflex use_post_norm use_post_transformer_norm use_pre_transformer_norm use_rel_pos_bias use_rot_pos_emb
    use_shared_rel_pos_bias
"""
OWN_ARGUMENTS = frozenset(
    {"norm_eps", "class_and_mean", "feature_head", "text_width", "text_sigmoid"}
)  # those of `diffrate.patch.parts.complete`
ARGUMENTS = OWN_ARGUMENTS.union(_NAMES.split())  # all that a file may give: none makes timm fetch or read other files


class SavedModelError(ValueError):
    """A file that holds no model that can be rebuilt, or a model that cannot be saved; one line."""


class _Entry(NamedTuple):
    """Which values an entry of the header takes, in words and as a check; `plain` ones are no JSON."""

    accepted: str
    fits: Callable[[Any], Any]
    plain: bool = False
    optional: bool = False


def _between(low: float, high: float = sys.float_info.max, whole: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a number from `low` to `high`; infinite ones and NaN are not."""
    return lambda value: type(value) in ((int,) if whole else (int, float)) and low <= value <= high


def _array_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == (length or len(value) or 1) and all(map(fits, value))


def is_argument(value: Any) -> bool:
    """Whether a value that JSON gives can be an argument: text, number, truth value or none, or an array of those."""
    items = value if isinstance(value, list) and value else [value]
    return all(item is None or isinstance(item, bool | str) or _is_number(item) for item in items)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_is_number = _between(-sys.float_info.max)
_is_positive = _between(sys.float_info.min)
_is_count = _between(1, whole=True)
_SIZE = f"channels, height and width, whole numbers from 1 to {LONGEST}"
_COUNTS = "an array of whole numbers from 1"
_ENTRIES: Mapping[str, _Entry] = {
    "architecture": _Entry("the name of a timm model", re.compile(r"\w+").fullmatch, plain=True),
    "arguments": _Entry(
        "an object of numbers, texts and arrays of them",
        lambda value: isinstance(value, dict) and all(map(is_argument, value.values())),
    ),
    "num_classes": _Entry("a whole number from 0", _between(0, whole=True)),
    "input_size": _Entry(_SIZE, _array_of(_between(1, LONGEST, whole=True), 3)),
    "mean": _Entry("an array of numbers", _array_of(_is_number)),
    "std": _Entry("an array of numbers above 0", _array_of(_is_positive)),
    "interpolation": _Entry(f"one of {', '.join(INTERPOLATIONS)}", INTERPOLATIONS.__contains__, plain=True),
    "crop_pct": _Entry("a number above 0", _is_positive),
    "crop_mode": _Entry(f"one of {', '.join(CROP_MODES)}", CROP_MODES.__contains__, plain=True, optional=True),
    PRUNE_FIELD: _Entry(_COUNTS, _array_of(_is_count), optional=True),
    MERGE_FIELD: _Entry(_COUNTS, _array_of(_is_count)),
    TOKENS_FIELD: _Entry("a whole number from 1", _is_count),
    RULES_FIELD: _Entry("an array of names", _array_of(lambda name: name in RULE_NAMES), optional=True),
    "granularity": _Entry("two whole numbers from 1", _array_of(_is_count, 2)),
    "gflops": _Entry("a number from 0", _between(0)),
    "versions": _Entry(
        "an object of texts", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))
    ),
    "return_flop": _Entry("true or false", lambda value: isinstance(value, bool), optional=True),
    "name": _Entry("a line of text", lambda value: value.strip() and value.isprintable(), plain=True, optional=True),
    "classes": _Entry("an array of texts", _array_of(_is_text), optional=True),
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What saved and exported files both say of their model.

    schedule: kept counts per block, with the tokens that enter the first.
    gflops: 10^9 multiply-accumulates of one image at the schedule.
    input_size: channels, height and width of the images, in pixels.
    mean, std: what images in [0, 1] are normalised with, per channel; None where an exported model does not say.
    classes: words for the outputs, in order. versions: of diffrate, timm and torch, that the file was written with.
    """

    schedule: Schedule
    gflops: float
    input_size: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: tuple[str, ...] | None = None
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class About(Header):
    """What a saved file says of its model, beside what all files say.

    architecture: timm's name of it.
    arguments: what `timm.create_model` gets beside the architecture's name, JSON values.
    num_classes: outputs; 0 for a model without a head.
    interpolation, crop_pct: how photographs are resized, and the share of the side that is kept.
    crop_mode: timm's word for how, with sides of another ratio: cut, squashed, or with a border.
    granularity: steps between the candidates of a count in search, pruning and merging.
    name: what the one who saved it calls the model.
    return_flop: whether the model's forward gives the cost beside the logits.
    """

    architecture: str
    arguments: dict[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = CROP_MODES[0]
    granularity: tuple[int, int]
    name: str | None = None
    return_flop: bool = True

    def to_metadata(self) -> dict[str, str]:
        """The header's entries: plain text, or JSON for all that is no text; nothing for what is None."""
        schedule = self.schedule
        counts = {PRUNE_FIELD: schedule.prune, MERGE_FIELD: schedule.merge, TOKENS_FIELD: schedule.tokens}
        values = {**vars(self), **counts, RULES_FIELD: schedule.rules}
        # What JSON does not know becomes text, which no field but those of texts takes.
        return {FORMAT_FIELD: FORMAT} | {
            name: str(values[name]) if entry.plain else json.dumps(values[name], default=str)
            for name, entry in _ENTRIES.items()
            if values[name] is not None and (name, values[name]) != ("return_flop", True)  # what files without it mean
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> About:
        """The inverse of `to_metadata`.

        Raises:
            SavedModelError: the entries are not ours or of a newer format, one is missing or holds what
                it cannot, or two do not fit each other.
        """
        if metadata.get(FORMAT_FIELD) != FORMAT:
            raise _refusal(FORMAT_FIELD, metadata.get(FORMAT_FIELD), repr(FORMAT))
        values = {name: _read(metadata.get(name), name, entry) for name, entry in _ENTRIES.items()}
        for name in sorted(values["arguments"].keys() - ARGUMENTS):
            raise SavedModelError(f"arguments: found {name!r}; accepted: {', '.join(sorted(ARGUMENTS))}")
        channels, classes, outputs = values["input_size"][0], values["classes"], values["num_classes"]
        lengths = (3,) if channels == 3 else (channels, 3)  # timm keeps three for models of other channels
        for name in ("mean", "std"):
            if len(values[name]) not in lengths:
                raise _refusal(name, metadata[name], " or ".join(f"{length} numbers" for length in lengths))
        if classes is not None and len(classes) != outputs:
            raise SavedModelError(f"classes: found {len(classes)} names; accepted: {outputs}, one per output")
        given = arrays_as_tuples({name: value for name, value in values.items() if value is not None})
        prune, merge, tokens, rules = (
            given.pop(name, None) for name in (PRUNE_FIELD, MERGE_FIELD, TOKENS_FIELD, RULES_FIELD)
        )
        schedule = Schedule(prune, merge, tokens, rules)
        try:
            check_schedule(schedule, (tokens,) * len(merge), prune is not None)
        except ScheduleError as error:
            raise SavedModelError(str(error)) from error
        return cls(schedule=schedule, **given)


def arrays_as_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of JSON, with a tuple for each array among them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def timms_and_own(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON values of a file as timm's constructor takes them, arrays as tuples, and those of `OWN_ARGUMENTS`."""
    given = arrays_as_tuples(arguments)
    own = {name: given.pop(name) for name in OWN_ARGUMENTS & given.keys()}
    return given, own


def fetch(path: str | Path) -> Path:
    """The file at `path`; `hf-hub:USER/NAME[/FILE][@REVISION]` is downloaded on first use.

    Raises:
        SavedModelError: the reference is of another form, or the file cannot be had.
    """
    reference = str(path)
    if not reference.startswith(HUB):
        return Path(path)
    parts = REFERENCE.fullmatch(reference)
    if parts is None:
        raise SavedModelError(f"found {reference!r}; accepted: {HUB}USER/NAME, with /FILE and @REVISION or without")
    file = parts["file"] or "model.safetensors"
    try:
        with hub_or_cache():
            return Path(huggingface_hub.hf_hub_download(parts["repository"], file, revision=parts["revision"]))
    except Exception as error:  # no network, repository, file or permission: an error of its own each
        raise SavedModelError(f"{reference}: cannot download {file} ({first_line(error)})") from error


def about(path: str | Path) -> About:
    """What the file at `path` says of its model. Reads the header only, and needs no torch.

    Raises:
        SavedModelError: the file is missing, damaged, or not one that `save` wrote.
    """
    path, accepted = Path(path), "accepted: a file written by diffrate.save"
    if not path.is_file():
        raise SavedModelError(f"{path}: found {'a folder' if path.is_dir() else 'no such file'}; {accepted}")
    try:
        return About.from_metadata(_metadata(path))
    except (OSError, SafetensorError) as error:
        raise SavedModelError(f"{path}: cannot be read ({first_line(error)}); {accepted}") from error
    except SavedModelError as error:
        raise SavedModelError(f"{path}: {error}") from error


def is_saved_model(path: str | Path) -> bool:
    """Whether a local file was written by `diffrate.save`, of whatever format; damaged or missing ones are not."""
    try:
        return _metadata(Path(path).expanduser()).get(FORMAT_FIELD, "").startswith(FORMAT.split()[0])
    except (OSError, SafetensorError):
        return False


def _metadata(path: Path) -> dict[str, str]:
    refuse_pipe(path)
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _read(text: str | None, name: str, entry: _Entry) -> Any:
    """The value of one entry, None where it may be missing and is."""
    if text is None and entry.optional:
        return None
    try:
        value = (text or "") if entry.plain else parse_json(text or "")
    except ValueError:  # not JSON, a number of too many digits, or nested too deeply
        value = None
    if not entry.fits(value):
        raise _refusal(name, text, entry.accepted)
    return value


def _refusal(name: str, text: str | None, accepted: str) -> SavedModelError:
    found = "none" if text is None else repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    return SavedModelError(f"{name}: found {found}; accepted: {accepted}")


EXPORT_FORMAT = "diffrate export 1"
PRECISIONS = ("float32", "bf16", "fp16")
ONNX = ".onnx"
LEAST_OPSET = 18  # the first that torch's exporter writes
TRACES = (2, 8)  # the lowest torch that traces these models for any batch size


class ExportError(ValueError):
    """A model that cannot be exported as it was asked for, or a file that is none of an export; one line."""


@dataclass(frozen=True, kw_only=True)
class Metadata(Header):
    """What an exported file says of its model, beside what all files say.

    model: what its maker calls it. dense_gflops: as `gflops`, with all tokens.
    normalizes: whether the file normalises images itself, and takes them in [0, 1].
    precision: of the weights; images and logits are float32 in any.
    """

    model: str
    dense_gflops: float
    normalizes: bool
    precision: str

    def entries(self) -> dict[str, str]:
        """The fields and the format's name, as JSON each."""
        return {name: json.dumps(value) for name, value in {FORMAT_FIELD: EXPORT_FORMAT, **asdict(self)}.items()}

    @classmethod
    def of_entries(cls, entries: Mapping[str, str], where: str) -> Metadata:
        """The inverse of `entries`; `where` they come from starts the message.

        Raises:
            ExportError: they are not of an export, or one is missing or damaged.
        """
        if entries.get(FORMAT_FIELD) != json.dumps(EXPORT_FORMAT):
            found = entries.get(FORMAT_FIELD, "none")
            raise ExportError(
                f"{where}: found the format {found}; accepted: {json.dumps(EXPORT_FORMAT)}, a file of --export"
            )
        try:
            values: dict[str, Any] = {name: parse_json(entries[name]) for name in cls.__dataclass_fields__}
            schedule = Schedule(**arrays_as_tuples(values.pop("schedule")))
            return cls(schedule=schedule, **arrays_as_tuples(values))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{where}: damaged metadata ({error}); accepted: a file of --export") from error


class Target(NamedTuple):
    """A kind of file: the runtime that runs it, the packages that write and run it, the precisions it takes."""

    runtime: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    torch: tuple[int, ...]  # the lowest version that writes it


TARGETS: Mapping[str, Target] = {
    # onnxruntime's CPU kernels know no bfloat16.
    ONNX: Target("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), ("float32", "fp16"), (2, 9)),
    ".pt2": Target("torch", (), PRECISIONS, TRACES),
    ".xml": Target("openvino", ("openvino",), PRECISIONS, (2, 9)),
}


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
        install = f"pip install {' '.join(missing)}, or all of requirements-export.txt"
        raise ExportError(f"{path}: needs {', '.join(missing)}; accepted: after {install}")
    return target


def check_torch(what: str, least: tuple[int, ...]) -> None:
    """Raise an `ExportError` where torch is older than the version `least`, which `what` needs."""
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
        if path.suffix != ONNX:
            raise ExportError(f"{path}: found the opset {opset}; accepted: none, it goes with {ONNX}")
        from onnx.defs import onnx_opset_version

        if not LEAST_OPSET <= opset <= onnx_opset_version():
            raise ExportError(f"{path}: found the opset {opset}; accepted: {LEAST_OPSET} to {onnx_opset_version()}")
    if path.is_dir():
        raise ExportError(f"{path}: found a folder; accepted: the name of a file")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: no folder {path.parent}")
