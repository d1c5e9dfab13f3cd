"""Saved models of every construction of timm's ViTs, as `timm.create_model` and what came after it left them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.layers.norm import RmsNorm
from timm.models import build_model_with_cfg
from timm.models.metaformer import Attention, SepConv
from timm.models.naflexvit import NaFlexVitCfg
from torch import nn

from diffrate.files.header import ARGUMENTS, OWN_ARGUMENTS, about
from diffrate.files.save import load, save
from diffrate.patch.base import CompressedModel
from diffrate.patch.shapes import input_size
from diffrate.patch.timm_families import families, vit
from tests.constructions import CONSTRUCTIONS, build, size_of
from tests.library.saved_models import assert_same, needs_arguments, refusal, scheduled

pytestmark = needs_arguments

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
SIZED = SMALL | {"img_size": 32, "patch_size": 8}
BUILT_BY_TIMM = [name for name in CONSTRUCTIONS if name != "gated"]
# One of each class of timm's, and of each way in which tokens carry what they need.
KINDS = (
    *("class_token", "distilled", "hybrid", "attention_pool", "rope", "rope_mixed", "rope_dinov3"),
    *("relative_table", "relative_shared_network", "naflex", "naflex_rope", "naflex_attention_pool"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def patched(name: str, **options: Any) -> CompressedModel:
    """The model of a construction, which removes tokens."""
    # Trainable, as loaded ones are: for frozen weights torch takes other kernels, which round otherwise.
    plain = build(name, **options).requires_grad_(True)
    return scheduled(vit(plain, 1, 1, size_of(name)))


def come_back(model: CompressedModel, path: Path) -> CompressedModel:
    """`model` from its file, where it has to be the same."""
    save(model, path)
    said, plain = about(path), model.pretrained_cfg
    assert said.input_size == input_size(model)
    assert said.num_classes == model.num_classes
    assert (said.mean, said.std, said.crop_pct) == (plain["mean"], plain["std"], plain["crop_pct"])
    loaded = load(path)
    assert_same(loaded, model)
    return loaded


@pytest.mark.parametrize("name", BUILT_BY_TIMM)
def test_every_construction_comes_back(path: Path, name: str) -> None:
    come_back(patched(name), path)


@pytest.mark.parametrize("name", KINDS)
def test_without_a_head_and_in_few_bits(path: Path, name: str) -> None:
    """Tables of positions keep their own precision."""
    model: Any = patched(name, num_classes=0).bfloat16()
    come_back(model, path)
    assert about(path).num_classes == 0


@pytest.mark.parametrize("name", KINDS)
def test_a_reset_head_comes_back(path: Path, name: str) -> None:
    plain: Any = build(name).requires_grad_(True)
    pool = "" if plain.global_pool == "avg" else "avg"
    plain.reset_classifier(3, "token" if name == "distilled" else pool)
    come_back(scheduled(vit(plain, 1, 1, size_of(name))), path)
    assert about(path).num_classes == 3


# Sizes


@pytest.mark.parametrize(
    ("architecture", "options", "size"),
    [
        ("vit_tiny_patch16_224", SIZED | {"img_size": (32, 48)}, (32, 48)),
        ("vit_tiny_patch16_224", SIZED | {"dynamic_img_size": True}, (48, 24)),
        ("vit_tiny_patch16_224", SIZED | {"dynamic_img_size": True, "dynamic_img_pad": True}, (45, 30)),
        ("eva02_tiny_patch14_224", SIZED | {"img_size": (32, 48)}, (32, 48)),
        ("eva02_tiny_patch14_224", SIZED | {"dynamic_img_size": True}, (48, 24)),
        ("vit_small_patch16_rope_mixed_ape_224", SIZED | {"dynamic_img_size": True}, (48, 24)),
        ("beit_base_patch16_224", SIZED | {"img_size": (32, 48)}, (32, 48)),
        ("vit_srelpos_small_patch16_224", SIZED | {"img_size": (32, 48)}, (32, 48)),
        ("naflexvit_base_patch16_gap", SMALL | {"patch_size": 8, "pos_embed_grid_size": (3, 5)}, (24, 48)),
        ("naflexvit_base_patch16_gap", SMALL | {"patch_size": 8, "rope_type": "dinov3"}, (24, 48)),
        ("vit_tiny_patch16_224", SIZED | {"use_naflex": True}, (48, 24)),
        ("vit_tiny_patch16_224", SIZED | {"use_naflex": True, "img_size": (24, 32)}, (48, 24)),
        ("eva02_tiny_patch14_224", SIZED | {"use_naflex": True}, (48, 24)),
        ("caformer_s18", {"num_classes": 2}, (64, 96)),
    ],
    ids=str,
)
def test_the_size_it_was_patched_for_comes_back(
    path: Path, architecture: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    model = scheduled(vit(timm.create_model(architecture, **options).eval(), 1, 1, size))
    loaded: Any = come_back(model, path)
    assert loaded.image_size == size
    assert loaded.pretrained_cfg["input_size"] == (3, *size)


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm resizes tables of biases in ways that torch warns of
@pytest.mark.parametrize("name", ["class_token", "rope", "relative_table", "relative_network", "hybrid"])
def test_a_size_that_was_changed_comes_back(path: Path, name: str) -> None:
    plain: Any = build(name).requires_grad_(True)
    plain.set_input_size(img_size=(64, 96))
    come_back(scheduled(vit(plain, 1, 1)), path)
    assert about(path).input_size == (3, 64, 96)


# Arguments


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm", "act_layer": "silu", "attn_layer": "diff"}),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "qkv_bias": False, "no_embed_class": True, "reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"pos_embed": "none", "class_token": False, "global_pool": "map"}),
        ("deit_tiny_distilled_patch16_224", {"drop_path_rate": 0.123456789, "in_chans": 1}),
        ("eva02_tiny_patch14_224", {"ref_feat_shape": (7, 9), "rope_temperature": 50.0, "rope_grid_offset": 0.5}),
        ("eva02_tiny_patch14_224", {"rope_grid_indexing": "xy", "qkv_fused": False, "scale_attn_inner": True}),
        ("eva02_tiny_patch14_224", {"swiglu_mlp": True, "swiglu_align_to": 32, "mlp_ratio": 2.7, "init_values": 0.1}),
        ("eva02_tiny_patch14_224", {"global_pool": "map", "attn_pool_num_heads": 2, "attn_pool_mlp_ratio": 2.0}),
        ("eva02_tiny_patch14_224", {"use_abs_pos_emb": False, "use_post_transformer_norm": True, "num_reg_tokens": 2}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "global_pool": "token"}),
        ("vit_relpos_small_patch16_224", {"rel_pos_type": "mlp-swin", "rel_pos_dim": 20, "fc_norm": True}),
        ("naflexvit_base_patch16_gap", {"attn_type": "rope", "attn_gated": True, "rope_type": "axial"}),
        ("naflexvit_base_patch16_gap", {"pos_embed_interp_mode": "bilinear", "pos_embed_antialias": False}),
        ("naflexvit_base_patch16_gap", {"embed_proj_type": "conv", "class_token": True, "global_pool": "token"}),
    ],
    ids=str,
)
def test_arguments_of_timm_come_back(path: Path, architecture: str, options: dict[str, Any]) -> None:
    sizes = {"patch_size": 8} if architecture.startswith("naflex") else {"patch_size": 8, "img_size": 32}
    plain = timm.create_model(architecture, **{**SMALL, **sizes, **options}).eval()
    loaded: Any = come_back(scheduled(vit(plain, 1, 1, (32, 32))), path)
    assert max(getattr(block.drop_path1, "drop_prob", 0) for block in loaded.blocks) == pytest.approx(
        options.get("drop_path_rate", 0)
    )


def test_fewer_blocks_come_back(path: Path) -> None:
    plain: Any = build("relative_table").requires_grad_(True)
    plain.blocks = plain.blocks[:3]
    loaded: Any = come_back(scheduled(vit(plain, 1, 1)), path)
    assert len(loaded.blocks) == 3


@pytest.mark.parametrize("name", ["class_token", "rope", "relative_network"])
def test_sizes_are_saved_without_what_timm_was_given(path: Path, name: str) -> None:
    """Before timm 1.0.31 no model has it; what is read from a file can be saved again in any."""
    plain: Any = build(name, img_size=(48, 32)).requires_grad_(True)
    vars(plain).pop("_model_args", None)
    come_back(come_back(scheduled(vit(plain, 1, 1)), path), path)


def test_what_sizes_do_not_show_needs_a_newer_timm(path: Path) -> None:
    plain: Any = build("qk_norm")
    vars(plain).pop("_model_args", None)
    message = refusal(lambda: save(scheduled(vit(plain, 1, 1)), path))
    assert message.startswith("blocks.0.attn.q_norm: found timm.layers.norm.LayerNorm(")
    assert message.endswith("; create_model of timm 1.0.31 keeps what it is given")


def test_timms_switch_to_naflex_is_no_part_of_the_machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMM_USE_NAFLEX", "1")
    model = scheduled(vit(timm.create_model("eva02_tiny_patch14_224", **SIZED).eval(), 1, 1))
    monkeypatch.delenv("TIMM_USE_NAFLEX")
    come_back(model, path)


def test_only_arguments_of_timms_classes_go_on_to_timm() -> None:
    kinds = {kind for family in families() for kind in family.__mro__[:-2]} | {Attention, SepConv}
    taken = {field.name for field in fields(NaFlexVitCfg)}.union(
        *(inspect.signature(kind).parameters for kind in kinds)
    )
    assert ARGUMENTS - OWN_ARGUMENTS - taken == {"use_naflex"}
    assert not OWN_ARGUMENTS & taken
    steering = {name for act in (timm.create_model, build_model_with_cfg) for name in inspect.signature(act).parameters}
    assert not ARGUMENTS & steering


# What cannot be rebuilt


@pytest.mark.parametrize(
    ("architecture", "options", "start"),
    [
        ("vit_tiny_patch16_224", {"norm_layer": RmsNorm}, "blocks.0.norm1: found timm.layers.norm.RmsNorm("),
        ("eva02_tiny_patch14_224", {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, "blocks.0.norm1: found torch.nn"),
        ("beit_base_patch16_224", {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, "blocks.0.norm1: found torch.nn"),
        ("vit_relpos_small_patch16_224", {"act_layer": nn.ReLU}, "blocks.0.mlp.act: found torch.nn.modules."),
    ],
)
def test_arguments_that_no_file_holds(path: Path, architecture: str, options: dict[str, Any], start: str) -> None:
    model = scheduled(vit(timm.create_model(architecture, **{**SIZED, **options}), 1, 1))
    assert refusal(lambda: save(model, path)).startswith(start)
    assert not path.exists()


def as_it_is(model: Any) -> None:
    """It has a part that no argument of timm's gives."""


