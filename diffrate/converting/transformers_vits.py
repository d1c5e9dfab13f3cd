"""Readers of the vision transformers of transformers, by their classes. transformers itself is not imported: of a live
model and of files alike, readers see tensors and a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi, prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffrate.blocks.block import UnsupportedModelError
from diffrate.converting.layout import (
    BEIT,
    CLIP,
    EVA,
    IMAGENET_VIT,
    Names,
    Parts,
    Plan,
    State,
    parts_of,
    planned,
    ratio,
)
from diffrate.patch.shapes import Size, as_size

NAMES = Names(  # of transformers 4 and 5
    r"(?:encoder\.layers?|layers?|model\.layer)\.(\d+)\.",
    """patch_embed.proj embeddings.patch_embeddings.projection embeddings.patch_embeddings embeddings.patch_embedding
    cls_token embeddings.cls_token embeddings.class_embedding
    dist_token embeddings.distillation_token; reg_token embeddings.register_tokens
    pos_embed embeddings.position_embeddings embeddings.position_embedding.weight
    norm_pre pre_layrnorm; norm layernorm norm post_layernorm; fc_norm pooler.layernorm; head pooler.dense
    rel_pos_bias.relative_position_bias_table encoder.relative_position_bias.relative_position_bias_table
    rel_pos_bias shared_position_bias
    norm1 layernorm_before norm1 layer_norm1; norm2 layernorm_after norm2 layer_norm2
    attn.q attention.attention.query attention.q_proj self_attn.q_proj
    attn.k attention.attention.key attention.k_proj self_attn.k_proj
    attn.v attention.attention.value attention.v_proj self_attn.v_proj
    attn.proj attention.output.dense attention.o_proj self_attn.out_proj
    attn attention.attention.relative_position_bias relative_position_bias
    ls1.gamma lambda_1 layer_scale1.lambda1; ls2.gamma lambda_2 layer_scale2.lambda1
    mlp.gate mlp.gate_proj; mlp.fc1 intermediate.dense mlp.fc1 mlp.up_proj mlp.weights_in
    mlp.fc2 output.dense mlp.fc2 mlp.down_proj mlp.weights_out
    attn_pool.latent head.probe; attn_pool head.attention; attn_pool.proj head.attention.out_proj
    attn_pool.norm head.layernorm; attn_pool.mlp.fc1 head.mlp.fc1; attn_pool.mlp.fc2 head.mlp.fc2""",
    unread=("embeddings.mask_token", "embeddings.position_ids"),  # of pretraining, and of computed positions
)
_SAME = {name: name for name in ("gelu", "quick_gelu", "relu", "silu")}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu", **_SAME}
# What no image goes through, of models with two towers.
UNSEEN = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
# What a `config.json` need not say of one of two towers, by family: as in transformers.
_CLIP: Mapping[str, Any] = {"image_size": 224, "num_attention_heads": 12, "layer_norm_eps": 1e-5}
_SIGLIP = {"num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {**_CLIP, "hidden_act": "quick_gelu"},
    "siglip": {**_SIGLIP, "image_size": 224},
    "siglip2": {**_SIGLIP, "patch_size": 16, "num_patches": 256},
}
TABLES = ("use_relative_position_bias", "use_shared_relative_position_bias")


class Source(NamedTuple):
    """What is read of a model: its class, the tensors of what holds the blocks, those of the layers behind it by their
    own names, the configuration of what holds the blocks, and the size of images."""

    kind: str
    trunk: Parts
    behind: State
    config: Any
    size: Size

    def refusal(self, name: str, accepted: str) -> UnsupportedModelError:
        """That of a field of the configuration."""
        found = getattr(self.config, name)
        return UnsupportedModelError(f"{self.kind}: found config.{name} {found!r}; accepted: {accepted}")

    def layer(self, name: str) -> State:
        """The tensors of the model's layer `name`, as those of a head; none where it has none, or no labels."""
        found = {part: self.behind.get(f"{name}.{part}") for part in ("weight", "bias")}
        return {f"head.{part}": tensor for part, tensor in found.items() if tensor is not None}

    def plan(self, architecture: str, gated: bool = False, antialias: bool | None = None, **arguments: Any) -> Plan:
        """The plan of the trunk, its MLP `gated` or not, with its rates of dropout; `antialias` as `_interpolate`."""
        config, act = self.config, getattr(self.config, "hidden_act", "gelu")
        known = ACTIVATIONS if architecture not in (BEIT, EVA) else ("gelu",)  # those two take no other
        if act not in known and not gated:
            raise self.refusal("hidden_act", ", ".join(known))
        heads = config.num_attention_heads
        plan = planned(self.kind, self.trunk, NAMES, architecture, heads, self.size, **arguments)
        if self.size != image_size(config) and architecture != EVA:
            self._interpolate(plan, antialias)
        if not gated and architecture not in (BEIT, EVA):
            plan.arguments["act_layer"] = ACTIVATIONS[act]
        in_attention = getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0))
        rates = {"pos_drop_rate": getattr(config, "hidden_dropout_prob", 0.0), "attn_drop_rate": in_attention}
        rates["drop_path_rate"] = getattr(config, "drop_path_rate", 0.0)
        plan.arguments |= {name: float(rate) for name, rate in rates.items() if rate}
        return plan

    def _interpolate(self, plan: Plan, antialias: bool | None) -> None:
        """Give `plan` the positions that the model itself has for images of another size than its own.

        antialias: of the classes that interpolate in float32 in any precision, whether they do so; None of the others.
        """
        own, found = image_size(self.config), "x".join(map(str, self.size))
        if not hasattr(self.config, "image_size") or any(getattr(self.config, name, False) for name in TABLES):
            raise UnsupportedModelError(f"{self.kind}: found input_size {found}; accepted: {own[0]}x{own[1]}")
        sides, positions = plan.arguments["patch_size"], plan.state.get("pos_embed")
        if positions is None:
            return
        before, after = ([side // step for side, step in zip(size, sides, strict=True)] for size in (own, self.size))
        first = sum(name in plan.state for name in ("cls_token", "dist_token"))
        if positions.shape[1] != first + prod(before):
            raise self.refusal("image_size", f"one of {positions.shape[1] - first} patches, as there are positions")
        grid = positions[:, first:].unflatten(1, before).movedim(-1, 1)
        grid = grid if antialias is None else grid.float()
        made = F.interpolate(grid, after, mode="bicubic", align_corners=False, antialias=bool(antialias))
        plan.state["pos_embed"] = torch.cat([positions[:, :first], made.to(positions.dtype).flatten(2).mT], dim=1)


def image_size(config: Any) -> Size:
    """Height and width that a model was configured for; of SigLIP 2, those of a square of as many patches."""
    if hasattr(config, "image_size"):
        return as_size(config.image_size, "config.image_size")
    return as_size(config.patch_size * int(config.num_patches**0.5), "config.num_patches")


def hidden_dropout(plan: Plan) -> None:
    """Dropout after attention and after the MLP, at the rate of the embeddings'."""
    if "pos_drop_rate" in plan.arguments:
        plan.arguments["proj_drop_rate"], plan.drops_inside = plan.arguments["pos_drop_rate"], False


def vit(source: Source) -> Plan:
    """ViT, DeiT without its second head, and the encoder of MAE: the class token, through a head where there is one."""
    if getattr(source.config, "mask_ratio", 0):
        raise source.refusal("mask_ratio", "0, since masking is random; or the same weights in a ViTModel")
    plan = source.plan("vit_base_patch16_224", class_token=True, global_pool="token")
    if "dist_token" in plan.state:  # that nothing reads in the end: a register
        plan.architecture, plan.arguments["reg_tokens"] = IMAGENET_VIT, 1
        plan.state["reg_token"] = plan.state.pop("dist_token")
    hidden_dropout(plan)
    if "head.weight" in plan.state:
        if getattr(source.config, "pooler_act", "tanh") != "tanh":
            raise source.refusal("pooler_act", "tanh")
        plan.add_head({}, feature_head="tanh")
    elif layer := source.layer("classifier"):
        plan.add_head(layer)
    return plan


def distilled(source: Source) -> Plan:
    """DeiT with both heads, of which the logits are the mean."""
    plan = source.plan("deit_base_distilled_patch16_224", global_pool="token")
    hidden_dropout(plan)
    if layer := source.layer("cls_classifier"):
        plan.add_head(layer)
    second = source.layer("distillation_classifier")
    plan.state |= {name.replace("head", "head_dist"): tensor for name, tensor in second.items()}
    return plan


def beit(source: Source) -> Plan:
    """BEiT, with tables of relative positions for each block, for all, or none."""
    config = source.config
    if source.size[0] != source.size[1] and any(getattr(config, name) for name in TABLES):  # transformers mixes them up
        raise source.refusal("image_size", "a square, with relative positions")
    plan = source.plan(
        BEIT,
        global_pool="avg" if config.use_mean_pooling else "token",
        use_abs_pos_emb=config.use_absolute_position_embeddings,
        use_rel_pos_bias=config.use_relative_position_bias,
        use_shared_rel_pos_bias=config.use_shared_relative_position_bias,
    )
    if config.use_mean_pooling and "fc_norm.weight" not in plan.state:
        raise source.refusal("use_mean_pooling", "False without a pooler")
    if "init_values" not in plan.arguments:  # timm's all have layer scale
        ones = torch.ones_like(plan.state["blocks.0.norm1.weight"])
        plan.state |= {f"blocks.{i}.ls{part}.gamma": ones for i in range(plan.arguments["depth"]) for part in (1, 2)}
    plan.name_as_eva()
    hidden_dropout(plan)
    if layer := source.layer("classifier"):
        plan.add_head(layer)
    return plan


def dinov2(source: Source) -> Plan:
    """DINOv2, with registers or without; its classifier sees the class token beside the mean of the patches."""
    gated = source.config.use_swiglu_ffn
    architecture = "vit_giant_patch14_dinov2" if gated else "vit_base_patch14_dinov2"
    registers = hasattr(source.config, "num_register_tokens")
    plan = source.plan(architecture, gated, registers, class_token=True, global_pool="token")
    arguments, state = plan.arguments, plan.state
    plan.even_depth = True
    if "reg_token" in state:  # it has no position: that of the class token becomes part of the token
        positions = state["pos_embed"]
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
        arguments |= {"reg_tokens": state["reg_token"].shape[1], "no_embed_class": True}
    if layer := source.layer("classifier"):
        arguments |= {"global_pool": "map", "pool_include_prefix": True, "class_and_mean": True}
        plan.add_head(layer)
    return plan


def dinov3(source: Source) -> Plan:
    """DINOv3: registers, and rotary positions with sines and cosines rounded as the model's own."""
    config = source.config
    gated = config.use_gated_mlp
    if gated and config.hidden_act not in ("silu", "swish"):
        raise source.refusal("hidden_act", "silu, where config.use_gated_mlp is set")
    options: dict[str, Any] = {
        "class_token": True,
        "global_pool": "token",
        "dynamic_img_size": False,
        "use_fc_norm": False,
    }
    plan = source.plan(EVA, gated, swiglu_mlp=gated, rope_temperature=float(config.rope_theta), **options)
    arguments, state = plan.arguments, plan.state
    arguments |= {"num_reg_tokens": config.num_register_tokens, "attn_type": "rope" if config.key_bias else "eva"}
    if gated:
        arguments["mlp_ratio"] = ratio(config.intermediate_size, config.hidden_size)
    if not config.num_register_tokens:
        del state["reg_token"]
    plan.name_as_eva(config.key_bias)
    plan.even_depth = True
    plan.buffers["rope.pos_embed_cached"] = _angles(config, plan)
    return plan


def _angles(config: Any, plan: Plan) -> Tensor:
    """Sines and cosines `[patches, 2 D]` of DINOv3's positions, rounded as transformers does."""
    weight, arguments = plan.state["patch_embed.proj.weight"], plan.arguments
    steps = torch.arange(0, 1, 4 / (arguments["embed_dim"] // config.num_attention_heads), device=weight.device)
    frequencies = (1 / config.rope_theta**steps).to(weight.dtype)
    sides = [side // step for side, step in zip(arguments["img_size"], arguments["patch_size"], strict=True)]
    centres = torch.meshgrid(*(torch.arange(0.5, side, device=weight.device) / side for side in sides), indexing="ij")
    places = 2.0 * torch.stack(centres, dim=-1).flatten(0, 1) - 1.0
    angles = (2 * pi * places[:, :, None] * frequencies).flatten(1).tile(2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def clip(source: Source) -> Plan:
    """CLIP: a norm before the blocks, and a projection where the model has one."""
    layer = source.layer("classifier")
    pooled: dict[str, Any] = {"global_pool": "avg", "final_norm": False} if layer else {"global_pool": "token"}
    plan = source.plan(CLIP, class_token=True, pre_norm=True, **pooled)
    if layer:  # it sees the mean of patches that were not normalised
        plan.state = {name: tensor for name, tensor in plan.state.items() if name not in ("norm.weight", "norm.bias")}
        plan.add_head(layer)
    elif projection := source.layer("visual_projection"):
        plan.add_head(projection, feature_head="none")
    return plan


def siglip(source: Source) -> Plan:
    """SigLIP, and SigLIP 2 at one square size: pooled by attention, or for a classifier by the mean."""
    layer = source.layer("classifier")
    if not layer and not getattr(source.config, "vision_use_head", True):
        raise source.refusal("vision_use_head", "True, since nothing else pools")
    pooled: dict[str, Any] = {"global_pool": "avg", "fc_norm": False} if layer else {"global_pool": "map"}
    plan = source.plan("vit_base_patch16_siglip_224", class_token=False, **pooled)
    state, patch = plan.state, plan.state["patch_embed.proj.weight"]
    if patch.ndim == 2:  # SigLIP 2 takes patches, channels last
        side = source.config.patch_size
        state["patch_embed.proj.weight"] = patch.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        plan.arguments |= {"patch_size": [side, side], "in_chans": source.config.num_channels}
    pool = {name: state.pop(name) for name in list(state) if name.startswith("attn_pool.")}
    if layer:
        plan.add_head(layer)
        return plan
    for part in ("weight", "bias"):
        joined = pool.pop(f"attn_pool.in_proj_{part}")
        pool |= {f"attn_pool.q.{part}": joined[: len(patch)], f"attn_pool.kv.{part}": joined[len(patch) :]}
    state |= pool
    return plan


class Layout(NamedTuple):
    """How a class of transformers is read, and what it returns.

    reader: from its model to a plan. trunk: the attribute with the blocks, or the model itself where it has none such.
    output: the class of what its forward returns, in the file of the model. normed: whether the last hidden state has
    been through the last norm. behind: the linear layers after it that its class has.
    """

    reader: Callable[[Source], Plan]
    trunk: str = ""
    output: str = "BaseModelOutputWithPooling"
    normed: bool = True
    behind: tuple[str, ...] = ()


def _layouts() -> dict[str, Layout]:
    found: dict[str, Layout] = {}

    def add(folder: str, reader: Callable[[Source], Plan], models: str, classifiers: str = "", **facts: Any) -> None:
        place = f"transformers.models.{folder}.modeling_{folder}"
        found.update({f"{place}.{name}": Layout(reader, **facts) for name in models.split()})
        facts = {"trunk": folder, **facts, "output": "ImageClassifierOutput", "behind": ("classifier",)}
        found.update({f"{place}.{name}": Layout(reader, **facts) for name in classifiers.split()})

    teacher = "DeiTForImageClassificationWithTeacher"
    add("vit", vit, "ViTModel", "ViTForImageClassification")
    add("vit_mae", vit, "ViTMAEModel", output="ViTMAEModelOutput")
    add("deit", vit, "DeiTModel", "DeiTForImageClassification")
    both = ("cls_classifier", "distillation_classifier")
    add("deit", distilled, teacher, trunk="deit", output=f"{teacher}Output", behind=both)
    add("beit", beit, "BeitModel", "BeitForImageClassification", output="BeitModelOutputWithPooling")
    add("dinov2", dinov2, "Dinov2Model", "Dinov2ForImageClassification")
    registers = "Dinov2WithRegisters"
    add("dinov2_with_registers", dinov2, f"{registers}Model", f"{registers}ForImageClassification")
    add("dinov3_vit", dinov3, "DINOv3ViTModel")
    facts = {"trunk": "vision_model", "normed": False}  # of transformers 4 vision models have a trunk, too
    add("clip", clip, "CLIPVisionModel CLIPVisionTransformer", "CLIPForImageClassification", **facts)
    facts["behind"] = ("visual_projection",)
    add("clip", clip, "CLIPVisionModelWithProjection", output="CLIPVisionModelOutput", **facts)
    add("clip", clip, "CLIPModel", output="CLIPOutput", **facts)
    for folder, name in (("siglip", "Siglip"), ("siglip2", "Siglip2")):
        models = f"{name}VisionModel {name}VisionTransformer"
        add(folder, siglip, models, f"{name}ForImageClassification", trunk="vision_model")
        add(folder, siglip, f"{name}Model", trunk="vision_model", output=f"{name}Output")
    return found


LAYOUTS: Mapping[str, Layout] = _layouts()


def plan_of(model: nn.Module, name: str, size: Size | None) -> Plan:
    """The plan of a model whose class has the full name `name`, one of `LAYOUTS`; for images of `size` or its own."""
    layout, kind, behind = LAYOUTS[name], type(model).__name__, {}
    trunk: Any = getattr(model, layout.trunk, model) if layout.trunk else model
    for place in layout.behind:
        layer = getattr(model, place, None)
        if layer is None or type(layer) is nn.Identity:
            continue
        if not isinstance(layer, nn.Linear):
            raise UnsupportedModelError(f"{kind}: found the {place} {type(layer).__name__}; accepted: Linear")
        behind |= {f"{place}.{part}": tensor.detach() for part, tensor in layer.state_dict().items()}
    return layout.reader(Source(kind, parts_of(trunk), behind, trunk.config, size or image_size(trunk.config)))


def plan_of_files(config: Mapping[str, Any], tensors: State, size: Size | None) -> Plan:
    """The same of the content of a `config.json` and of the weights beside it.

    Raises:
        UnsupportedModelError: the class is not known, has parts that timm's models have not, or lacks tensors.
    """
    found, kind = config.get("model_type"), str((config.get("architectures") or [None])[0])
    name = next((name for name in LAYOUTS if name.rpartition(".")[2] == kind), None)
    family = "" if name is None else name.split(".")[2]
    if name is None or found not in (family, f"{family}_vision_model") or "auto_map" in config:
        accepted = ", ".join(sorted(name.rpartition(".")[2] for name in LAYOUTS))
        own = " with code of its own" if "auto_map" in config else ""
        raise UnsupportedModelError(
            f"config.json: found the class {kind} of model_type {found!r}{own}; accepted: {accepted}"
        )
    layout = LAYOUTS[name]
    facts = SimpleNamespace(**{**DEFAULTS.get(family, {}), **config.get("vision_config", config)})
    behind = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] in layout.behind}
    prefix = f"{layout.trunk}."
    if not any(key.startswith(prefix) for key in tensors):  # saved as the trunk alone
        prefix = ""
    spare = f"{prefix}pooler.dense." if layout.behind else UNSEEN  # which classifiers have not, and files may
    others = [key for key in tensors if key not in behind and not key.startswith(spare)]
    trunk = {key.removeprefix(prefix): tensors[key] for key in others if key.startswith(prefix)}
    left = [key for key in others if not key.startswith((prefix, *UNSEEN))]
    lacking = [place for place in layout.behind if f"{place}.weight" not in behind and config.get("id2label") != {}]
    if left or lacking:
        wrong = f"{left[0]}; accepted: the parts of its class" if left else f"no {lacking[0]}.weight; accepted: one"
        raise UnsupportedModelError(f"{kind}: found {wrong}")
    source = Source(kind, Parts(trunk, (float(facts.layer_norm_eps),)), behind, facts, size or image_size(facts))
    return layout.reader(source)


def both_heads(model: Any, images: Tensor) -> dict[str, Tensor]:
    """What a distilled classifier of transformers returns: the logits of both heads, `[B, K]`, and their mean."""
    entry, schedule = model.enter(images), model.schedule
    x = model.norm(model.run(model.steps(entry, schedule), entry.state).x)
    first, second = model.head(x[:, 0]), model.head_dist(x[:, 1])
    return {"logits": (first + second) / 2, "cls_logits": first, "distillation_logits": second}


def images_of_patches(model: Any, patches: Tensor, options: dict[str, Any]) -> Tensor:
    """Images `[B, C, H, W]` of the patches `[B, N, P * P * C]` that SigLIP 2 takes; all there, and of one grid.

    Raises:
        ValueError: patches of another grid, or some that are masked.
    """
    rows, columns = model.token_grid
    shapes, mask = options.get("spatial_shapes"), options.get("pixel_attention_mask")
    mask = options.pop("attention_mask", None) if mask is None else mask  # as the tower of transformers 4 calls it
    if shapes is not None and (torch.as_tensor(shapes) != torch.tensor([rows, columns], device=shapes.device)).any():
        raise ValueError(f"spatial_shapes: found {shapes.tolist()}; accepted: {[rows, columns]} for all images")
    if patches.shape[1] != rows * columns or (mask is not None and not mask.all()):
        raise ValueError(f"pixel_values: found {patches.shape[1]} patches; accepted: {rows * columns}, none masked")
    height, width = model.stem.patch_size
    split = patches.unflatten(2, (height, width, -1)).unflatten(1, (rows, columns))
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
