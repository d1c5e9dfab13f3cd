"""What a model shows of the arguments that it was built with, by its parts as they are now.

A part is named by its path. Where timm's classes keep one thing in different places, the first path that
is there counts, so that all classes share one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any

from timm.layers.drop import DropPath
from torch import nn

from diffrate.patch.sizes import channels_of

Reader = Callable[[Any], Any]


def _at(*paths: str) -> Reader:
    """What the first of `paths` leads to."""
    return lambda model: _found(model, paths)[0]


def _has(*paths: str) -> Reader:
    """Whether any of `paths` leads to a part that does something."""
    return lambda model: any(part is not None and not isinstance(part, nn.Identity) for part in _found(model, paths))


def _found(model: Any, paths: tuple[str, ...]) -> list[Any]:
    """What each of `paths` leads to, for those that there are: one at least."""
    found = []
    for path in paths:
        with suppress(AttributeError):
            found.append(attrgetter(path)(model))
    if not found:
        raise AttributeError(f"none of {', '.join(paths)}")
    return found


def _sides(*paths: str) -> Reader:
    """Rows and columns at the first of `paths`, or one number where they are equal."""

    def read(model: Any) -> Any:
        rows, columns = _found(model, paths)[0] or (None, None)
        return rows if rows == columns else [rows, columns]

    return read


def _mlp_ratio(model: Any) -> float:
    """The ratio that timm, which rounds down, makes the hidden width from."""
    width, hidden = model.embed_dim, model.blocks[0].mlp.fc2.in_features
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _drop_path_rate(model: nn.Module) -> float:
    """The highest rate of all blocks. timm computes the rates in float32: rounded, they are as given."""
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    return round(float(max(rates, default=0.0)), 6)


def _registers(model: Any) -> int:
    token = getattr(model, "embeds", model).reg_token
    return 0 if token is None else token.shape[1]


def _pos_embed(model: Any) -> str:
    if hasattr(model, "embeds"):
        return model.embeds.pos_embed_type
    return "none" if model.pos_embed is None else "learn"


def _pos_embed_grid(model: Any) -> list[int] | None:
    """The grid that the table of positions has; None where the size of images gives it."""
    grid = model.embeds.pos_embed_grid_size
    return None if grid is None or model.embeds.default_img_size else list(grid)


def _scales(name: str) -> Reader:
    """For each stage what its scales start at, or None where it has none."""

    def read(model: Any) -> list[float | None]:
        has = _has(f"blocks.0.{name}")
        return [1.0 if has(stage) else None for stage in model.stages]

    return read


_STEM: dict[str, Reader] = {
    "in_chans": channels_of,
    "img_size": _sides("patch_embed.img_size", "embeds.default_img_size"),
    "patch_size": _sides("patch_embed.patch_size", "embeds.patch_size"),
    "embed_dim": _at("embed_dim"),
    "dynamic_img_size": _at("dynamic_img_size"),
    "dynamic_img_pad": _at("patch_embed.dynamic_img_pad", "embeds.dynamic_img_pad"),
    "class_token": _has("cls_token", "embeds.cls_token"),
    "reg_tokens": _registers,
    "num_reg_tokens": _registers,
    "pos_embed": _pos_embed,
    "pos_embed_grid_size": _pos_embed_grid,
    "use_abs_pos_emb": _has("pos_embed"),
    "no_embed_class": _at("no_embed_class"),
    "pos_drop_rate": _at("pos_drop.p", "embeds.pos_drop.p"),
    "pre_norm": _has("norm_pre"),
    "use_pre_transformer_norm": _has("norm_pre"),
}
_BLOCKS: dict[str, Reader] = {
    "depth": lambda model: len(model.blocks),
    "num_heads": _at("blocks.0.attn.num_heads"),
    "mlp_ratio": _mlp_ratio,
    "qkv_bias": _has("blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias", "blocks.0.attn.q_proj.bias"),
    "qk_norm": _has("blocks.0.attn.q_norm"),
    "scale_attn_norm": _has("blocks.0.attn.norm"),
    "scale_attn_inner": _has("blocks.0.attn.norm"),
    "scale_attn_inner_norm": _has("blocks.0.attn.norm"),
    "scale_mlp": _has("blocks.0.mlp.norm"),
    "scale_mlp_norm": _has("blocks.0.mlp.norm"),
    "proj_bias": _has("blocks.0.attn.proj.bias"),
    "init_values": _at("blocks.0.ls1.init_values", "blocks.0.init_values"),
    "proj_drop_rate": _at("blocks.0.attn.proj_drop.p", "stages.0.blocks.0.mlp.drop1.p"),
    "attn_drop_rate": _at("blocks.0.attn.attn_drop.p"),
    "drop_path_rate": _drop_path_rate,
}
_STAGES: dict[str, Reader] = {
    "depths": lambda model: [len(stage.blocks) for stage in model.stages],
    "dims": lambda model: [stage.blocks[0].norm1.weight.shape[0] for stage in model.stages],
    "mlp_bias": _has("stages.0.blocks.0.mlp.fc1.bias"),
    "layer_scale_init_values": _scales("layer_scale1"),
    "res_scale_init_values": _scales("res_scale1"),
}
_HEAD: dict[str, Reader] = {
    "global_pool": _at("head.global_pool.pool_type", "global_pool"),
    "pool_include_prefix": _at("pool_include_prefix"),
    "final_norm": _has("norm", "fc_norm"),
    "use_post_transformer_norm": _has("norm"),
    "fc_norm": _has("fc_norm"),
    "use_fc_norm": _has("fc_norm"),
    "use_mlp_head": _at("use_mlp_head"),
    "drop_rate": _at("head_drop.p", "head.drop.p"),
    "num_classes": _at("num_classes"),
}
# By timm's names of the arguments; the values are JSON's. None and an AttributeError both mean: not shown.
READERS: Mapping[str, Reader] = _STEM | _BLOCKS | _STAGES | _HEAD
