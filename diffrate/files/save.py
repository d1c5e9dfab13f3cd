"""One safetensors file for a compressed model, and the model from the file alone.

A model is built again by the arguments of timm's constructor: those that `timm.create_model` was given, which timm
keeps, and those that the parts of the model show otherwise, as after timm's `reset_classifier`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers.drop import DropPath
from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

import diffrate
from diffrate.atomic import first_line, whole_path
from diffrate.blocks.block import UnsupportedModelError, other_methods
from diffrate.blocks.rates import RateError
from diffrate.device import shapes_alone
from diffrate.files.header import ARGUMENTS, About, SavedModelError, about, fetch, is_argument, timms_and_own
from diffrate.patch.base import CompressedModel
from diffrate.patch.parts import FeatureHead, TextHead, complete
from diffrate.patch.shapes import channels_of, input_size
from diffrate.patch.timm_families import families, vit
from diffrate.schedule import ScheduleError

COUNTS = "compression._extra_state"
KEEPS_ARGUMENTS = "1.0.31"  # the first timm that keeps what `timm.create_model` was given
# What may differ from what timm was given. An AttributeError means: a model of this kind does not show it.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "num_classes": lambda model: model.num_classes,
    "in_chans": channels_of,
    "global_pool": lambda model: model.head.global_pool.pool_type if hasattr(model, "stages") else model.global_pool,
    "img_size": lambda model: _sides(*model.patch_embed.img_size),
    "patch_size": lambda model: _sides(*model.patch_embed.patch_size),
    "depth": lambda model: len(model.blocks),
    # With those above, all that small models differ in, where timm does not keep what it was given.
    "embed_dim": lambda model: model.embed_dim,
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    # None after timm's reset_classifier.
    "feature_head": lambda model: _activation(model.head.features if isinstance(model.head, TextHead) else model.head),
    "text_width": lambda model: model.head.in_features if isinstance(model.head, TextHead) else None,
    "text_sigmoid": lambda model: model.head.logit_bias is not None if isinstance(model.head, TextHead) else None,
}
READ_OFF_CONFIG = ("mean", "std", "interpolation", "crop_pct")
# What passes its input on in evaluation, whatever its rate.
PASSING = (nn.Identity, nn.Dropout, DropPath)
# Attributes that only training, first weights, or timm's own attention read.
UNREAD = {
    *("training", "grad_checkpointing", "fused_attn", "drop_rate", "distilled_training"),
    *("weight_init_mode", "fix_init", "init_values", "head_init_scale"),
}


def save(
    model: CompressedModel, path: str | Path, *, name: str | None = None, classes: Sequence[str] | None = None
) -> None:
    """Write `model` to one safetensors file, whole or not at all.

    The file holds the weights in their precision, the rate logits, the kept counts (those of the rate
    logits while none are set) and what it takes to build the model again. `name` is what the caller
    calls it, `classes` are words for its outputs, in order.

    With timm before 1.0.31 the rates of dropout and stochastic depth are not saved: a loaded model has timm's defaults.

    Raises:
        SavedModelError: `model` is not patched, was not made by `timm.create_model`, or has parts, methods or
            hooks that timm's arguments do not stand for; `classes` are not one per output; the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise SavedModelError(f"{path}: found a folder; accepted: the name of a file")
    described = _describe(model, name, classes)
    _check_alike(model, _rebuilt(described))
    state = dict(model.named_buffers()) | model.state_dict()
    fixed = copy.copy(model.compression)  # the model itself may be in search: it stays without a schedule
    fixed._schedule = described.schedule  # and its rate logits go on learning
    state[COUNTS] = fixed.get_extra_state()
    # Copies, since a file takes no two tensors in one storage.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    try:
        with whole_path(path) as scratch:
            save_file(tensors, scratch, described.to_metadata())
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
    path = fetch(path)
    described = about(path)
    try:
        with safe_open(path, "pt") as file:  # tensors in the file's own pages
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SavedModelError(f"{path}: cannot be read ({first_line(error)})") from error
    try:
        for name in ("depth", "depths"):  # blocks that there are no tensors for would take for ever to build
            found = described.arguments.get(name, 1)
            depths = found if isinstance(found, list) else [found]
            if any(isinstance(depth, int) and not 1 <= depth <= len(tensors) for depth in depths):
                accepted = f"from 1 to the {len(tensors)} tensors of the file"
                raise SavedModelError(f"arguments: found {name} {found}; accepted: {accepted}")
        model = _rebuilt(described)
        for name, built in {"num_classes": model.num_classes, "input_size": input_size(model)}.items():
            found = getattr(described, name)
            if found != built:
                raise SavedModelError(f"{name}: found {found}; accepted: {built}, as the arguments make it")
        model.check(described.schedule)
        model.compression.schedule = described.schedule
        _check_tensors(model, tensors)
    except (SavedModelError, ScheduleError) as error:
        raise SavedModelError(f"{path}: {error}") from error
    _fill(model, tensors, device)
    return model.eval()


