"""`diffrate.convert`: a model of transformers, open_clip or torchvision as the equal model of timm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import nn

from diffrate.atomic import holds_weights
from diffrate.blocks.block import UnsupportedModelError, other_methods
from diffrate.converting import transformers_vits
from diffrate.converting.layout import CLIP, IMAGENET_VIT, Names, Plan, State, parts_of, planned
from diffrate.files.header import SavedModelError
from diffrate.files.save import build
from diffrate.patch.parts import FeatureHead
from diffrate.patch.shapes import Size, as_size
from diffrate.patch.timm_families import families

TORCHVISION = Names(
    r"encoder\.layers\.encoder_layer_(\d+)\.",
    """patch_embed.proj conv_proj; cls_token class_token; pos_embed encoder.pos_embedding; norm1 ln_1; norm2 ln_2
    attn.qkv.weight self_attention.in_proj_weight; attn.qkv.bias self_attention.in_proj_bias
    attn.proj self_attention.out_proj; mlp.fc1 mlp.0; mlp.fc2 mlp.3; norm encoder.ln; head heads.head heads""",
)
OPEN_CLIP = Names(
    r"transformer\.resblocks\.(\d+)\.",
    """patch_embed.proj conv1; cls_token class_embedding; pos_embed positional_embedding; norm_pre ln_pre; norm ln_post
    norm1 ln_1; attn.qkv.weight attn.in_proj_weight; attn.qkv.bias attn.in_proj_bias; attn.proj attn.out_proj
    norm2 ln_2; ls1.gamma ls_1.gamma; ls2.gamma ls_2.gamma; mlp.fc1 mlp.c_fc; mlp.fc2 mlp.c_proj""",
)


def name_of(kind: type) -> str:
    """The full name of a class: its module's, and its own."""
    return f"{kind.__module__}.{kind.__qualname__}"


def known_name(model: object, known: Mapping[str, Any]) -> str | None:
    """The full name of the class in `known` that `model` is of: its own, or one that it is derived from without another
    forward."""
    kind = type(model)
    for base in kind.__mro__:
        if name_of(base) in known:
            return name_of(base) if getattr(base, "forward", None) is getattr(kind, "forward", None) else None
    return None


def torchvision_vit(model: Any) -> Plan:
    """The VisionTransformer of torchvision."""
    _check_nothing_added(model)
    kind, last = "VisionTransformer of torchvision", model.heads
    if isinstance(last, nn.Sequential) and last._modules.keys() == {"head"}:
        last = last.head
    if not isinstance(last, nn.Linear | nn.Identity):
        raise UnsupportedModelError(f"{kind}: found heads of {type(last).__name__}; accepted: Linear, or Identity")
    heads, size = model.encoder.layers[0].num_heads, as_size(model.image_size)
    bent = _activation((block.mlp[1] for block in model.encoder.layers), kind)
    plan = planned(kind, parts_of(model), TORCHVISION, IMAGENET_VIT, heads, size, global_pool="token", act_layer=bent)
    if "head.weight" in plan.state:
        plan.add_head({})
    inside = model.attention_dropout
    rates = {"pos_drop_rate": model.dropout, "proj_drop_rate": model.dropout, "attn_drop_rate": inside}
    plan.arguments |= {name: rate for name, rate in rates.items() if rate}
    return plan


def open_clip_vit(model: Any) -> Plan:
    """The VisionTransformer of open_clip: its pooled output, projected where it has a projection."""
    _check_nothing_added(model)
    kind = "VisionTransformer of open_clip"
    if model.attn_pool is not None or model.pool_type not in ("tok", "avg"):
        found = model.pool_type if model.attn_pool is None else type(model.attn_pool).__name__
        raise UnsupportedModelError(f"{kind}: found the pooling {found!r}; accepted: 'tok', 'avg'")
    mean, blocks = model.pool_type == "avg", model.transformer.resblocks
    after = mean and model.final_ln_after_pool
    pooled = {"global_pool": "avg" if mean else "token", "fc_norm": after}
    pooled |= {"pre_norm": not isinstance(model.ln_pre, nn.Identity)}
    pooled |= {"act_layer": _activation((block.mlp.gelu for block in blocks), kind)}
    heads, size = blocks[0].attn.num_heads, as_size(model.image_size)
    plan = planned(kind, parts_of(model), OPEN_CLIP, CLIP, heads, size, **pooled)
    if after:
        plan.state |= {f"fc_{name}": plan.state.pop(name) for name in ("norm.weight", "norm.bias")}
    projection = plan.state.pop("proj", None)
    if projection is not None:
        plan.add_head({"head.weight": projection.T}, feature_head="none")
    rate = getattr(model.patch_dropout, "prob", 0.0)
    if rate:
        raise UnsupportedModelError(f"{kind}: found patch_dropout {rate}; accepted: 0, tokens go by importance")
    return plan