def another_reference_grid(model: Any) -> None:
    model.rope.ref_feat_shape = (5, 5)


def another_layout_of_angles(model: Any) -> None:
    model.blocks[1].attn.rotate_half = True


def another_interpolation(model: Any) -> None:
    model.embeds.pos_embed_interp_mode = "bilinear"


def one_window_more(model: Any) -> None:
    model.rel_pos_bias.window_size = (5, 4)


@pytest.mark.parametrize(
    ("name", "change", "start"),
    [
        ("gated", as_it_is, "blocks.0.attn.gate: found torch.nn.modules.linear.Linear("),
        ("rope", another_reference_grid, "rope.ref_feat_shape: found [5, 5]; accepted: [16, 16], as timm "),
        ("rope", another_layout_of_angles, "blocks.1.attn.rotate_half: found True; accepted: False"),
        ("naflex", another_interpolation, "embeds.pos_embed_interp_mode: found bilinear; accepted: bicubic"),
        ("relative_shared_table", one_window_more, "rel_pos_bias.window_size: found [5, 4]; accepted: [4, 4]"),
    ],
)
def test_parts_that_were_changed_by_hand(path: Path, name: str, change: Callable[[Any], None], start: str) -> None:
    model = patched(name)
    change(model)
    assert refusal(lambda: save(model, path)).startswith(start)
    assert not path.exists()
