"""Readers of the vision transformers of transformers, by their classes. transformers itself is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffrate.blocks.block import UnsupportedModelError
from diffrate.converting.layout import (
    BEIT,
    CLIP,
    DINOV2,
    DISTILLED,
    EVA,
    IMAGENET_VIT,
    SIGLIP,
    SWIGLU,
    VIT,
    Names,
    Plan,
    Tensors,
    add_head,
    epsilon_of,
    ratio,
    read_vit,
    rename_as_eva,
)
from diffrate.patch.shapes import Size, as_size

# Those of transformers 4 stand before those of 5.
NAMES = Names(
    patch=(*("embeddings.patch_embeddings.projection", "embeddings.patch_embeddings", "embeddings.patch_embedding"),),
    class_token=("embeddings.cls_token", "embeddings.class_embedding"),
    positions=("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
    norm=("layernorm", "norm", "post_layernorm"),
    norm_pre=("pre_layrnorm",),
    block=("encoder.layer.{}.", "encoder.layers.{}.", "layers.{}.", "model.layer.{}.", "layer.{}."),
    norm1=("layernorm_before", "norm1", "layer_norm1"),
    query=("attention.attention.query", "attention.q_proj", "self_attn.q_proj"),
    key=("attention.attention.key", "attention.k_proj", "self_attn.k_proj"),
    value=("attention.attention.value", "attention.v_proj", "self_attn.v_proj"),
    proj=("attention.output.dense", "attention.o_proj", "self_attn.out_proj"),
    scale1=("lambda_1", "layer_scale1.lambda1"),
    norm2=("layernorm_after", "norm2", "layer_norm2"),
    fc1=("intermediate.dense", "mlp.fc1", "mlp.up_proj", "mlp.weights_in"),
    gate=("mlp.gate_proj",),
    fc2=("output.dense", "mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
    scale2=("lambda_2", "layer_scale2.lambda1"),
)
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
} | {name: name for name in ("relu", "silu")}
SWIGLUS = ("silu", "swish")
UNREAD = ("embeddings.mask_token", "embeddings.position_ids")  # of pretraining, and of computed positions


class Source(NamedTuple):
    """What a reader reads: a model, the module in it that holds the blocks, its configuration and its tensors."""

    model: Any
    trunk: Any
    config: Any
    tensors: Tensors
    kind: str

    def refuse(self, name: str, found: object, accepted: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.kind}: found config.{name} {found!r}; accepted: {accepted}")

    def linear(self, layer: nn.Module | None) -> dict[str, Tensor]:
        """The head's tensors of a linear layer; none of a layer that passes on what it gets."""
        if layer is None or type(layer) is nn.Identity:
            return {}
        if not isinstance(layer, nn.Linear):
            raise UnsupportedModelError(f"{self.kind}: found the head {type(layer).__name__}; accepted: Linear")
        return {f"head.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}


def read(source: Source, architecture: str, **arguments: Any) -> Plan:
    """What all have: the trunk up to its last norm, which is left to the reader."""
    config, kind = source.config, source.kind
    act = getattr(config, "hidden_act", "gelu")
    gated = getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)
    accepted = SWIGLUS if getattr(config, "use_gated_mlp", False) else tuple(ACTIVATIONS)
    if act not in accepted and not getattr(config, "use_swiglu_ffn", False):
        raise source.refuse("hidden_act", act, ", ".join(accepted))
    heads, size = config.num_attention_heads, image_size(config)
    plan = read_vit(source.tensors, NAMES, architecture, heads, size, **arguments)
    if architecture not in (BEIT, EVA) and not gated:  # those two have no other than GELU, in timm as here
        plan.arguments["act_layer"] = ACTIVATIONS[act]
    elif act != "gelu" and not gated:
        raise source.refuse("hidden_act", act, "gelu")
    plan.arguments["norm_eps"] = epsilon_of(source.trunk, kind)
    names = {
        "pos_drop_rate": ("hidden_dropout_prob",),
        "attn_drop_rate": ("attention_probs_dropout_prob", "attention_dropout"),
        "drop_path_rate": ("drop_path_rate",),
    }
    for ours, theirs in names.items():
        rate = next((getattr(config, name) for name in theirs if hasattr(config, name)), 0.0)
        if rate:
            plan.arguments[ours] = float(rate)
    return plan