# timm's names of activations, by their classes and what these approximate by.
ACTIVATIONS = {
    ("torch.nn.modules.activation.GELU", "none"): "gelu",
    ("torch.nn.modules.activation.GELU", "tanh"): "gelu_tanh",
    ("open_clip.transformer.QuickGELU", None): "quick_gelu",
}


def _activation(modules: Iterable[Any], kind: str) -> str:
    """timm's name of the one activation that all blocks have."""
    found = {(name_of(type(module)), getattr(module, "approximate", None)) for module in modules}
    if len(found) > 1 or not found <= ACTIVATIONS.keys():
        shown = ", ".join(sorted(name.rpartition(".")[2] for name, _ in found))
        accepted = "GELU, QuickGELU, one in all blocks"
        raise UnsupportedModelError(f"{kind}: found the activation {shown}; accepted: {accepted}")
    return ACTIVATIONS[found.pop()]


def timm_tower(model: Any) -> nn.Module:
    """A copy of the timm model that one of open_clip or transformers holds, with its projection as the head."""
    kind, trunk = type(model).__name__, getattr(model, "trunk", None) or model.timm_model
    if type(trunk) not in families():
        accepted = ", ".join(sorted(known.__name__ for known in families()))
        raise UnsupportedModelError(f"{kind}: found a {type(trunk).__name__}; accepted: {accepted}")
    trunk: Any = copy.deepcopy(trunk)
    layers: dict[str, Any] = dict(getattr(model, "head", nn.Identity()).named_children())
    projection = layers.pop("proj", None)
    dropout = layers.pop("drop", None)
    if layers:
        raise UnsupportedModelError(f"{kind}: found a head of {', '.join(layers)}; accepted: one linear layer, or none")
    if projection is not None:
        trunk.num_classes = projection.out_features
        head = FeatureHead(projection.in_features, projection.out_features).to(projection.weight)
        head.load_state_dict({"bias": torch.zeros_like(head.bias)} | projection.state_dict())
        trunk.head = head
        trunk.head_drop = copy.deepcopy(dropout)
    return trunk.train(model.training)


READERS: Mapping[str, Callable[[Any], Any]] = {
    "torchvision.models.vision_transformer.VisionTransformer": torchvision_vit,
    "open_clip.transformer.VisionTransformer": open_clip_vit,
    "open_clip.timm_model.TimmModel": timm_tower,
    "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperForImageClassification": timm_tower,
    "open_clip.model.CLIP": lambda model: _read(model.visual, None),
    "open_clip.model.CustomTextCLIP": lambda model: _read(model.visual, None),
}


# Whose parts and hooks a model may have: they compute what its configuration and weights say.
LIBRARIES = ("torch", "torchvision", "open_clip", "transformers", "timm")
HOOKING = ("transformers", "accelerate")


def _check_nothing_added(model: nn.Module) -> None:
    """Refuse what would not be seen in a model's weights: parts, forwards and hooks of others, parametrized weights.

    Raises:
        UnsupportedModelError: names the part.
    """
    for name, module in model.named_modules():
        found, kind = "", type(module)
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not all(_library_of(hook) in HOOKING for hook in hooks):
            found = "a forward hook"
        if other_methods(module, ["forward"]) and not hasattr(module, "_hf_hook"):  # accelerate's, which moves tensors
            found = "another forward"
        if (name and _library_of(kind) not in LIBRARIES) or hasattr(module, "parametrizations"):
            found = f"a {name_of(kind)}"
        if found:
            accepted = f"parts of {', '.join(LIBRARIES)}, without hooks"
            raise UnsupportedModelError(f"{type(model).__name__}: found {found} at {name or '.'}; accepted: {accepted}")


def _library_of(item: Any) -> str:
    return str(getattr(item, "__module__", "")).partition(".")[0]


