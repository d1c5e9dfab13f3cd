"""The arguments that make timm's constructor build a model of the same structure.

The model says by its parts what it was built with, also where they were changed afterwards, as by
timm's `reset_classifier`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from timm.layers.drop import DropPath
from timm.models.metaformer import MetaFormer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from diffrate.patch.base import CompressedModel
from diffrate.saving.about import SavedModelError
from diffrate.saving.plain import plain_model

Reader = Callable[[Any], Any]


def _present(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _side(sides: tuple[int, int]) -> int | list[int]:
    return sides[0] if sides[0] == sides[1] else list(sides)


def _mlp_ratio(model: Any) -> float:
    """The ratio that timm, which rounds down, makes the hidden width from."""
    width, hidden = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _drop_path_rate(model: nn.Module) -> float:
    """The highest rate of all blocks. timm computes the rates in float32: rounded, they are as given."""
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    return round(float(max(rates, default=0.0)), 6)


def _scales(model: Any, name: str) -> list[float | None]:
    """For each stage what its scales start at, or None where it has none."""
    return [1.0 if _present(getattr(stage.blocks[0], name)) else None for stage in model.stages]


# How each argument is read off a model, by timm's names. Those that the constructor of the model's class
# does not have are passed over, so that classes of one kind can share a table. Values are JSON's, and
# never None, which `timm.create_model` takes for an argument that is not given.
_ANY: dict[str, Reader] = {
    "in_chans": lambda model: next(part for part in model.modules() if isinstance(part, nn.Conv2d)).in_channels,
    "num_classes": lambda model: model.num_classes,
    "drop_path_rate": _drop_path_rate,
}
_VIT: dict[str, Reader] = _ANY | {
    "img_size": lambda model: _side(model.patch_embed.img_size),
    "patch_size": lambda model: _side(model.patch_embed.patch_size),
    "global_pool": lambda model: model.global_pool,
    "embed_dim": lambda model: model.embed_dim,
    "depth": lambda model: len(model.blocks),
    "num_heads": lambda model: model.blocks[0].attn.num_heads,
    "mlp_ratio": _mlp_ratio,
    "qkv_bias": lambda model: model.blocks[0].attn.qkv.bias is not None,
    "qk_norm": lambda model: _present(model.blocks[0].attn.q_norm),
    "scale_attn_norm": lambda model: _present(model.blocks[0].attn.norm),
    "scale_mlp_norm": lambda model: _present(model.blocks[0].mlp.norm),
    "proj_bias": lambda model: model.blocks[0].attn.proj.bias is not None,
    "init_values": lambda model: float(getattr(model.blocks[0].ls1, "init_values", 0.0)),  # 0 is timm's "none"
    "class_token": lambda model: model.cls_token is not None,
    "pos_embed": lambda model: "none" if model.pos_embed is None else "learn",
    "no_embed_class": lambda model: model.no_embed_class,
    "reg_tokens": lambda model: model.num_reg_tokens,
    "pre_norm": lambda model: _present(model.norm_pre),
    "final_norm": lambda model: _present(model.norm) or _present(model.fc_norm),
    "fc_norm": lambda model: _present(model.fc_norm),
    "pool_include_prefix": lambda model: model.pool_include_prefix,
    "dynamic_img_size": lambda model: model.dynamic_img_size,
    "dynamic_img_pad": lambda model: model.patch_embed.dynamic_img_pad,
    "drop_rate": lambda model: model.head_drop.p,
    "pos_drop_rate": lambda model: model.pos_drop.p,
    "proj_drop_rate": lambda model: model.blocks[0].attn.proj_drop.p,
    "attn_drop_rate": lambda model: model.blocks[0].attn.attn_drop.p,
}
_METAFORMER: dict[str, Reader] = _ANY | {
    "global_pool": lambda model: model.head.global_pool.pool_type,
    "depths": lambda model: [len(stage.blocks) for stage in model.stages],
    "dims": lambda model: [stage.blocks[0].norm1.weight.shape[0] for stage in model.stages],
    "mlp_bias": lambda model: model.stages[0].blocks[0].mlp.fc1.bias is not None,
    "layer_scale_init_values": lambda model: _scales(model, "layer_scale1"),
    "res_scale_init_values": lambda model: _scales(model, "res_scale1"),
    "use_mlp_head": lambda model: model.use_mlp_head,
    "drop_rate": lambda model: model.head.drop.p,
    "proj_drop_rate": lambda model: model.stages[0].blocks[0].mlp.drop1.p,
}
READERS: Mapping[type[nn.Module], Mapping[str, Reader]] = {VisionTransformer: _VIT, MetaFormer: _METAFORMER}
ARGUMENTS = frozenset(name for table in READERS.values() for name in table)


def constructor_arguments(model: nn.Module) -> dict[str, Any]:
    """What `timm.create_model` needs beyond the architecture's name to build a model like `model`.

    JSON values; arguments that are the architecture's own are left out. Whether they are all it takes is
    for a comparison of the two models to say: parts that no argument stands for are passed over here.

    Raises:
        SavedModelError: `model` does not come from `timm.create_model`, or timm builds none like it.
    """
    architecture = architecture_of(model)
    wanted = _readings(model)
    arguments: dict[str, Any] = {}
    while True:
        # Defaults depend on other arguments (the norm's place on the pooling): look again at what they make.
        made = _readings(plain_model(architecture, arguments))
        differing = {name: value for name, value in wanted.items() if made.get(name) != value}
        if differing.keys() <= arguments.keys():
            return arguments
        arguments |= differing


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


def _readings(model: nn.Module) -> dict[str, Any]:
    """Every argument that `model` shows, whatever it is by default."""
    timm_class = _timm_class(model)
    readers = next((READERS[kind] for kind in timm_class.__mro__ if kind in READERS), _ANY)
    readings = {}
    for name in readers.keys() & inspect.signature(timm_class).parameters.keys():
        try:
            readings[name] = readers[name](model)
        except AttributeError:  # a part of another kind, which the comparison of the models names
            continue
    return dict(sorted(readings.items()))


def _timm_class(model: nn.Module) -> type[nn.Module]:
    """The class of `model` before it was patched."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, CompressedModel))