def image_size(config: Any) -> Size:
    """Height and width that a model was configured for; of SigLIP 2, the square of as many patches."""
    if hasattr(config, "image_size"):
        return as_size(config.image_size, "config.image_size")
    return as_size(config.patch_size * int(config.num_patches**0.5), "config.num_patches")


def vit(source: Source) -> Plan:
    """ViT, DeiT without its second head, and the encoder of MAE."""
    ratio = getattr(source.config, "mask_ratio", 0)
    if ratio:
        raise source.refuse("mask_ratio", ratio, "0, since masking is random; or the weights in a ViTModel")
    plan = read(source, VIT, class_token=True, global_pool="token")
    distillation = source.tensors.find("embeddings.distillation_token")
    if distillation is not None:  # a token that nothing reads in the end is a register
        plan.architecture = IMAGENET_VIT
        plan.arguments["reg_tokens"], plan.state["reg_token"] = 1, distillation
    hidden_dropout(plan)
    return with_pooler(plan, source)


def distilled(source: Source) -> Plan:
    """DeiT with both heads; the logits are their mean."""
    plan = read(source, DISTILLED, global_pool="token")
    plan.state["dist_token"] = source.tensors.take("embeddings.distillation_token")
    hidden_dropout(plan)
    plan.state |= source.tensors.layer("norm", NAMES.norm)
    add_head(plan, source.linear(source.model.cls_classifier))
    second = source.linear(source.model.distillation_classifier)
    plan.state |= {name.replace("head", "head_dist"): tensor for name, tensor in second.items()}
    return plan


def hidden_dropout(plan: Plan) -> None:
    """Dropout after attention and after the MLP, at the rate of that of the embeddings."""
    if "pos_drop_rate" in plan.arguments:
        plan.arguments["proj_drop_rate"], plan.drops_inside = plan.arguments["pos_drop_rate"], False


def with_pooler(plan: Plan, source: Source) -> Plan:
    """The class token after the last norm, through a classifier or a pooler where the model has one."""
    plan.state |= source.tensors.layer("norm", NAMES.norm)
    classifier, pooler = getattr(source.model, "classifier", None), getattr(source.trunk, "pooler", None)
    if pooler is not None:
        act = source.config.pooler_act if hasattr(source.config, "pooler_act") else "tanh"
        if act != "tanh":
            raise source.refuse("pooler_act", act, "tanh")
        add_head(plan, source.tensors.layer("head", ("pooler.dense",)), feature_head="tanh")
    elif classifier is not None and (layer := source.linear(classifier)):
        add_head(plan, layer)
    return plan


def beit(source: Source) -> Plan:
    """BEiT, with tables of relative positions for each block, or one for all, or none."""
    config, tensors = source.config, source.tensors
    mean = config.use_mean_pooling
    plan = read(
        source,
        BEIT,
        global_pool="avg" if mean else "token",
        use_abs_pos_emb=config.use_absolute_position_embeddings,
        use_rel_pos_bias=config.use_relative_position_bias,
        use_shared_rel_pos_bias=config.use_shared_relative_position_bias,
    )
    if "init_values" not in plan.arguments:  # of timm's, each has layer scale
        ones = torch.ones_like(plan.state["blocks.0.norm1.weight"])
        plan.state |= {f"blocks.{i}.ls{part}.gamma": ones for i in range(plan.arguments["depth"]) for part in (1, 2)}
    table = "relative_position_bias.relative_position_bias_table"
    for number in range(plan.arguments["depth"]):
        found = tensors.find(f"encoder.layer.{number}.attention.attention.{table}", f"layers.{number}.{table}")
        if found is not None:
            plan.state[f"blocks.{number}.attn.relative_position_bias_table"] = found
    shared = tensors.find(f"encoder.{table}", "shared_position_bias.relative_position_bias_table")
    if shared is not None:
        plan.state["rel_pos_bias.relative_position_bias_table"] = shared
    rename_as_eva(plan)
    hidden_dropout(plan)
    if source.trunk.pooler is None and mean:
        raise UnsupportedModelError(
            f"{source.kind}: found no pooler; accepted: one, where config.use_mean_pooling is set"
        )
    ours, theirs = ("fc_norm", ("pooler.layernorm",)) if mean else ("norm", NAMES.norm)
    plan.state |= tensors.layer(ours, theirs)
    layer = source.linear(getattr(source.model, "classifier", None))
    if layer:
        add_head(plan, layer)
    return plan