def _read(model: nn.Module, size: Size | None) -> Any:
    """The plan of a timm model, or the model itself, by the class of `model`; for images of `size`."""
    name = known_name(model, transformers_vits.LAYOUTS)
    if name is not None:
        _check_nothing_added(model)
        return transformers_vits.plan_of(model, name, size)
    name = known_name(model, READERS)
    if name is not None:
        read = READERS[name](model)
        own = read.arguments["img_size"] if isinstance(read, Plan) else "timm's, by its set_input_size"
        if size is not None and list(size) != own:
            raise UnsupportedModelError(f"{type(model).__name__}: found input_size {list(size)}; accepted: {own}")
        return read
    kind = type(model)
    if kind in families():
        raise UnsupportedModelError(f"found timm's {kind.__name__}; accepted: it as it is, by diffrate.patch.vit")
    names = sorted({name.rpartition(".")[2] for name in (*READERS, *transformers_vits.LAYOUTS)})
    raise UnsupportedModelError(f"found {name_of(kind)}; accepted: {', '.join(names)}")


def convert(model: nn.Module, input_size: int | Size | None = None, layer: int | None = None) -> Any:
    """A plain timm model that computes what `model` of another library computes, with copies of its weights.

    It takes images `[B, 3, H, W]` of the size that `model` is configured for, is not yet patched, and has the
    precision, device and mode of `model`, which stays as it is; all weights are trainable. It gives the logits of a
    classifier. Of a model without one it gives the pooled output, which searches compare by its angle: `pooler_output`
    of transformers' (the class token after the last norm where there is no pooler), `image_embeds` of
    `CLIPVisionModelWithProjection` and `CLIPModel`, and `encode_image` of open_clip's, both before they are normalised.

    input_size: height and width in pixels, or a side, of images of another size, for which a model of transformers
    interpolates its positions, as it does itself.

    layer: for a language model that reads `hidden_states[layer]`, such as -2, of the tower `model`: the blocks up to
    that one alone, whose features, not normalised, are what it reads.

    Raises:
        UnsupportedModelError: the class of `model` is not known, it has parts that timm's models have not, or it does
            not take images of `input_size`, or has no such `layer`.
    """
    plan = _read(model, None if input_size is None else as_size(input_size))
    if not isinstance(plan, Plan):
        if layer is not None:
            raise UnsupportedModelError(f"layer: found {layer} for {type(model).__name__}; accepted: None, all blocks")
        return plan
    if layer is not None:
        plan.end_at(layer)
    weight = plan.state["patch_embed.proj.weight"]
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and thrown away
        try:
            built = build(plan.architecture, plan.arguments, "cpu")
        except SavedModelError as error:
            raise UnsupportedModelError(f"{type(model).__name__}: {error}") from error
    built.to(weight.device, weight.dtype)
    _fill(built, plan, type(model).__name__)
    for block in built.blocks:
        if not plan.drops_inside:
            block.mlp.drop1.p = 0.0
        if plan.even_depth and (rate := plan.arguments.get("drop_path_rate")):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    size = (plan.arguments["in_chans"], *plan.arguments["img_size"])
    facts = {"num_classes": built.num_classes, "input_size": size}
    built.pretrained_cfg = built.default_cfg = {**built.pretrained_cfg, **facts}
    return built.train(model.training)


def _fill(built: nn.Module, plan: Plan, kind: str) -> None:
    """Copy the tensors of `plan` into `built`."""
    built.load_state_dict(completed(plan, built.state_dict(), kind))
    for name, tensor in plan.buffers.items():
        built.get_buffer(name).copy_(tensor)


def completed(plan: Plan, expected: State, kind: str) -> State:
    """The tensors of `plan`, for the model that has the `expected` ones; biases that only timm has are zeros.

    Raises:
        UnsupportedModelError: some are missing, have another shape or are no floats, or are of no part of timm's model.
    """
    state, left = {}, dict(plan.state)
    for name, own in expected.items():
        found = left.pop(name, None)
        if found is None and name.endswith("bias"):
            found = torch.zeros(own.shape)
        if found is None or found.is_meta or found.shape != own.shape or not holds_weights(found):
            shown = "nothing" if found is None else f"{found.dtype} {list(found.shape)} on {found.device}"
            raise UnsupportedModelError(f"{kind}: found {shown} for timm's {name}; accepted: floats {list(own.shape)}")
        state[name] = found
    if left:
        raise UnsupportedModelError(f"{kind}: found {', '.join(left)}; accepted: parts that timm's models have")
    return state
