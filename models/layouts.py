"""From the layouts that weights are published in to timm's names, with timm's own converters."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from models.download import first_line
from models.errors import CheckpointError

StateDict = dict[str, Tensor]
SHOWN_KEYS = 3  # of each side in a message

# What a patched model adds to its state: absent from official files, skipped for dense models.
COMPRESSION_PREFIX = "compression."
CONVERTER = "checkpoint_filter_fn"  # timm's name for what converts, in the file of each family
TIMM = "timm.models."
# Positions of another input size are interpolated as the weights were trained, which timm tells by the name.
BILINEAR = ("flexi", "radio")
ALIGNED_CORNERS = ("base_patch16_radio_v3", "huge_patch16_radio_v3")
FLEXIBLE = "flexi"  # trained on patches of many sizes: those of another are interpolated
POSITIONS = ("pos_embed", "relative_position_bias_table")


def convert(state: StateDict, model: nn.Module, name: str) -> StateDict:
    """Bring `state` to timm's names and to the input's size of `model`; `name` starts messages.

    Tensors that are there in this form already stay as they are.

    Raises:
        CheckpointError: timm has no converter for this kind of model, or it does not take these tensors, or their
            patches are of another size.
    """
    converter = _converter(model)
    own = patch_kernel(model)
    if own is not None:  # whatever the layout, a kernel of patches has the model's width and channels
        kernels = [value.shape[2:] for value in state.values() if value.ndim == 4 and value.shape[:2] == own.shape[:2]]
        if kernels and own.shape[2:] not in kernels:
            check_patches(kernels[0], model, name)
    # timm's know nothing of ours, and some look every key up in the model.
    ours = {key: value for key, value in state.items() if key.startswith(COMPRESSION_PREFIX)}
    theirs = {key: value for key, value in state.items() if key not in ours}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on how timm interpolates relative positions
            converted = {**converter(theirs, model), **ours}
    except KeyError as error:
        raise CheckpointError(f"checkpoint {name} does not fit the model: unexpected {error.args[0]}") from error
    except (RuntimeError, ValueError, AttributeError, IndexError, TypeError, AssertionError) as error:
        reason = first_line(error)
        kind = next(base.__name__ for base in type(model).__mro__ if base.__module__.startswith(TIMM))
        raise CheckpointError(
            f"checkpoint {name} does not fit the model: timm does not read it as weights of {kind} ({reason})"
        ) from error
    expected = model.state_dict().keys()
    if not converted.keys() & expected:
        found, accepted = (", ".join(list(names)[:SHOWN_KEYS]) for names in (state, expected))
        raise CheckpointError(
            f"checkpoint {name} does not fit the model: found {found}, ...; accepted: {accepted}, ..."
        )
    return converted


def patch_kernel(model: nn.Module) -> Tensor | None:
    """What turns patches into tokens, None in a model that has no such convolution."""
    weight = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 4 else None


def check_patches(found: Sequence[int], model: nn.Module, name: str) -> None:
    """Refuse weights for patches of `found` rows and columns in a model of others, unless it was trained for any.

    Raises:
        CheckpointError: names both sizes, and timm's model with such patches if there is one.
    """
    own, architecture = patch_kernel(model), _architecture(model)
    if own is None or own.shape[2:] == tuple(found) or FLEXIBLE in architecture:
        return
    fitting = re.sub(r"patch\d+", f"patch{found[0]}", architecture)
    instead = f", or --model {fitting}" if is_model(fitting) else ""
    (rows, columns), (own_rows, own_columns) = found, own.shape[2:]
    raise CheckpointError(
        f"checkpoint {name} does not fit the model: it is for patches of {rows} by {columns} pixels; "
        f"accepted: of {own_rows} by {own_columns}{instead}"
    )


def resampled(state: StateDict, converted: StateDict, name: str) -> list[str]:
    """A note on positions in `converted` that are not the file's own in `state`, but interpolated ones, if any."""
    held = {value.untyped_storage().data_ptr() for value in state.values()}
    made = [
        key
        for key, value in converted.items()
        if key.endswith(POSITIONS) and value.untyped_storage().data_ptr() not in held
    ]
    if not made:
        return []
    first = made[0]
    came = f" {list(state[first].shape)}" if first in state else ""
    more = f", and {len(made) - 1} more" if len(made) > 1 else ""
    return [f"{name}: positions resampled, {first}{came} to {list(converted[first].shape)}{more}"]


def _architecture(model: nn.Module) -> str:
    """timm's name of a model's architecture, as far as the model knows it."""
    return str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))


def _converter(model: nn.Module) -> Callable[[StateDict, nn.Module], StateDict]:
    """timm's converter for `model`, as the function that builds its architecture would call it.

    Raises:
        CheckpointError: timm has none.
    """
    architecture = _architecture(model)
    for module in _modules(model, architecture):
        function: Any = getattr(module, CONVERTER, None)
        if function is not None:
            options = _options(function, architecture)
            return lambda state, target: function(state, target, **options)
    raise CheckpointError(f"{type(model).__name__}: timm has no {CONVERTER} for it; accepted: a model for which it has")


def _modules(model: nn.Module, architecture: str) -> list[ModuleType]:
    """timm's files that may know how to read weights of `model`: its architecture's, then its class's."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith(TIMM)]
    modules = [sys.modules[kind.__module__] for kind in kinds]
    if is_model(architecture):
        own = sys.modules[model_entrypoint(architecture).__module__]
        if any(getattr(own, kind.__name__, None) is kind for kind in kinds):  # it builds models of this class
            modules.insert(0, own)
    return modules


def _options(function: Callable[..., Any], architecture: str) -> dict[str, Any]:
    """What timm's builders give their converters beyond the tensors and the model."""
    wanted: dict[str, Any] = {"adapt_layer_scale": True}  # DeiT III's names, which no other model has
    if any(word in architecture for word in BILINEAR):
        aligned = any(word in architecture for word in ALIGNED_CORNERS)
        wanted |= {"interpolation": "bilinear", "antialias": False, "align_corners": aligned}
    known = inspect.signature(function).parameters
    return {name: value for name, value in wanted.items() if name in known}