def dinov2(source: Source) -> Plan:
    """DINOv2, with registers or without; its classifier sees the class token beside the mean of the patches."""
    architecture = SWIGLU if source.config.use_swiglu_ffn else DINOV2
    plan = read(source, architecture, class_token=True, global_pool="token")
    if architecture == SWIGLU:  # timm counts both halves
        plan.arguments["mlp_ratio"] = ratio(len(plan.state["blocks.0.mlp.fc1.weight"]), plan.arguments["embed_dim"])
    registers = source.tensors.find("embeddings.register_tokens")
    if registers is not None and registers.shape[1]:
        with_registers(plan, registers)
    plan.even_depth = True
    if classifier := source.linear(getattr(source.model, "classifier", None)):
        plan.arguments |= {"global_pool": "map", "pool_include_prefix": True, "class_and_mean": True}
        add_head(plan, classifier)
    plan.state |= source.tensors.layer("norm", NAMES.norm)
    return plan


def with_registers(plan: Plan, registers: Tensor) -> None:
    """Put `registers` `[1, R, C]` behind the class token; the class token's position becomes part of it."""
    positions = plan.state["pos_embed"]
    plan.state |= {
        "reg_token": registers,
        "cls_token": plan.state["cls_token"] + positions[:, :1],
        "pos_embed": positions[:, 1:],
    }
    plan.arguments |= {"reg_tokens": registers.shape[1], "no_embed_class": True}


def dinov3(source: Source) -> Plan:
    """DINOv3: rotary positions, computed by the model itself, and registers."""
    config, tensors = source.config, source.tensors
    registers = tensors.take("embeddings.register_tokens")
    plan = read(
        source,
        EVA,
        class_token=True,
        global_pool="token",
        num_reg_tokens=registers.shape[1],
        swiglu_mlp=config.use_gated_mlp,
        attn_type="rope" if config.key_bias else "eva",
        rope_temperature=float(
            config.rope_theta if hasattr(config, "rope_theta") else source.trunk.rope_embeddings.base
        ),
        dynamic_img_size=False,
        use_fc_norm=False,
    )
    if config.use_gated_mlp:
        plan.arguments["mlp_ratio"] = ratio(config.intermediate_size, config.hidden_size)
    if registers.shape[1]:
        plan.state["reg_token"] = registers
    rename_as_eva(plan, config.key_bias)
    plan.even_depth = True
    plan.state |= tensors.layer("norm", NAMES.norm)
    rows, columns = image_size(config)
    embeddings = source.trunk.rope_embeddings
    was_training = embeddings.training  # then they would be shifted
    weight = plan.state["patch_embed.proj.weight"]
    cosines, sines = embeddings.eval()(weight.new_empty(1, 1, rows, columns))
    embeddings.train(was_training)
    plan.buffers["rope.pos_embed_cached"] = torch.cat([sines, cosines], dim=-1)
    return plan


def clip(source: Source) -> Plan:
    """CLIP: a norm before the blocks, and a projection where the model has one."""
    tensors, classifier = source.tensors, source.linear(getattr(source.model, "classifier", None))
    pooled = {"global_pool": "avg", "final_norm": False} if classifier else {"global_pool": "token"}
    plan = read(source, CLIP, class_token=True, pre_norm=True, **pooled)
    plan.state |= tensors.layer("norm_pre", NAMES.norm_pre)
    norm = tensors.layer("norm", NAMES.norm)
    if classifier:  # the mean of patches that were not normalised
        add_head(plan, classifier)
        return plan
    plan.state |= norm
    if projection := source.linear(getattr(source.model, "visual_projection", None)):
        add_head(plan, projection, feature_head="none")
    return plan


def siglip(source: Source) -> Plan:
    """SigLIP, and SigLIP 2 at one square size: pooled by attention, or for a classifier by the mean."""
    tensors, classifier = source.tensors, source.linear(getattr(source.model, "classifier", None))
    has_pool = getattr(source.config, "vision_use_head", True)
    if not has_pool and not classifier:
        raise source.refuse("vision_use_head", has_pool, "True, since there is nothing else that pools")
    pooled = {"global_pool": "avg", "fc_norm": False} if classifier else {"global_pool": "map"}
    plan = read(source, SIGLIP, class_token=False, **pooled)
    patch = plan.state["patch_embed.proj.weight"]
    if patch.ndim == 2:  # SigLIP 2 takes patches, channels last
        side = source.config.patch_size
        plan.state["patch_embed.proj.weight"] = patch.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        plan.arguments |= {"patch_size": [side, side], "in_chans": source.config.num_channels}
    plan.state |= tensors.layer("norm", NAMES.norm)
    if has_pool:
        pool = attention_pool(tensors)
        plan.state |= {} if classifier else pool
    if classifier:
        add_head(plan, classifier)
    return plan