def check_patched(model: object, error: type[ValueError]) -> None:
    """Raise `error` for what `diffrate.patch` has not patched."""
    if not isinstance(model, CompressedModel):
        raise error(f"found {type(model).__name__}; accepted: a model that diffrate.patch has patched")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise error("found weights without storage, on the device meta; accepted: weights on a CPU or GPU")


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
    check_patched(model, SavedModelError)
    if name is not None and not isinstance(name, str):
        raise SavedModelError(f"name: found {name!r}; accepted: a line of text")
    if isinstance(classes, str):
        raise SavedModelError(f"classes: found {classes!r}; accepted: a sequence of texts, one per output")
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        kind = next((kind for kind in type(model).__mro__ if kind in families()), type(model))  # before it was patched
        raise SavedModelError(
            f"found a {kind.__name__} without the name of its architecture; accepted: a model made by timm.create_model"
        )
    described = About(
        **header_of(model),
        architecture=architecture,
        arguments=_constructor_arguments(model, architecture),
        num_classes=model.num_classes,
        **{name: config.get(name) for name in READ_OFF_CONFIG},
        crop_mode=config.get("crop_mode") or About.crop_mode,
        granularity=(model.compression.granularity["prune"], model.compression.granularity["merge"]),
        name=name,
        classes=None if classes is None else tuple(classes),
        return_flop=model.return_flop,
    )
    return About.from_metadata(described.to_metadata())


def _constructor_arguments(model: nn.Module, architecture: str) -> dict[str, Any]:
    """What `timm.create_model` needs beyond the architecture's name to build a model like `model`, as JSON values.

    Parts that no argument stands for, or one that is no JSON value, are left to `_check_alike`.
    """
    # timm's own get_model_args adds what was not given, which not every architecture takes, and leaves rates out.
    given: Mapping[str, Any] = getattr(model, "_model_args", {})
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    arguments = {name: value for name, value in as_json.items() if name in ARGUMENTS and is_argument(value)}
    if isinstance(model, NaFlexVit) and not is_model_in_modules(architecture, ("naflexvit",)):
        arguments["use_naflex"] = True  # an environment variable of timm's may have said so instead
    shown = _readings(model)
    while True:
        # Defaults depend on other arguments (heads on the width): look again at what they make.
        made = _readings(build(architecture, arguments))
        corrected = arguments | {name: value for name, value in shown.items() if made.get(name) != value}
        if corrected == arguments:
            return dict(sorted(arguments.items()))
        arguments = corrected


def _readings(model: nn.Module) -> dict[str, Any]:
    """Every argument that `model` shows, whatever it is by default."""
    readings = {}
    for name, read in _READERS.items():
        with suppress(AttributeError, TypeError):  # no such part, or None: nothing is shown
            readings[name] = read(model)
    return readings


def _activation(head: object) -> str | None:
    return head.activation if isinstance(head, FeatureHead) else None


def _sides(rows: int, columns: int) -> int | list[int]:
    return rows if rows == columns else [rows, columns]


def build(architecture: str, arguments: Mapping[str, Any], device: str = "meta") -> Any:
    """timm's model, and what `arguments` ask beyond timm; on the meta device as structure alone: no weights, no draws
    from a generator.

    `arguments` are JSON values; arrays reach timm as tuples, as its own defaults are.

    Raises:
        SavedModelError: timm has no such model, or does not build it with these.
    """
    if not timm.is_model(architecture):
        raise SavedModelError(f"architecture: found {architecture!r}; accepted: a model of timm {timm.__version__}")
    given, own = timms_and_own(arguments)
    try:
        with shapes_alone() if device == "meta" else torch.device(device):
            model: Any = timm.create_model(architecture, pretrained=False, **given)
            complete(model, **own)
    except Exception as error:  # each constructor fails in its own way, and all mean: not with these
        accepted = f"what timm {timm.__version__} builds {architecture} with ({first_line(error)})"
        raise SavedModelError(f"arguments: found {dict(arguments)}; accepted: {accepted}") from error
    model._model_args = given | own  # so that what was loaded can be saved
    return model


