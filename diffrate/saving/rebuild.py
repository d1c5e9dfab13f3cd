"""A compressed model from what a file says of it, as structure alone, and whether it is like another."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from torch import nn

from diffrate.blocks.forms import UnsupportedModelError
from diffrate.blocks.rule import ReductionRule
from diffrate.patch.any import vit
from diffrate.patch.base import CompressedModel
from diffrate.rates.rate import RateError
from diffrate.saving.about import About, SavedModelError
from diffrate.saving.arguments import KEEPS_ARGUMENTS, plain_model

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