def attention_pool(tensors: Tensors) -> dict[str, Tensor]:
    """The pooling of SigLIP under timm's names."""
    state = {"attn_pool.latent": tensors.take("head.probe")}
    for part in ("weight", "bias"):
        joined = tensors.take(f"head.attention.in_proj_{part}")
        width = len(joined) // 3
        state |= {f"attn_pool.q.{part}": joined[:width], f"attn_pool.kv.{part}": joined[width:]}
    for ours, theirs in (("proj", "attention.out_proj"), ("norm", "layernorm"), ("mlp.fc1",) * 2, ("mlp.fc2",) * 2):
        state |= tensors.layer(f"attn_pool.{ours}", (f"head.{theirs}",))
    return state


class Layout(NamedTuple):
    """How a class of transformers is read, and what it returns.

    reader: from its model to a plan. trunk: the attribute with the blocks, or the model itself where it has none such.
    output: the class of what its forward returns, in the file of the model. normed: whether the last hidden state has
    been through the last norm.
    """

    reader: Callable[[Source], Plan]
    trunk: str = ""
    output: str = "BaseModelOutputWithPooling"
    normed: bool = True


def _layouts() -> dict[str, Layout]:
    found: dict[str, Layout] = {}

    def add(folder: str, *names: str, **facts: Any) -> None:
        for name in names:
            found[f"transformers.models.{folder}.modeling_{folder}.{name}"] = Layout(**facts)

    classifier, embeds = "ImageClassifierOutput", "CLIPVisionModelOutput"
    teacher = "DeiTForImageClassificationWithTeacherOutput"
    add("vit", "ViTModel", reader=vit)
    add("vit", "ViTForImageClassification", reader=vit, trunk="vit", output=classifier)
    add("vit_mae", "ViTMAEModel", reader=vit, output="ViTMAEModelOutput")
    add("deit", "DeiTModel", reader=vit)
    add("deit", "DeiTForImageClassification", reader=vit, trunk="deit", output=classifier)
    add("deit", "DeiTForImageClassificationWithTeacher", reader=distilled, trunk="deit", output=teacher)
    add("beit", "BeitModel", reader=beit, output="BeitModelOutputWithPooling")
    add("beit", "BeitForImageClassification", reader=beit, trunk="beit", output=classifier)
    for folder, name in (("dinov2", "Dinov2"), ("dinov2_with_registers", "Dinov2WithRegisters")):
        add(folder, f"{name}Model", reader=dinov2)
        add(folder, f"{name}ForImageClassification", reader=dinov2, trunk=folder, output=classifier)
    add("dinov3_vit", "DINOv3ViTModel", reader=dinov3)
    tower = "vision_model"  # in transformers 4 of the vision models, too
    add("clip", "CLIPVisionModel", "CLIPVisionTransformer", reader=clip, trunk=tower, normed=False)
    add("clip", "CLIPVisionModelWithProjection", reader=clip, trunk=tower, output=embeds, normed=False)
    add("clip", "CLIPModel", reader=clip, trunk=tower, output="CLIPOutput", normed=False)
    add("clip", "CLIPForImageClassification", reader=clip, trunk=tower, output=classifier, normed=False)
    for folder, name in (("siglip", "Siglip"), ("siglip2", "Siglip2")):
        add(folder, f"{name}VisionModel", f"{name}VisionTransformer", reader=siglip, trunk=tower)
        add(folder, f"{name}Model", reader=siglip, trunk=tower, output=f"{name}Output")
        add(folder, f"{name}ForImageClassification", reader=siglip, trunk=tower, output=classifier)
    return found


LAYOUTS: Mapping[str, Layout] = _layouts()


def plan_of(model: nn.Module, name: str) -> Plan:
    """The plan of a model whose class has the full name `name`, one of `LAYOUTS`."""
    layout, kind = LAYOUTS[name], name.rpartition(".")[2]
    trunk: Any = getattr(model, layout.trunk, model) if layout.trunk else model
    source = Source(model, trunk, trunk.config, Tensors(trunk, kind), kind)
    plan = layout.reader(source)
    source.tensors.check_taken(UNREAD)
    return plan