def _rebuilt(about: About) -> Any:
    """The compressed model on the meta device, without weights and schedule."""
    model = build(about.architecture, about.arguments)
    # Not before it is built: timm would take the images' size for that of the table of positions.
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        **{name: getattr(about, name) for name in ("num_classes", "input_size", "crop_mode", *READ_OFF_CONFIG)},
    }
    try:
        with torch.device("meta"):
            return vit(model, *about.granularity, about.input_size[1:], about.return_flop)
    except (UnsupportedModelError, RateError) as error:
        raise SavedModelError(str(error)) from error
    except (TypeError, ValueError) as error:  # such as three sides of an image, which older timm takes
        raise SavedModelError(f"arguments: found a model that cannot be patched ({first_line(error)})") from error


def _check_alike(model: CompressedModel, rebuilt: CompressedModel) -> None:
    """Refuse a model that computes otherwise than `rebuilt` would with its weights, by the first part that differs.

    Compared are the kinds, settings and shapes of all parts, but for what changes nothing in evaluation.
    """
    ours, theirs = _structure(model), _structure(rebuilt)
    needed = "" if hasattr(model, "_model_args") else f"; create_model of timm {KEEPS_ARGUMENTS} keeps what it is given"
    for part in ours | theirs:
        found, built = ours.get(part, "nothing"), theirs.get(part, "nothing")
        if found != built:
            origin = f"as timm {timm.__version__} builds {rebuilt.pretrained_cfg['architecture']}{needed}"
            raise SavedModelError(f"{part or 'model'}: found {found}; accepted: {built}, {origin}")


def _structure(model: CompressedModel) -> dict[str, Any]:
    """What makes the model compute as it does: the kind of each module, its settings, and the shapes of its tensors."""
    structure: dict[str, Any] = {"rule": model.rule}
    for name, module in model.named_modules():
        if type(module) in PASSING:
            structure[name] = "Identity()" + _put_on(module)
            continue
        kind = type(module)
        structure[name] = f"{kind.__module__}.{kind.__qualname__}({module.extra_repr()}){_put_on(module)}"
        settings = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in UNREAD}
        facts = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        # None is like nothing at all: where a part was taken away, timm leaves one or the other.
        facts = {key: value for key, value in facts.items() if value is not None and is_argument(value)}
        tensors = {**module._parameters, **module._buffers}
        facts |= {key: list(tensor.shape) for key, tensor in tensors.items() if tensor is not None}
        structure |= {f"{name}.{key}".strip("."): value for key, value in facts.items()}
    return structure


def _put_on(module: nn.Module) -> str:
    """What no file holds and logits depend on: hooks of forward passes, methods that are not those of the class."""
    hooks = ["forward hooks"] if module._forward_hooks or module._forward_pre_hooks else []
    # Those of every module, such as `train`, change no logits.
    methods = [name for name in other_methods(module) if name == "forward" or not hasattr(nn.Module, name)]
    return "".join(f", with {found}" for found in (*hooks, *(f"another {name}" for name in methods)))


def _check_tensors(model: CompressedModel, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are not those of `model`, or other counts than the header's.

    All floating types are one, since a model may be in any.
    """
    expected = dict(model.named_buffers()) | model.state_dict()
    ours, theirs = (
        {name: f"{'floating' if item.is_floating_point() else item.dtype} {list(item.shape)}" for name, item in state}
        for state in (expected.items(), tensors.items())
    )
    for name in ours | theirs:
        found, accepted = theirs.get(name, "nothing"), ours.get(name, "nothing")
        if found != accepted:
            raise SavedModelError(f"{name}: found {found}; accepted: {accepted}")
    found, accepted = tensors[COUNTS].tolist(), expected[COUNTS].tolist()
    if found != accepted:
        raise SavedModelError(f"{COUNTS}: found {found}; accepted: {accepted}, as in the header")


def _fill(model: CompressedModel, tensors: dict[str, Tensor], device: torch.device | str) -> None:
    """Replace the tensors of `model` by copies of `tensors` on `device`, with their types.

    Copies, since a file may change while the model is in use, and aligns tensors to no more than 8 bytes,
    where kernels may round otherwise. The counts, which become Python's integers, stay on the CPU.
    """
    copies = {name: tensor if name == COUNTS else tensor.to(device, copy=True) for name, tensor in tensors.items()}
    state = model.state_dict().keys()
    model.load_state_dict({name: copies[name] for name in state}, strict=True, assign=True)
    for name in tensors.keys() - state:  # buffers that the constructor computes
        module, _, buffer = name.rpartition(".")
        model.get_submodule(module).register_buffer(buffer, copies[name], persistent=False)
