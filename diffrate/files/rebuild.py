"""The arguments that make timm's constructor build a model of the same structure.

timm keeps what `timm.create_model` was given. What was changed afterwards, as by timm's `reset_classifier`,
and what a configuration of pretrained weights decided, the model shows by its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit
from torch import nn

from diffrate.atomic import first_line
from diffrate.blocks.block import UnsupportedModelError
from diffrate.blocks.rates import RateError
from diffrate.blocks.reduction import ReductionRule
from diffrate.files.header import ARGUMENTS, About, SavedModelError, is_argument
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import channels_of
from diffrate.patch.timm_families import families, vit

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
}


def constructor_arguments(model: nn.Module) -> dict[str, Any]:
    """What `timm.create_model` needs beyond the architecture's name to build a model like `model`.

    JSON values. Whether they are all it takes is for a comparison of the two models to say: what no argument
    stands for, or one that is no JSON value, is passed over here.

    Raises:
        SavedModelError: `model` does not come from `timm.create_model`, or timm builds none like it.
    """
    architecture = architecture_of(model)
    arguments, shown = _given(model, architecture), _readings(model)
    while True:
        # Defaults depend on other arguments (heads on the width): look again at what they make.
        made = _readings(plain_model(architecture, arguments))
        corrected = arguments | {name: value for name, value in shown.items() if made.get(name) != value}
        if corrected == arguments:
            return dict(sorted(arguments.items()))
        arguments = corrected


def architecture_of(model: nn.Module) -> str:
    """timm's name of the model's architecture.

    Raises:
        SavedModelError: `model` does not come from `timm.create_model`.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        kind = next((kind for kind in type(model).__mro__ if kind in families()), type(model))  # before it was patched
        raise SavedModelError(
            f"found a {kind.__name__} without the name of its architecture; accepted: a model made by timm.create_model"
        )
    return architecture


def plain_model(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """timm's model as structure alone, on the meta device: no weights, no draws from a generator.

    `arguments` are JSON values; arrays reach timm as tuples, as its own defaults are.

    Raises:
        SavedModelError: this timm has no such architecture, or cannot build it with these arguments.
    """
    if not timm.is_model(architecture):
        raise SavedModelError(f"architecture: found {architecture!r}; accepted: a model of timm {timm.__version__}")
    given: dict[str, Any] = {name: tuple(it) if isinstance(it, list) else it for name, it in arguments.items()}
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(architecture, pretrained=False, **given)
    except Exception as error:  # each constructor fails in its own way, and all mean: not with these
        raise SavedModelError(
            f"arguments: found {dict(arguments)}; accepted: what timm {timm.__version__} "
            f"builds {architecture} with ({first_line(error)})"
        ) from error
    model._model_args = given  # for older timm, so that what was loaded can be saved
    return model


def _given(model: nn.Module, architecture: str) -> dict[str, Any]:
    """What `timm.create_model` was given for `model`, as far as a file can hold it."""
    # timm's own get_model_args adds what was not given, which not every architecture takes, and leaves rates out.
    given: Mapping[str, Any] = getattr(model, "_model_args", {})
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    kept = {name: value for name, value in as_json.items() if name in ARGUMENTS and is_argument(value)}
    if isinstance(model, NaFlexVit) and not is_model_in_modules(architecture, "naflexvit"):
        kept["use_naflex"] = True  # an environment variable of timm's may have said so instead
    return kept


def _sides(rows: int, columns: int) -> int | list[int]:
    return rows if rows == columns else [rows, columns]


def _readings(model: nn.Module) -> dict[str, Any]:
    """Every argument that `model` shows, whatever it is by default."""
    readings = {}
    for name, read in _READERS.items():
        with suppress(AttributeError, TypeError):  # no such part, or None: nothing is shown
            readings[name] = read(model)
    return readings


CONFIG_FIELDS = ("num_classes", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# What passes its input on in evaluation, whatever its rate.
PASSING = (nn.Identity, nn.Dropout, DropPath)
# Attributes that only training, first weights, or timm's own attention read.
UNREAD = {
    *("training", "grad_checkpointing", "fused_attn", "drop_rate", "distilled_training"),
    *("weight_init_mode", "fix_init", "init_values", "head_init_scale"),
}
LOADED = {"schedule"}  # attributes that are part of the state, as tensors are
Plain = bool | int | float | str | ReductionRule


def rebuild(about: About, where: str = "") -> CompressedModel:
    """The model on the meta device, without weights and schedule; `where` starts the messages.

    Raises:
        SavedModelError: this timm, or this diffrate, cannot build it.
    """
    _, height, width = about.input_size
    try:
        model: Any = plain_model(about.architecture, about.arguments)
        # Not before it is built: timm would take the images' size for that of the table of positions.
        config = {name: getattr(about, name) for name in CONFIG_FIELDS}
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **config}
        with torch.device("meta"):
            return vit(model, *about.granularity, (height, width), about.return_flop)
    except (SavedModelError, UnsupportedModelError, RateError) as error:
        raise SavedModelError(f"{where}{error}") from error


def check_alike(model: CompressedModel, rebuilt: CompressedModel) -> None:
    """Refuse a model that computes otherwise than `rebuilt` would with its weights.

    Compared are the kinds, settings and shapes of all parts, but for what changes nothing in evaluation.

    Raises:
        SavedModelError: names the first part that differs.
    """
    ours, theirs = _structure(model), _structure(rebuilt)
    needed = "" if hasattr(model, "_model_args") else f"; create_model of timm {KEEPS_ARGUMENTS} keeps what it is given"
    for place in ours | theirs:
        found, built = ours.get(place, "nothing"), theirs.get(place, "nothing")
        if found != built:
            architecture = rebuilt.pretrained_cfg["architecture"]
            raise SavedModelError(
                f"{place}: found {found}; accepted: {built}, as timm {timm.__version__} builds {architecture}{needed}"
            )


def _structure(model: CompressedModel) -> dict[str, Any]:
    """What makes the model compute as it does, by the place in it."""
    structure: dict[str, Any] = {"rule": model.rule}
    for name, module in model.named_modules():
        structure |= {f"{name}.{fact}".strip("."): value for fact, value in _facts(module).items()}
    return structure


def _facts(module: nn.Module) -> dict[str, Any]:
    """The kind of one module, its settings, and the shapes of its tensors."""
    if type(module) in PASSING:
        return {"": "Identity()"}
    settings = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in UNREAD | LOADED}
    tensors = {**module._parameters, **module._buffers}
    # None is like nothing at all: where a part was taken away, timm leaves one or the other.
    return {
        "": f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})",
        **{name: _as_list(value) for name, value in settings.items() if value is not None and _is_plain(value)},
        **{name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None},
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Plain)


def _as_list(value: Any) -> Any:
    return list(map(_as_list, value)) if isinstance(value, tuple | list) else value
