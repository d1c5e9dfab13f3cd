"""The arguments that make timm's constructor build a model of the same structure.

timm keeps what `timm.create_model` was given. What was changed afterwards, as by timm's `reset_classifier`,
and what a configuration of pretrained weights decided, the model shows by its parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import nn

from diffrate.patch.any import families
from diffrate.saving.about import SavedModelError, is_argument
from diffrate.saving.plain import plain_model
from diffrate.saving.readers import READERS

# Arguments that no single part shows: known by what `timm.create_model` was given. A file's arguments go on to
# timm: here belongs nothing that makes timm fetch or read other files.
_ATTENTION = {"num_kv_heads", "qkv_fused", "attn_type", "attn_layer", "attn_gated", "attn_only_layer_scale"}
_MLP = {"swiglu_mlp", "swiglu_align_to"}
_LAYERS = {"norm_layer", "embed_norm_layer", "act_layer", "use_post_norm"}
_ROTARY = {
    *("use_rot_pos_emb", "rope_type", "rope_temperature", "rope_grid_offset", "rope_grid_indexing"),
    *("rope_rotate_half", "rope_mrope_section", "ref_feat_shape", "rope_ref_feat_shape"),
    *("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
}
_RELATIVE = {"use_rel_pos_bias", "use_shared_rel_pos_bias", "rel_pos_type", "rel_pos_dim", "shared_rel_pos"}
_ANY_SIZE = {
    *("use_naflex", "use_key_only_attn_mask", "embed_proj_type", "patchify_channels_last", "enable_patch_interpolator"),
    *("pos_embed_interp_mode", "pos_embed_ar_preserving", "pos_embed_antialias", "pos_embed_align_corners"),
    "pos_embed_use_grid_sample",
}
_POOLING = {"attn_pool_num_heads", "attn_pool_mlp_ratio"}
_MIXERS = {"head_dim", "expansion_ratio", "kernel_size", "padding", "bias"}
ARGUMENTS = frozenset(READERS) | _ATTENTION | _MLP | _LAYERS | _ROTARY | _RELATIVE | _ANY_SIZE | _POOLING | _MIXERS


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
        # Defaults depend on other arguments (the norm's place on the pooling): look again at what they make.
        made = _readings(plain_model(architecture, arguments))
        differing = {name: value for name, value in shown.items() if made.get(name) != value}
        corrected = arguments | differing
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
        raise SavedModelError(
            f"found a {_timm_class(model).__name__} without the name of its architecture; "
            "accepted: a model made by timm.create_model"
        )
    return architecture


def _given(model: nn.Module, architecture: str) -> dict[str, Any]:
    """What `timm.create_model` was given for `model`, as far as a file can hold it."""
    # timm's own get_model_args adds what was not given, which not every architecture takes, and leaves rates out.
    given: Mapping[str, Any] = getattr(model, "_model_args", {})
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    kept = {name: value for name, value in as_json.items() if name in ARGUMENTS and is_argument(value)}
    if _timm_class(model) is NaFlexVit and not is_model_in_modules(architecture, "naflexvit"):
        kept["use_naflex"] = True  # an environment variable of timm's may have said so instead
    return kept


def _readings(model: nn.Module) -> dict[str, Any]:
    """Every argument that `model` shows, whatever it is by default."""
    readings = {}
    for name in READERS.keys() & _parameters(_timm_class(model)):
        try:
            value = READERS[name](model)
        except AttributeError:  # a part of another kind, which the comparison of the models names
            continue
        if value is not None:  # which `timm.create_model` takes for an argument that is not given
            readings[name] = value
    return readings


def _parameters(timm_class: type[nn.Module]) -> set[str]:
    """The names of the arguments that timm's class takes, in its own name or its parents'."""
    names = {field.name for field in fields(NaFlexVitCfg)} if timm_class is NaFlexVit else set()
    kinds = timm_class.__mro__[: timm_class.__mro__.index(nn.Module)]
    return names.union(*(inspect.signature(kind).parameters for kind in kinds))


def _timm_class(model: nn.Module) -> type[nn.Module]:
    """The class of `model` before it was patched."""
    return next((kind for kind in type(model).__mro__ if kind in families()), type(model))
